"""Training of adapters and head with AdamW, which can be stopped and resumed at any step.

A step is a function of parameters, moments, step number and seed: `BatchOrder` determines the batches, there is no
dropout, and `state` and `restore` preserve parameters and moments bit for bit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fedspine_edge.config import OptimizerSettings
from fedspine_edge.errors import DataError, OutOfMemory
from fedspine_edge.model.flops import output_flops, pass_flops
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.training.batching import BatchOrder, Encoded, Ints, collate, evaluation_batches, lengths_of, pack
from fedspine_edge.training.loss import loss_sum, num_targets
from fedspine_edge.training.state_dir import StateRecord, prefixed, unprefixed

T = TypeVar("T")

EVALUATION_BATCH = 32
FLOAT16_LOSS_SCALE = 2.0**15
"""Initial loss scale for a float16 base, which keeps small gradients from underflowing."""
SPIKE_FACTOR = 10.0
"""Factor of the median gradient norm above which a step is skipped, because even clipped it would disturb the moments.
A step whose gradient needs no clipping is never skipped: late in training the median norm is tiny."""
SPIKE_WINDOW = 20
"""Steps of which the median norm is taken. Skipped steps count, so that a lasting change is accepted."""
SPIKE_MIN_STEPS = 10
"""Steps before which no step is skipped."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


@dataclass(frozen=True)
class StepStatistics:
    """Mean loss, gradient norm before clipping, and learning rate of one step, taken or skipped."""

    loss: float
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy over `num_examples` predictions.

    A prediction is a text (classification), a word (token_classification) or a token (causal_lm).
    """

    loss: float
    accuracy: float
    num_examples: int


def learning_rate(training: OptimizerSettings, step: int, round_steps: int) -> float:
    """Return the learning rate of `step` (from 0) in a round of `round_steps`.

    It is constant until `decay_from_step` of the run and then follows a cosine to the end. During the first
    `warmup_ratio` of every round, whose Adam moments start at zero, it rises linearly. Source:
    docs/concepts/a-round.md.
    """
    done = training.first_step + step - training.decay_from_step
    progress = min(1.0, max(0.0, done / max(1, training.total_steps - training.decay_from_step)))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    warmup = training.warmup_ratio * round_steps
    return training.learning_rate * cosine * min(1.0, (step + 1) / warmup if warmup > 1 else 1.0)


class WorkMeter(Protocol):
    """Receives the cost of every pass."""

    def work(self, flops: float) -> None:
        """Account for one training step or evaluation batch of `flops` floating-point operations."""


@dataclass(frozen=True)
class BatchSettings:
    """Settings of how examples are combined into batches.

    Args:
        pad_id: Padding token of the tokenizer.
        seed: Seed of the data order.
        pack: Whether several examples share a row instead of being padded, where `loss.can_pack` allows it.
        micro_batch: Initial number of examples per forward pass (default: the batch size).
    """

    pad_id: int = 0
    seed: int = 0
    pack: bool = False
    micro_batch: int | None = None


class Trainer:
    """Trains the adapters and the head of `model` in place.

    Args:
        model: Model with adapters.
        train: Tokenized training examples.
        holdout: Tokenized held-out examples; may be empty if `evaluate` is always called with examples.
        training: Settings of the optimizer.
        round_steps: Steps that this trainer will take, for the warm-up.
        batches: How examples are combined into batches.
        tracker: Importance tracker, which is updated on scored steps.
        meter: Receives the cost of every pass.
    """

    def __init__(
        self,
        model: PrunableModel,
        train: Sequence[Encoded],
        holdout: Sequence[Encoded],
        training: OptimizerSettings,
        *,
        round_steps: int,
        batches: BatchSettings | None = None,
        tracker: ImportanceTracker | None = None,
        meter: WorkMeter | None = None,
    ) -> None:
        if not train:
            raise DataError("there are no training examples.", remedy="Provide at least one example.")
        batches = batches or BatchSettings()
        self.model = model
        self.tracker = tracker
        self.training = training
        self.step = 0
        self.skipped = 0
        """Steps that were skipped because loss or gradient was not finite."""
        self.spikes = 0
        """Steps that were skipped because the gradient norm was far above the median."""
        self.last_step: StepStatistics | None = None
        self.micro_batch = min(training.batch_size, batches.micro_batch or training.batch_size)
        """Examples per forward pass, halved when memory runs out."""
        self._train = train
        self._holdout = holdout
        self._round_steps = round_steps
        self._pad_id = batches.pad_id
        self._meter = meter
        self._order = BatchOrder(lengths_of(train), training.batch_size, batches.seed)
        # An evaluation needs far less memory per example than a training step.
        self._evaluation_batch = min(EVALUATION_BATCH, 4 * self.micro_batch)
        self.ran_out = False
        """Whether `micro_batch` was halved because memory ran out."""
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._loss_scale = FLOAT16_LOSS_SCALE if model.compute_dtype == torch.float16 else 1.0
        self._pack = batches.pack
        self.optimizer = torch.optim.AdamW(
            self._parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        model.module.eval()  # dropout stays off, so that a repeated step gives the same bits

    @property
    def train_loss(self) -> float | None:
        """Mean loss of the steps that were not skipped; None before the first."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    @property
    def last_loss(self) -> float | None:
        """Loss of the last step that was not skipped; None before the first."""
        return self._losses[-1] if self._losses else None

    def warnings(self) -> list[str]:
        """Return sentences about skipped steps and smaller micro-batches, for the user."""
        found = []
        if self.micro_batch < self.training.batch_size:
            why = "memory ran out" if self.ran_out else "memory_limit_mib allows no more"
            found.append(
                f"{why}; trained {self.micro_batch} instead of {self.training.batch_size} examples at a time and "
                "accumulated gradients"
            )
        if self.skipped:
            found.append(f"{self.skipped} of {self.step} steps had a non-finite loss or gradient and were skipped")
        if self.spikes:
            found.append(f"{self.spikes} of {self.step} steps had a gradient far above the median and were skipped")
        return found

    def run(self, until: int, *, scored: bool = False, on_step: Callable[[], None] | None = None) -> None:
        """Take steps until `self.step == until`, and call `on_step` after each.

        Raises `OutOfMemory` if a single example does not fit.
        """
        while self.step < until:
            examples = self._order.indices(self.training.first_step + self.step)
            examples = examples[np.argsort([-len(self._train[i].input_ids) for i in examples], kind="stable")]
            self._retry_with_fewer_examples(lambda examples=examples: self._take_step(examples, scored))  # type: ignore[misc]
            self.step += 1
            if on_step is not None:
                on_step()

    def evaluate(
        self, examples: Sequence[Encoded] | None = None, *, on_batch: Callable[[int], None] | None = None
    ) -> Evaluation:
        """Return loss and accuracy on the held-out examples or on `examples`.

        Args:
            examples: Examples to evaluate on (default: the held-out ones).
            on_batch: Called with the size of each batch.

        Raises `OutOfMemory`, `DataError`.
        """
        chosen = self._holdout if examples is None else examples
        if not chosen:
            raise DataError("there are no examples to evaluate on.", remedy="Provide at least one example.")
        return self._retry_with_fewer_examples(lambda: self._evaluate(chosen, on_batch), evaluation=True)

    def compact(self, layout: Layout) -> None:
        """Shrink model, moments and importance to `layout`. Raises `LayoutError`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.compact(layout, optimizer=self.optimizer, importance=self.tracker)

    def state(self) -> StateRecord:
        """Return the state with which training continues bit for bit, except the layout and the base weights."""
        tensors = prefixed("adapter.", self.model.adapter_state())
        opt_steps: dict[str, float] = {}
        for name, parameter in self.model.trainable_parameters().items():
            moments = self.optimizer.state.get(parameter)
            if moments:
                tensors[f"exp_avg.{name}"] = _numpy(moments["exp_avg"])
                tensors[f"exp_avg_sq.{name}"] = _numpy(moments["exp_avg_sq"])
                opt_steps[name] = float(moments["step"])
        if self.tracker is not None:
            tensors |= prefixed("tracker.", self.tracker.state_dict())
        info = {
            "step": self.step,
            "skipped": self.skipped,
            "micro_batch": self.micro_batch,
            "ran_out": self.ran_out,
            "evaluation_batch": self._evaluation_batch,
            "losses": self._losses,
            "spikes": self.spikes,
            "norms": self._norms,
            "loss_scale": self._loss_scale,
            "optimizer_steps": opt_steps,
        }
        return StateRecord(info, tensors)

    def restore(self, saved: StateRecord) -> None:
        """Continue from what `state` returned. The model must already have the layout of that moment.

        Raises `CheckpointError` if the adapters do not fit the model, and `KeyError` for an incomplete state.
        """
        info = saved.info
        self.model.load_adapter(unprefixed("adapter.", saved.tensors))
        self.step, self.skipped = int(info["step"]), int(info["skipped"])
        self.micro_batch, self._evaluation_batch = int(info["micro_batch"]), int(info["evaluation_batch"])
        self.ran_out = bool(info["ran_out"])
        self._losses = [float(loss) for loss in info["losses"]]
        self.spikes, self._norms = int(info["spikes"]), [float(norm) for norm in info["norms"]]
        self._loss_scale = float(info["loss_scale"])
        if self.tracker is not None:
            self.tracker.load_state_dict(unprefixed("tracker.", saved.tensors))
        self.optimizer.state.clear()
        self.optimizer.param_groups[0]["params"] = self._parameters()
        for name, parameter in self.model.trainable_parameters().items():
            if name in info["optimizer_steps"]:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(
                        float(info["optimizer_steps"][name]), dtype=torch.float32, device=parameter.device
                    ),
                    "exp_avg": torch.from_numpy(saved.tensors[f"exp_avg.{name}"]).to(parameter),
                    "exp_avg_sq": torch.from_numpy(saved.tensors[f"exp_avg_sq.{name}"]).to(parameter),
                }

    def _parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.trainable_parameters().values())

    def _take_step(self, examples: Ints, scored: bool) -> None:
        loss, gradients, norm = self._gradients(examples, scored)
        while self._loss_scale > 1.0 and math.isfinite(loss) and not math.isfinite(norm):
            self._loss_scale /= 2  # float16 overflowed in the backward pass
            loss, gradients, norm = self._gradients(examples, scored)
        rate = learning_rate(self.training, self.step, self._round_steps)
        self.last_step = StepStatistics(loss, norm, rate)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            return
        median = statistics.median(self._norms) if len(self._norms) >= SPIKE_MIN_STEPS else math.inf
        self._norms = [*self._norms, norm][-SPIKE_WINDOW:]
        if norm > max(SPIKE_FACTOR * median, self.training.max_grad_norm):
            self.spikes += 1
            return
        if scored and self.tracker is not None:
            self.tracker.update(loss_scale=self._loss_scale)
        if norm > self.training.max_grad_norm:
            torch._foreach_mul_(gradients, self.training.max_grad_norm / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._losses.append(loss)

    def _gradients(self, examples: Ints, scored: bool) -> tuple[float, list[torch.Tensor], float]:
        """Return the mean loss of one step, its gradients without the loss scale, and their norm."""
        # transformers recomputes layers in train mode only. With every dropout at 0, the mode changes nothing else.
        self.model.module.train(self.model.gradient_checkpointing)
        self.optimizer.zero_grad(set_to_none=True)
        if self.tracker is not None:
            self.tracker.begin(scored)
        batches = [
            self._batch(self._train, examples[i : i + self.micro_batch])
            for i in range(0, len(examples), self.micro_batch)
        ]
        count = sum(num_targets(batch, self.model.task) for batch in batches)
        loss = 0.0
        for batch in batches:
            piece_sum, _ = self._forward(batch)
            (piece_sum * (self._loss_scale / count)).backward()
            loss += float(piece_sum.detach()) / count
            self._account(batch, backward=True, scored=scored and batch is batches[0])
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if self._loss_scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / self._loss_scale)
        norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
        return loss, gradients, float(torch.linalg.vector_norm(norms))

    def _batch(self, examples: Sequence[Encoded], indices: Ints) -> dict[str, Ints]:
        if self._pack:
            return pack(examples, indices, self._pad_id, self.training.max_length_tokens)
        return collate(examples, indices, self._pad_id)

    def _forward(self, batch: Mapping[str, Ints]) -> tuple[torch.Tensor, torch.Tensor]:
        return loss_sum(self.model, batch)

    def _evaluate(self, examples: Sequence[Encoded], on_batch: Callable[[int], None] | None) -> Evaluation:
        loss, correct, count = 0.0, 0, 0
        self.model.module.eval()
        with torch.inference_mode():
            for piece in evaluation_batches(examples, self._evaluation_batch):
                batch = self._batch(examples, piece)
                batch_loss, batch_correct = self._forward(batch)
                loss += float(batch_loss)
                correct += int(batch_correct)
                count += num_targets(batch, self.model.task)
                self._account(batch, backward=False)
                if on_batch is not None:
                    on_batch(len(piece))
        return Evaluation(loss / count, correct / count, count)

    def _account(self, batch: Mapping[str, Ints], *, backward: bool, scored: bool = False) -> None:
        if self._meter is not None:
            size, length = batch["input_ids"].shape
            flops = pass_flops(self.model.layout, self.model.r or 0, size, length, backward=backward, scored=scored)
            if self.model.task == "causal_lm":  # its head can cost more than the layers; a classifier's is negligible
                vocabulary, hidden_size = self.model.module.get_output_embeddings().weight.shape
                flops += output_flops(vocabulary, hidden_size, num_targets(batch, self.model.task), backward=backward)
            self._meter.work(flops)

    def _retry_with_fewer_examples(self, work: Callable[[], T], *, evaluation: bool = False) -> T:
        """Call `work`, and repeat it with half the examples at a time while memory runs out."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            # Not in the handler, because its traceback holds the activations that must be freed.
            self.optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            rows = self._evaluation_batch if evaluation else self.micro_batch
            if rows <= 1:
                raise OutOfMemory(
                    f"step {self.step + 1} does not fit into memory, even with one example at a time.",
                    remedy="Lower `max_length_tokens`, prune further or use a smaller base model.",
                )
            if evaluation:
                self._evaluation_batch = rows // 2
            else:
                self.micro_batch, self.ran_out = rows // 2, True


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def _numpy(tensor: Any) -> npt.NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()  # type: ignore[no-any-return]

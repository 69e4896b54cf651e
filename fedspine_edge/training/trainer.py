"""Local optimisation of adapters and head: AdamW, one step after the other, stoppable and repeatable at any step.

Everything a step does is a function of (parameters, moments, step number, seed): batches come from `BatchOrder`,
there is no dropout, and `state`/`restore` carry parameters and moments bit for bit.
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
from fedspine_edge.training.batching import BatchOrder, Encoded, Ints, collate, evaluation_batches, pack
from fedspine_edge.training.loss import loss_sum, num_targets
from fedspine_edge.training.state_dir import StateRecord, prefixed, unprefixed

T = TypeVar("T")

EVALUATION_BATCH = 32
FLOAT16_LOSS_SCALE = 2.0**15
"""What a float16 base's loss is multiplied by at first, so that small gradients do not vanish on their way back."""
SPIKE_FACTOR = 10.0
"""A step whose gradient is this many times the usual norm is not taken: clipped, it would still turn the moments.
One that needs no clipping is always taken: late in a training the usual norm is tiny."""
SPIKE_WINDOW = 20
SPIKE_MIN_STEPS = 10
"""Steps whose median norm is the usual one (skipped ones too, so that a lasting change is accepted), and the fewest."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


@dataclass(frozen=True)
class StepStatistics:
    """Of one step, taken or not: mean loss, norm of the gradient before clipping, learning rate."""

    loss: float
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy over `num_examples` answers: texts (classification), words (token_classification), or
    predicted tokens (causal_lm), of which those of a long answer count for more than those of a short one."""

    loss: float
    accuracy: float
    num_examples: int


def learning_rate(training: OptimizerSettings, step: int, round_steps: int) -> float:
    """Learning rate of `step` (from 0) of a round of `round_steps`.

    The peak until `decay_from_step` of the run, then a cosine to its end; over both a linear rise during the first
    `warmup_ratio` of the round, whose Adam moments start at zero. Source: docs/algorithms.md, "The round".
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


class Trainer:
    """Trains the adapters and the head of `model` in place.

    Args:
        model: With adapters attached.
        train: Tokenised training examples.
        holdout: Tokenised held-out examples; may be empty if `evaluate` is not called without arguments.
        training: Optimisation settings.
        round_steps: Steps that this trainer will take, for the warm-up.
        tracker: Importance of the model's groups, updated on scored steps.
        seed: Of the data order.
        pad_id: The tokenizer's padding token.
        meter: Told the cost of every pass.
        pack: Put several examples of a step into one row instead of padding them, where `objective.can_pack` allows.
        micro_batch: Examples per forward pass to begin with; default the batch size.
    """

    def __init__(
        self,
        model: PrunableModel,
        train: Sequence[Encoded],
        holdout: Sequence[Encoded],
        training: OptimizerSettings,
        *,
        round_steps: int,
        tracker: ImportanceTracker | None = None,
        seed: int = 0,
        pad_id: int = 0,
        meter: WorkMeter | None = None,
        pack: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        if not train:
            raise DataError("there are no training examples.", remedy="Provide at least one example.")
        self.model = model
        self.tracker = tracker
        self.training = training
        self.step = 0
        self.skipped = 0
        """Steps that were not taken because loss or gradient was not finite."""
        self.spikes = 0
        """Steps that were not taken because the gradient was far above the usual."""
        self.last_step: StepStatistics | None = None
        self.micro_batch = min(training.batch_size, micro_batch or training.batch_size)
        """Examples per forward pass; below the batch size after memory ran out."""
        self._train = train
        self._holdout = holdout
        self._round_steps = round_steps
        self._pad_id = pad_id
        self._meter = meter
        self._order = BatchOrder([len(example.input_ids) for example in train], training.batch_size, seed)
        # One example takes far less memory in an evaluation than in a step.
        self._evaluation_batch = min(EVALUATION_BATCH, 4 * self.micro_batch)
        self.ran_out = False
        """Whether memory ran out, so that fewer examples at a time are trained than at first."""
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._loss_scale = FLOAT16_LOSS_SCALE if model.compute_dtype == torch.float16 else 1.0
        self._pack = pack
        self.optimizer = torch.optim.AdamW(
            self._parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        model.module.eval()  # dropout stays off: a repeated step must give the same bits

    @property
    def train_loss(self) -> float | None:
        """Mean loss of the steps taken, None before the first."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    @property
    def last_loss(self) -> float | None:
        """Loss of the last step that was not skipped, None before the first."""
        return self._losses[-1] if self._losses else None

    def remarks(self) -> list[str]:
        """What did not go as planned, in words for the user; empty if all did."""
        found = []
        if self.micro_batch < self.training.batch_size:
            why = "memory ran out" if self.ran_out else "memory_limit_mib allows no more"
            found.append(
                f"{why}; trained {self.micro_batch} instead of {self.training.batch_size} examples at a time, "
                "gradients accumulated"
            )
        if self.skipped:
            found.append(f"{self.skipped} of {self.step} steps were not finite and were skipped")
        if self.spikes:
            found.append(f"{self.spikes} of {self.step} steps had a gradient far above the usual and were skipped")
        return found

    def run(self, until: int, *, scored: bool = False, on_step: Callable[[], None] | None = None) -> None:
        """Take steps until `self.step == until`; `on_step` is called after each.

        Raises `OutOfMemory` if not even one example at a time fits.
        """
        while self.step < until:
            examples = self._order.indices(self.training.first_step + self.step)
            examples = examples[np.argsort([-len(self._train[i].input_ids) for i in examples], kind="stable")]
            self._with_less_memory(lambda examples=examples: self._take_step(examples, scored))  # type: ignore[misc]
            self.step += 1
            if on_step is not None:
                on_step()

    def evaluate(
        self, examples: Sequence[Encoded] | None = None, *, on_batch: Callable[[int], None] | None = None
    ) -> Evaluation:
        """Loss and accuracy on the held-out examples, or on `examples`; `on_batch` is told the size of each batch.

        Raises `OutOfMemory`, `DataError`.
        """
        chosen = self._holdout if examples is None else examples
        if not chosen:
            raise DataError("there are no examples to evaluate on.", remedy="Provide at least one example.")
        return self._with_less_memory(lambda: self._evaluate(chosen, on_batch), evaluation=True)

    def compact(self, layout: Layout) -> None:
        """Shrink model, moments and importance to `layout`. Raises `LayoutError`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.compact(layout, optimizer=self.optimizer, importance=self.tracker)

    def state(self) -> StateRecord:
        """Everything needed to continue with the same bits, except the layout and the base weights."""
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
        """Continue from `state`; the model must already have the layout of that moment.

        Raises `CheckpointError` when adapters do not fit the model, `KeyError` for an incomplete document.
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
            self._loss_scale /= 2  # float16 overflowed on its way back, not the step's fault
            loss, gradients, norm = self._gradients(examples, scored)
        rate = learning_rate(self.training, self.step, self._round_steps)
        self.last_step = StepStatistics(loss, norm, rate)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            return
        usual = statistics.median(self._norms) if len(self._norms) >= SPIKE_MIN_STEPS else math.inf
        self._norms = [*self._norms, norm][-SPIKE_WINDOW:]
        if norm > max(SPIKE_FACTOR * usual, self.training.max_grad_norm):
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
        """(mean loss, gradients without the loss scale, their norm) of one step's examples."""
        # transformers recomputes layers in train mode only; with every dropout at 0 the mode changes nothing else
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
            if self.model.task == "causal_lm":  # its head can outweigh the layers; a classifier's is next to nothing
                vocabulary, hidden_size = self.model.module.get_output_embeddings().weight.shape
                flops += output_flops(vocabulary, hidden_size, num_targets(batch, self.model.task), backward=backward)
            self._meter.work(flops)

    def _with_less_memory(self, work: Callable[[], T], *, evaluation: bool = False) -> T:
        """Do `work`; when memory runs out, again with half the examples at a time."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            # Outside the handler, since its traceback holds the activations that must be freed.
            self.optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            at_once = self._evaluation_batch if evaluation else self.micro_batch
            if at_once <= 1:
                raise OutOfMemory(
                    f"step {self.step + 1} does not fit into memory, even one example at a time.",
                    remedy="Lower `max_length_tokens`, prune further or use a smaller base model.",
                )
            if evaluation:
                self._evaluation_batch = at_once // 2
            else:
                self.micro_batch, self.ran_out = at_once // 2, True


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def _numpy(tensor: Any) -> npt.NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()  # type: ignore[no-any-return]

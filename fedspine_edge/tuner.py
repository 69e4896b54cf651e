"""Fine-tune and prune a language model on one device, no fleet needed.

tuner = EdgeTuner.from_pretrained("base-model", task="classification", num_labels=2, r=8)
tuner.fit("train.csv"); tuner.prune(0.5); tuner.fit("train.csv"); tuner.save("out/")
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from fedspine_edge.config import DataSettings, OptimizerSettings, Task, TrainingSettings, convert
from fedspine_edge.data.loading import Data, read
from fedspine_edge.errors import ConfigError, DataError
from fedspine_edge.kernels.native import MAX_RANK
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.model.flops import pass_flops
from fedspine_edge.model.layout import Layout, check_ratio
from fedspine_edge.model.loading import load_tokenizer
from fedspine_edge.model.precision import BaseDtype
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.pruning.importance import Criterion, Metric
from fedspine_edge.pruning.latency import ModelLatency, measure_latency
from fedspine_edge.pruning.preview import PruningPlan
from fedspine_edge.pruning.selection import Scope
from fedspine_edge.pruning.settings import PruningSettings
from fedspine_edge.training.base_model import choose_torch_device, open_model
from fedspine_edge.training.batching import Encoded
from fedspine_edge.training.checkpoint import key_of, open_checkpoint
from fedspine_edge.training.gradual_pruning import prune_in_stages
from fedspine_edge.training.loss import can_pack
from fedspine_edge.training.memory import MemoryEstimate, estimate
from fedspine_edge.training.progress import bar, tensorboard
from fedspine_edge.training.tokenization import TextEncoder
from fedspine_edge.training.trainer import Trainer
from fedspine_edge.training.training_loop import run_fit

log = logging.getLogger("fedspine_edge.tuner")


class EdgeTuner:
    """Adapters on one model, trained and pruned step by step. Make one with `from_pretrained`.

    Data is, wherever it is asked for: a CSV, JSON lines or Parquet file; 'module:function'; a list of (text, label)
    or (text, text_pair, label); or a callable that returns such a list. For causal_lm texts alone, or (prompt, answer)
    of which only the answer is learned; for token_classification (list of words, list of labels).

    Args:
        model: With or without adapters.
        tokenizer: The model's transformers tokenizer.
        settings: Learning rate, batch size, length, clipping.
        columns: Names of the columns of files.
        ranking: What ranks heads and channels, and how many stay.
        pack, seed: As in `from_pretrained`.
    """

    def __init__(
        self,
        model: PrunableModel,
        tokenizer: Any,
        *,
        settings: TrainingSettings,
        columns: DataSettings,
        ranking: PruningSettings,
        pack: bool = True,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.train_loss: float | None = None
        """Mean loss of the steps of the last `fit`."""
        self._texts = TextEncoder.of(model, tokenizer)
        self._settings = settings
        self._columns = columns
        self._ranking = ranking
        self._pack = pack
        self._seed = seed
        self._tracker = ranking.tracker(model, seed)
        self._last: list[Encoded] | None = None
        self._steps_taken = 0
        self._metrics: dict[str, float] = {}
        self._latency: ModelLatency | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        task: Task = "classification",
        num_labels: int | None = None,
        r: int = 8,
        lora_alpha: float | None = None,
        learning_rate: float = 1e-3,
        batch_size: int = 8,
        max_length_tokens: int | None = None,
        text: str = "text",
        text_pair: str = "",
        label: str = "label",
        criterion: Criterion = "lora",
        metric: Metric = "auto",
        scope: Scope = "layer",
        round_to: int = 8,
        min_heads: int = 1,
        min_channels: int = 1,
        base_dtype: BaseDtype | None = None,
        gradient_checkpointing: bool = False,
        pack: bool = True,
        torch_device: str = "auto",
        gguf_file: str | None = None,
        seed: int = 0,
    ) -> EdgeTuner:
        """Load a base model, or a model that `save` wrote, with its adapter and its pruned widths.

        Args:
            path: Hugging Face folder, GGUF folder or hub id; or a saved folder.
            task: "classification", "token_classification" or "causal_lm".
            num_labels: Classes; default 2, or what a saved model has.
            r: LoRA rank; a saved adapter keeps its own.
            lora_alpha: scaling = lora_alpha / r; default 2·r.
            learning_rate: Peak of each `fit`'s schedule.
            batch_size: Examples per step.
            max_length_tokens: Longer texts are cut; default 128, or what the model's table of positions allows.
            text, text_pair, label: Columns of a file's texts, second texts (empty for none) and integer labels.
            criterion, metric, scope, round_to, min_heads, min_channels: As in `fedspine_edge.pruning.settings.Ranking`.
            base_dtype: How the frozen weights are kept: "float32", "bfloat16", "float16", "int8" or "int4"; adapters,
                head and optimizer are float32 always. Default float32, or what a saved model has. docs/memory.md.
            gradient_checkpointing: Keep only the layers' inputs for the backward pass and compute the rest again:
                much less memory, about a third more time, the same results.
            pack: For causal_lm put several examples of a step into one row instead of padding them: the same loss
                with less work.
            torch_device: "auto", "cpu" or "cuda".
            gguf_file: The file within a GGUF folder, if there are several.
            seed: Of head, adapters and data order.

        Raises `ModelError` for a folder that cannot be used, `ConfigError` for impossible settings.
        """
        if not 1 <= r <= MAX_RANK:
            raise ConfigError(
                f"`r` is {r}; the LoRA rank must be within 1..{MAX_RANK}.", remedy="Usual ranks are 4 to 32."
            )
        if seed < 0:
            raise ConfigError(f"`seed` is {seed}; it must be at least 0.", remedy="Leave it out for the default, 0.")
        if torch_device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"torch_device {torch_device!r} is unknown.", remedy="Use 'auto', 'cpu' or 'cuda'.")
        training: dict[str, Any] = {"learning_rate": learning_rate, "batch_size": batch_size}
        if max_length_tokens is not None:
            training["max_length_tokens"] = max_length_tokens
        settings = convert(training, TrainingSettings)  # before the model, which takes long to load
        model = open_model(
            path, task=task, num_labels=num_labels, gguf_file=gguf_file, base_dtype=base_dtype, seed=seed
        )
        folder = model.folder if model.folder is not None else path
        tokenizer = load_tokenizer(folder, gguf_file=model.gguf_file)
        model.module.to(choose_torch_device(torch_device))  # type: ignore[arg-type]
        model.set_gradient_checkpointing(gradient_checkpointing)
        if model.r is None:
            model.attach_lora(r, 2.0 if lora_alpha is None else lora_alpha / r, seed)
        longest = TextEncoder.of(model, tokenizer).length(max_length_tokens)
        settings = msgspec.structs.replace(settings, max_length_tokens=longest)
        classes = max(2, model.num_labels)
        columns = DataSettings(path="", text=text, text_pair=text_pair, label=label, num_labels=classes)
        ranking = PruningSettings(criterion, metric, scope, round_to, min_heads, min_channels)
        return cls(model, tokenizer, settings=settings, columns=columns, ranking=ranking, pack=pack, seed=seed)

    @property
    def layout(self) -> Layout:
        """Which heads and channels are left; `layout.pruning_ratio` and `layout.sparsity` say how much is gone."""
        return self.model.layout

    def fit(
        self,
        data: Data,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        progress: bool | None = None,
        checkpoint: str | Path | None = None,
        log_dir: str | Path | None = None,
        on_step: Callable[[int, float | None], None] | None = None,
    ) -> EdgeTuner:
        """Train adapters and head: AdamW, warm-up and cosine over this call's steps.

        Args:
            data: See the class.
            epochs: Passes over the data, default 1.
            steps: Training steps, instead of epochs.
            progress: Show how far it is: a bar on a terminal, lines elsewhere; default the bar only.
            checkpoint: Folder, one for each `fit`, from which the same call goes on after the process was killed, and
                ends with the same bits. When the call has finished, repeating it restores its result at once.
            log_dir: Folder for TensorBoard's event files (extra `tensorboard`): loss, norm of the gradient, learning
                rate, steps not taken.
            on_step: Called after each step with its number, from 1, and the last loss; what it raises ends the fit.

        Returns the tuner itself, so calls can be chained. Raises `DataError`, `ConfigError`, `OutOfMemory`, and
        `CheckpointError` for a damaged checkpoint.
        """
        if epochs is not None and steps is not None:
            raise ConfigError("fit takes epochs or steps, not both.")
        train = self._encoded(data)
        per_epoch = max(1, len(train) // self._settings.batch_size)
        total = steps if steps is not None else round((1.0 if epochs is None else epochs) * per_epoch)
        if total < 1:
            raise ConfigError(f"{total} training steps are too few.", remedy="Give `steps` of at least 1.")
        longest = self._settings.max_length_tokens
        if full := sum(len(example.input_ids) == longest for example in train):
            log.info("%d of %d texts reach max_length_tokens, %d; longer ones are cut", full, len(train), longest)
        self._last, self._metrics = train, {}
        trainer = self._trainer(train, total)
        with ExitStack() as stack:
            saver = None
            if checkpoint is not None:
                saver = stack.enter_context(open_checkpoint(checkpoint, self._fit_key(train, total), total))
            curves = None if log_dir is None else stack.enter_context(tensorboard(log_dir, self._steps_taken))
            run_fit(trainer, total, saver=saver, curves=curves, progress=progress, on_step=on_step)
        self._done(trainer, train)
        return self

    def estimate(
        self, data: Data | None = None, *, batch_size: int | None = None, max_length_tokens: int | None = None
    ) -> MemoryEstimate:
        """Peak memory of `fit` and `prune` in bytes, before they begin; `print` shows what it consists of.

        Takes about a second, trains nothing and allocates next to nothing. Measured to be within 15 %: docs/memory.md.

        Args:
            data: What will be trained on, for the length of its longest text; default `max_length_tokens` of it.
            batch_size: Examples at a time, if others than the tuner's.
            max_length_tokens: Likewise for the length.

        Raises `DataError`.
        """
        settings = self._settings
        tokens = settings.max_length_tokens if max_length_tokens is None else max_length_tokens
        if data is not None:
            tokens = min(tokens, max(len(example.input_ids) for example in self._encoded(data)))
        rows = settings.batch_size if batch_size is None else batch_size
        packs = self._pack and can_pack(self.model, tokens)
        return estimate(self.model, micro_batch=rows, tokens=tokens, pack_rows=packs)

    def evaluate(self, data: Data, *, progress: bool | None = None) -> dict[str, float]:
        """`loss`, `accuracy` and `num_examples` on `data` (causal_lm: per predicted token, `num_examples` tokens)."""
        examples = self._encoded(data)
        with bar("evaluate", len(examples), progress) as advance:
            self._metrics = asdict(self._trainer(examples, 1).evaluate(examples, on_batch=advance))
        return dict(self._metrics)

    def prune(
        self,
        pruning_ratio: float,
        data: Data | None = None,
        *,
        stages: int = 3,
        steps: int = 20,
        progress: bool | None = None,
    ) -> EdgeTuner:
        """Physically remove the least important heads and channels, a part at a time with training in between.

        The importance comes from the last steps of `fit`; if there were none, `steps` scoring steps are taken first.
        Call `fit` afterwards to let the smaller model recover.

        Args:
            pruning_ratio: Share of prunable parameters gone afterwards, counted from the unpruned model.
            data: To train on in between; default the last `fit`'s.
            stages: Parts in which to remove; most goes in the first.
            steps: Training steps, all scored, between two parts.
            progress: As in `fit`.

        Returns the tuner itself. Raises `ConfigError` for a ratio outside [0, 1) or below the present one, and
        `DataError` when there is no data to score with.
        """
        check_ratio(pruning_ratio, self.layout)
        if stages < 1 or steps < 1:
            raise ConfigError(f"stages is {stages} and steps is {steps}; both must be at least 1.")
        train = self._last if data is None else self._encoded(data)
        unscored = not self._tracker.ready
        if train is None and (unscored or stages > 1):
            raise DataError(
                "pruning needs data: importance comes from training steps.",
                remedy="Call fit(data) first, or pass prune(ratio, data).",
            )
        total = steps * (stages - 1 + unscored)
        self._metrics, self._latency = {}, None
        trainer = self._trainer(train or [], total) if total else None
        parts = {"stages": stages, "steps": steps}
        with bar("prune", total, progress) as advance:
            layout_at = partial(self._layout_at, goal=pruning_ratio)
            prune_in_stages(self._tracker, trainer, layout_at, pruning_ratio, advance=advance, **parts)
        if trainer is not None:
            self._done(trainer, train or [])
        return self

    def plan(self, pruning_ratio: float) -> PruningPlan:
        """What `apply` would remove to reach `pruning_ratio`, with scores, parameters and operations saved.

        Changes nothing. Raises `ConfigError` for a ratio outside [0, 1), `DataError` before any step was scored.
        """
        check_ratio(pruning_ratio)
        if not self._tracker.ready:
            raise DataError(
                "planning needs scores: importance comes from training steps.", remedy="Call fit(data) first."
            )
        after = self._layout_at(pruning_ratio)
        length = self._settings.max_length_tokens
        now, then = (pass_flops(layout, 0, 1, length, backward=False) for layout in (self.layout, after))
        scores = self._tracker.scores()
        return PruningPlan(self.layout, after, scores, now, then, asked=pruning_ratio, latency=self._latency)

    def apply(self, plan: PruningPlan) -> EdgeTuner:
        """Prune to a plan at once; `fit` afterwards lets the smaller model recover.

        Raises `LayoutError`, changing nothing, if the model was pruned otherwise since the plan was made.
        """
        self.model.compact(plan.after, importance=self._tracker)
        self._metrics, self._latency = {}, None
        return self

    def measure_latency(self, *, length_tokens: int | None = None, repeats: int = 10) -> ModelLatency:
        """Time of one text through the model as it is now, adapters included, on this machine.

        `plan` then predicts from it, and `save` writes it into the model card.

        Args:
            length_tokens: Of the text; default the tuner's longest.
            repeats: Passes, of which the median counts.
        """
        length = self._settings.max_length_tokens if length_tokens is None else length_tokens
        self._latency = measure_latency(self.model, length, repeats=repeats)
        return self._latency

    def save(self, folder: str | Path) -> Path:
        """Write model, adapter, layout and tokenizer to `folder`, atomically; `from_pretrained` reads it back.

        The model card in it, README.md, prints what `evaluate` and `measure_latency` found of the model as it is.
        """
        return save_model(self.model, folder, metrics=self._measured())

    def save_merged(self, folder: str | Path) -> Path:
        """Like `save`, with the adapter folded into the weights."""
        return save_model(self.model, folder, merged=True, metrics=self._measured())

    def merge(self) -> Any:
        """A copy of the transformers model with the adapter folded in; the tuner stays as it is."""
        return self.model.merge()

    def _layout_at(self, pruning_ratio: float, goal: float = 0.0) -> Layout:
        return self._ranking.layout(self._tracker.scores(), self.layout, pruning_ratio, goal=goal)

    def _fit_key(self, train: list[Encoded], total: int) -> str:
        ranks = (self._ranking.criterion, self._ranking.metric, self._ranking.scope)
        return key_of(train, self.model, self._settings, total, self._seed, self._steps_taken, self._pack, *ranks)

    def _encoded(self, data: Data) -> list[Encoded]:
        return self._texts.encode(read(data, self._columns, self.model.task), self._settings.max_length_tokens)

    def _trainer(self, train: list[Encoded], steps: int) -> Trainer:
        settings = self._settings
        names = set(OptimizerSettings.__struct_fields__) & set(settings.__struct_fields__)
        training = OptimizerSettings(total_steps=max(1, steps), **{name: getattr(settings, name) for name in names})
        return Trainer(
            self.model,
            train,
            [],
            training,
            round_steps=steps,
            tracker=self._tracker,
            seed=self._seed + self._steps_taken,  # a second fit sees the data in another order
            pad_id=self._texts.pad_id,
            pack=self._pack and can_pack(self.model, settings.max_length_tokens),
        )

    def _measured(self) -> dict[str, float]:
        latency = self._latency
        timed = {} if latency is None else {f"latency in ms ({latency.conditions})": latency.total_ms}
        return {**self._metrics, **timed}

    def _done(self, trainer: Trainer, train: list[Encoded]) -> None:
        self._steps_taken += trainer.step
        self.model.trained_steps += trainer.step
        self.model.trained_examples = max(self.model.trained_examples, len(train))
        self.train_loss = trainer.train_loss
        for remark in trainer.remarks():
            log.warning("%s", remark)

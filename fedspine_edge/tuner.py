"""Fine-tuning and pruning of a language model on one device, without a fleet.

tuner = EdgeTuner.from_pretrained("base-model", task="classification", num_labels=2, r=8)
tuner.fit("train.csv"); tuner.prune(0.5); tuner.fit("train.csv"); tuner.save("out/")
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import torch

from fedspine_edge.config import DataSettings, OptimizerSettings, Task, TrainingSettings, convert
from fedspine_edge.data.loading import Data, count_names, names_for_data, read_examples
from fedspine_edge.errors import ConfigError, DataError
from fedspine_edge.kernels.native import MAX_RANK
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.model.flops import pass_flops
from fedspine_edge.model.layout import Layout, check_ratio
from fedspine_edge.model.loading import load_tokenizer
from fedspine_edge.model.precision import BaseDtype
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.pruning.latency import ModelLatency, measure_latency
from fedspine_edge.pruning.preview import PruningPreview
from fedspine_edge.pruning.repair import repair_for
from fedspine_edge.pruning.selection import PruningSettings
from fedspine_edge.training.base_model import choose_torch_device, open_model
from fedspine_edge.training.batching import EncodedExamples, collate
from fedspine_edge.training.checkpoint import key_of, open_checkpoint
from fedspine_edge.training.loss import can_pack
from fedspine_edge.training.memory import MemoryEstimate, estimate
from fedspine_edge.training.progress import progress_bar, tensorboard_writer
from fedspine_edge.training.tokenization import TextEncoder
from fedspine_edge.training.trainer import BatchSettings, Trainer
from fedspine_edge.training.training_loop import prune_in_stages, run_fit

log = logging.getLogger("fedspine_edge.tuner")
REPAIR_TEXTS, REPAIR_BATCH = 256, 16
"""Texts on which `prune(repair=True)` refits, and how many at a time."""
Struct = TypeVar("Struct", "ColumnNames", PruningSettings, "MemorySettings")


@dataclass(frozen=True)
class ColumnNames:
    """Columns of data files.

    Args:
        text: Column of the texts.
        text_pair: Column of the second texts; empty for none.
        label: Column of the labels.
    """

    text: str = "text"
    text_pair: str = ""
    label: str = "label"


@dataclass(frozen=True)
class MemorySettings:
    """Means to train in less memory; docs/guides/save-memory.md compares them.

    Args:
        base_dtype: Data type of the frozen weights: "float32", "bfloat16", "float16", "int8" or "int4" (default:
            float32, or that of a saved model). Adapters, head and optimizer state are always float32.
        gradient_checkpointing: Whether to keep only the inputs of the layers for the backward pass and recompute the
            rest: much less memory and the same results, in about a third more time.
        pack: Whether several examples of a causal_lm step share a row instead of being padded: the same loss with less
            work.
    """

    base_dtype: BaseDtype | None = None
    gradient_checkpointing: bool = False
    pack: bool = True


class EdgeTuner:
    """Adapters on one model, which is trained and pruned step by step. Create it with `from_pretrained`.

    Data can be a CSV, JSON lines or Parquet file; 'module:function'; a list of (text, label) or (text, text_pair,
    label); or a callable that returns such a list. For causal_lm it consists of texts, or of (prompt, answer) pairs of
    which only the answer is learned. For token_classification it consists of (list of words, list of labels).

    Args:
        model: Model with adapters.
        tokenizer: Tokenizer of transformers.
        training: Learning rate, batch size, maximum length and clipping.
        columns: Columns of data files.
        pruning: Criterion and widths.
        pack: As in `MemorySettings`.
        seed: Seed of adapters and data order.
    """

    def __init__(
        self,
        model: PrunableModel,
        tokenizer: Any,
        *,
        training: TrainingSettings,
        columns: ColumnNames,
        pruning: PruningSettings,
        pack: bool = True,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.train_loss: float | None = None
        """Mean loss of the steps of the last `fit`."""
        self._texts = TextEncoder.from_model(model, tokenizer)
        self._training = training
        names = names_for_data(_class_names(model))
        self._data_settings = DataSettings(
            path="", num_labels=max(2, model.num_labels), labels=names, **asdict(columns)
        )
        self._pruning = pruning
        self._pack = pack
        self._seed = seed
        pruning.check_minimums(model.spec)
        self._tracker = ImportanceTracker(
            model, pruning.criterion, pruning.importance_metric, seed=seed, scope=pruning.scope
        )
        self._last_examples: EncodedExamples | None = None
        self._steps_taken = 0
        self._repaired = False
        self._metrics: dict[str, float] = {}
        self._latency: ModelLatency | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        task: Task = "classification",
        num_labels: int | None = None,
        labels: Sequence[str] | None = None,
        r: int = 8,
        lora_alpha: float | None = None,
        learning_rate: float = 1e-3,
        batch_size: int = 8,
        max_length_tokens: int | None = None,
        torch_device: Literal["auto", "cpu", "cuda"] = "auto",
        seed: int = 0,
        columns: ColumnNames | None = None,
        pruning: PruningSettings | None = None,
        memory: MemorySettings | None = None,
        **settings: Any,
    ) -> EdgeTuner:
        """Load a base model, or a model that `save` wrote, with its adapter and its pruned widths.

        Args:
            path: Hugging Face folder, GGUF file or hub id; or a saved folder.
            task: "classification", "token_classification" or "causal_lm".
            num_labels: Number of classes (default: that of `labels` or of a saved model, otherwise 2).
            labels: Names of the classes in the order of their indices. The data may then contain names, and bundles
                answer with them (default: those of a saved model, otherwise LABEL_0, LABEL_1, …).
            r: LoRA rank; a saved adapter keeps its own.
            lora_alpha: Numerator of scaling = lora_alpha / r (default: 2·r).
            learning_rate: Peak learning rate of each `fit`.
            batch_size: Examples per step.
            max_length_tokens: Length to which texts are truncated (default: 128, or the number of positions of the
                model
                if that is lower).
            torch_device: "auto", "cpu" or "cuda".
            seed: Seed of head, adapters and data order.
            columns: Columns of data files.
            pruning: Criterion and widths.
            memory: Data type of the base, gradient checkpointing and packing.
            settings: Single fields of `columns`, `pruning` and `memory`, and `metric` and `gguf_file`. Deprecated.

        Raises `ModelError` for a folder that cannot be used and `ConfigError` for impossible settings.
        """
        if not 1 <= r <= MAX_RANK:
            raise ConfigError(
                f"`r` is {r}; the LoRA rank must be within 1..{MAX_RANK}.", remedy="Usual ranks are 4 to 32."
            )
        if not math.isfinite(learning_rate):
            raise ConfigError(
                f"`learning_rate` is {learning_rate}; it must be finite.", remedy="Usual are 1e-4 to 1e-2."
            )
        if seed < 0:
            raise ConfigError(f"`seed` is {seed}; it must be at least 0.", remedy="Leave it out for the default, 0.")
        if torch_device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"torch_device {torch_device!r} is unknown.", remedy="Use 'auto', 'cpu' or 'cuda'.")
        gguf_file = settings.pop("gguf_file", None)
        if gguf_file is not None:
            _warn_deprecated("from_pretrained(folder, gguf_file=name)", "from_pretrained(folder / name)")
        columns = _with_single_fields(columns or ColumnNames(), "columns", settings)
        pruning = _with_single_fields(pruning or PruningSettings(), "pruning", settings)
        memory = _with_single_fields(memory or MemorySettings(), "memory", settings)
        if settings:
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {next(iter(settings))!r}")
        fields_given: dict[str, Any] = {"learning_rate": learning_rate, "batch_size": batch_size}
        if max_length_tokens is not None:
            fields_given["max_length_tokens"] = max_length_tokens
        training = convert(fields_given, TrainingSettings)  # validated before the model is loaded, which takes long
        if labels is not None:
            num_labels = count_names(labels, num_labels)
        model = open_model(
            path, task=task, num_labels=num_labels, gguf_file=gguf_file, base_dtype=memory.base_dtype, seed=seed
        )
        if labels is not None:
            _name_classes(model, labels)
        folder = model.folder if model.folder is not None else path
        tokenizer = load_tokenizer(folder, gguf_file=model.gguf_file)
        model.module.to(choose_torch_device(torch_device))
        model.set_gradient_checkpointing(memory.gradient_checkpointing)
        if model.r is None:
            model.attach_lora(r, 2.0 if lora_alpha is None else lora_alpha / r, seed)
        max_length = TextEncoder.from_model(model, tokenizer).max_length_tokens(max_length_tokens)
        training = msgspec.structs.replace(training, max_length_tokens=max_length)
        return cls(model, tokenizer, training=training, columns=columns, pruning=pruning, pack=memory.pack, seed=seed)

    @property
    def layout(self) -> Layout:
        """Heads and channels that are left; see `layout.pruning_ratio` and `layout.sparsity`."""
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
        """Train adapters and head with AdamW, a warm-up and a cosine schedule over the steps of this call.

        Args:
            data: Training data; see the class.
            epochs: Passes over the data (default: 1).
            steps: Training steps, instead of epochs.
            progress: Whether to show a bar on a terminal, or lines elsewhere (default: the bar only).
            checkpoint: Folder from which the same call continues after the process was killed, with the same bits as
                without the interruption. Use a separate folder for every `fit`. A call that has finished restores its
                result when it is repeated.
            log_dir: Folder for TensorBoard event files (extra `tensorboard`): loss, gradient norm, learning rate,
                skipped steps.
            on_step: Called after each step with its number, from 1, and the last loss. An exception ends the fit.

        Returns the tuner, so that calls can be chained. Raises `DataError`, `ConfigError`, `OutOfMemory`, and
        `CheckpointError` for a damaged checkpoint.
        """
        if epochs is not None and steps is not None:
            raise ConfigError("fit takes epochs or steps, not both.")
        train = self._encoded(data)
        per_epoch = max(1, len(train) // self._training.batch_size)
        total = steps if steps is not None else round((1.0 if epochs is None else epochs) * per_epoch)
        if total < 1:
            raise ConfigError(f"{total} training steps are too few.", remedy="Set `steps` to at least 1.")
        limit = self._training.max_length_tokens
        if at_limit := int((train.lengths == limit).sum()):
            log.info("%d of %d texts have max_length_tokens, %d; longer ones are cut", at_limit, len(train), limit)
        self._last_examples, self._metrics = train, {}
        trainer = self._trainer(train, total)
        with ExitStack() as stack:
            saved = curves = None
            if checkpoint is not None:
                saved = stack.enter_context(open_checkpoint(checkpoint, self._fit_key(train, total), total))
            if log_dir is not None:
                curves = stack.enter_context(tensorboard_writer(log_dir, self._steps_taken))
            run_fit(trainer, total, checkpoint=saved, write_curves=curves, progress=progress, on_step=on_step)
        self._finish(trainer, train)
        return self

    def estimate(
        self, data: Data | None = None, *, batch_size: int | None = None, max_length_tokens: int | None = None
    ) -> MemoryEstimate:
        """Estimate the peak memory of `fit` and `prune` in bytes; `print` shows its parts.

        This takes about a second, trains nothing and allocates almost nothing. docs/results/memory.md compares it
        with measured peaks, which differ by less than 15 %.

        Args:
            data: Training data, for its own memory and the length of its longest text (default: no data, and
                `max_length_tokens`).
            batch_size: Examples per forward pass (default: that of the tuner).
            max_length_tokens: Maximum length in tokens (default: that of the tuner).

        Raises `DataError`.
        """
        training = self._training
        tokens = training.max_length_tokens if max_length_tokens is None else max_length_tokens
        data_bytes = 0
        if data is not None:
            examples = read_examples(data, self._data_settings, self.model.task)
            encoded = self._texts.encode(examples, training.max_length_tokens)
            tokens = min(tokens, int(encoded.lengths.max()))
            data_bytes = encoded.size_bytes + sum(example.size_bytes for example in examples)
        rows = training.batch_size if batch_size is None else batch_size
        packs = self._pack and can_pack(self.model, tokens)
        found = estimate(self.model, micro_batch=rows, tokens=tokens, pack_rows=packs)
        return replace(found, data_bytes=data_bytes)

    def evaluate(self, data: Data, *, progress: bool | None = None) -> dict[str, float]:
        """Return `loss`, `accuracy` and `num_examples` on `data`; for causal_lm per predicted token."""
        examples = self._encoded(data)
        with progress_bar("evaluate", len(examples), progress) as advance:
            self._metrics = asdict(self._trainer(examples, 1).evaluate(examples, on_batch=advance))
        return dict(self._metrics)

    def preview(self, pruning_ratio: float) -> PruningPreview:
        """Return what `prune` would remove at once to reach `pruning_ratio`, with scores and savings.

        Nothing is changed. Raises `ConfigError` for a ratio outside [0, 1) and `DataError` before any step was scored.
        """
        check_ratio(pruning_ratio)
        if not self._tracker.ready:
            raise DataError(
                "a preview needs scores, and importance is computed from training steps.",
                remedy="Call fit(data) first.",
            )
        after = self._layout_at(pruning_ratio)
        length = self._training.max_length_tokens
        now, then = (pass_flops(layout, 0, 1, length, backward=False) for layout in (self.layout, after))
        return PruningPreview(
            self.layout, after, self._tracker.scores(), now, then, asked=pruning_ratio, latency=self._latency
        )

    def prune(
        self,
        pruning_ratio: float | PruningPreview,
        data: Data | None = None,
        *,
        stages: int = 3,
        steps: int = 20,
        repair: bool = False,
        progress: bool | None = None,
    ) -> EdgeTuner:
        """Physically remove the least important heads and channels. Call `fit` afterwards to recover accuracy.

        To reach a ratio, groups are removed in stages with training in between. Their importance comes from the last
        steps of `fit`; if there were none, `steps` scored steps are taken first. A preview is pruned to at once.

        Args:
            pruning_ratio: Share of the prunable parameters of the unpruned model that is removed afterwards, or a
                preview.
            data: Training data (default: that of the last `fit`). Not used for a preview.
            stages: Number of stages, of which the first removes most. Not used for a preview.
            steps: Scored training steps between two stages. Not used for a preview.
            repair: Whether to refit the outputs of attention and FFN at every cut by least squares, on up to 256
                of the training texts, so that the pruned model stays close to the unpruned one. Takes seconds;
                see `fedspine_edge.pruning.repair`.
            progress: As in `fit`.

        Returns the tuner. Raises `ConfigError` for a ratio outside [0, 1) or below the present one, `DataError` if
        there is no data to score with, and `LayoutError` for a preview of a model that was pruned otherwise since.
        """
        if isinstance(pruning_ratio, PruningPreview):
            if repair:
                train = self._last_examples if data is None else self._encoded(data)
                self._repair(pruning_ratio.after, train or EncodedExamples())
            self.model.compact(pruning_ratio.after, importance=self._tracker)
            self._metrics, self._latency = {}, None
            return self
        check_ratio(pruning_ratio, self.layout)
        if stages < 1 or steps < 1:
            raise ConfigError(f"stages is {stages} and steps is {steps}; both must be at least 1.")
        train = self._last_examples if data is None else self._encoded(data)
        unscored = not self._tracker.ready
        if train is None and (unscored or stages > 1 or repair):
            raise DataError(
                "pruning needs data, because importance is computed from training steps.",
                remedy="Call fit(data) first, or pass prune(ratio, data).",
            )
        total = steps * (stages - 1 + unscored)
        self._metrics, self._latency = {}, None
        trainer = self._trainer(train or EncodedExamples(), total) if total else None
        with progress_bar("prune", total, progress) as advance:
            layout_at = partial(self._layout_at, final_ratio=pruning_ratio)
            prune_in_stages(
                self._tracker,
                trainer,
                layout_at,
                pruning_ratio,
                stages=stages,
                steps=steps,
                advance=advance,
                before_cut=partial(self._repair, train=train or EncodedExamples()) if repair else None,
            )
        if trainer is not None:
            self._finish(trainer, train or EncodedExamples())
        return self

    def measure_latency(self, *, length_tokens: int | None = None, repeats: int = 10) -> ModelLatency:
        """Measure the latency of one text through the present model, adapters included, on this machine.

        Later previews predict from it, and `save` writes it into the model card.

        Args:
            length_tokens: Length of the text in tokens (default: the tuner's maximum).
            repeats: Number of passes, of which the median is taken.
        """
        length = self._training.max_length_tokens if length_tokens is None else length_tokens
        self._latency = measure_latency(self.model, length, repeats=repeats)
        return self._latency

    def save(self, folder: str | Path, *, merged: bool = False) -> Path:
        """Write model, adapter, layout and tokenizer to `folder` atomically. `from_pretrained` loads them.

        The model card, README.md, states the last results of `evaluate` and `measure_latency` on the present model.

        Args:
            folder: New or empty folder, or a saved model, which is replaced.
            merged: Whether to merge the adapter into the weights.
        """
        return save_model(self.model, folder, merged=merged, metrics=self._measured())

    def merge(self) -> Any:
        """Return a copy of the transformers model with the adapter merged. The tuner is not changed."""
        return self.model.merge()

    def plan(self, pruning_ratio: float) -> PruningPreview:
        """Return `preview(pruning_ratio)`. Deprecated."""
        _warn_deprecated("plan(ratio)", "preview(ratio)")
        return self.preview(pruning_ratio)

    def apply(self, plan: PruningPreview) -> EdgeTuner:
        """Return `prune(plan)`. Deprecated."""
        _warn_deprecated("apply(plan)", "prune(preview)")
        return self.prune(plan)

    def save_merged(self, folder: str | Path) -> Path:
        """Return `save(folder, merged=True)`. Deprecated."""
        _warn_deprecated("save_merged(folder)", "save(folder, merged=True)")
        return self.save(folder, merged=True)

    def _repair(self, layout: Layout, train: EncodedExamples) -> None:
        chosen = np.unique(np.linspace(0, len(train) - 1, min(len(train), REPAIR_TEXTS)).round().astype(np.int64))
        device = next(self.model.module.parameters()).device
        batches = []
        for start in range(0, len(chosen), REPAIR_BATCH):
            batch = collate(train, chosen[start : start + REPAIR_BATCH], self._texts.pad_id)
            batches.append({name: torch.from_numpy(x).to(device) for name, x in batch.items() if name != "labels"})
        repair_for(self.model, layout, batches)
        self._repaired = True

    def _layout_at(self, pruning_ratio: float, final_ratio: float = 0.0) -> Layout:
        return self._pruning.select_layout(self._tracker.scores(), self.layout, pruning_ratio, final_ratio=final_ratio)

    def _fit_key(self, train: EncodedExamples, total: int) -> str:
        pruning: tuple[str, ...] = (self._pruning.criterion, self._pruning.importance_metric, self._pruning.scope)
        if self._repaired:
            pruning = (*pruning, "repaired")
        return key_of(train, self.model, self._training, total, self._seed, self._steps_taken, self._pack, *pruning)

    def _encoded(self, data: Data) -> EncodedExamples:
        examples = read_examples(data, self._data_settings, self.model.task)
        return self._texts.encode(examples, self._training.max_length_tokens)

    def _trainer(self, train: EncodedExamples, steps: int) -> Trainer:
        names = set(OptimizerSettings.__struct_fields__) & set(self._training.__struct_fields__)
        optimizer = {name: getattr(self._training, name) for name in names}
        return Trainer(
            self.model,
            train,
            [],
            OptimizerSettings(total_steps=max(1, steps), **optimizer),
            round_steps=steps,
            batches=BatchSettings(
                pad_id=self._texts.pad_id,
                seed=self._seed + self._steps_taken,  # a second fit sees the data in another order
                pack=self._pack and can_pack(self.model, self._training.max_length_tokens),
            ),
            tracker=self._tracker,
        )

    def _measured(self) -> dict[str, float]:
        latency = self._latency
        measured = {} if latency is None else {f"latency in ms ({latency.conditions})": latency.total_ms}
        return {**self._metrics, **measured}

    def _finish(self, trainer: Trainer, train: EncodedExamples) -> None:
        self._steps_taken += trainer.step
        self.model.trained_steps += trainer.step
        self.model.trained_examples = max(self.model.trained_examples, len(train))
        self.train_loss = trainer.train_loss
        for warning in trainer.warnings():
            log.warning("%s", warning)


def _class_names(model: PrunableModel) -> list[str]:
    id2label = model.module.config.id2label if model.num_labels else {}
    return [str(id2label[index]) for index in range(model.num_labels)]


def _name_classes(model: PrunableModel, labels: Sequence[str]) -> None:
    """Store the names of the classes in the model's config. Raises `ConfigError` if it has other names already."""
    present = names_for_data(_class_names(model))
    if present and present != tuple(labels) and (model.trained_steps or set(present) == set(labels)):
        raise ConfigError(
            f"the classes of the model are {', '.join(present)}, in this order; `labels` is {', '.join(labels)}.",
            remedy="Pass the names of the model as `labels`, or omit them.",
        )
    model.module.config.id2label = dict(enumerate(labels))
    model.module.config.label2id = {label: index for index, label in enumerate(labels)}


def _with_single_fields(struct: Struct, parameter: str, settings: dict[str, Any]) -> Struct:
    """Return `struct` with the fields that `settings` names, which are removed from `settings` with a warning."""
    if isinstance(struct, PruningSettings) and "metric" in settings:
        settings["importance_metric"] = settings.pop("metric")
    given = {field.name: settings.pop(field.name) for field in fields(struct) if field.name in settings}
    if given:
        written = ", ".join(f"{name}={value!r}" for name, value in given.items())
        _warn_deprecated(
            f"from_pretrained({written})", f"from_pretrained({parameter}={type(struct).__name__}({written}))", level=4
        )
    return replace(struct, **given)


def _warn_deprecated(old: str, new: str, level: int = 3) -> None:
    warnings.warn(
        f"{old} is deprecated and will be removed in the next release; use {new}.", FutureWarning, stacklevel=level
    )

"""Fine-tune and prune a language model on one device, no fleet needed.

tuner = EdgeTuner.from_pretrained("base-model", task="classification", num_labels=2, r=8)
tuner.fit("train.csv"); tuner.prune(0.5); tuner.fit("train.csv"); tuner.save("out/")
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedspine_edge.config import DataSettings, TrainingSettings
from fedspine_edge.device.data import Data, Encoded, encode, examples_of
from fedspine_edge.device.source import choose_torch_device
from fedspine_edge.device.state import Document, StateDir
from fedspine_edge.device.telemetry import pass_flops
from fedspine_edge.device.trainer import Trainer
from fedspine_edge.errors import CheckpointError, ConfigError, DataError
from fedspine_edge.model.architecture import Task
from fedspine_edge.model.base import MANIFEST
from fedspine_edge.model.checkpoint import load_base, load_model, load_tokenizer
from fedspine_edge.model.importance import CRITERIA, METRICS, ImportanceTracker, Metric
from fedspine_edge.model.latency import Latency, measure_latency
from fedspine_edge.model.layout import Layout, check_ratio, smallest_counts, target_counts
from fedspine_edge.model.plan import PruningPlan
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.model.pruning import GroupScores, Scope, plan_local
from fedspine_edge.wire.messages import Training

log = logging.getLogger("fedspine_edge.tuner")

SCORED_STEPS = 40
"""Steps at the end of a `fit` whose gradients are scored: with a decay of 0.9 the ones before hardly count."""

CHECKPOINT_STEPS = 10
FIT = "fit"
"""Name of the state file in a fit's checkpoint folder."""


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
        criterion: What ranks heads and channels: "lora", "apt", "magnitude" or "random".
        metric: How "lora" sums a group's terms: "abs", "square" or "signed".
        scope: "layer" gives every layer the same width, "global" lets widths differ.
        round_to: Kept channel counts are multiples of this.
        min_heads: KV heads that stay in every layer at any ratio.
        min_channels: Channels likewise, rounded up to `round_to`.
        seed: Of the adapters and the order of the data.
    """

    def __init__(
        self,
        model: PrunableModel,
        tokenizer: Any,
        *,
        settings: TrainingSettings,
        columns: DataSettings,
        criterion: str = "lora",
        metric: Metric = "abs",
        scope: Scope = "layer",
        round_to: int = 8,
        min_heads: int = 1,
        min_channels: int = 1,
        seed: int = 0,
    ) -> None:
        if criterion not in CRITERIA:
            raise ConfigError(f"criterion {criterion!r} is unknown.", remedy=f"Use one of {', '.join(CRITERIA)}.")
        if scope not in ("layer", "global"):
            raise ConfigError(f"scope {scope!r} is unknown.", remedy="Use 'layer' or 'global'.")
        if metric not in METRICS:
            raise ConfigError(f"metric {metric!r} is unknown.", remedy=f"Use one of {', '.join(METRICS)}.")
        self._at_least = min_heads, min_channels
        smallest_counts(model.spec, round_to, self._at_least)
        self.model = model
        self.tokenizer = tokenizer
        self.train_loss: float | None = None
        """Mean loss of the steps of the last `fit`."""
        self._settings = settings
        self._columns = columns
        self._scope: Scope = scope
        self._round_to = round_to
        self._seed = seed
        self._tracker = ImportanceTracker(model, criterion, metric, seed=seed, scope=scope)
        self._last: list[Encoded] | None = None
        self._steps_taken = 0
        self._metrics: dict[str, float] = {}
        self._latency: Latency | None = None

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
        criterion: str = "lora",
        metric: Metric = "abs",
        scope: Scope = "layer",
        round_to: int = 8,
        min_heads: int = 1,
        min_channels: int = 1,
        gradient_checkpointing: bool = False,
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
            text: Column of the text in files.
            text_pair: Column of the second text; empty for single texts.
            label: Column of the integer label.
            criterion: What ranks heads and channels.
            metric: How "lora" sums a group's terms.
            scope: "layer" or "global".
            round_to: Kept channel counts are multiples of this.
            min_heads: KV heads that stay in every layer.
            min_channels: Channels that stay in every layer.
            gradient_checkpointing: Keep only the layers' inputs for the backward pass and compute the rest again:
                much less memory, about a third more time, the same results.
            torch_device: "auto", "cpu" or "cuda".
            gguf_file: The file within a GGUF folder, if there are several.
            seed: Of head, adapters and data order.

        Raises `ModelError` for a folder that cannot be used, `ConfigError` for impossible settings.
        """
        if r < 1:
            raise ConfigError(f"r is {r}; the LoRA rank must be at least 1.", remedy="Usual ranks are 4 to 32.")
        if torch_device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"torch_device {torch_device!r} is unknown.", remedy="Use 'auto', 'cpu' or 'cuda'.")
        if (Path(path).expanduser() / MANIFEST).exists():
            model = load_model(path)
            if model.task != task or (num_labels is not None and model.num_labels != num_labels):
                raise ConfigError(
                    f"{path} was saved for {model.task} with {model.num_labels} labels, not {task} with {num_labels}.",
                    remedy="Pass the task and num_labels it was saved with, or the base model.",
                )
        else:
            classes = 2 if num_labels is None else num_labels
            model = load_base(path, task=task, num_labels=classes, gguf_file=gguf_file, seed=seed)
        folder = model.folder if model.folder is not None else path
        tokenizer = load_tokenizer(folder, gguf_file=model.gguf_file)
        model.module.to(choose_torch_device(torch_device))  # type: ignore[arg-type]
        model.recompute_layers(gradient_checkpointing)
        if model.r is None:
            model.attach_lora(r, 2.0 if lora_alpha is None else lora_alpha / r, seed)
        longest = model.architecture.max_tokens(model.module.config)
        if max_length_tokens is None:
            max_length_tokens = 128 if longest is None else min(128, longest)
        if longest is not None and max_length_tokens > longest:
            raise ConfigError(
                f"max_length_tokens is {max_length_tokens}, {path} has positions for {longest} tokens.",
                remedy=f"Use at most {longest}.",
            )
        settings = _checked(
            TrainingSettings,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_length_tokens=max_length_tokens,
        )
        columns = _checked(
            DataSettings, path="", text=text, text_pair=text_pair, label=label, num_labels=max(2, model.num_labels)
        )
        return cls(
            model,
            tokenizer,
            settings=settings,
            columns=columns,
            criterion=criterion,
            metric=metric,
            scope=scope,
            round_to=round_to,
            min_heads=min_heads,
            min_channels=min_channels,
            seed=seed,
        )

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
        on_step: Callable[[int, float | None], None] | None = None,
    ) -> EdgeTuner:
        """Train adapters and head: AdamW, warm-up and cosine over this call's steps.

        Args:
            data: See the class.
            epochs: Passes over the data, default 1.
            steps: Training steps, instead of epochs.
            progress: Show a progress bar; default only on a terminal.
            checkpoint: Folder, one for each `fit`, from which the same call goes on after the process was killed, and
                ends with the same bits. When the call has finished, repeating it restores its result at once.
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
            raise ConfigError(f"fit would take {total} steps.", remedy="Pass steps or epochs above 0.")
        self._last, self._metrics = train, {}
        trainer = self._trainer(train, total)
        with ExitStack() as stack:
            advance = stack.enter_context(_bar("fit", total, progress))
            saver = None if checkpoint is None else stack.enter_context(StateDir(checkpoint))
            key = self._fit_key(train, total)
            if saver is not None and self._resume(saver, trainer, key):
                advance(trainer.step)

            def stepped() -> None:
                advance(1)
                if saver is not None and (trainer.step % CHECKPOINT_STEPS == 0 or trainer.step == total):
                    saved = trainer.state()
                    saver.write(FIT, Document({"key": key, "trainer": saved.info}, saved.tensors))
                if on_step is not None:
                    on_step(trainer.step, trainer.last_loss)

            trainer.run(max(0, total - SCORED_STEPS), on_step=stepped)
            trainer.run(total, scored=True, on_step=stepped)
        self._done(trainer, train)
        return self

    def evaluate(self, data: Data) -> dict[str, float]:
        """`loss`, `accuracy` and `num_examples` on `data` (causal_lm: per predicted token, `num_examples` tokens)."""
        examples = self._encoded(data)
        result = self._trainer(examples, 1).evaluate(examples)
        self._metrics = {"loss": result.loss, "accuracy": result.accuracy, "num_examples": result.num_examples}
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
            progress: Show a progress bar; default only on a terminal.

        Returns the tuner itself. Raises `ConfigError` for a ratio outside [0, 1) or below the present one, and
        `DataError` when there is no data to score with.
        """
        check_ratio(pruning_ratio)
        if stages < 1 or steps < 1:
            raise ConfigError(f"stages is {stages} and steps is {steps}; both must be at least 1.")
        start = self.layout.pruning_ratio
        unit = 1.0 / self.layout.spec.num_kv_heads  # rounding to whole groups may overshoot by less than this
        if pruning_ratio < start - unit:
            raise ConfigError(
                f"the model is already pruned to {start:.3f}; it cannot go back to {pruning_ratio}.",
                remedy="Load the base model again to prune less.",
            )
        goal = self._at_least
        if self._scope == "layer":  # or a part might take the last channels for a head that the next one takes as well
            goal = target_counts(self.layout.spec, pruning_ratio, round_to=self._round_to, at_least=goal)
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
        with _bar("prune", total, progress) as advance:
            if unscored and trainer is not None:
                log.warning("no training step was scored yet: taking %d scoring steps before pruning", steps)
                trainer.run(steps, scored=True, on_step=advance)
            for stage in range(1, stages + 1):
                share = 1.0 - (1.0 - stage / stages) ** 3
                target = max(start, start + (pruning_ratio - start) * share)
                layout = self._planned(self._tracker.scores(), target, goal)
                if trainer is None:
                    self.model.compact(layout, importance=self._tracker)
                else:
                    trainer.compact(layout)
                    if stage < stages:
                        trainer.run(trainer.step + steps, scored=True, on_step=advance)
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
        scores = self._tracker.scores()
        after = self._planned(scores, pruning_ratio, self._at_least)
        length = self._settings.max_length_tokens
        now, then = (pass_flops(layout, 0, 1, length, backward=False) for layout in (self.layout, after))
        return PruningPlan(self.layout, after, scores, now, then, asked=pruning_ratio, latency=self._latency)

    def apply(self, plan: PruningPlan) -> EdgeTuner:
        """Prune to a plan at once; `fit` afterwards lets the smaller model recover.

        Raises `LayoutError`, changing nothing, if the model was pruned otherwise since the plan was made.
        """
        self.model.compact(plan.after, importance=self._tracker)
        self._metrics, self._latency = {}, None
        return self

    def measure_latency(self, *, length_tokens: int | None = None, repeats: int = 10) -> Latency:
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
        return self.model.save(folder, metrics=self._measured())

    def save_merged(self, folder: str | Path) -> Path:
        """Like `save`, with the adapter folded into the weights."""
        return self.model.save_merged(folder, metrics=self._measured())

    def merge(self) -> Any:
        """A copy of the transformers model with the adapter folded in; the tuner stays as it is."""
        return self.model.merged()

    def _planned(self, scores: GroupScores, pruning_ratio: float, at_least: tuple[int, int]) -> Layout:
        return plan_local(
            scores, self.layout, pruning_ratio, scope=self._scope, round_to=self._round_to, at_least=at_least
        )

    def _fit_key(self, train: list[Encoded], total: int) -> str:
        """Digest of everything that a fit's result depends on besides the weights it starts from."""
        model = self.model
        parts = (
            [(x.input_ids, x.label, x.token_type_ids, x.token_labels) for x in train],
            [total, self._seed, self._steps_taken, model.r, model.scaling, model.task],
            [model.spec.base_sha256, model.layout.to_dict()],
            msgspec.to_builtins(self._settings),
            [self._tracker.criterion, self._tracker.metric, self._scope],
        )
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()

    def _resume(self, saver: StateDir, trainer: Trainer, key: str) -> bool:
        saved = saver.read(FIT)
        if saved is None:
            return False
        if saved.info.get("key") != key:
            raise ConfigError(
                f"{saver.folder} holds the checkpoint of another fit: other data, settings, steps or widths.",
                remedy="Give every fit a folder of its own, or delete this one.",
            )
        try:
            trainer.restore(Document(saved.info["trainer"], saved.tensors))
        except (KeyError, TypeError, ValueError) as error:
            raise saver.damaged(FIT, f"it is incomplete ({type(error).__name__})") from error
        log.info("resumed after step %d", trainer.step)
        return True

    def _encoded(self, data: Data) -> list[Encoded]:
        task = self.model.task
        examples = examples_of(data, self._columns, labelled=task != "causal_lm", words=task == "token_classification")
        encoded = encode(examples, self.tokenizer, self._settings.max_length_tokens, causal=task == "causal_lm")
        largest = max(max(example.input_ids) for example in encoded)
        known = self.model.module.get_input_embeddings().weight.shape[0]
        if largest >= known:  # on a GPU this would be an assertion that ends the process
            raise CheckpointError(
                f"the tokenizer gives token {largest}, the model has embeddings for {known}.",
                remedy=f"The tokenizer files in {self.model.folder} belong to another model; copy the right ones.",
            )
        return encoded

    def _trainer(self, train: list[Encoded], steps: int) -> Trainer:
        settings = self._settings
        training = Training(
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            max_length_tokens=settings.max_length_tokens,
            warmup_share=settings.warmup_share,
            max_grad_norm=settings.max_grad_norm,
            weight_decay=settings.weight_decay,
            total_steps=max(1, steps),
        )
        return Trainer(
            self.model,
            train,
            [],
            training,
            round_steps=steps,
            tracker=self._tracker,
            seed=self._seed + self._steps_taken,  # a second fit sees the data in another order
            pad_id=int(self.tokenizer.pad_token_id),
        )

    def _measured(self) -> dict[str, float]:
        names = {"num_examples": "test tokens" if self.model.task == "causal_lm" else "test examples"}
        found = {names.get(name, name): value for name, value in self._metrics.items()}
        if self._latency is not None:
            found[f"latency in ms ({self._latency.conditions}, adapter not merged)"] = self._latency.total_ms
        return found

    def _done(self, trainer: Trainer, train: list[Encoded]) -> None:
        self._steps_taken += trainer.step
        self.model.trained_steps += trainer.step
        self.model.trained_examples = max(self.model.trained_examples, len(train))
        self.train_loss = trainer.train_loss
        if trainer.micro_batch < self._settings.batch_size:
            log.warning("memory ran out: trained %d examples at a time, gradients accumulated", trainer.micro_batch)
        if trainer.skipped:
            log.warning("%d of %d steps were not finite and were skipped", trainer.skipped, trainer.step)


@contextmanager
def _bar(what: str, total: int, wanted: bool | None) -> Iterator[Any]:
    """Yields a function to call after each step."""
    console = Console(stderr=True)
    shown = console.is_terminal if wanted is None else wanted
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown or total == 0) as progress:
        task: TaskID = progress.add_task(what, total=total)
        yield lambda steps=1: progress.advance(task, steps)


def _checked(kind: Any, **values: Any) -> Any:
    """Settings with the limits of their fields checked. Raises `ConfigError` naming the field."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error}.") from None

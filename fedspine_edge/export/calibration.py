"""The user's examples as inputs of a model: for calibration, for the default profile and for measuring accuracy.

Examples are read as by `EdgeTuner` and tokenized as by `Session`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import OptimizationProfile, TensorInfo
from fedspine_edge.bundle.metrics import Accuracy, Metric
from fedspine_edge.config import DataSettings, Task
from fedspine_edge.data.examples import Example
from fedspine_edge.data.loading import Data, names_for_data, read_examples
from fedspine_edge.data.targets import IGNORED, truncate_prompt_and_answer, word_targets
from fedspine_edge.errors import DeployError, MissingDependency
from fedspine_edge.files import TOKENIZER
from fedspine_edge.runtime.kv_cache import empty_kv_cache

Inputs = dict[str, Array]

CALIBRATION_EXAMPLES = 128
"""More examples barely change the ranges: 128 sentences contain the largest of several thousand tokens."""
ACCURACY_EXAMPLES = 1000
"""One example is 0.1 percentage points. The 95% interval of an accuracy of 85% is ±2 points, and that of a paired
difference is smaller."""
BATCH_TOKENS = 1024

_METRICS: dict[Task, Metric] = {
    "classification": "accuracy",
    "token_classification": "token_accuracy",
    "causal_lm": "next_token_accuracy",
}


class ModelDescription(Protocol):
    """Properties of a model that determine its inputs; an `ExportedModel` and a `BundleManifest` have them."""

    @property
    def task(self) -> Task: ...
    @property
    def inputs(self) -> tuple[TensorInfo, ...]: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def pad_token_id(self) -> int: ...
    @property
    def num_labels(self) -> int: ...


@dataclass(frozen=True)
class Batch:
    """A batch of examples.

    Attributes:
        tokens: Token inputs of shape (batch, tokens).
        labels: Classes (batch,), or classes or next tokens (batch, tokens) with IGNORED at positions that do not count.
    """

    tokens: Inputs = field(repr=False)
    labels: Array = field(repr=False)

    def inputs(self, tensors: Sequence[TensorInfo], adapter: Mapping[str, Array] | None) -> Inputs:
        """Return all inputs of a model: the tokens, an empty KV cache of the model's type, and the adapter."""
        return self.tokens | empty_kv_cache(tensors, len(self.labels)) | dict(adapter or {})


@dataclass(frozen=True)
class UserData:
    """Examples for calibration and for measuring accuracy.

    Attributes:
        calibration: Batches for calibration.
        measured: Batches for measuring accuracy.
        lengths: Number of tokens of every example in ascending order.
        held_out: Whether no example is in both parts.
    """

    calibration: tuple[Batch, ...]
    measured: tuple[Batch, ...]
    lengths: tuple[int, ...]
    held_out: bool


def read_user_data(
    data: Data, folder: Path, model: ModelDescription, *, calibrate: bool = True, seed: int = 0
) -> UserData:
    """Read examples, tokenize them with `folder`/tokenizer.json and form batches.

    Args:
        data: A file, 'module:function', examples, or a callable that returns examples. Columns are called text and
            label unless it is a `DataSettings` that names others.
        folder: Folder that contains tokenizer.json.
        model: The model: its task, inputs and limits.
        calibrate: Whether to use some of the examples for calibration.
        seed: Seed of the split.

    Raises:
        DataError: An example is invalid; the error names the file, row and column, but never contains a text.
        DeployError: There is no tokenizer.json.
    """
    encoder = _Encoder(folder, model.task, model.max_tokens)
    examples = read_examples(
        data,
        DataSettings(path="", num_labels=model.num_labels, labels=names_for_data(getattr(model, "labels", ()))),
        model.task,
    )
    order = np.random.default_rng(seed).permutation(len(examples))
    encoded = [encoder.encode(examples[index]) for index in order[: CALIBRATION_EXAMPLES + ACCURACY_EXAMPLES]]
    split = min(CALIBRATION_EXAMPLES, len(encoded) // 2)
    held_out = split >= 8 or not calibrate  # very few examples are used for both parts
    parts = (encoded, encoded)
    if not calibrate:
        parts = ([], encoded)
    elif held_out:
        parts = (encoded[:split], encoded[split:])
    calibration, measured = (tuple(_batches(part, model.inputs, model.pad_token_id)) for part in parts)
    return UserData(calibration, measured, tuple(sorted(len(ids) for ids, _, _ in encoded)), held_out)


def profile_for_lengths(
    lengths: Sequence[int], max_tokens: int, *, batch: tuple[int, int, int] = (1, 1, 8)
) -> OptimizationProfile:
    """Return a profile for examples of the given lengths, in ascending order.

    The optimum is the median length, and the maximum leaves a margin of a quarter above the longest example.
    """
    longest = min(max_tokens, -(-lengths[-1] * 5 // 4 // 8) * 8)
    return OptimizationProfile(batch=batch, tokens=(1, min(lengths[len(lengths) // 2], longest), longest))


def require_tokenizer(folder: Path) -> None:
    """Raise `DeployError` unless `folder` contains a tokenizer.json."""
    if not (folder / TOKENIZER).is_file():
        raise DeployError(
            f"The model has no {TOKENIZER}, so examples cannot be tokenized.",
            remedy="Put the tokenizer's tokenizer.json into the model folder.",
        )


class _Encoder:
    def __init__(self, folder: Path, task: Task, max_tokens: int) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependency.of("tokenizers", extra="export", purpose="Reading text") from error
        require_tokenizer(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_padding()
        self._task, self._max_tokens = task, max_tokens

    def encode(self, example: Example) -> tuple[list[int], list[int], Any]:
        """Return (token ids, segment ids, label or one label per token), truncated as in training."""
        self._tokenizer.enable_truncation(self._max_tokens)
        if self._task == "token_classification":
            encoding = self._tokenizer.encode(list(example.words), is_pretokenized=True)
            return encoding.ids, encoding.type_ids, word_targets(encoding.word_ids, example.word_labels)
        if self._task == "causal_lm":
            prompt, answer = self._prompt_and_answer(example)
            ids = [*prompt, *answer]
            # The label of a position is the next token. If there is an answer, only its tokens count.
            first = len(prompt) - 1 if answer else 0
            labels = [token if position >= first else IGNORED for position, token in enumerate(ids[1:])]
            return ids, [0] * len(ids), [*labels, IGNORED]
        pair = (example.text,) if example.text_pair is None else (example.text, example.text_pair)
        encoding = self._tokenizer.encode(*pair)
        return encoding.ids, encoding.type_ids, example.label

    def _prompt_and_answer(self, example: Example) -> tuple[list[int], list[int]]:
        if example.text_pair is None:
            return self._tokenizer.encode(example.text).ids, []
        self._tokenizer.no_truncation()
        prompt = self._tokenizer.encode(example.text).ids
        answer = self._tokenizer.encode(example.text_pair, add_special_tokens=False).ids
        return truncate_prompt_and_answer(prompt, answer, self._max_tokens)


def _batches(encoded: Sequence[tuple[list[int], list[int], Any]], tensors: Sequence[TensorInfo], pad: int) -> Any:
    """Yield batches of similar length with at most `BATCH_TOKENS` tokens."""
    pending: list[tuple[list[int], list[int], Any]] = []
    for row in sorted(encoded, key=lambda row: len(row[0])):
        if pending and (len(pending) + 1) * len(row[0]) > BATCH_TOKENS:
            yield _batch(pending, tensors, pad)
            pending = []
        pending.append(row)
    if pending:
        yield _batch(pending, tensors, pad)


def _batch(rows: Sequence[tuple[list[int], list[int], Any]], tensors: Sequence[TensorInfo], pad: int) -> Batch:
    longest = max(len(ids) for ids, _, _ in rows)

    def padded(columns: Sequence[Sequence[int]], filler: int) -> Array:
        return np.array([[*column, *[filler] * (longest - len(column))] for column in columns], dtype=np.int64)

    columns: dict[str, Callable[[], Array]] = {
        "input_ids": lambda: padded([ids for ids, _, _ in rows], pad),
        "attention_mask": lambda: padded([[1] * len(ids) for ids, _, _ in rows], 0),
        "token_type_ids": lambda: padded([segments for _, segments, _ in rows], 0),
    }
    tokens = {tensor.name: columns[tensor.name]() for tensor in tensors if tensor.kind == "tokens"}
    labels = [label for _, _, label in rows]
    return Batch(
        tokens,
        padded(labels, IGNORED) if isinstance(labels[0], list) else np.array(labels, dtype=np.int64),
    )


def measure_accuracy(
    data: UserData,
    task: Task,
    before: Callable[[Inputs], Inputs],
    after: Callable[[Inputs], Inputs],
    *,
    inputs: Sequence[TensorInfo],
    adapter: Mapping[str, Array] | None = None,
) -> Accuracy:
    """Return the accuracy and loss of two implementations, and the share of examples that they answer identically.

    Args:
        data: Examples; `measured` is used.
        task: Task of the model.
        before: Function from inputs to outputs of the original model.
        after: The same for the compiled model.
        inputs: Inputs of the model.
        adapter: Values of the adapter's inputs.
    """
    correct = {"before": 0, "after": 0}
    loss = {"before": 0.0, "after": 0.0}
    same = total = 0
    for batch in data.measured:
        model_inputs = batch.inputs(inputs, adapter)
        answers = {}
        counted = batch.labels != IGNORED
        labels = batch.labels[counted]
        for name, run in (("before", before), ("after", after)):
            logits = run(model_inputs)["logits"][counted].astype(np.float64)
            answers[name] = logits.argmax(axis=-1)
            top = logits.max(axis=-1, keepdims=True)
            log_sum = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
            loss[name] += float((log_sum - np.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]).sum())
            correct[name] += int((answers[name] == labels).sum())
        same += int((answers["before"] == answers["after"]).sum())
        total += len(labels)
    return Accuracy(
        metric=_METRICS[task],
        before=correct["before"] / total,
        after=correct["after"] / total,
        loss_before=loss["before"] / total,
        loss_after=loss["after"] / total,
        agreement=same / total,
        num_answers=total,
        held_out=data.held_out,
    )

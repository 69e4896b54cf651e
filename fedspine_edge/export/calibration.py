"""The user's own examples as a model's inputs: to calibrate on, to size profiles by, and to measure accuracy with.

Read as `EdgeTuner` reads them, tokenised as `Session` tokenises them. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import OptimizationProfile, TensorInfo
from fedspine_edge.bundle.metrics import Accuracy, Metric
from fedspine_edge.config import DataSettings, Task
from fedspine_edge.data.examples import Example
from fedspine_edge.data.loading import Data, read_examples
from fedspine_edge.data.targets import IGNORED, truncate_prompt_and_answer, word_targets
from fedspine_edge.errors import DeployError, MissingDependency
from fedspine_edge.files import TOKENIZER
from fedspine_edge.runtime.onnxruntime_runner import empty_past

Inputs = dict[str, Array]

CALIBRATED_EXAMPLES = 128
"""More change the ranges little: the largest of a few thousand tokens is seen after a hundred sentences."""
MEASURED_EXAMPLES = 1000
"""Of these one is 0.1 points; the 95 % interval of an accuracy of 85 % is ±2 points, of a paired difference less."""
BATCH_TOKENS = 1024

_METRICS: dict[Task, Metric] = {
    "classification": "accuracy",
    "token_classification": "token_accuracy",
    "causal_lm": "next_token_accuracy",
}


@dataclass(frozen=True)
class Batch:
    """Token inputs (batch, tokens) and what the model should answer: (batch,) classes, or (batch, tokens) classes or
    next tokens with IGNORED where nothing counts."""

    tokens: Inputs = field(repr=False)
    labels: Array = field(repr=False)

    def inputs(self, tensors: Sequence[TensorInfo], adapter: Mapping[str, Array] | None) -> Inputs:
        """All that a model with these inputs takes: tokens, an empty KV cache in its type, and its adapter."""
        return self.tokens | empty_past(tensors, len(self.labels)) | dict(adapter or {})


@dataclass(frozen=True)
class UserData:
    """Examples for calibration and, disjoint where there are enough, for measuring."""

    calibration: tuple[Batch, ...]
    measured: tuple[Batch, ...]
    lengths: tuple[int, ...]
    """Tokens of every example, shortest first."""
    held_out: bool
    """Whether no example is in both parts."""


def read_data(
    data: Data,
    folder: Path,
    *,
    task: Task,
    num_labels: int,
    inputs: Sequence[TensorInfo],
    max_tokens: int,
    pad_token_id: int,
    calibrate: bool = True,
    seed: int = 0,
) -> UserData:
    """Reads examples, tokenises them with `folder`/tokenizer.json and forms batches.

    Args:
        data: A file, 'module:function', examples, or a callable that returns examples, with columns text and label
            unless it is a `DataSettings` that names others.
        folder: Holds tokenizer.json.
        task: Decides what an example is, as for `EdgeTuner`.
        num_labels: Classes; labels beyond are refused.
        inputs: The model's inputs.
        max_tokens: Longer texts are cut to it.
        pad_token_id: Fills short rows.
        calibrate: Keep some of the examples for calibration.
        seed: Of the split.

    Raises `DataError` naming file, row and column, never a text; `DeployError` without a tokenizer.json.
    """
    encoder = _Encoder(folder, task, max_tokens)
    examples = read_examples(data, DataSettings(path="", num_labels=num_labels), task)
    order = np.random.default_rng(seed).permutation(len(examples))
    encoded = [encoder.encode(examples[index]) for index in order[: CALIBRATED_EXAMPLES + MEASURED_EXAMPLES]]
    cut = min(CALIBRATED_EXAMPLES, len(encoded) // 2)
    held_out = cut >= 8 or not calibrate  # of a handful, both parts take all
    parts = (encoded, encoded)
    if not calibrate:
        parts = ([], encoded)
    elif held_out:
        parts = (encoded[:cut], encoded[cut:])
    calibration, measured = (tuple(_batches(part, inputs, pad_token_id)) for part in parts)
    return UserData(calibration, measured, tuple(sorted(len(ids) for ids, _, _ in encoded)), held_out)


def profile_of(
    lengths: Sequence[int], max_tokens: int, *, batch: tuple[int, int, int] = (1, 1, 8)
) -> OptimizationProfile:
    """An engine's shapes from the lengths of the user's examples: best at the median, room for a quarter more than
    the longest."""
    longest = min(max_tokens, -(-lengths[-1] * 5 // 4 // 8) * 8)
    return OptimizationProfile(batch=batch, tokens=(1, min(lengths[len(lengths) // 2], longest), longest))


def require_tokenizer(folder: Path) -> None:
    """Raises `DeployError` unless `folder` holds a tokenizer.json."""
    if not (folder / TOKENIZER).is_file():
        raise DeployError(
            f"The model has no {TOKENIZER}, so examples cannot be turned into tokens.",
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
        """(token ids, segment ids, label or one label per token), cut as training cuts."""
        self._tokenizer.enable_truncation(self._max_tokens)
        if self._task == "token_classification":
            found = self._tokenizer.encode(list(example.words), is_pretokenized=True)
            return found.ids, found.type_ids, word_targets(found.word_ids, example.word_labels)
        if self._task == "causal_lm":
            prompt, answer = self._prompt_and_answer(example)
            ids = [*prompt, *answer]
            # The token after each position; of a prompt with an answer only the answer counts.
            first = len(prompt) - 1 if answer else 0
            labels = [token if place >= first else IGNORED for place, token in enumerate(ids[1:])]
            return ids, [0] * len(ids), [*labels, IGNORED]
        pair = (example.text,) if example.text_pair is None else (example.text, example.text_pair)
        found = self._tokenizer.encode(*pair)
        return found.ids, found.type_ids, example.label

    def _prompt_and_answer(self, example: Example) -> tuple[list[int], list[int]]:
        if example.text_pair is None:
            return self._tokenizer.encode(example.text).ids, []
        self._tokenizer.no_truncation()
        prompt = self._tokenizer.encode(example.text).ids
        answer = self._tokenizer.encode(example.text_pair, add_special_tokens=False).ids
        return truncate_prompt_and_answer(prompt, answer, self._max_tokens)


def _batches(encoded: Sequence[tuple[list[int], list[int], Any]], tensors: Sequence[TensorInfo], pad: int) -> Any:
    """Batches of similar length and at most `BATCH_TOKENS` tokens, with an empty KV cache."""
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


def measure(
    data: UserData,
    task: Task,
    before: Callable[[Inputs], Inputs],
    after: Callable[[Inputs], Inputs],
    *,
    inputs: Sequence[TensorInfo],
    adapter: Mapping[str, Array] | None = None,
) -> Accuracy:
    """How often, and with which loss, two implementations give the right answer, and how often the same one."""
    right = {"before": 0, "after": 0}
    loss = {"before": 0.0, "after": 0.0}
    same = total = 0
    for batch in data.measured:
        given = batch.inputs(inputs, adapter)
        answers = {}
        counted = batch.labels != IGNORED
        labels = batch.labels[counted]
        for name, run in (("before", before), ("after", after)):
            logits = run(given)["logits"][counted].astype(np.float64)
            answers[name] = logits.argmax(axis=-1)
            top = logits.max(axis=-1, keepdims=True)
            log_sum = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
            loss[name] += float((log_sum - np.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]).sum())
            right[name] += int((answers[name] == labels).sum())
        same += int((answers["before"] == answers["after"]).sum())
        total += len(labels)
    return Accuracy(
        metric=_METRICS[task],
        before=right["before"] / total,
        after=right["after"] / total,
        loss_before=loss["before"] / total,
        loss_after=loss["after"] / total,
        agreement=same / total,
        num_answers=total,
        held_out=data.held_out,
    )

"""Tokenised examples, and batches of them that repeat exactly. No text remains here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedspine_edge.data.examples import Example
from fedspine_edge.data.targets import IGNORED, answered_within, word_targets

Ints = npt.NDArray[np.int64]

_BUCKET_BATCHES = 16
"""Batches among which examples are sorted by length: enough to remove most padding, few enough to stay shuffled."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids; `token_type_ids` is None for tokenizers without segments.

    `token_labels`, where tokens have labels of their own, is as long as `input_ids`; IGNORED ones do not count.
    """

    input_ids: list[int] = field(repr=False)
    label: int
    token_type_ids: list[int] | None = field(default=None, repr=False)
    token_labels: list[int] | None = field(default=None, repr=False)


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length_tokens: int, *, causal: bool = False
) -> list[Encoded]:
    """Tokenise once, truncated to `max_length_tokens`, unpadded. `tokenizer` is a transformers tokenizer.

    With `causal` a pair is a prompt and its answer: only the answer and the end token are to be predicted, and a
    prompt that is too long loses its beginning. Of a word's tokens the first carries its label.
    """
    if not examples:
        return []
    if examples[0].words:
        return _encode_words(examples, tokenizer, max_length_tokens)
    if causal and examples[0].text_pair is not None:
        return [_encode_answer(example, tokenizer, max_length_tokens) for example in examples]
    texts = [example.text for example in examples]
    pairs = [example.text_pair for example in examples]
    paired = pairs[0] is not None
    encoded = tokenizer(texts, pairs if paired else None, truncation=True, max_length=max_length_tokens)
    segments = encoded.get("token_type_ids")
    return [
        Encoded(list(ids), example.label, None if segments is None else list(segments[i]))
        for i, (ids, example) in enumerate(zip(encoded["input_ids"], examples))
    ]


def _encode_words(examples: Sequence[Example], tokenizer: Any, max_length_tokens: int) -> list[Encoded]:
    encoded = tokenizer(
        [list(example.words) for example in examples],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length_tokens,
    )
    segments = encoded.get("token_type_ids")
    return [
        Encoded(
            list(encoded["input_ids"][i]),
            0,
            None if segments is None else list(segments[i]),
            word_targets(encoded.word_ids(i), example.word_labels),
        )
        for i, example in enumerate(examples)
    ]


def _encode_answer(example: Example, tokenizer: Any, max_length_tokens: int) -> Encoded:
    prompt = list(tokenizer(example.text)["input_ids"])
    answer = list(tokenizer(example.text_pair, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        answer.append(int(tokenizer.eos_token_id))
    prompt, answer = answered_within(prompt, answer, max_length_tokens)
    return Encoded([*prompt, *answer], 0, None, [IGNORED] * len(prompt) + answer)


def collate(encoded: Sequence[Encoded], indices: Iterable[int], pad_id: int) -> dict[str, Ints]:
    """One batch padded to its own longest example: int64 arrays (batch, length); `labels` is (batch,).

    Where tokens have labels of their own, `labels` is (batch, length), IGNORED on padding.
    """
    chosen = [encoded[i] for i in indices]
    length = max(len(example.input_ids) for example in chosen)
    batch = {
        "input_ids": np.full((len(chosen), length), pad_id, dtype=np.int64),
        "attention_mask": np.zeros((len(chosen), length), dtype=np.int64),
        "labels": np.array([example.label for example in chosen], dtype=np.int64),
    }
    if chosen[0].token_labels is not None:
        batch["labels"] = np.full((len(chosen), length), IGNORED, dtype=np.int64)
    if chosen[0].token_type_ids is not None:
        batch["token_type_ids"] = np.zeros((len(chosen), length), dtype=np.int64)
    for row, example in enumerate(chosen):
        n = len(example.input_ids)
        batch["input_ids"][row, :n] = example.input_ids
        batch["attention_mask"][row, :n] = 1
        if example.token_labels is not None:
            batch["labels"][row, :n] = example.token_labels
        if example.token_type_ids is not None:
            batch["token_type_ids"][row, :n] = example.token_type_ids
    return batch


def pack(encoded: Sequence[Encoded], indices: Iterable[int], pad_id: int, max_tokens: int) -> dict[str, Ints]:
    """One causal batch whose rows hold several examples each, up to `max_tokens`: as `collate`, less padding.

    `position_ids` start anew in every example and `segments` (rows, tokens) numbers the examples of a row from 1, 0 for
    padding. No token is asked to predict the beginning of the next example.
    """
    rows = _fullest([encoded[i] for i in indices], max_tokens)
    length = max(sum(len(x.input_ids) for x in row) for row in rows)
    batch = {name: np.zeros((len(rows), length), dtype=np.int64) for name in ("position_ids", "segments")}
    batch["input_ids"] = np.full((len(rows), length), pad_id, dtype=np.int64)
    batch["labels"] = np.full((len(rows), length), IGNORED, dtype=np.int64)
    for r, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples, start=1):
            where = slice(start, start := start + len(example.input_ids))
            labels: list[int] = example.input_ids if example.token_labels is None else example.token_labels
            batch["input_ids"][r, where] = example.input_ids
            batch["labels"][r, where] = [IGNORED, *labels[1:]]
            batch["position_ids"][r, where] = np.arange(len(example.input_ids))
            batch["segments"][r, where] = number
    return batch


def _fullest(examples: Sequence[Encoded], max_tokens: int) -> list[list[Encoded]]:
    """The examples in rows of the width that leaves the least padding; one to a row is among the choices."""
    ordered = sorted(examples, key=lambda x: len(x.input_ids), reverse=True)
    longest, total = len(ordered[0].input_ids), sum(len(x.input_ids) for x in ordered)
    widths = {max(longest, -(-total // count)) for count in range(1, len(ordered) + 1)}
    choices = [_first_fit(ordered, width) for width in sorted(widths) if width <= max(longest, max_tokens)]
    return min(choices, key=lambda rows: len(rows) * max(sum(len(x.input_ids) for x in row) for row in rows))


def _first_fit(ordered: Sequence[Encoded], width: int) -> list[list[Encoded]]:
    rows: list[list[Encoded]] = []
    free: list[int] = []
    for example in ordered:
        size = len(example.input_ids)
        row = next((i for i, left in enumerate(free) if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(width)
        rows[row].append(example)
        free[row] -= size
    return rows


class BatchOrder:
    """Which examples make up the batch of a step: a pure function of (lengths, batch size, seed, step).

    So a device that lost power sees the same batches again. Each epoch is shuffled; within stretches of
    16 batches examples are grouped by length, so that little is computed on padding; batches are shuffled again.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size = min(batch_size, len(lengths))
        self._seed = seed
        self.batches_per_epoch = len(lengths) // self._batch_size
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def indices(self, step: int) -> Ints:
        """Positions (batch_size,) of the examples of `step` (from 0); fewer when there are fewer examples."""
        return self._epoch(step // self.batches_per_epoch)[step % self.batches_per_epoch]

    def _shuffle(self, epoch: int) -> list[Ints]:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self._lengths.size)[: self.batches_per_epoch * self._batch_size]
        stretch = _BUCKET_BATCHES * self._batch_size
        batches: list[Ints] = []
        for start in range(0, order.size, stretch):
            part = order[start : start + stretch]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += [part[i : i + self._batch_size] for i in range(0, part.size, self._batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(encoded: Sequence[Encoded], batch_size: int) -> Iterator[Ints]:
    """Every example once, sorted by length, so that batches hold almost no padding."""
    order = np.argsort([len(example.input_ids) for example in encoded], kind="stable")
    for start in range(0, order.size, batch_size):
        yield order[start : start + batch_size]

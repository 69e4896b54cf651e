"""Tokenized examples, padded and packed batches of them, and a reproducible order of batches."""

from __future__ import annotations

import logging
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from fedspine_edge.data.examples import Example
from fedspine_edge.data.targets import IGNORED, truncate_prompt_and_answer, word_targets

Ints = npt.NDArray[np.int64]

log = logging.getLogger(__name__)

_CHUNK_EXAMPLES = 1000
"""Texts tokenized at a time, which bounds the memory of the tokenizer's lists."""

_EXAMPLES_PER_LOG_LINE = 50_000

_BUCKET_BATCHES = 16
"""Batches within which examples are sorted by length: enough to remove most padding, few enough to stay shuffled."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids, without its text.

    Attributes:
        input_ids: Token ids.
        label: Class of the text; 0 for other tasks.
        token_type_ids: Segment of each token; None for tokenizers without segments.
        token_labels: Label of each token, or IGNORED; None if tokens have no labels of their own.
    """

    input_ids: list[int] = field(repr=False)
    label: int
    token_type_ids: list[int] | None = field(default=None, repr=False)
    token_labels: list[int] | None = field(default=None, repr=False)


class EncodedExamples(Sequence[Encoded]):
    """Tokenized examples in flat arrays of 4 bytes per token, where Python lists would take about 50.

    Indexing returns an `Encoded` with lists of its own.

    Args:
        examples: Examples of one task and one tokenizer.
    """

    def __init__(self, examples: Iterable[Encoded] = ()) -> None:
        self._input_ids = array("i")
        self._token_type_ids = array("B")
        self._token_labels = array("i")
        self._ends = array("q", [0])
        self._labels = array("q")
        self._has_segments = self._has_token_labels = False
        self.extend(examples)

    def extend(self, examples: Iterable[Encoded]) -> None:
        """Append examples."""
        for example in examples:
            if not self._labels:
                self._has_segments = example.token_type_ids is not None
                self._has_token_labels = example.token_labels is not None
            self._input_ids.extend(example.input_ids)
            self._token_type_ids.extend(example.token_type_ids or ())
            self._token_labels.extend(example.token_labels or ())
            self._labels.append(example.label)
            self._ends.append(len(self._input_ids))

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> EncodedExamples: ...

    def __getitem__(self, index: int | slice) -> Encoded | EncodedExamples:
        if isinstance(index, slice):
            return EncodedExamples(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        tokens = slice(self._ends[index], self._ends[index + 1])
        return Encoded(
            self._input_ids[tokens].tolist(),
            self._labels[index],
            self._token_type_ids[tokens].tolist() if self._has_segments else None,
            self._token_labels[tokens].tolist() if self._has_token_labels else None,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    @property
    def lengths(self) -> Ints:
        """Number of tokens of each example."""
        ends = np.asarray(self._ends, dtype=np.int64)
        return ends[1:] - ends[:-1]

    @property
    def has_targets(self) -> bool:
        """Whether a causal language model has a token to predict: one after the first that is not ignored."""
        if not self._has_token_labels:
            return bool((self.lengths > 1).any())
        targets = np.frombuffer(self._token_labels, dtype=np.intc) != IGNORED
        starts = np.asarray(self._ends[:-1], dtype=np.int64)
        targets[starts[self.lengths > 0]] = False
        return bool(targets.any())

    @property
    def largest_token(self) -> int:
        """Largest token id, or -1 without tokens."""
        return int(np.frombuffer(self._input_ids, dtype=np.intc).max()) if self._input_ids else -1

    @property
    def size_bytes(self) -> int:
        """Memory of the arrays in bytes."""
        arrays = (self._input_ids, self._token_type_ids, self._token_labels, self._ends, self._labels)
        return sum(map(sys.getsizeof, arrays))


def lengths_of(encoded: Sequence[Encoded]) -> Ints:
    """Return the number of tokens of each example."""
    if isinstance(encoded, EncodedExamples):
        return encoded.lengths
    return np.array([len(example.input_ids) for example in encoded], dtype=np.int64)


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length_tokens: int, *, causal: bool = False, segments: bool = True
) -> EncodedExamples:
    """Tokenize examples without padding, truncated to `max_length_tokens`.

    Args:
        examples: Examples of one task.
        tokenizer: Tokenizer of transformers.
        max_length_tokens: Maximum length in tokens.
        causal: Whether a pair is a prompt and its answer. Only the answer and the end token are then predicted, and a
            prompt that is too long loses its beginning.
        segments: Whether the model has an input for the `token_type_ids` of the tokenizer.

    The label of a word belongs to its first token.
    """
    encoded = EncodedExamples()
    for start in range(0, len(examples), _CHUNK_EXAMPLES):
        chunk = examples[start : start + _CHUNK_EXAMPLES]
        if chunk[0].words:
            encoded.extend(_encode_words(chunk, tokenizer, max_length_tokens, segments))
        elif causal and chunk[0].text_pair is not None:
            encoded.extend(_encode_answer(example, tokenizer, max_length_tokens) for example in chunk)
        else:
            encoded.extend(_encode_texts(chunk, tokenizer, max_length_tokens, segments))
        done = start + len(chunk)
        if done % _EXAMPLES_PER_LOG_LINE == 0:
            log.info("tokenized %d of %d texts", done, len(examples))
    return encoded


def _encode_texts(examples: Sequence[Example], tokenizer: Any, max_length_tokens: int, segments: bool) -> list[Encoded]:
    texts = [example.text for example in examples]
    pairs = [example.text_pair for example in examples]
    paired = pairs[0] is not None
    encoded = tokenizer(texts, pairs if paired else None, truncation=True, max_length=max_length_tokens)
    token_types = encoded.get("token_type_ids") if segments else None
    return [
        Encoded(list(ids), example.label, None if token_types is None else list(token_types[i]))
        for i, (ids, example) in enumerate(zip(encoded["input_ids"], examples))
    ]


def _encode_words(examples: Sequence[Example], tokenizer: Any, max_length_tokens: int, segments: bool) -> list[Encoded]:
    encoded = tokenizer(
        [list(example.words) for example in examples],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length_tokens,
    )
    token_types = encoded.get("token_type_ids") if segments else None
    return [
        Encoded(
            list(encoded["input_ids"][i]),
            0,
            None if token_types is None else list(token_types[i]),
            word_targets(encoded.word_ids(i), example.word_labels),
        )
        for i, example in enumerate(examples)
    ]


def _encode_answer(example: Example, tokenizer: Any, max_length_tokens: int) -> Encoded:
    prompt = list(tokenizer(example.text, verbose=False)["input_ids"])  # no warning about texts to be truncated
    answer = list(tokenizer(example.text_pair, add_special_tokens=False, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        answer.append(int(tokenizer.eos_token_id))
    prompt, answer = truncate_prompt_and_answer(prompt, answer, max_length_tokens)
    return Encoded([*prompt, *answer], 0, None, [IGNORED] * len(prompt) + answer)


def collate(encoded: Sequence[Encoded], indices: Iterable[int], pad_id: int) -> dict[str, Ints]:
    """Return one batch padded to its longest example, as int64 arrays (batch, length).

    `labels` is (batch,), or (batch, length) with IGNORED on padding if tokens have labels of their own.
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
    """Return one causal batch whose rows of up to `max_tokens` hold several examples each.

    `position_ids` restart in every example. `segments` (rows, tokens) numbers the examples of a row from 1 and is 0 on
    padding. No token predicts the beginning of the next example.
    """
    rows = _pack_rows([encoded[i] for i in indices], max_tokens)
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


def _pack_rows(examples: Sequence[Encoded], max_tokens: int) -> list[list[Encoded]]:
    """Distribute the examples over rows of the width with the least padding; one example per row is a candidate."""
    ordered = sorted(examples, key=lambda x: len(x.input_ids), reverse=True)
    longest, total = len(ordered[0].input_ids), sum(len(x.input_ids) for x in ordered)
    widths = {max(longest, -(-total // count)) for count in range(1, len(ordered) + 1)}
    candidates = [_first_fit(ordered, width) for width in sorted(widths) if width <= max(longest, max_tokens)]
    return min(candidates, key=lambda rows: len(rows) * max(sum(len(x.input_ids) for x in row) for row in rows))


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
    """The examples in the batch of each step, a pure function of (lengths, batch size, seed, step).

    A device that lost power therefore sees the same batches again. Every epoch is shuffled. Within chunks of 16
    batches, examples are sorted by length to avoid padding, and the batches are shuffled again.
    """

    def __init__(self, lengths: Sequence[int] | Ints, batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size = min(batch_size, len(lengths))
        self._seed = seed
        self.batches_per_epoch = len(lengths) // self._batch_size
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def indices(self, step: int) -> Ints:
        """Return the positions (batch_size,) of the examples of `step` (from 0); fewer if there are fewer examples."""
        return self._epoch(step // self.batches_per_epoch)[step % self.batches_per_epoch]

    def _shuffle(self, epoch: int) -> list[Ints]:
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self._lengths.size)[: self.batches_per_epoch * self._batch_size]
        chunk_size = _BUCKET_BATCHES * self._batch_size
        batches: list[Ints] = []
        for start in range(0, order.size, chunk_size):
            part = order[start : start + chunk_size]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += [part[i : i + self._batch_size] for i in range(0, part.size, self._batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(encoded: Sequence[Encoded], batch_size: int) -> Iterator[Ints]:
    """Yield batches with every example once, sorted by length so that there is almost no padding."""
    order = np.argsort(lengths_of(encoded), kind="stable")
    for start in range(0, order.size, batch_size):
        yield order[start : start + batch_size]

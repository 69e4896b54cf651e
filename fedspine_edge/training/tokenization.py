"""Tokenization of a task's examples for one model. Examples that the model cannot read raise before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine_edge.config import Task, TrainingSettings
from fedspine_edge.data.examples import Example
from fedspine_edge.errors import CheckpointError, ConfigError, DataError
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.training.batching import EncodedExamples, encode

DEFAULT_LENGTH_TOKENS = TrainingSettings().max_length_tokens


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizer of a model with the limits of the model.

    Attributes:
        tokenizer: Tokenizer of transformers.
        task: Task of the model.
        hard_max_tokens: Maximum length in tokens, or None if positions are computed.
        vocabulary: Number of tokens that have an embedding.
        pad_id: Token that fills short rows, for which the model has an embedding.
        segments: Whether the model distinguishes the segments of a pair.
        name: Name of the model, for errors.
    """

    tokenizer: Any
    task: Task
    hard_max_tokens: int | None
    vocabulary: int
    pad_id: int
    segments: bool
    name: str

    @classmethod
    def from_model(cls, model: PrunableModel, tokenizer: Any) -> TextEncoder:
        """Return the encoder of `model`, without keeping a reference to the model."""
        limit = model.architecture.hard_max_tokens(model.module.config)
        vocabulary = int(model.module.get_input_embeddings().weight.shape[0])
        # A token that was added to the tokenizer may have no embedding. Padding is masked, so any token will do.
        candidates = (tokenizer.pad_token_id, model.module.config.pad_token_id, 0)
        pad_id = next(int(token) for token in candidates if token is not None and 0 <= int(token) < vocabulary)
        name = str(model.folder or model.base or "the model")
        # Training feeds what a bundle feeds, which the family decides, whatever the tokenizer returns.
        segments = model.architecture.num_token_types(model.module.config) > 1
        return cls(tokenizer, model.task, limit, vocabulary, pad_id, segments, name)

    def max_length_tokens(self, requested: int | None = None) -> int:
        """Return the maximum length of a text in tokens.

        Args:
            requested: Setting of the user; None for the default of `TrainingSettings`, or the limit of the model if
                that
                is lower.

        Raises `ConfigError` for more tokens than the model has positions.
        """
        if requested is None:
            limit = self.hard_max_tokens
            return DEFAULT_LENGTH_TOKENS if limit is None else min(DEFAULT_LENGTH_TOKENS, limit)
        self._check_length(requested, requested)
        return requested

    def encode(self, examples: Sequence[Example], max_length_tokens: int) -> EncodedExamples:
        """Tokenize and truncate to `max_length_tokens`, which may exceed the model's limit if no text does.

        Raises `DataError` for texts without tokens, `ConfigError` for a token without a position and `CheckpointError`
        for a token without an embedding. On a GPU the last two would end the process.
        """
        encoded = encode(
            examples, self.tokenizer, max_length_tokens, causal=self.task == "causal_lm", segments=self.segments
        )
        lengths = encoded.lengths
        if len(empty := np.flatnonzero(lengths == 0)):
            which = ", ".join(str(index + 1) for index in empty[:5]) + (", …" if len(empty) > 5 else "")
            raise DataError(
                f"{len(empty)} of {len(encoded)} texts have no tokens: the tokenizer drops all of their characters.",
                remedy=f"Remove them from the data: example {which}, counted from 1 without blank lines.",
            )
        if self.task == "causal_lm" and not encoded.has_targets:
            raise DataError(
                "no text has a token to predict: each consists of a single token.",
                remedy="Give texts of at least two tokens, or prompts with answers.",
            )
        self._check_length(int(lengths.max()), max_length_tokens)
        largest = encoded.largest_token
        if largest >= self.vocabulary:
            raise CheckpointError(
                f"the tokenizer gives token {largest}, but the model has embeddings for {self.vocabulary} tokens.",
                remedy=f"The tokenizer files in {self.name} belong to another model; copy the right ones.",
            )
        return encoded

    def _check_length(self, tokens: int, requested: int) -> None:
        if self.hard_max_tokens is not None and tokens > self.hard_max_tokens:
            raise ConfigError(
                f"`max_length_tokens` is {requested}, but {self.name} has positions for {self.hard_max_tokens} tokens.",
                remedy=f"Use at most {self.hard_max_tokens}.",
            )


class TokenizedSplits:
    """Several sets of examples, which are tokenized when a length is first requested.

    Args:
        texts: Encoder of the model.
        splits: Sets of examples.
    """

    def __init__(self, texts: TextEncoder, *splits: Sequence[Example]) -> None:
        self._texts = texts
        self._splits = splits
        self._cached: tuple[int, list[EncodedExamples]] = (0, [])

    def truncated_to(self, max_length_tokens: int) -> list[EncodedExamples]:
        """Return each set truncated to `max_length_tokens`. Raises as `TextEncoder.encode` does."""
        if self._cached[0] != max_length_tokens:
            encoded = [self._texts.encode(split, max_length_tokens) for split in self._splits]
            self._cached = max_length_tokens, encoded
        return self._cached[1]

"""From a task's data to the tokens that one model can read; what does not fit it is told before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedspine_edge.config import Task, TrainingSettings
from fedspine_edge.data.examples import Example
from fedspine_edge.errors import CheckpointError, ConfigError, DataError
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.training.batching import Encoded, encode

DEFAULT_LENGTH_TOKENS = TrainingSettings().max_length_tokens


@dataclass(frozen=True)
class TextEncoder:
    """How a model reads texts, and which texts and tokens it has room for.

    Attributes:
        tokenizer: The model's transformers tokenizer.
        task: Of the model.
        longest: Tokens of the longest text that its table of positions allows; None where there is none.
        vocabulary: Tokens that it has embeddings for.
        name: Of the model, for errors.
    """

    tokenizer: Any
    task: Task
    longest: int | None
    vocabulary: int
    name: str

    @classmethod
    def of(cls, model: PrunableModel, tokenizer: Any) -> TextEncoder:
        """Those of `model`, without holding on to it."""
        longest = model.architecture.hard_max_tokens(model.module.config)
        vocabulary = int(model.module.get_input_embeddings().weight.shape[0])
        return cls(tokenizer, model.task, longest, vocabulary, str(model.folder or model.base or "the model"))

    @property
    def pad_id(self) -> int:
        """The token that fills short rows."""
        return int(self.tokenizer.pad_token_id)

    def length(self, asked: int | None = None) -> int:
        """Tokens of the longest text: as asked, else the default of `TrainingSettings` or what the positions allow.

        Raises `ConfigError` for more than that.
        """
        if asked is None:
            return DEFAULT_LENGTH_TOKENS if self.longest is None else min(DEFAULT_LENGTH_TOKENS, self.longest)
        self._check_length(asked, asked)
        return asked

    def encode(self, examples: Sequence[Example], max_length_tokens: int) -> list[Encoded]:
        """Tokenize and cut at `max_length_tokens`, which may be more than the positions allow if no text is that long.

        Raises `DataError` for texts without tokens, `ConfigError` for a token without a position, `CheckpointError` for
        one without an embedding; on a GPU the last two would end the process.
        """
        encoded = encode(examples, self.tokenizer, max_length_tokens, causal=self.task == "causal_lm")
        if empty := sum(not example.input_ids for example in encoded):
            raise DataError(
                f"{empty} of {len(encoded)} texts have no tokens: the tokenizer drops all of their characters.",
                remedy="Leave them out.",
            )
        self._check_length(max(len(example.input_ids) for example in encoded), max_length_tokens)
        largest = max(max(example.input_ids) for example in encoded)
        if largest >= self.vocabulary:
            raise CheckpointError(
                f"the tokenizer gives token {largest}, the model has embeddings for {self.vocabulary}.",
                remedy=f"The tokenizer files in {self.name} belong to another model; copy the right ones.",
            )
        return encoded

    def _check_length(self, tokens: int, asked: int) -> None:
        if self.longest is not None and tokens > self.longest:
            raise ConfigError(
                f"`max_length_tokens` is {asked}, {self.name} has positions for {self.longest} tokens.",
                remedy=f"Use at most {self.longest}.",
            )


class TokenizedSplits:
    """Several sets of examples, tokenised when a length is first asked for.

    Args:
        texts: How the model reads.
        sets: Of examples.
    """

    def __init__(self, texts: TextEncoder, *sets: Sequence[Example]) -> None:
        self._texts = texts
        self._sets = sets
        self._found: tuple[int, list[list[Encoded]]] = (0, [])

    def at(self, max_length_tokens: int) -> list[list[Encoded]]:
        """Return each set cut at `max_length_tokens`. Raises as `TextEncoder.encode` does."""
        if self._found[0] != max_length_tokens:
            encoded = [self._texts.encode(one, max_length_tokens) for one in self._sets]
            self._found = max_length_tokens, encoded
        return self._found[1]

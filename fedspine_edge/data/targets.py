"""Targets: the tokens that a model is trained to predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Token = TypeVar("Token")
IGNORED = -100
"""Label of a token without a target, as in torch's cross entropy and in transformers."""


def truncate_prompt_and_answer(
    prompt: list[Token], answer: list[Token], max_tokens: int
) -> tuple[list[Token], list[Token]]:
    """Truncate a prompt and its answer to `max_tokens` tokens.

    The beginning of the prompt is removed first, down to one token, and then the end of the answer.

    Args:
        prompt: Tokens of the prompt, at least one.
        answer: Tokens to predict.
        max_tokens: Largest number of tokens of both together, at least 2.
    """
    answer = answer[: max_tokens - 1]
    return prompt[-(max_tokens - len(answer)) :], answer


def first_tokens(words: Sequence[int | None]) -> dict[int, int]:
    """Return the position of the first token of each word, by word. Truncated words are absent.

    Args:
        words: Word index of each token as returned by tokenizers; None for special tokens.
    """
    first: dict[int, int] = {}
    for position, word in enumerate(words):
        if word is not None:
            first.setdefault(word, position)
    return first


def word_targets(words: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """Return one label per token: that of the word on its first token, IGNORED elsewhere.

    Args:
        words: Word index of each token as returned by tokenizers; None for special tokens.
        labels: Label of each word.
    """
    targets = [IGNORED] * len(words)
    for word, position in first_tokens(words).items():
        targets[position] = labels[word]
    return targets

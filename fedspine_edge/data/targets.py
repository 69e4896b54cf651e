"""Which tokens a model is asked about."""

from __future__ import annotations

from collections.abc import Sequence

IGNORED = -100
"""Label of a token that is not to be predicted, as torch's cross entropy and transformers have it."""


def first_tokens(words: Sequence[int | None]) -> dict[int, int]:
    """Position of every word's first token, which stands for the word; a word that was cut off is absent.

    Args:
        words: For each token the word that it belongs to, None for special tokens, as tokenizers say.
    """
    first: dict[int, int] = {}
    for position, word in enumerate(words):
        if word is not None:
            first.setdefault(word, position)
    return first


def word_targets(words: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """One label per token: a word's own on its first token, IGNORED elsewhere. `words` as for `first_tokens`."""
    targets = [IGNORED] * len(words)
    for word, position in first_tokens(words).items():
        targets[position] = labels[word]
    return targets

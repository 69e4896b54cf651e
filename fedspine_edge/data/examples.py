"""One example of a data set, and the split into training and held-out examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedspine_edge.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text, pair of texts, or list of labelled words. `repr` does not show the texts.

    Attributes:
        text: The text, or the prompt of a language model.
        label: Class index; 0 for language models and labelled words.
        text_pair: Second text, or the answer of a language model.
        words: Words of token classification.
        word_labels: Class index of each word.
    """

    text: str = field(repr=False)
    label: int
    text_pair: str | None = field(default=None, repr=False)
    words: tuple[str, ...] = field(default=(), repr=False)
    word_labels: tuple[int, ...] = field(default=(), repr=False)

    @property
    def size_bytes(self) -> int:
        """Approximate memory in bytes."""
        texts = (self.text, self.text_pair or "", *self.words)
        return sys.getsizeof(self) + sum(map(sys.getsizeof, texts)) + 8 * (1 + 2 * len(self.words))


def split_holdout(
    examples: Sequence[Example], holdout: int, seed: int, *, where: str
) -> tuple[list[Example], list[Example]]:
    """Split into (training, held-out) examples. The split depends on the seed only.

    Args:
        examples: All examples.
        holdout: Number of held-out examples.
        seed: Seed for the selection.
        where: Name of the data, for errors.

    Raises `DataError` when no example is left to train on.
    """
    if len(examples) < holdout + 1:
        raise DataError(
            f"{where} has {len(examples)} examples; holding out {holdout} leaves none to train on.",
            remedy="Lower `holdout` or provide more examples.",
        )
    order = np.random.default_rng([seed, 0x5E1]).permutation(len(examples))
    held_out = sorted(order[:holdout].tolist())
    training = sorted(order[holdout:].tolist())
    return [examples[i] for i in training], [examples[i] for i in held_out]

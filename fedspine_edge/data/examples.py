"""One labelled example, and how a set of them is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedspine_edge.errors import DataError


@dataclass(frozen=True)
class Example:
    """One labelled text, pair of texts, or text as words that each have a label. The texts are kept out of `repr`."""

    text: str = field(repr=False)
    label: int
    text_pair: str | None = field(default=None, repr=False)
    words: tuple[str, ...] = field(default=(), repr=False)
    word_labels: tuple[int, ...] = field(default=(), repr=False)


def split(examples: Sequence[Example], holdout: int, seed: int, *, where: str) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples, the same for the same seed. Raises `DataError` when too few are there."""
    if len(examples) < holdout + 1:
        raise DataError(
            f"{where} has {len(examples)} examples; holding {holdout} out leaves none to train on.",
            remedy="Lower `holdout` or provide more examples.",
        )
    order = np.random.default_rng([seed, 0x5E1]).permutation(len(examples))
    held = sorted(order[:holdout].tolist())
    rest = sorted(order[holdout:].tolist())
    return [examples[i] for i in rest], [examples[i] for i in held]

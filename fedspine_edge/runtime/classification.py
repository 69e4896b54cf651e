"""What a classifier says of texts, and a token classifier of each of their words. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.config import Task
from fedspine_edge.data.targets import first_tokens
from fedspine_edge.errors import ConfigError, DataError, DeployError
from fedspine_edge.runtime.latency import Result
from fedspine_edge.runtime.text import Text, Words

if TYPE_CHECKING:
    from fedspine_edge.runtime.session import Session


class Prediction(Result, frozen=True, kw_only=True):
    """The answer for one text: the label, its softmax probability, and its index in the logits."""

    label: str
    probability: float
    index: int


class WordLabel(Prediction, frozen=True, kw_only=True):
    """The answer for one word of a text."""

    word: str


def classify(session: Session, texts: Sequence[Text], batch_size: int) -> list[Prediction]:
    """One answer per text; see `Session.classify`."""
    _check(session, "classification", texts, batch_size)
    logits = _logits(session, session.encode(texts), batch_size)
    return [Prediction(**_answer(session, row)) for row in logits]


def label_words(session: Session, texts: Sequence[Words], batch_size: int) -> list[list[WordLabel]]:
    """One answer per word of every text; see `Session.label_words`."""
    _check(session, "token_classification", texts, batch_size)
    encodings = session.encode_words(texts)
    firsts = [first_tokens(encoding.word_ids) for encoding in encodings]
    for number, (words, first) in enumerate(zip(texts, firsts), start=1):
        if lost := [place for place in range(len(words)) if place not in first]:
            raise DataError(
                f"Word {lost[0] + 1} of text {number} has no tokens: the tokenizer drops all of its characters.",
                remedy="Leave it out.",
            )
    return [
        [WordLabel(word=word, **_answer(session, rows[first[place]])) for place, word in enumerate(words)]
        for words, first, rows in zip(texts, firsts, _logits(session, encodings, batch_size))
    ]


def _check(session: Session, task: Task, texts: Sequence[Any], batch_size: int) -> None:
    calls = {"classification": "classify()", "token_classification": "label_words()", "causal_lm": "generate()"}
    if session.manifest.task != task:
        raise DeployError(
            f"{calls[task]} needs a {task} model; this bundle holds a {session.manifest.task} model.",
            remedy=f"Call {calls[session.manifest.task]}.",
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
    if not texts:
        raise DataError(f"{calls[task]} was given an empty list.", remedy="Give at least one text.")


def _logits(session: Session, encodings: Sequence[Any], batch_size: int) -> list[Array]:
    """The logits of every encoding, in the given order; at most `batch_size` of similar length run together."""
    by_length = sorted(range(len(encodings)), key=lambda index: len(encodings[index].ids))
    step = min(batch_size, session.live_runner().max_batch or batch_size)
    found: dict[int, Array] = {}
    for start in range(0, len(encodings), step):
        chosen = by_length[start : start + step]
        found.update(zip(chosen, session.run(**session.codec.padded([encodings[index] for index in chosen]))))
    return [found[index] for index in range(len(encodings))]


def _answer(session: Session, logits: Array) -> dict[str, Any]:
    """The fields of a `Prediction` from the logits of one answer, (labels,)."""
    scores = np.exp(logits - logits.max())
    index = int(scores.argmax())
    names = session.manifest.labels
    return {
        "label": names[index] if names else str(index),
        "probability": float(scores[index] / scores.sum()),
        "index": index,
    }

"""Classification of texts, and of the words of a text."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.config import Task
from fedspine_edge.data.targets import first_tokens
from fedspine_edge.errors import ConfigError, DataError, DeployError
from fedspine_edge.runtime.inputs import require_number
from fedspine_edge.runtime.loaded_model import LoadedModel
from fedspine_edge.runtime.results import Prediction, WordLabel
from fedspine_edge.runtime.text import Text, Words


def classify(model: LoadedModel, texts: Sequence[Text], batch_size: int) -> list[Prediction]:
    """Return one prediction per text; see `Session.classify`."""
    _check_call(model, "classification", texts, batch_size)
    logits = _batched_logits(model, model.codec.encode(texts), batch_size)
    return [Prediction(**_top_class(model, row)) for row in logits]


def label_words(model: LoadedModel, texts: Sequence[Words], batch_size: int) -> list[list[WordLabel]]:
    """Return one label per word of every text; see `Session.label_words`."""
    _check_call(model, "token_classification", texts, batch_size)
    encodings = model.codec.encode_words(texts)
    firsts = [first_tokens(encoding.word_ids) for encoding in encodings]
    for number, (words, first) in enumerate(zip(texts, firsts), start=1):
        if missing := [index for index in range(len(words)) if index not in first]:
            raise DataError(
                f"Word {missing[0] + 1} of text {number} has no tokens: the tokenizer removes all of its characters.",
                remedy="Leave it out.",
            )
    return [
        [WordLabel(word=word, **_top_class(model, rows[first[index]])) for index, word in enumerate(words)]
        for words, first, rows in zip(texts, firsts, _batched_logits(model, encodings, batch_size))
    ]


def _check_call(model: LoadedModel, task: Task, texts: Sequence[Any], batch_size: int) -> None:
    calls = {"classification": "classify()", "token_classification": "label_words()", "causal_lm": "generate()"}
    if model.manifest.task != task:
        raise DeployError(
            f"{calls[task]} needs a {task} model; this bundle contains a {model.manifest.task} model.",
            remedy=f"Call {calls[model.manifest.task]}.",
        )
    require_number("batch_size", batch_size, numbers.Integral)
    if batch_size < 1:
        raise ConfigError(f"`batch_size` is {batch_size}.", remedy="Give at least 1.")
    if not texts:
        raise DataError(f"{calls[task]} received an empty list.", remedy="Give at least one text.")


def _batched_logits(model: LoadedModel, encodings: Sequence[Any], batch_size: int) -> list[Array]:
    """Return the logits of every encoding in the given order. Batches contain encodings of similar length."""
    by_length = sorted(range(len(encodings)), key=lambda index: len(encodings[index].ids))
    step = min(batch_size, model.runner.max_batch or batch_size)
    logits: dict[int, Array] = {}
    for start in range(0, len(encodings), step):
        batch = by_length[start : start + step]
        logits.update(zip(batch, model.run(model.codec.pad([encodings[index] for index in batch]))))
    return [logits[index] for index in range(len(encodings))]


def _top_class(model: LoadedModel, logits: Array) -> dict[str, Any]:
    """Return the fields of a `Prediction` for logits of shape (labels,)."""
    exponentials = np.exp(logits - logits.max())
    index = int(exponentials.argmax())
    names = model.manifest.labels
    return {
        "label": names[index] if names else str(index),
        "probability": float(exponentials[index] / exponentials.sum()),
        "index": index,
    }

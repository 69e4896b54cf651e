"""Examples from Python objects, and from functions of the user."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.data.examples import Example
from fedspine_edge.data.row_validation import RowValidator
from fedspine_edge.errors import DataError


def read_items(items: Iterable[Any], validator: RowValidator) -> list[Example]:
    """Return the examples of `items`. Accepts and raises what `read_examples` documents."""
    examples: list[Example] = []
    for row, item in enumerate(items, start=1):
        with validator.collect_error():
            example = _labelled_words(item, validator, row) if validator.has_words else _text(item, validator, row)
            if examples and (example.text_pair is None) != (examples[0].text_pair is None):
                raise validator.error(
                    "single texts and pairs are mixed.", "Give every example a pair, or none.", row=row
                )
            examples.append(example)
    return validator.finish(examples)


def _labelled_words(item: Any, validator: RowValidator, row: int) -> Example:
    if isinstance(item, Example):
        item = item.words, item.word_labels
    elif isinstance(item, Mapping):
        validator.check_columns([str(key) for key in item], row=row)
        item = item[validator.settings.text], item[validator.settings.label]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise validator.error(
            f"is a {type(item).__name__}, not words with labels.", "Give (words, labels), two lists.", row=row
        )
    return validator.words_example(item[0], item[1], row)


def _text(item: Any, validator: RowValidator, row: int) -> Example:
    settings = validator.settings
    pair_column = settings.text_pair or "text_pair"
    text: Any
    pair: Any
    label: Any
    if isinstance(item, Example):
        text, pair, label = item.text, item.text_pair, item.label
    elif isinstance(item, str) and not validator.has_labels:
        text, pair, label = item, None, 0
    elif isinstance(item, Mapping):
        validator.check_columns([str(key) for key in item], row=row)
        text, pair, label = item[settings.text], item.get(pair_column), item.get(settings.label)
    elif isinstance(item, (tuple, list)) and len(item) == 2 and not validator.has_labels:
        text, pair, label = item[0], item[1], 0
    elif isinstance(item, (tuple, list)) and len(item) in (2, 3):
        text, pair, label = item[0], item[1] if len(item) == 3 else None, item[-1]
    else:
        raise validator.error(
            f"is a {type(item).__name__}, not an example.",
            "Give (text, label), (text, text_pair, label) or mappings with those columns.",
            row=row,
        )
    text = validator.text(text, settings.text, row)
    pair = None if pair is None else validator.text(pair, pair_column, row)
    return Example(text, validator.label(label, row) if validator.has_labels else 0, pair)


def call_by_name(path: str) -> Iterable[Any]:
    """Return the items of the function 'module:function'. Raises `DataError`."""
    module_name, function_name = path.split(":")
    sys.path.append(os.getcwd())  # a console script does not search the current folder for modules
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be imported: {error}.",
            remedy="Write 'module:function'; the module must be importable from the current folder.",
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    return call(function, path)


def call(function: Callable[[], Iterable[Any]], name: str) -> Iterable[Any]:
    """Return the items of a user's function.

    Raises `DataError`, which contains the type and the place of an exception but not its message.
    """
    try:
        return list(function())
    except DataError:
        raise
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
        raise DataError(
            f"{name} raised {type(error).__name__}{place}.",
            remedy="It must take no arguments and return (text, label) or (text, text_pair, label) items.",
        ) from None

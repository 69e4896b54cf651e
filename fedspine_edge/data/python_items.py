"""Examples from Python: items of several forms, and functions of the user's that return them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.data.examples import Example
from fedspine_edge.data.row_validation import Source
from fedspine_edge.errors import DataError


def read_items(items: Iterable[Any], source: Source) -> list[Example]:
    """Every example of `items`; see `examples_of` for what an item can be, and for the errors."""
    examples: list[Example] = []
    for row, item in enumerate(items, start=1):
        with source.going_on():
            example = _labelled_words(item, source, row) if source.words else _text(item, source, row)
            if examples and (example.text_pair is None) != (examples[0].text_pair is None):
                raise source.fail("single texts and pairs are mixed.", "Give every example a pair, or none.", row=row)
            examples.append(example)
    return source.checked(examples)


def _labelled_words(item: Any, source: Source, row: int) -> Example:
    if isinstance(item, Example):
        item = item.words, item.word_labels
    elif isinstance(item, Mapping):
        source.check_columns([str(key) for key in item], row=row)
        item = item[source.settings.text], item[source.settings.label]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise source.fail(
            f"is a {type(item).__name__}, not words with labels.", "Give (words, labels), two lists.", row=row
        )
    return source.words_example(item[0], item[1], row)


def _text(item: Any, source: Source, row: int) -> Example:
    settings = source.settings
    pair_column = settings.text_pair or "text_pair"
    text: Any
    pair: Any
    label: Any
    if isinstance(item, Example):
        text, pair, label = item.text, item.text_pair, item.label
    elif isinstance(item, str) and not source.labelled:
        text, pair, label = item, None, 0
    elif isinstance(item, Mapping):
        source.check_columns([str(key) for key in item], row=row)
        text, pair, label = item[settings.text], item.get(pair_column), item.get(settings.label)
    elif isinstance(item, (tuple, list)) and len(item) == 2 and not source.labelled:
        text, pair, label = item[0], item[1], 0
    elif isinstance(item, (tuple, list)) and len(item) in (2, 3):
        text, pair, label = item[0], item[1] if len(item) == 3 else None, item[-1]
    else:
        raise source.fail(
            f"is a {type(item).__name__}, not an example.",
            "Give (text, label), (text, text_pair, label) or mappings with those columns.",
            row=row,
        )
    text = source.text(text, settings.text, row)
    pair = None if pair is None else source.text(pair, pair_column, row)
    return Example(text, source.label(label, row) if source.labelled else 0, pair)


def call_by_name(path: str) -> Iterable[Any]:
    """The items that the function 'module:function' returns. Raises `DataError`."""
    module_name, function_name = path.split(":")
    sys.path.append(os.getcwd())  # a console script does not look for modules where the user stands
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be imported: {error}.",
            remedy="Write 'module:function'; the module must be importable from the working folder.",
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    return call(function, path)


def call(function: Callable[[], Iterable[Any]], name: str) -> Iterable[Any]:
    """The items of a user's function; of its exceptions only the kind and the place are told. Raises `DataError`."""
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

"""Examples from Python: items of several forms, and functions of the user's that return them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.data.examples import Example
from fedspine_edge.data.rows import Source
from fedspine_edge.errors import DataError


def read_items(items: Iterable[Any], source: Source) -> list[Example]:
    """Every example of `items`; see `examples_of` for what an item can be, and for the errors."""
    examples: list[Example] = []
    pair = source.settings.text_pair or "text_pair"
    for row, item in enumerate(items, start=1):
        if source.words and not isinstance(item, Example):
            if isinstance(item, Mapping):
                source.check_columns([str(key) for key in item], row=row)
                item = (item[source.settings.text], item[source.settings.label])
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise source.fail(
                    f"is a {type(item).__name__}, not words with labels.", "Give (words, labels), two lists.", row=row
                )
            examples.append(source.words_example(item[0], item[1], row))
            continue
        if isinstance(item, Example):
            record: dict[str, Any] = {"text": item.text, "label": item.label, "pair": item.text_pair}
        elif isinstance(item, str) and not source.labelled:
            record = {"text": item, "label": 0, "pair": None}
        elif isinstance(item, Mapping):
            source.check_columns([str(key) for key in item], row=row)
            settings = source.settings
            record = {"text": item[settings.text], "label": item.get(settings.label), "pair": item.get(pair)}
        elif isinstance(item, (tuple, list)) and len(item) == 2 and not source.labelled:
            record = {"text": item[0], "label": 0, "pair": item[1]}
        elif isinstance(item, (tuple, list)) and len(item) in (2, 3):
            record = {"text": item[0], "label": item[-1], "pair": item[1] if len(item) == 3 else None}
        else:
            raise source.fail(
                f"is a {type(item).__name__}, not an example.",
                "Give (text, label), (text, text_pair, label) or mappings with those columns.",
                row=row,
            )
        text = source.text(record["text"], source.settings.text, row)
        other = None if record["pair"] is None else source.text(record["pair"], pair, row)
        examples.append(Example(text, source.label(record["label"], row) if source.labelled else 0, other))
        if (other is None) != (examples[0].text_pair is None):
            raise source.fail("single texts and pairs are mixed.", "Give every example a pair, or none.", row=row)
    return source.not_empty(examples)


def call_by_name(path: str) -> Iterable[Any]:
    """The items that the function 'module:function' returns. Raises `DataError`."""
    module_name, function_name = path.split(":")
    sys.path.append(os.getcwd())  # a console script does not look for modules where the user stands
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"data.path {path!r} cannot be imported: {error}.",
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

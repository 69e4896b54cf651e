"""Where a user's examples come from: a file, a function, or Python items, told apart here and read in one form.

Training on a device and calibration before an export read the same data through this room. No torch here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Union

import msgspec

from fedspine_edge.config import DataSettings, Task
from fedspine_edge.data.examples import Example
from fedspine_edge.data.files import read_file
from fedspine_edge.data.python_items import call, call_by_name, read_items
from fedspine_edge.data.row_validation import Source

Data = Union[str, "os.PathLike[str]", DataSettings, Iterable[Any], Callable[[], Iterable[Any]]]
"""What the SDK accepts as data: a path, 'module:function', one of these with names of columns (`DataSettings`),
examples, or a callable that returns examples."""

_CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def read(data: Data, columns: DataSettings, task: Task) -> list[Example]:
    """The examples of `data` in the form that `task` has: docs/guides/prepare-data.md. Raises as `examples_of` does."""
    return examples_of(data, columns, labelled=task != "causal_lm", words=task == "token_classification")


def load_examples(settings: DataSettings, *, labelled: bool = True, words: bool = False) -> list[Example]:
    """Every example of `settings.path`: CSV, TSV, JSON lines, Parquet, or 'module:function'.

    Args:
        settings: Path and column names; labels must be integers within 0..num_labels-1.
        labelled: False for plain text (causal language modelling); labels are then 0.
        words: The text column holds a list of words and the label column a list of as many labels (token
            classification; JSON lines and Parquet can hold lists).

    Raises `DataError` naming the file, what is wrong with how many rows and which (in a text file by line, as an
    editor numbers them) and the remedy; `MissingDependency` for Parquet without pyarrow.
    """
    if _CALLABLE.match(settings.path) and not Path(settings.path).exists():
        return read_items(call_by_name(settings.path), Source(settings.path, settings, labelled, words))
    path = Path(settings.path).expanduser()
    unit = "row" if path.suffix.lower() == ".parquet" else "line"
    return read_file(path, Source(f"data file {path}", settings, labelled, words, unit))


def examples_of(data: Data, settings: DataSettings, *, labelled: bool = True, words: bool = False) -> list[Example]:
    """Examples from whatever the SDK's user hands over: see `Data`. Raises as `load_examples` does.

    Items are (text, label), (text, text_pair, label), mappings with the configured columns, or `Example`; with
    `labelled=False` plain strings and (text, text_pair) too; with `words=True` (list of words, list of labels).
    """
    if isinstance(data, DataSettings):
        settings = msgspec.structs.replace(data, num_labels=settings.num_labels)
        data = settings.path
    if isinstance(data, (str, os.PathLike)):
        return load_examples(msgspec.structs.replace(settings, path=os.fspath(data)), labelled=labelled, words=words)
    source = Source("the given examples", settings, labelled, words)
    return read_items(call(data, source.name) if callable(data) else data, source)

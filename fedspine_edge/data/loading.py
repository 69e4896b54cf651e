"""Reading examples from a file, a function or Python objects.

Training on a device, evaluation and calibration before an export read data in the same way.
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
from fedspine_edge.data.file_readers import read_file
from fedspine_edge.data.python_items import call, call_by_name, read_items
from fedspine_edge.data.row_validation import RowValidator

Data = Union[str, "os.PathLike[str]", DataSettings, Iterable[Any], Callable[[], Iterable[Any]]]
"""Data that the public API accepts: a path, a 'module:function', `DataSettings` with a path and column names, an
iterable of examples, or a function that returns one."""

_CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def read_examples(data: Data, columns: DataSettings | None = None, task: Task = "classification") -> list[Example]:
    """Read and validate all examples.

    An item of Python data is (text, label), (text, text_pair, label), a mapping with the configured columns, or an
    `Example`. For causal_lm, plain strings and (prompt, answer) are accepted too. For token_classification, an item is
    (list of words, list of labels).

    Args:
        data: Source of the examples.
        columns: Column names and number of labels. `DataSettings` as `data` bring their own column names. May be
            omitted then.
        task: Task that the examples are for.

    Raises:
        DataError: The data cannot be used. The message names the file, the problems and their rows, in text files by
            the line number that an editor shows.
        MissingDependency: pyarrow is required for Parquet and missing.
    """
    columns = columns or (data if isinstance(data, DataSettings) else DataSettings(path=""))
    if isinstance(data, DataSettings):
        columns = msgspec.structs.replace(data, num_labels=columns.num_labels)
        data = data.path
    if isinstance(data, (str, os.PathLike)):
        return _read_path(os.fspath(data), columns, task)
    validator = RowValidator("the given examples", columns, task)
    return read_items(call(data, validator.name) if callable(data) else data, validator)


def _read_path(path: str, columns: DataSettings, task: Task) -> list[Example]:
    """Read the examples of a file, or of 'module:function'."""
    if _CALLABLE.match(path) and not Path(path).exists():
        return read_items(call_by_name(path), RowValidator(path, columns, task))
    file = Path(path).expanduser()
    unit = "row" if file.suffix.lower() == ".parquet" else "line"
    return read_file(file, RowValidator(f"data file {file}", columns, task, unit))

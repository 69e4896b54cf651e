"""Reading examples from a file, a function or Python objects.

Training on a device, evaluation and calibration before an export read data in the same way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Union

import msgspec

from fedspine_edge.config import DataSettings, Task
from fedspine_edge.data.examples import Example
from fedspine_edge.data.file_readers import read_file
from fedspine_edge.data.python_items import call, call_by_name, read_items
from fedspine_edge.data.row_validation import RowValidator
from fedspine_edge.errors import ConfigError

Data = Union[str, "os.PathLike[str]", DataSettings, Iterable[Any], Callable[[], Iterable[Any]]]
"""Data that the public API accepts: a path, a 'module:function', `DataSettings` with a path and column names, an
iterable of examples, or a function that returns one."""

_LABEL_NAME = re.compile(r"^\w[\w .:+/&-]{0,63}$")
_CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def read_examples(
    data: Data, columns: DataSettings | None = None, task: Task = "classification", *, skip_bad_rows: bool = False
) -> list[Example]:
    """Read and validate all examples.

    An item of Python data is (text, label), (text, text_pair, label), a mapping with the configured columns, or an
    `Example`. For causal_lm, plain strings and (prompt, answer) are accepted too. For token_classification, an item is
    (list of words, list of labels).

    Args:
        data: Source of the examples.
        columns: Column names and number of labels. `DataSettings` as `data` bring their own column names. May be
            omitted then.
        task: Task that the examples are for.
        skip_bad_rows: Whether to log unusable rows as a warning instead of raising, if at least one row is usable.

    Raises:
        DataError: The data cannot be used. The message names the file, the problems and their rows, in text files by
            the line number that an editor shows.
        MissingDependency: pyarrow is required for Parquet and missing.
    """
    columns = columns or (data if isinstance(data, DataSettings) else DataSettings(path=""))
    if isinstance(data, DataSettings):
        labels = data.labels or columns.labels
        columns = msgspec.structs.replace(data, num_labels=columns.num_labels, labels=labels)
        data = data.path
    if isinstance(data, (str, os.PathLike)):
        return _read_path(os.fspath(data), columns, task, skip_bad_rows)
    validator = RowValidator("the given examples", columns, task, skip_bad_rows=skip_bad_rows)
    return read_items(call(data, validator.name) if callable(data) else data, validator)


def _read_path(
    path: str, columns: DataSettings, task: Task, skip_bad_rows: bool, names: set[str] | None = None
) -> list[Example]:
    """Read the examples of a file, or of 'module:function'."""
    if _CALLABLE.match(path) and not Path(path).exists():
        return read_items(
            call_by_name(path), RowValidator(path, columns, task, skip_bad_rows=skip_bad_rows, names=names)
        )
    file = Path(path).expanduser()
    unit = "row" if file.suffix.lower() == ".parquet" else "line"
    return read_file(file, RowValidator(f"data file {file}", columns, task, unit, skip_bad_rows, names))


def find_labels(path: str, columns: DataSettings, task: Task = "classification") -> tuple[str, ...]:
    """Return the sorted class names in a data file, or an empty tuple if its labels do not look like names.

    They do if none is a number, if all are short, and if each occurs twice on average. Anything else is probably the
    text itself, which `read_examples` then refuses without showing it.

    Args:
        path: File or 'module:function'.
        columns: Column names.
        task: Task that the examples are for.

    Raises `DataError` for data that cannot be read and for more than 1,000 names, which are probably texts.
    """
    names: set[str] = set()
    settings = msgspec.structs.replace(columns, labels=())
    examples = _read_path(path, settings, task, True, names)
    count = sum(max(1, len(example.word_labels)) for example in examples)
    are_names = len(names) > 1 and 2 * len(names) <= count and all(map(_LABEL_NAME.match, names))
    return tuple(sorted(names)) if are_names else ()


def names_for_data(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the class names of a model that data may contain: none if they are LABEL_0, LABEL_1, … or not unique."""
    named = len(set(labels)) == len(labels) > 1 and not all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
    return tuple(labels) if named else ()


def count_names(labels: Sequence[str], num_labels: int | None) -> int:
    """Return the number of names. Raises `ConfigError` for too few or repeated names, or another `num_labels`."""
    if isinstance(labels, str) or len(labels) < 2 or len(set(labels)) < len(labels):
        raise ConfigError("`labels` must be at least two different names.", remedy="Give one name for every class.")
    if num_labels not in (None, len(labels)):
        raise ConfigError(f"`num_labels` is {num_labels}, but `labels` has {len(labels)} names.", remedy="Omit one.")
    return len(labels)

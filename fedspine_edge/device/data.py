"""A device's private examples: reading, checking and splitting them. What becomes of their tokens is in batches.py.

The text of an example never enters an error, a log line or a `repr`: messages name the file, the row and the
column only. A label that is not a number is not quoted either, since a wrong `label` column is often the text.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import numpy as np

from fedspine_edge.config import DataSettings
from fedspine_edge.errors import DataError, MissingDependency

Data = Union[str, "os.PathLike[str]", Iterable[Any], Callable[[], Iterable[Any]]]
"""What the SDK accepts as data: a path, 'module:function', examples, or a callable that returns examples."""

_CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_PLAIN_NAME = re.compile(r"^[A-Za-z_][\w-]{0,39}$")
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Example:
    """One labelled text, pair of texts, or text as words that each have a label. The texts are kept out of `repr`."""

    text: str = field(repr=False)
    label: int
    text_pair: str | None = field(default=None, repr=False)
    words: tuple[str, ...] = field(default=(), repr=False)
    word_labels: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class _Source:
    """What is being read and how its columns are called."""

    name: str
    settings: DataSettings
    labelled: bool
    words: bool = False

    def fail(self, what: str, remedy: str, *, row: int | None = None) -> DataError:
        place = f"{self.name}, row {row}" if row is not None else self.name
        return DataError(f"{place}: {what}", remedy=remedy)

    @property
    def columns(self) -> list[str]:
        wanted = [self.settings.text]
        if self.settings.text_pair:
            wanted.append(self.settings.text_pair)
        return [*wanted, self.settings.label] if self.labelled else wanted


def load_examples(settings: DataSettings, *, labelled: bool = True, words: bool = False) -> list[Example]:
    """Every example of `settings.path`: CSV, TSV, JSON lines, Parquet, or 'module:function'.

    Args:
        settings: Path and column names; labels must be integers within 0..num_labels-1.
        labelled: False for plain text (causal language modelling); labels are then 0.
        words: The text column holds a list of words and the label column a list of as many labels (token
            classification; JSON lines and Parquet can hold lists).

    Raises `DataError` naming the file, the row (as an editor numbers it: the header of a CSV is row 1) and the
    remedy; `MissingDependency` for Parquet without pyarrow.
    """
    if _CALLABLE.match(settings.path) and not Path(settings.path).exists():
        return _from_items(_call(settings.path), _Source(settings.path, settings, labelled, words))
    path = Path(settings.path).expanduser()
    source = _Source(f"data file {path}", settings, labelled, words)
    if path.is_dir():
        raise source.fail("is a folder.", f"Name one file ({', '.join(_SUFFIXES)}) in data.path.")
    if not path.exists():
        raise source.fail("does not exist.", "Check data.path; it is relative to the working folder.")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise source.fail(
            f"unknown kind {path.suffix!r}.", f"Supported: {', '.join(_SUFFIXES)}, or 'module:function' of your own."
        )
    try:
        examples = list(reader(path, source))
    except OSError as error:
        raise source.fail(f"cannot be read: {error.strerror}.", "Check the file's permissions.") from None
    except UnicodeDecodeError as error:
        raise source.fail(f"is not UTF-8 (byte {error.start}).", "Convert it, e.g. with iconv -t utf-8.") from None
    return _not_empty(examples, source)


def examples_of(data: Data, settings: DataSettings, *, labelled: bool = True, words: bool = False) -> list[Example]:
    """Examples from whatever the SDK's user hands over: see `Data`. Raises as `load_examples` does.

    Items are (text, label), (text, text_pair, label), mappings with the configured columns, or `Example`; with
    `labelled=False` plain strings and (text, text_pair) too; with `words=True` (list of words, list of labels).
    """
    if isinstance(data, (str, os.PathLike)):
        fields = {name: getattr(settings, name) for name in settings.__struct_fields__}
        return load_examples(DataSettings(**{**fields, "path": os.fspath(data)}), labelled=labelled, words=words)
    source = _Source("the given examples", settings, labelled, words)
    return _from_items(_guarded(data, source.name) if callable(data) else data, source)


def split(examples: Sequence[Example], holdout: int, seed: int, *, where: str) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples, the same for the same seed. Raises `DataError` when too few are there."""
    if len(examples) < holdout + 1:
        raise DataError(
            f"{where} has {len(examples)} examples; holding {holdout} out leaves none to train on.",
            remedy="Lower data.holdout or provide more examples.",
        )
    order = np.random.default_rng([seed, 0x5E1]).permutation(len(examples))
    held = sorted(order[:holdout].tolist())
    rest = sorted(order[holdout:].tolist())
    return [examples[i] for i in rest], [examples[i] for i in held]


def _csv(path: Path, source: _Source) -> Iterator[Example]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        row = 1
        try:
            _check_columns(reader.fieldnames or [], source)
            for row, record in enumerate(reader, start=2):
                if None in record:
                    raise source.fail(
                        "more fields than the header has.",
                        "Put texts that contain the separator into double quotes.",
                        row=row,
                    )
                yield _example(record, source, row)
        except csv.Error:
            raise source.fail(
                "is not valid CSV.", "Double every quote inside a quoted text and close every quote.", row=row + 1
            ) from None


def _json_lines(path: Path, source: _Source) -> Iterator[Example]:
    with path.open(encoding="utf-8-sig") as file:
        for row, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # its message quotes no text, but the exception carries the whole line
                raise source.fail("is not valid JSON.", "Write one JSON object per line.", row=row) from None
            if not isinstance(record, dict):
                raise source.fail("is not a JSON object.", "Write one JSON object per line.", row=row)
            _check_columns(list(record), source, row=row)
            yield _example(record, source, row)


def _parquet(path: Path, source: _Source) -> Iterator[Example]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingDependency.of("pyarrow", extra="data", purpose=f"Reading {path}") from None
    try:
        file = parquet.ParquetFile(path)
        _check_columns(list(file.schema_arrow.names), source)
        row = 0
        for batch in file.iter_batches(columns=source.columns):
            for record in batch.to_pylist():
                row += 1
                yield _example(record, source, row)
    except pyarrow.ArrowException:
        raise source.fail("is not a readable Parquet file.", "Write it again; it may be truncated.") from None


def _check_columns(present: Sequence[str], source: _Source, *, row: int | None = None) -> None:
    missing = [name for name in source.columns if name not in present]
    if not present and row is None:
        raise source.fail("is empty.", "The first line must name the columns.")
    if missing:
        raise source.fail(
            f"no column {missing[0]!r}; the columns present are: {_named(present)}.",
            "Set data.text, data.text_pair and data.label to the names of your columns.",
            row=row,
        )


def _named(columns: Sequence[str]) -> str:
    """Column names for a message; what is no plain name may be the first row's text of a file without a header."""
    return ", ".join(name if _PLAIN_NAME.match(name) else "(not a plain name, not shown)" for name in columns)


def _example(record: Mapping[str, Any], source: _Source, row: int) -> Example:
    settings = source.settings
    if source.words:
        return _words(record[settings.text], record[settings.label], source, row)
    text = _text(record[settings.text], settings.text, source, row)
    pair = _text(record[settings.text_pair], settings.text_pair, source, row) if settings.text_pair else None
    return Example(text, _label(record[settings.label], source, row) if source.labelled else 0, pair)


def _words(words: Any, labels: Any, source: _Source, row: int) -> Example:
    settings = source.settings
    for column, value in ((settings.text, words), (settings.label, labels)):
        if not isinstance(value, (list, tuple)) or not value:
            raise source.fail(
                f"column {column!r} is not a list.",
                "Token classification needs a list of words and a list of as many labels (.jsonl or .parquet).",
                row=row,
            )
    if len(words) != len(labels):
        raise source.fail(
            f"{len(words)} words have {len(labels)} labels.", "Give every word exactly one label.", row=row
        )
    checked = tuple(_text(word, settings.text, source, row) for word in words)
    return Example(" ".join(checked), 0, None, checked, tuple(_label(label, source, row) for label in labels))


def _text(value: Any, column: str, source: _Source, row: int) -> str:
    if not isinstance(value, str) or not value.strip():
        kind = "is empty" if value is None or isinstance(value, str) else f"holds {type(value).__name__}, not text"
        raise source.fail(f"column {column!r} {kind}.", "Fill it in or leave the row out.", row=row)
    return value


def _label(value: Any, source: _Source, row: int) -> int:
    settings = source.settings
    remedy = f"Labels are whole numbers from 0 to {settings.num_labels - 1} (data.num_labels = {settings.num_labels})."
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number != int(number):
        raise source.fail(f"the label in column {settings.label!r} is not an integer.", remedy, row=row)
    if not 0 <= number < settings.num_labels:
        raise source.fail(f"label {int(number)} is out of range.", remedy, row=row)
    return int(number)


def _from_items(items: Iterable[Any], source: _Source) -> list[Example]:
    examples: list[Example] = []
    pair = source.settings.text_pair or "text_pair"
    for row, item in enumerate(items, start=1):
        if source.words and not isinstance(item, Example):
            if isinstance(item, Mapping):
                _check_columns([str(key) for key in item], source, row=row)
                item = (item[source.settings.text], item[source.settings.label])
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise source.fail(
                    f"is a {type(item).__name__}, not words with labels.", "Give (words, labels), two lists.", row=row
                )
            examples.append(_words(item[0], item[1], source, row))
            continue
        if isinstance(item, Example):
            record: dict[str, Any] = {"text": item.text, "label": item.label, "pair": item.text_pair}
        elif isinstance(item, str) and not source.labelled:
            record = {"text": item, "label": 0, "pair": None}
        elif isinstance(item, Mapping):
            _check_columns([str(key) for key in item], source, row=row)
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
        text = _text(record["text"], source.settings.text, source, row)
        other = None if record["pair"] is None else _text(record["pair"], pair, source, row)
        examples.append(Example(text, _label(record["label"], source, row) if source.labelled else 0, other))
        if (other is None) != (examples[0].text_pair is None):
            raise source.fail("single texts and pairs are mixed.", "Give every example a pair, or none.", row=row)
    return _not_empty(examples, source)


def _not_empty(examples: list[Example], source: _Source) -> list[Example]:
    if not examples:
        raise source.fail("holds no examples.", "Provide at least data.holdout + 1 examples.")
    return examples


def _call(path: str) -> Iterable[Any]:
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
    return _guarded(function, path)


def _guarded(function: Callable[[], Iterable[Any]], name: str) -> Iterable[Any]:
    """The examples of a user's callable; of its exceptions only the kind and the place are told."""
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

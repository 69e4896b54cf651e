"""Examples from CSV, TSV, JSON lines and Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedspine_edge.data.examples import Example
from fedspine_edge.data.row_validation import RowValidator
from fedspine_edge.errors import MissingDependency

MAX_CELL_CHARACTERS = 1 << 24
"""Largest number of characters in a CSV cell. Python's default is too small for long documents."""


def read_file(path: Path, validator: RowValidator) -> list[Example]:
    """Return the examples of a file, whose format follows from its suffix. Raises what `read_examples` documents."""
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
    supported = ", ".join(readers)
    if path.is_dir():
        raise validator.error("is a folder.", f"Give a file in it: {supported}.")
    if not path.exists():
        raise validator.error("does not exist.", "Check the path. A relative path starts at the current folder.")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise validator.error(
            f"unknown format {path.suffix!r}.", f"Supported: {supported}, or a 'module:function' of your own."
        )
    try:
        examples = list(reader(path, validator))
    except OSError as error:
        raise validator.error(f"cannot be read: {error.strerror}.", "Check the file's permissions.") from None
    except UnicodeDecodeError as error:
        raise validator.error(
            f"is not UTF-8 (byte {error.start}).",
            "Convert it with iconv -f ENCODING -t utf-8; ENCODING is often latin1 or utf-16.",
        ) from None
    return validator.finish(examples)


def _csv(path: Path, validator: RowValidator) -> Iterator[Example]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
                raise validator.error(
                    f"its columns are separated by {other!r}.", "Save it with commas, or with tabs as .tsv."
                )
            validator.check_columns(header)
            line = reader.line_num + 1  # quoted texts may contain line breaks
            for fields in reader:
                if fields:  # not a blank line
                    with validator.collect_error():
                        if delimiter == "\t" and any("\t" in field and "\n" in field for field in fields):
                            raise validator.error(
                                "a quoted text contains tabs and line breaks; it probably includes the next rows.",
                                "Close the quote, or double quotes inside texts and put such texts in quotes.",
                                row=line,
                            )
                        yield validator.example(_record(header, fields, validator, line), line)
                line = reader.line_num + 1
        except csv.Error:
            raise validator.error(
                "is not valid CSV.", "Double every quote inside a quoted text and close every quote.", row=line
            ) from None


def _record(header: list[str], fields: list[str], validator: RowValidator, line: int) -> dict[str, str | None]:
    if len(fields) > len(header):
        raise validator.error(
            "more fields than the header.", "Put texts that contain the separator in double quotes.", row=line
        )
    return {**dict.fromkeys(header), **dict(zip(header, fields))}


def _json_lines(path: Path, validator: RowValidator) -> Iterator[Example]:
    with path.open(encoding="utf-8-sig") as file:
        for row, line in enumerate(file, start=1):
            if line.strip():
                with validator.collect_error():
                    yield validator.example(_parsed(line, validator, row), row)


class _JsonObject(dict[str, Any]):
    """JSON object that knows all its names, including repeated ones."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def _parsed(line: str, validator: RowValidator, row: int) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_JsonObject)
    except (ValueError, RecursionError):  # the exception would contain the whole line
        raise validator.error("is not valid JSON.", "Write one JSON object per line.", row=row) from None
    if not isinstance(record, _JsonObject):
        raise validator.error("is not a JSON object.", "Write one JSON object per line.", row=row)
    validator.check_columns(record.names, row=row)
    return record


def _parquet(path: Path, validator: RowValidator) -> Iterator[Example]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingDependency.of("pyarrow", extra="data", purpose=f"Reading {path}") from None
    try:
        file = parquet.ParquetFile(path)
        validator.check_columns(list(file.schema_arrow.names))
        row = 0
        for batch in file.iter_batches(columns=validator.columns):
            for record in batch.to_pylist():
                row += 1
                with validator.collect_error():
                    yield validator.example(record, row)
    except pyarrow.ArrowException:
        raise validator.error("is not a readable Parquet file.", "Write it again; it may be truncated.") from None

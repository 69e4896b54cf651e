"""Examples from a file: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedspine_edge.data.examples import Example
from fedspine_edge.data.row_validation import Source
from fedspine_edge.errors import MissingDependency

LONGEST_CELL = 1 << 24
"""Characters of a CSV's cell; Python's own limit is below that of a long document."""


def read_file(path: Path, source: Source) -> list[Example]:
    """Every example of a file; its suffix says which kind it is. Raises as `load_examples` does."""
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
    supported = ", ".join(readers)
    if path.is_dir():
        raise source.fail("is a folder.", f"Name one file of it: {supported}.")
    if not path.exists():
        raise source.fail("does not exist.", "Check the path; it starts at the working folder unless absolute.")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise source.fail(
            f"unknown kind {path.suffix!r}.", f"Supported: {supported}, or 'module:function' of your own."
        )
    try:
        examples = list(reader(path, source))
    except OSError as error:
        raise source.fail(f"cannot be read: {error.strerror}.", "Check the file's permissions.") from None
    except UnicodeDecodeError as error:
        raise source.fail(
            f"is not UTF-8 (byte {error.start}).",
            "Convert it with iconv -f KIND -t utf-8; KIND is often latin1 or utf-16.",
        ) from None
    return source.checked(examples)


def _csv(path: Path, source: Source) -> Iterator[Example]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
                raise source.fail(
                    f"its columns are separated by {other!r}.", "Save it with commas, or with tabs as .tsv."
                )
            source.check_columns(header)
            line = reader.line_num + 1  # a row begins where the one before ended: quoted texts may have line breaks
            for fields in reader:
                if fields:  # no blank line
                    with source.going_on():
                        yield source.example(_record(header, fields, source, line), line)
                line = reader.line_num + 1
        except csv.Error:
            raise source.fail(
                "is not valid CSV.", "Double every quote inside a quoted text and close every quote.", row=line
            ) from None


def _record(header: list[str], fields: list[str], source: Source, line: int) -> dict[str, str | None]:
    if len(fields) > len(header):
        raise source.fail(
            "more fields than the header has.", "Put texts that contain the separator into double quotes.", row=line
        )
    return {**dict.fromkeys(header), **dict(zip(header, fields))}


def _json_lines(path: Path, source: Source) -> Iterator[Example]:
    with path.open(encoding="utf-8-sig") as file:
        for row, line in enumerate(file, start=1):
            if line.strip():
                with source.going_on():
                    yield source.example(_parsed(line, source, row), row)


def _parsed(line: str, source: Source, row: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # its message quotes no text, but the exception carries the whole line
        raise source.fail("is not valid JSON.", "Write one JSON object per line.", row=row) from None
    if not isinstance(record, dict):
        raise source.fail("is not a JSON object.", "Write one JSON object per line.", row=row)
    source.check_columns(list(record), row=row)
    return record


def _parquet(path: Path, source: Source) -> Iterator[Example]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingDependency.of("pyarrow", extra="data", purpose=f"Reading {path}") from None
    try:
        file = parquet.ParquetFile(path)
        source.check_columns(list(file.schema_arrow.names))
        row = 0
        for batch in file.iter_batches(columns=source.columns):
            for record in batch.to_pylist():
                row += 1
                with source.going_on():
                    yield source.example(record, row)
    except pyarrow.ArrowException:
        raise source.fail("is not a readable Parquet file.", "Write it again; it may be truncated.") from None

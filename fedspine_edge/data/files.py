"""Examples from a file: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from fedspine_edge.data.examples import Example
from fedspine_edge.data.rows import Source
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
    return source.not_empty(examples)


def _csv(path: Path, source: Source) -> Iterator[Example]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        row = 1
        try:
            header = [name.strip() for name in reader.fieldnames or []]
            if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
                raise source.fail(
                    f"its columns are separated by {other!r}.", "Save it with commas, or with tabs as .tsv."
                )
            reader.fieldnames = header
            source.check_columns(header)
            for row, record in enumerate(reader, start=2):
                if None in record:
                    raise source.fail(
                        "more fields than the header has.",
                        "Put texts that contain the separator into double quotes.",
                        row=row,
                    )
                yield source.example(record, row)
        except csv.Error:
            raise source.fail(
                "is not valid CSV.", "Double every quote inside a quoted text and close every quote.", row=row + 1
            ) from None


def _json_lines(path: Path, source: Source) -> Iterator[Example]:
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
            source.check_columns(list(record), row=row)
            yield source.example(record, row)


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
                yield source.example(record, row)
    except pyarrow.ArrowException:
        raise source.fail("is not a readable Parquet file.", "Write it again; it may be truncated.") from None

"""Rows of a user's data, checked one by one; those that cannot be used are told together.

The text of an example never enters an error, a log line or a `repr`: messages name the file, the row and the
column only. A label that is not a number is not quoted either, since a wrong `label` column is often the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fedspine_edge.config import DataSettings
from fedspine_edge.data.examples import Example
from fedspine_edge.errors import DataError

_PLAIN_NAME = re.compile(r"^[A-Za-z_][\w-]{0,39}$")

SHOWN = 5
"""Rows that are named of those with one problem, and problems that are named."""


class BadRow(DataError):
    """One row cannot be used; `Source.going_on` collects these."""

    def __init__(self, place: str, row: int, what: str, remedy: str) -> None:
        super().__init__(f"{place} {row}: {what}", remedy=remedy)
        self.row, self.what = row, what


@dataclass(frozen=True)
class Source:
    """What is being read, how its columns are called, and what its rows must hold.

    Attributes:
        name: Of the file, function or argument, for errors.
        settings: Names of the columns and the number of labels.
        labelled: Whether rows have labels.
        words: Whether texts are lists of words with a label each.
        unit: What a row's number counts: "row", or "line" of a text file, as an editor numbers them.
    """

    name: str
    settings: DataSettings
    labelled: bool
    words: bool = False
    unit: str = "row"
    _bad: dict[tuple[str, str], list[int]] = field(default_factory=dict, init=False, repr=False)

    def fail(self, what: str, remedy: str, *, row: int | None = None) -> DataError:
        """The error that says `what` is wrong with this source, or with one row of it (from 1)."""
        if row is not None:
            return BadRow(f"{self.name}, {self.unit}", row, what, remedy)
        return DataError(f"{self.name}: {what}", remedy=remedy)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Around the reading of one row: if it cannot be used, that is kept for `checked`, and the next one is read."""
        try:
            yield
        except BadRow as error:  # kept without its traceback, whose frames hold the text
            self._bad.setdefault((error.what, error.remedy), []).append(error.row)

    def checked(self, examples: list[Example]) -> list[Example]:
        """`examples` if there is one and no row was bad. Raises one `DataError` that tells all that were."""
        count = sum(len(rows) for rows in self._bad.values())
        if count == 1:
            ((what, remedy),) = self._bad
            raise self.fail(what, remedy, row=self._bad[what, remedy][0])
        if self._bad:
            shown = list(self._bad.items())[:SHOWN]
            problems = [f"{what.rstrip('.')} ({self._places(rows)})" for (what, _), rows in shown]
            if (others := len(self._bad) - len(shown)) > 0:
                problems.append(f"{others} more kinds of problems")
            remedies = dict.fromkeys(remedy for (_, remedy), _ in shown)
            raise self.fail(
                f"{count:,} of {len(examples) + count:,} rows cannot be used: {'; '.join(problems)}.",
                " ".join(remedies),
            )
        if not examples:
            raise self.fail("holds no examples.", "Provide at least one.")
        return examples

    def _places(self, rows: list[int]) -> str:
        names = ", ".join(str(row) for row in rows[:SHOWN])
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        return f"{self.unit}{'s' if len(rows) > 1 else ''} {names}{more}"

    @property
    def columns(self) -> list[str]:
        """Those that every row must have."""
        wanted = [self.settings.text]
        if self.settings.text_pair:
            wanted.append(self.settings.text_pair)
        return [*wanted, self.settings.label] if self.labelled else wanted

    @property
    def _arguments(self) -> list[str]:
        """Those that name the columns."""
        return ["`text`", "`text_pair`", "`label`"] if self.labelled else ["`text`", "`text_pair`"]

    def check_columns(self, present: Sequence[str], *, row: int | None = None) -> None:
        """Raises `DataError` when a column is missing among those `present`."""
        missing = [name for name in self.columns if name not in present]
        if not present and row is None:
            raise self.fail("is empty.", "The first line must name the columns.")
        if missing:
            raise self.fail(
                f"no column {missing[0]!r}; the columns present are: {_named(present)}.",
                f"Name your columns with {' and '.join(self._arguments)}.",
                row=row,
            )

    def example(self, record: Mapping[str, Any], row: int) -> Example:
        """The example of one record. Raises `DataError`."""
        settings = self.settings
        if self.words:
            return self.words_example(record[settings.text], record[settings.label], row)
        text = self.text(record[settings.text], settings.text, row)
        pair = self.text(record[settings.text_pair], settings.text_pair, row) if settings.text_pair else None
        return Example(text, self.label(record[settings.label], row) if self.labelled else 0, pair)

    def words_example(self, words: Any, labels: Any, row: int) -> Example:
        """The example of a list of words and a list of their labels. Raises `DataError`."""
        settings = self.settings
        for column, value in ((settings.text, words), (settings.label, labels)):
            if not isinstance(value, (list, tuple)) or not value:
                raise self.fail(
                    f"column {column!r} is not a list.",
                    "Token classification needs a list of words and a list of as many labels (.jsonl or .parquet).",
                    row=row,
                )
        if len(words) != len(labels):
            raise self.fail(
                f"{len(words)} words have {len(labels)} labels.", "Give every word exactly one label.", row=row
            )
        checked = tuple(self.text(word, settings.text, row) for word in words)
        return Example(" ".join(checked), 0, None, checked, tuple(self.label(label, row) for label in labels))

    def text(self, value: Any, column: str, row: int) -> str:
        """`value` if it is a text that is not blank. Raises `DataError`."""
        if not isinstance(value, str) or not value.strip():
            kind = "is empty" if value is None or isinstance(value, str) else f"holds {type(value).__name__}, not text"
            raise self.fail(f"column {column!r} {kind}.", "Fill it in or leave the row out.", row=row)
        return value

    def label(self, value: Any, row: int) -> int:
        """`value` as an index of a class; "1" and 1.0 will do. Raises `DataError`."""
        column, count = self.settings.label, self.settings.num_labels
        if value is None or value == "":
            raise self.fail(f"column {column!r} is empty.", "Fill it in or leave the row out.", row=row)
        remedy = f"Labels are whole numbers from 0 to {count - 1} (`num_labels` is {count})."
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number != int(number):
            raise self.fail(f"the label in column {column!r} is not an integer.", remedy, row=row)
        if not 0 <= number < count:
            raise self.fail(f"label {int(number)} is out of range.", remedy, row=row)
        return int(number)


def _named(columns: Sequence[str]) -> str:
    """Column names for a message; what is no plain name may be the first row's text of a file without a header."""
    if not columns:
        return "none"
    return ", ".join(name if _PLAIN_NAME.match(name) else "(not a plain name, not shown)" for name in columns)

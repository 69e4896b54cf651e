"""Validation of the rows of a user's data. All unusable rows are reported in one error.

The text of an example never appears in an error, a log line or a `repr`: messages name the file, the row and the
column only. A label that is not a number is not quoted either, because a wrong `label` column is often the text.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fedspine_edge.config import DataSettings, Task
from fedspine_edge.data.examples import Example
from fedspine_edge.data.targets import IGNORED
from fedspine_edge.errors import DataError

_PLAIN_NAME = re.compile(r"^[A-Za-z_][\w-]{0,39}$")

SHOWN = 5
"""Largest number of problems that an error lists, and of rows that it lists for each."""


MAX_NAMES = 1000
"""Largest number of class names; a column with more of them probably contains the texts."""

NUMBER = ""
"""Stands for labels that are numbers in a set of label names."""

log = logging.getLogger(__name__)


class BadRow(DataError):
    """One row cannot be used. `RowValidator.collect_error` collects these errors."""

    def __init__(self, place: str, row: int, what: str, remedy: str) -> None:
        super().__init__(f"{place} {row}: {what}", remedy=remedy)
        self.row, self.what = row, what


@dataclass(frozen=True)
class RowValidator:
    """Validates the rows of one source and collects their errors.

    Attributes:
        name: Name of the file, function or argument, for errors.
        settings: Column names and number of labels.
        task: Task that the rows are for.
        unit: Unit of row numbers: "row", or "line" in a text file, as an editor numbers them.
        skip_bad_rows: Whether to log unusable rows as a warning instead of raising, if at least one row is usable.
        names: Set to which label names are added instead of validating them; NUMBER stands for any number.
    """

    name: str
    settings: DataSettings
    task: Task = "classification"
    unit: str = "row"
    skip_bad_rows: bool = False
    names: set[str] | None = None
    _bad: dict[tuple[str, str], list[int]] = field(default_factory=dict, init=False, repr=False)

    @property
    def has_labels(self) -> bool:
        """Whether rows have labels."""
        return self.task != "causal_lm"

    @property
    def has_words(self) -> bool:
        """Whether texts are lists of words with one label each."""
        return self.task == "token_classification"

    def error(self, what: str, remedy: str, *, row: int | None = None) -> DataError:
        """Return the error for a problem of the source, or of one of its rows (from 1)."""
        if row is not None:
            return BadRow(f"{self.name}, {self.unit}", row, what, remedy)
        return DataError(f"{self.name}: {what}", remedy=remedy)

    @contextmanager
    def collect_error(self) -> Iterator[None]:
        """Collect the error of a row that is read in this context, for `finish` to raise."""
        try:
            yield
        except BadRow as error:  # without its traceback, whose frames contain the text
            self._bad.setdefault((error.what, error.remedy), []).append(error.row)

    def finish(self, examples: list[Example]) -> list[Example]:
        """Return `examples`. Raises one `DataError` for all collected errors, or when there is no example."""
        count = sum(len(rows) for rows in self._bad.values())
        if self.names is not None or (self.skip_bad_rows and examples):
            if count and self.names is None:
                log.warning("%s: skipped rows: %s", self.name, self._summary(len(examples)))
            return examples
        if count == 1:
            ((what, remedy),) = self._bad
            raise self.error(what, remedy, row=self._bad[what, remedy][0])
        if self._bad:
            remedies = dict.fromkeys(remedy for _, remedy in list(self._bad)[:SHOWN])
            raise self.error(self._summary(len(examples)), " ".join(remedies))
        if not examples:
            raise self.error("contains no examples.", "Provide at least one.")
        return examples

    def _summary(self, num_usable: int) -> str:
        """Return how many rows are unusable, and for which reasons."""
        count = sum(len(rows) for rows in self._bad.values())
        problems = [f"{what.rstrip('.')} ({self._places(rows)})" for (what, _), rows in list(self._bad.items())[:SHOWN]]
        if (others := len(self._bad) - len(problems)) > 0:
            problems.append(f"{others} more kinds of problems")
        return f"{count:,} of {num_usable + count:,} rows cannot be used: {'; '.join(problems)}."

    def _places(self, rows: list[int]) -> str:
        names = ", ".join(str(row) for row in rows[:SHOWN])
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        return f"{self.unit}{'s' if len(rows) > 1 else ''} {names}{more}"

    @property
    def columns(self) -> list[str]:
        """Columns that every row must have."""
        wanted = [self.settings.text]
        if self.settings.text_pair:
            wanted.append(self.settings.text_pair)
        return [*wanted, self.settings.label] if self.has_labels else wanted

    @property
    def _arguments(self) -> list[str]:
        """Arguments that name the columns."""
        return ["`text`", "`text_pair`", "`label`"] if self.has_labels else ["`text`", "`text_pair`"]

    def check_columns(self, present: Sequence[str], *, row: int | None = None) -> None:
        """Raise `DataError` when a required column is missing."""
        missing = [name for name in self.columns if name not in present]
        repeated = [name for name in self.columns if present.count(name) > 1]
        if not present and row is None:
            raise self.error("is empty.", "The first line must name the columns.")
        if missing:
            raise self.error(
                f"no column {missing[0]!r}; the columns present are: {_named(present)}.",
                f"Name your columns with {' and '.join(self._arguments)}.",
                row=row,
            )
        if repeated:
            raise self.error(
                f"more than one column is named {repeated[0]!r}.", "Rename or remove all but one of them.", row=row
            )

    def example(self, record: Mapping[str, Any], row: int) -> Example:
        """Return the example of one record. Raises `DataError`."""
        settings = self.settings
        if self.has_words:
            return self.words_example(record[settings.text], record[settings.label], row)
        text = self.text(record[settings.text], settings.text, row)
        pair = self.text(record[settings.text_pair], settings.text_pair, row) if settings.text_pair else None
        return Example(text, self.label(record[settings.label], row) if self.has_labels else 0, pair)

    def words_example(self, words: Any, labels: Any, row: int) -> Example:
        """Return the example of a list of words and a list of their labels. Raises `DataError`."""
        settings = self.settings
        for column, value in ((settings.text, words), (settings.label, labels)):
            if not isinstance(value, (list, tuple)) or not value:
                raise self.error(
                    f"column {column!r} is not a list.",
                    "Token classification needs a list of words and a list of their labels (.jsonl or .parquet).",
                    row=row,
                )
        if len(words) != len(labels):
            raise self.error(
                f"{len(words)} words have {len(labels)} labels.", "Give every word exactly one label.", row=row
            )
        checked = tuple(self.text(word, settings.text, row) for word in words)
        return Example(" ".join(checked), 0, None, checked, tuple(self.label(label, row) for label in labels))

    def text(self, value: Any, column: str, row: int) -> str:
        """Return `value` if it is a text that is not blank. Raises `DataError`."""
        if not isinstance(value, str) or not value.strip():
            kind = (
                "is empty" if value is None or isinstance(value, str) else f"contains {type(value).__name__}, not text"
            )
            raise self.error(f"column {column!r} {kind}.", "Fill it in or remove the row.", row=row)
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error(
                f"column {column!r} contains half of a surrogate pair, which is not a character.",
                "Repair the text; the program that wrote it cut a character, such as an emoji, in two.",
                row=row,
            )
        return value

    def label(self, value: Any, row: int) -> int:
        """Return `value` as a class index. Accepts a name in `labels`, "1" and 1.0 too. Raises `DataError`.

        In token classification, -100 marks a word without a label.
        """
        column, count = self.settings.label, self.settings.num_classes
        if value is None or value == "":
            raise self.error(f"column {column!r} is empty.", "Fill it in or remove the row.", row=row)
        if isinstance(value, str) and value in self.settings.labels:
            return self.settings.labels.index(value)
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if self.names is not None:
            self._collect_name(value, number)
            return 0
        if self.has_words and number == IGNORED:
            return IGNORED
        whole = math.isfinite(number) and number == int(number)
        if self.settings.labels:
            remedy = f"Labels are the {count} names in `labels`, or their indices from 0 to {count - 1}."
            if not whole:
                raise self.error(f"the label in column {column!r} is not in `labels`.", remedy, row=row)
        else:
            remedy = f"Labels are integers from 0 to {count - 1} (`num_labels` is {count}), or names given as `labels`."
            if not whole:
                raise self.error(f"the label in column {column!r} is not an integer.", remedy, row=row)
        if not 0 <= number < count:
            raise self.error(f"label {int(number)} is out of range.", remedy, row=row)
        return int(number)

    def _collect_name(self, value: Any, number: float) -> None:
        assert self.names is not None
        self.names.add(value if isinstance(value, str) and math.isnan(number) else NUMBER)
        if len(self.names) > MAX_NAMES:
            raise DataError(
                f"{self.name}: column {self.settings.label!r} has more than {MAX_NAMES:,} different texts.",
                remedy="Name the column of the labels with `label`.",
            )


def _named(columns: Sequence[str]) -> str:
    """Return column names for a message. Other texts are not shown: a file without a header has a text there."""
    if not columns:
        return "none"
    return ", ".join(name if _PLAIN_NAME.match(name) else "(not a plain name, not shown)" for name in columns)

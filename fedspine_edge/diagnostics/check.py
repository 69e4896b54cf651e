"""Result of a check of `doctor`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "warn", "missing", "failed"]


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Args:
        name: Subject of the check.
        state: ok; warn: works with a drawback; missing: not installed; failed: present but does not work.
        detail: Finding in one line.
        remedy: Command that fixes the problem; empty without a problem.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the fields as plain strings, for `--json` and for the output of a probe."""
        return asdict(self)


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error from another library."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__

"""One finding of `doctor`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "warn", "missing", "failed"]


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        name: What was looked at.
        state: ok; warn = works, with a drawback; missing = not there; failed = there, and does not work.
        detail: What was found, one line.
        remedy: The command that mends it; empty when there is nothing to mend.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain strings, for `--json` and for the pipe."""
        return asdict(self)


def line_of(error: BaseException) -> str:
    """Kind and first line of a foreign error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__

"""Commands as a user types them, and the form of an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedspine_edge.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *expected: str) -> str:
    """Run a command that must exit with code 2 and one error that contains all of `expected`. Returns the error."""
    capsys.readouterr()
    assert main(arguments) == 2
    return one_error(capsys.readouterr().err, *expected)


def one_error(stderr: str, *expected: str) -> str:
    """Check that there is one error with a remedy that contains all of `expected`, and return it."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    message = stderr[stderr.index("error: ") :]
    for part in expected:
        assert part in message, message
    remedy = message.splitlines()[1:]
    assert remedy, f"no remedy: {message}"
    assert remedy[0].strip()
    return message


def tune(model: Path | str, data: Path | str, out: Path, *more: str) -> list[str]:
    return ["tune", "--model", str(model), "--data", str(data), "--out", str(out), "--steps", "1", *more]

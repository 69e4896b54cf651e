"""Commands as a user types them, and what a refusal must look like."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedspine_edge.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *told: str) -> str:
    """Runs the command, which must end with code 2 and one error that says all of `told`."""
    capsys.readouterr()
    assert main(arguments) == 2
    return one_error(capsys.readouterr().err, *told)


def one_error(stderr: str, *told: str) -> str:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert "Traceback" not in stderr
    message = stderr[stderr.index("error: ") :]
    for part in told:
        assert part in message, message
    remedy = message.splitlines()[1:]
    assert remedy, f"no remedy: {message}"
    assert remedy[0].strip()
    return message


def tune(model: Path | str, data: Path | str, out: Path, *more: str) -> list[str]:
    return ["tune", "--model", str(model), "--data", str(data), "--out", str(out), "--steps", "1", *more]

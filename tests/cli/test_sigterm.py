"""SIGTERM ends a command as Ctrl-C does."""

import os
import signal
import time

import pytest

from fedspine_edge.cli import main as module


def test_sigterm_returns_143_and_restores_handler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def work(_: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
            return 0
        finally:
            cleaned.append(True)

    monkeypatch.setattr("fedspine_edge.cli.inspect.run", work)
    before = signal.getsignal(signal.SIGTERM)
    assert module.main(["inspect", "some-bundle"]) == 143
    assert cleaned == [True]
    assert "terminated" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before

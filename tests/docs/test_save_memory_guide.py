"""The example of docs/guides/save-memory.md runs unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_bert

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "save-memory.md").read_text(encoding="utf-8")


def test_save_memory_guide_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    tiny_bert.write_model(tmp_path / "base-model")
    tiny_bert.write_csv(tmp_path / "train.csv", tiny_bert.sentences(64))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "16 examples at a time: weights" in capsys.readouterr().out
    assert list((tmp_path / "runs/curves").glob("events.*"))


def test_save_memory_guide_describes_every_base_dtype() -> None:
    from fedspine_edge.model.precision import BASE_DTYPES

    assert tuple(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)[1:]) == BASE_DTYPES  # less the heading

"""Runs the Python code of docs/guides/deploy-a-model.md, in order."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_deploy import tiny_model, write_byte_tokenizer, write_tokenizer

from fedspine_edge.export.compile import compile_engine
from fedspine_edge.model.checkpoint import save_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/guides/deploy-a-model.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_deploy_guide_code_runs(tmp_path):
    save_model(tiny_model("bert"), tmp_path / "out")
    write_tokenizer(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "other-adapter")
    save_model(tiny_model("llama", "causal_lm"), tmp_path / "decoder")
    write_byte_tokenizer(tmp_path / "decoder")
    compile_engine(tmp_path / "decoder", backend="onnxruntime")
    rows = [f"good film {'very ' * (i % 7)}board,{i % 3}" for i in range(60)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "page.py").write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Prediction(" in done.stdout

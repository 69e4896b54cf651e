"""A fit that was killed continues from its checkpoint and ends with the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_bert
from safetensors.numpy import load_file

from fedspine_edge import EdgeTuner
from fedspine_edge.errors import CheckpointError, ConfigError
from fedspine_edge.training.state_dir import StateDir

CHILD = Path(__file__).with_name("tune_child.py")
SUPPORT = Path(tiny_bert.__file__).parent


def child(folder, work, kill_fit=0, kill_step=0):
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(CHILD), str(folder), str(work), str(kill_fit), str(kill_step)]
    root = Path(__file__).parents[2]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200, cwd=root
    )


def test_fit_after_a_kill_ends_with_the_same_bits(tiny_folder, tmp_path):
    assert child(tiny_folder, tmp_path / "straight").returncode == 0
    assert child(tiny_folder, tmp_path / "killed", 2, 17).returncode == -9
    last = child(tiny_folder, tmp_path / "killed")
    assert last.returncode == 0, last.stderr
    steps = [tuple(map(int, line.split())) for line in last.stdout.splitlines()]
    assert steps == [(2, step) for step in range(11, 26)]  # the first fit was done, the second had reached step 10
    for name in ("adapter_model.safetensors", "model.safetensors"):
        straight, killed = (load_file(tmp_path / run / "out" / name) for run in ("straight", "killed"))
        assert straight.keys() == killed.keys()
        assert all((straight[key] == killed[key]).all() for key in straight)


def test_checkpoint_of_another_fit_or_damaged_is_rejected(tiny_folder, tmp_path):
    tuner = EdgeTuner.from_pretrained(tiny_folder, r=2, torch_device="cpu")
    losses = []
    data = tiny_bert.sentences(40)
    tuner.fit(data, steps=10, checkpoint=tmp_path / "c", on_step=lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == list(range(1, 11))
    assert all(loss > 0 for _, loss in losses)
    again = EdgeTuner.from_pretrained(tiny_folder, r=2, torch_device="cpu")
    with pytest.raises(ConfigError, match="checkpoint of another fit"):
        again.fit(data, steps=11, checkpoint=tmp_path / "c")
    with pytest.raises(ConfigError, match="checkpoint of another fit"):
        again.fit(tiny_bert.sentences(41), steps=10, checkpoint=tmp_path / "c")
    state = tmp_path / "c" / "fit.state"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be used"):
        again.fit(data, steps=10, checkpoint=tmp_path / "c")
    assert bytes(content) == state.read_bytes()


def test_exception_in_a_callback_ends_the_fit(tiny_folder):
    tuner = EdgeTuner.from_pretrained(tiny_folder, r=2, torch_device="cpu")

    def stop(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.fit(tiny_bert.sentences(40), steps=10, on_step=stop)


def test_checkpoint_of_a_diverged_fit_names_the_folder_to_delete(tiny_folder, tmp_path):
    data = tiny_bert.sentences(40)
    tuner = EdgeTuner.from_pretrained(tiny_folder, r=2, torch_device="cpu")
    tuner.fit(data, steps=2, checkpoint=tmp_path / "fit")
    with StateDir(tmp_path / "fit") as folder:
        saved = folder.read("fit")
        name = next(name for name in saved.tensors if name.endswith("lora_B"))
        saved.tensors[name] = np.full_like(saved.tensors[name], np.nan)
        folder.write("fit", saved)
    again = EdgeTuner.from_pretrained(tiny_folder, r=2, torch_device="cpu")
    with pytest.raises(CheckpointError, match="non-finite") as caught:
        again.fit(data, steps=2, checkpoint=tmp_path / "fit")
    assert f"Delete {tmp_path / 'fit'}" in caught.value.remedy
    other = EdgeTuner.from_pretrained(tiny_folder, r=2, torch_device="cpu", learning_rate=1e-4)
    with pytest.raises(ConfigError, match="another fit") as refused:
        other.fit(data, steps=2, checkpoint=tmp_path / "fit")
    assert f"Delete {tmp_path / 'fit'}" in refused.value.remedy


@pytest.mark.parametrize("rate", [float("inf"), float("nan")])
def test_learning_rate_that_is_not_finite_is_rejected(rate, tmp_path):
    with pytest.raises(ConfigError, match="`learning_rate` is"):
        EdgeTuner.from_pretrained(tmp_path / "nowhere", learning_rate=rate)

"""A fleet of language models run by its commands over a real broker, with one process killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_lm

from fedspine_edge.monitoring.run_view import by_round, peek_run, read_run

pytestmark = [pytest.mark.broker, pytest.mark.slow]
COMMAND = [sys.executable, "-m", "fedspine_edge"]


def start(kind: str, path: Path, settings: dict[str, Any]) -> subprocess.Popen[str]:
    path.write_bytes(msgspec.toml.encode(settings))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, kind, "--config", str(path)], text=True, **pipes)


def wait_for_round(run_dir: Path, number: int, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while number not in by_round(peek_run(run_dir).rows):
        assert time.monotonic() < deadline, f"round {number} did not begin"
        time.sleep(0.02)


def test_language_fleet_learns_instructions_over_broker(tmp_path: Path) -> None:
    pytest.importorskip("iotcore")
    from fedspine_edge.transport.broker import EmbeddedBroker

    model = tiny_lm.write_folder(tmp_path / "base")
    with EmbeddedBroker() as broker:
        common = {"fleet": "tiny", "task": "causal_lm", "broker": {"port": broker.port}}
        fleet = {
            **common,
            "run_dir": str(tmp_path / "run"),
            "num_rounds": 6,
            "pruning_ratio": 0.4,
            "round_to": 4,
            "ranks": [4],
            "criterion": "apt",
            "min_devices": 2,
            "min_reports": 2,
            "training": {"tau": 20, "recovery_steps": 20, "learning_rate": 1e-2, "max_length_tokens": 24},
        }
        devices: dict[str, dict[str, Any]] = {}
        for seed, name in enumerate(("left", "right"), start=1):
            rows = tiny_lm.write_instructions(tmp_path / f"{name}.jsonl", tiny_lm.instructions(96, seed))
            devices[name] = {
                **common,
                "device_id": name,
                "model": str(model),
                "state_dir": str(tmp_path / name),
                "torch_threads": 1,
                "data": {"path": str(rows), "text": "prompt", "text_pair": "answer", "holdout": 16},
            }
        running = {name: start("device", tmp_path / f"{name}.toml", device) for name, device in devices.items()}
        running["server"] = start("server", tmp_path / "fleet.toml", fleet)
        try:
            wait_for_round(tmp_path / "run", 3)
            os.kill(running["right"].pid, signal.SIGKILL)
            running["right"].communicate(timeout=30)
            running["right"] = start("device", tmp_path / "right.toml", devices["right"])
            output = {name: process.communicate(timeout=200) for name, process in running.items()}
        finally:
            for process in running.values():
                process.kill()
        assert {name: process.returncode for name, process in running.items()} == dict.fromkeys(running, 0), output

    rounds = by_round(read_run(tmp_path / "run").rows)
    assert [row.status for row in rounds[6]] == ["ok", "ok"]
    assert all(last.loss_after < 0.3 * first.loss_before for first, last in zip(rounds[1], rounds[6]))

    for step in (
        ["assemble", str(tmp_path / "run"), "--model", str(model), "--out", str(tmp_path / "model")],
        ["compile", str(tmp_path / "model"), "--out", str(tmp_path / "bundle")],
    ):
        subprocess.run([*COMMAND, *step], check=True, capture_output=True)
    prompts = tiny_lm.instructions(20, seed=9)
    texts = [part for prompt, _ in prompts for part in ("--text", prompt)]
    run = [*COMMAND, "run", str(tmp_path / "bundle"), "--json", "--max-new-tokens", "4", *texts]
    results = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)["results"]
    right = [found["text"] == answer and found["finish"] == "end" for found, (_, answer) in zip(results, prompts)]
    assert sum(right) >= 16

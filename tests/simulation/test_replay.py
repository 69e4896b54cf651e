"""Fleets of replay devices: repeatability, disconnects, and the record of losses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from recorded_fleet import RECORD, recorded_fleet, run_recorded

from fedspine_edge.errors import ConfigError
from fedspine_edge.monitoring.run_view import read_run
from fedspine_edge.simulation.cost_model import MINILM
from fedspine_edge.simulation.experiments.run_metrics import measure
from fedspine_edge.simulation.replay import REASON, LossRecord, ReplayContext
from fedspine_edge.simulation.virtual_fleet import simulate_recorded

MIX = {"tx2": 3, "nx": 4, "agx": 1}


@pytest.mark.parametrize("layout", ["consensus", "local"])
def test_replay_reaches_target_and_is_repeatable(tmp_path: Path, layout: str) -> None:
    results = [
        run_recorded(tmp_path / name / "run", mix=MIX, layout=layout, seed=seed, pruning_ratio=0.6)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert results[0].adapter_sha256 == results[1].adapter_sha256 != results[2].adapter_sha256
    figures = measure(tmp_path / "a" / "run")
    assert figures == measure(tmp_path / "b" / "run")
    assert figures["mean_ratio"] == pytest.approx(0.6, abs=1e-6)
    assert figures["not_ok"] == 0


def test_replay_reports_state_recorded_losses(tmp_path: Path) -> None:
    run_recorded(tmp_path / "run", mix=MIX)
    rows = read_run(tmp_path / "run").rows
    assert {row.reason for row in rows} == {REASON}
    assert measure(tmp_path / "run")["training"] == "recorded"
    losses = {point.loss_after for point in RECORD.points}
    assert {row.loss_after for row in rows} <= losses
    with pytest.raises(ConfigError, match="is a replay of recorded losses"):
        LossRecord.of_runs([tmp_path / "run"], "x")


def test_loss_record_roundtrips_and_draws_near_samples(tmp_path: Path) -> None:
    import random

    RECORD.save(tmp_path / "record.json")
    assert LossRecord.load(tmp_path / "record.json") == RECORD
    for seed in range(20):
        point = RECORD.draw(0.5, 0.5, 8, random.Random(seed))
        assert abs(point.progress - 0.5) + abs(point.pruning_ratio - 0.5) <= 0.35


def test_slow_class_is_slower_and_pruning_shortens_rounds(tmp_path: Path) -> None:
    run_recorded(tmp_path / "run", mix=MIX, pruning_ratio=0.7, strategy="fixed", num_rounds=8)
    rows = read_run(tmp_path / "run").rows

    def mean_time(name: str, server_round: int) -> float:
        times = [r.completion_time_s for r in rows if r.device_class == name and r.server_round == server_round]
        return sum(t for t in times if t) / len(times)

    assert mean_time("tx2", 1) > 1.2 * mean_time("agx", 1)
    assert mean_time("tx2", 8) < mean_time("tx2", 1)


def test_disconnected_device_is_lost_then_returns(tmp_path: Path) -> None:
    run_recorded(tmp_path / "run", mix=MIX, disconnect_probability=0.25, num_rounds=8, deadline_s=300.0)
    rows = read_run(tmp_path / "run").rows
    lost = [row for row in rows if row.status == "lost"]
    assert {row.status for row in rows} == {"ok", "lost"}
    assert 0.1 < len(lost) / len(rows) < 0.45
    assert all(row.reward is None for row in lost)
    back = {(row.device_id, row.server_round + 1) for row in lost if row.server_round < 8}
    assert back <= {(row.device_id, row.server_round) for row in rows}


def test_interrupted_run_continues_at_its_time(tmp_path: Path) -> None:
    run_recorded(tmp_path / "whole" / "run", mix=MIX)
    whole = measure(tmp_path / "whole" / "run")
    fleet, devices = recorded_fleet(tmp_path / "cut", MIX)
    rounds = 0

    def interrupt(name: str, data: Mapping[str, Any]) -> None:
        nonlocal rounds
        rounds += name == "round_opened"
        if rounds == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_recorded(fleet, devices, ReplayContext(RECORD), on_event=interrupt)
    simulate_recorded(fleet, devices, ReplayContext(RECORD))
    cut = measure(Path(fleet.run_dir))
    assert cut["total_time_s"] == pytest.approx(whole["total_time_s"], rel=0.05)
    times = [point["time_s"] for point in cut["curve"]]
    assert times == sorted(times)


def test_replay_with_real_shapes_finishes(tmp_path: Path) -> None:
    fleet, devices = recorded_fleet(tmp_path, {"agx": 2}, num_rounds=4, pruning_ratio=0.2)
    simulate_recorded(fleet, devices, ReplayContext(RECORD, spec=MINILM))
    row = read_run(Path(fleet.run_dir)).rows[0]
    factors = 2 * row.r * 6 * (4 * (384 + 384) + 2 * (384 + 1536))
    scores_and_indices = 6 * (1536 + 12) * 3 * 4
    assert row.bytes_up == pytest.approx(factors + scores_and_indices, rel=0.05)

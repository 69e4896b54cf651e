"""Custom strategies run a whole fleet, and the baselines behave as published."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "simulation"))

from recorded_fleet import run_recorded  # noqa: E402

from fedspine_edge.monitoring.run_view import by_round, read_run  # noqa: E402
from fedspine_edge.server.journal.schema import DeviceView  # noqa: E402

MIX = {"tx2": 2, "nx": 2, "agx": 2}


def rounds_of(folder: Path, **settings: Any) -> dict[int, list[DeviceView]]:
    run_recorded(folder / "run", mix=MIX, num_rounds=7, ranks=[4, 8, 16], pruning_ratio=0.5, **settings)
    return by_round(read_run(folder / "run").rows)


def test_example_strategy_runs_a_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    rounds = rounds_of(tmp_path, strategy="my_strategy:RankByClass")
    for rows in rounds.values():
        assert {(row.device_class, row.r) for row in rows} == {("tx2", 4), ("nx", 8), ("agx", 16)}
    ratios = [rows[0].pruning_ratio for rows in rounds.values()]
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(0.5)


def test_one_shot_baselines_prune_once_to_the_same_ratio(tmp_path: Path) -> None:
    early = rounds_of(tmp_path / "a", strategy="prune_then_tune")
    late = rounds_of(tmp_path / "b", strategy="tune_then_prune")
    assert [{row.pruning_ratio for row in rows} for rows in early.values()] == [{0.0}] + [{0.5}] * 6
    assert [{row.pruning_ratio for row in rows} for rows in late.values()] == [{0.0}] * 6 + [{0.5}]


def test_hetlora_gives_slow_classes_small_ranks(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, strategy="hetlora")
    assert {row.r for row in rounds[1]} == {8}
    by_class = {row.device_class: row.r for row in rounds[7]}
    assert by_class == {"tx2": 4, "nx": 8, "agx": 16}
    assert all(row.pruning_ratio == 0.0 for row in rounds[7])


def test_fedapt_is_faster_than_pruning_late(tmp_path: Path) -> None:
    def total(rounds: dict[int, list[DeviceView]]) -> float:
        return sum(max(row.completion_time_s or 0.0 for row in rows) for rows in rounds.values())

    apt = total(rounds_of(tmp_path / "a", strategy="fedapt"))
    middle = total(rounds_of(tmp_path / "b", strategy="fixed"))
    late = total(rounds_of(tmp_path / "c", strategy="tune_then_prune"))
    assert apt < middle < late

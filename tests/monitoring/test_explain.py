"""Explanation of a device's plan, read from the journal of a run."""

import json
from pathlib import Path

import pytest
from recorded_fleet import run_recorded

from fedspine_edge.cli.main import main
from fedspine_edge.monitoring.explain import describe, explain
from fedspine_edge.server.journal.writer import Journal


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained") / "run"
    run_recorded(folder, num_rounds=6, mix={"tx2": 2, "nx": 2})
    return folder


def test_leaves_partition_arms_and_selected_has_largest_bound(run_dir: Path) -> None:
    for server_round in range(2, 7):
        explained = explain(run_dir, "tx2-2", server_round=server_round)
        leaves, plan = explained["decision"]["leaves"], explained["plan"]
        area = sum((leaf["u"][1] - leaf["u"][0]) * len(leaf["ranks"]) for leaf in leaves)
        assert area == pytest.approx(2.0)  # u in 0..1 × two ranks
        assert sum(leaf["pulls"] for leaf in leaves) == server_round - 1
        selected = [x for x in leaves if x["u"][0] <= plan["u"] < x["u"][1] and plan["r"] in x["ranks"]]
        assert len(selected) == 1
        assert selected[0]["bound"] == max(leaf["bound"] for leaf in leaves if leaf["open"])


def test_outcome_matches_journal(run_dir: Path) -> None:
    explained = explain(run_dir, "nx-3")
    with Journal.open_readonly(run_dir) as journal:
        row = journal.device_rounds(6)[1]
    assert (explained["server_round"], row.device_id) == (6, "nx-3")
    assert explained["outcome"]["reward"] == row.reward
    assert explained["outcome"]["reward_terms"] == row.reward_terms
    assert row.reward is not None
    assert f"reward {row.reward:.3f}" in describe(explained)


def test_explain_reports_times_and_variance_shares(run_dir: Path) -> None:
    explained = {i: explain(run_dir, i, server_round=5) for i in ("nx-1", "nx-3", "tx2-2", "tx2-4")}
    times = {i: one["decision"]["pace"] for i, one in explained.items()}
    assert [i for i, time in times.items() if time["sets_the_pace"]] == [
        max(times, key=lambda i: times[i]["shortest_s"])
    ]
    assert len({time["expected_s"] for time in times.values()}) == 1
    assert all(time["predicted_s"] <= 1.001 * time["expected_s"] for time in times.values())
    shares = explained["nx-1"]["outcome"]["decided_by"]
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
    assert "s predicted; target for the round" in describe(explained["nx-1"])
    assert "variance between devices by term" in describe(explained["nx-1"])


def test_explain_command_prints_text_and_json(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(run_dir), "--device", "tx2-2", "--round", "3"]) == 0
    text = capsys.readouterr().out
    assert "tx2-2 (tx2), round 3" in text
    assert text.count("<- selected") == 1
    assert main(["explain", str(run_dir), "--device", "tx2-2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["server_round"] == 6


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        (["--device", "tx2-9"], "has no device 'tx2-9'", "Did you mean 'tx2-"),
        (["--device", "tx2-2", "--round", "40"], "no plan for 'tx2-2' in round 40", "another --round"),
    ],
)
def test_explain_unknown_device_or_round_raises(
    run_dir: Path, options: list[str], message: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(run_dir), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert remedy in error

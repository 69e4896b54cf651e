"""Experiments: configs, resumption and adoption of results, confidence intervals and pages."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from recorded_fleet import recorded_fleet

from fedspine_edge.cli.main import main
from fedspine_edge.errors import ConfigError, MissingDependency
from fedspine_edge.simulation.cost_model import MINILM, round_cost_s
from fedspine_edge.simulation.device_classes import load_device_classes, parse_mix
from fedspine_edge.simulation.experiments import experiment as module
from fedspine_edge.simulation.experiments.experiment import (
    Experiment,
    interval,
    load_experiment,
    names,
    run_experiment,
    summarise,
)
from fedspine_edge.simulation.experiments.run_metrics import time_to
from fedspine_edge.simulation.oracle import oracle


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("quick", [True, False])
def test_every_config_gives_valid_fleet(name: str, quick: bool, tmp_path: Path) -> None:
    experiment = load_experiment(name, quick=quick)
    assert experiment.paper
    assert experiment.question
    assert len(experiment.variants) >= 2
    for job in experiment.jobs.values():
        if job["training"] == "sums":
            continue
        assert job["training"] in ("real", "recorded")
        parse_mix(job["mix"], load_device_classes())
        recorded_fleet(tmp_path, {"tx2": 2}, **{**job["settings"], "seed": job["seed"]})


def test_variants_differ_only_in_their_settings() -> None:
    jobs = load_experiment("criterion", quick=True).jobs
    lora, other = jobs["lora-0"], jobs["random-0"]
    assert other["settings"].pop("criterion") == "random"
    assert {k: v for k, v in lora.items() if k != "variant"} == {k: v for k, v in other.items() if k != "variant"}


def small(seeds: list[int]) -> Experiment:
    full = load_experiment("aggregation", quick=True)
    jobs = {name: {**job, "num_devices": 3} for name, job in full.jobs.items() if job["seed"] in seeds}
    keep = {name: job for name, job in jobs.items() if "mixed" in job["variant"]}
    return Experiment(full.name, full.form, full.title, full.question, full.paper, full.measures, keep, {})


def test_interrupted_experiment_runs_only_missing_jobs(tmp_path: Path) -> None:
    lines: list[str] = []
    tmp_path = tmp_path / "alone" / "it"
    run_experiment(small([0]), tmp_path, on_progress=lines.append)
    first = json.loads((tmp_path / "jobs" / "reconstruct-mixed-ranks-half-kept-0.json").read_text())
    summary = run_experiment(small([0, 1]), tmp_path, on_progress=lines.append)
    assert [line for line in lines if "to run" in line] == [
        "aggregation (quick): 4 jobs, 4 to run",
        "aggregation (quick): 8 jobs, 4 to run",
    ]
    assert json.loads((tmp_path / "jobs" / "reconstruct-mixed-ranks-half-kept-0.json").read_text()) == first
    exact = summary["variants"]["reconstruct, mixed ranks, half kept"]["error"]
    assert exact["n"] == 2
    padded = summary["variants"]["zero_pad, mixed ranks, half kept"]["error"]
    assert exact["mean"] < padded["mean"]
    floor = summary["variants"]["reconstruct, mixed ranks, half kept"]["error_of_best"]["mean"]
    assert exact["mean"] == pytest.approx(floor, rel=1e-3)


def test_changed_job_runs_again(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    job: dict[str, Any] = {"variant": "a", "seed": 0, "training": "sums"}
    module._write(tmp_path / "jobs", "a-0", job, {"error": 1.0})
    assert module._read(tmp_path / "jobs", "a-0", job) == {"error": 1.0}
    assert module._read(tmp_path / "jobs", "a-0", {**job, "num_devices": 4}) is None


def test_result_with_renamed_settings_is_not_run_again(tmp_path: Path) -> None:
    """Results written before settings were renamed belong to the same jobs."""
    old = {
        "seed": 0,
        "settings": {"target": "mean", "bandit": {"min_side": 0.5, "slack": 0.1}},
        "inputs": {"profiles": "0"},
    }
    new = {
        "seed": 0,
        "settings": {"target": "fleet_mean", "bandit": {"min_leaf_width": 0.5, "time_tolerance": 0.1}},
        "inputs": {"device_classes": "0"},
    }
    module._write(tmp_path, "a-0", {**old, "variant": "a", "profiles": "/x"}, {"error": 1.0})
    assert module._read(tmp_path, "a-0", {**new, "variant": "a", "device_classes": "/y"}) == {"error": 1.0}
    assert module._read(tmp_path, "a-0", {**new, "variant": "a", "seed": 1}) is None


def test_interruption_leaves_complete_seeds_and_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_then_power_loss(jobs: Any, work: Path, **_: Any) -> Any:
        assert [job["seed"] for job in jobs.values()] == [0, 0, 0, 0, 1, 1, 1, 1]
        yield next(iter(jobs)), {"error": 0.5}
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_jobs", one_then_power_loss)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(small([0, 1]), tmp_path / "alone" / "it")
    tmp_path = tmp_path / "alone" / "it"
    summary = json.loads((tmp_path / "summary.json").read_text())
    counts = {name: row["error"]["n"] for name, row in summary["variants"].items()}
    assert sorted(counts.values()) == [0, 0, 0, 1]
    assert (tmp_path / "jobs.csv").read_text().count("\n") == 2


def test_result_of_other_experiment_is_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small([0])
    name, job = next(iter(first.jobs.items()))
    (tmp_path / "other" / "jobs").mkdir(parents=True)
    (tmp_path / "other" / "summary.json").write_text("{}")
    module._write(tmp_path / "other" / "jobs", "other-name-0", {**job, "variant": "another name"}, {"error": 0.25})
    asked: list[str] = []
    monkeypatch.setattr(module, "run_jobs", lambda jobs, work, **_: asked.extend(jobs) or iter(()))
    summary = run_experiment(first, tmp_path / "mine")
    assert name not in asked
    assert len(asked) == 3
    assert summary["variants"][job["variant"]]["error"]["mean"] == 0.25


def test_ray_not_installed_names_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency) as error:
        run_experiment(small([0]), tmp_path, engine="ray")
    assert "fedspine-edge[ray]" in error.value.remedy


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # Ray's own
def test_ray_gives_same_results(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the optional extra ray is not installed")
    here = run_experiment(small([0]), tmp_path / "a" / "here")
    there = run_experiment(small([0]), tmp_path / "b" / "there", engine="ray")
    assert there["variants"] == here["variants"]


def test_interval_uses_student_t() -> None:
    assert interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "half": pytest.approx(4.303 / 3**0.5, rel=1e-3), "n": 3}
    assert interval([1.0, None]) == {"mean": 1.0, "half": None, "n": 1}
    assert interval([None])["mean"] is None


def test_time_to_returns_first_round_at_target() -> None:
    curve = [{"time_s": 10.0 * k, "accuracy": a} for k, a in enumerate((0.5, 0.7, 0.65, 0.8), start=1)]
    assert time_to(curve, 0.66) == 20.0
    assert time_to(curve, 0.9) is None


def test_target_of_mean_curve_ignores_one_lucky_seed() -> None:
    """Seed 0 crosses the target early by luck; the mean of both does in the third round."""
    experiment = load_experiment("time-to-accuracy", quick=True)

    def curve(*accuracies: float) -> dict[str, Any]:
        nothing = dict.fromkeys(("loss", "ratio", "reward", "idle_share"))
        points = [{"round": k, "time_s": 10.0 * k, "accuracy": a, **nothing} for k, a in enumerate(accuracies, start=1)]
        return {"curve": points}

    found = {
        "fedlora-0": curve(0.6, 0.7, 0.8),
        "fedlora-1": curve(0.6, 0.7, 0.84),
        "fedspine-0": curve(0.78, 0.7, 0.8),
        "fedspine-1": curve(0.5, 0.7, 0.79),
    }
    variants = summarise(experiment, found)["variants"]
    assert variants["fedspine"]["target_accuracy_of_mean"]["mean"] == pytest.approx(0.79)
    assert variants["fedspine"]["time_to_target_s"] == {"mean": 10.0, "half": None, "n": 1}
    assert variants["fedspine"]["time_to_target_of_mean_s"] == {"mean": 30.0, "half": None, "n": 2}
    assert variants["fedapt"]["time_to_target_of_mean_s"]["mean"] is None


def test_oracle_beats_one_arm_for_all_devices(tmp_path: Path) -> None:
    fleet, devices = recorded_fleet(tmp_path, {"wide-tx2": 1, "wide-nx": 1, "paper-agx": 1}, pruning_ratio=0.5)
    best = oracle(fleet, devices, MINILM, 32)
    ratio, total, idle = 0.0, 0.0, 0.0
    from fedspine_edge.strategies.base import pruning_schedule

    for server_round in range(1, fleet.num_rounds + 1):
        after = pruning_schedule(fleet).ratio(0.5, server_round=server_round, previous=ratio)
        times = [round_cost_s(d, fleet, MINILM, 32, before=ratio, after=after, r=8) for d in devices]
        total += max(times)
        idle += sum(1 - t / max(times) for t in times) / len(times)
        ratio = after
    assert best.work_time_s < total
    assert best.idle_share < idle / fleet.num_rounds


def test_experiment_command_lists_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["experiment"]) == 0
    assert "heterogeneity" in capsys.readouterr().out
    assert main(["experiment", "nothing"]) == 2
    assert "One of: aggregation" in capsys.readouterr().err
    monkeypatch.setattr(module, "load_experiment", lambda name, quick: small([0]))
    tmp_path = tmp_path / "alone"
    assert main(["experiment", "aggregation", "--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "The paper" in page
    assert page.count("<svg") == 4
    assert (tmp_path / "jobs.csv").read_text().count("\n") == 5
    with pytest.raises(ConfigError, match="no experiment"):
        load_experiment("nothing", quick=True)

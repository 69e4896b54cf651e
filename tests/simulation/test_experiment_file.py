"""Experiment files of the user: the example, digests of inputs, and errors."""

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedspine_edge.cli.main import main
from fedspine_edge.errors import ConfigError, DataError
from fedspine_edge.monitoring.csv_export import COLUMNS
from fedspine_edge.simulation.experiments import experiment as module
from fedspine_edge.simulation.experiments.experiment import load_experiment, run_experiment
from fedspine_edge.simulation.experiments.jobs import run_job
from fedspine_edge.simulation.experiments.run_metrics import CURVE

ROOT = Path(__file__).parents[2]
EXAMPLE = ("experiment.toml", "boards.toml", "my_strategy.py")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs run in this process; the names of those that did."""
    done: list[str] = []

    def here(jobs: Any, work: Path, **_: Any) -> Iterator[Any]:
        for name, job in jobs.items():
            done.append(name)
            yield name, run_job(job, work / name)

    monkeypatch.setattr(module, "run_jobs", here)
    monkeypatch.setattr(sys, "path", [*sys.path])  # jobs add the folder of the experiment
    monkeypatch.delitem(sys.modules, "my_strategy", raising=False)
    return done


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The example on a copy, with seed 0 alone."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in EXAMPLE:
        shutil.copy(ROOT / "examples" / name, folder)
    text = (folder / "experiment.toml").read_text()
    (folder / "experiment.toml").write_text(text.replace("seeds = [0, 1]", "seeds = [0]"))
    return folder / "experiment.toml"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_example_runs_own_strategies_on_own_boards(
    example: Path, tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "it"
    assert main(["experiment", str(example), "--quick", "--out", str(out)]) == 0
    assert "rank by class: " in capsys.readouterr().out
    assert len(ran) == 3
    devices, rounds = rows(out / "devices.csv"), rows(out / "rounds.csv")
    assert list(devices[0]) == ["variant", "seed", *COLUMNS]
    assert list(rounds[0]) == ["variant", "seed", *CURVE]
    assert (len(devices), len(rounds)) == (3 * 6 * 4, 3 * 6)
    own_rows = [row for row in devices if row["variant"] == "rank by class"]
    assert {(row["device_class"], row["r"]) for row in own_rows} == {("bench", "4"), ("rack", "16")}
    for row in devices:
        if row["variant"] == "S-UCB, rewarded per second" and row["server_round"] == "1":
            same = [d for d in devices if d["variant"] == row["variant"] and d["server_round"] == "1"]
            rate = {d["device_id"]: float(d["reward_loss"]) / float(d["completion_time_s"]) for d in same}
            assert float(row["reward"]) == pytest.approx(rate[row["device_id"]] / max(rate.values()), rel=1e-3)
    for name in ("idle-share", "idle-share-over-time"):
        assert (out / "figures" / f"{name}.svg").read_text().startswith("<?xml")
        assert (out / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_results_depend_on_content_not_location(example: Path, tmp_path: Path, ran: list[str]) -> None:
    out = tmp_path / "results" / "it"
    run_experiment(load_experiment(str(example), quick=True), out)
    moved = Path(shutil.move(example.parent, tmp_path / "elsewhere")) / example.name
    ran.clear()
    run_experiment(load_experiment(str(moved), quick=True), out)
    assert ran == []
    with (moved.parent / "my_strategy.py").open("a") as file:
        file.write("\n# another version\n")
    run_experiment(load_experiment(str(moved), quick=True), out)
    assert sorted(ran) == ["S-UCB-rewarded-per-second-0", "rank-by-class-0"]


def test_real_training_uses_own_model_and_partition(
    tmp_path: Path, tiny_model: Path, tiny_csv: Path, ran: list[str]
) -> None:
    lines = tiny_csv.read_text().splitlines()
    (tmp_path / "split").mkdir()
    for name, part in (("device-1", lines[1:61]), ("device-2", lines[61:181]), ("test", lines[181:241])):
        (tmp_path / "split" / f"{name}.csv").write_text("\n".join([lines[0], *part]) + "\n")
    config = tmp_path / "mine.toml"
    config.write_text(
        f"""
        [common]
        mix = "nx=1,agx=1"
        data = "split"
        model = '{tiny_model}'
        holdout = 16
        [common.settings]
        num_rounds = 5
        pruning_ratio = 0.4
        ranks = [2, 4]
        round_to = 4
        training = {{ tau = 2, recovery_steps = 1, batch_size = 4, max_length_tokens = 16 }}
        [[variant]]
        name = "fixed"
        settings = {{ strategy = "fixed" }}
        """
    )
    experiment = load_experiment(str(config), quick=False)
    summary = run_experiment(experiment, tmp_path / "results" / "it")
    assert ran == ["fixed-0"]
    job = json.loads((tmp_path / "results" / "it" / "jobs" / "fixed-0.json").read_text())
    assert job["measures"]["test_examples"] == 60
    assert {row["num_examples"] for row in job["measures"]["devices"]} == {60 - 16, 120 - 16}
    assert summary["variants"]["fixed"]["test_accuracy"]["n"] == 1
    (tmp_path / "split" / "device-2.csv").unlink()
    with pytest.raises(DataError, match=r"device-2\.csv does not exist"):
        run_experiment(load_experiment(str(config), quick=False), tmp_path / "results" / "it")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[variant]]", "[[varient]]", "unknown key 'varient'"),
        ('mix = "bench=2,rack=2"', 'mix = "nx=2"', "unknown device class 'nx'"),
        ('mix = "bench=2,rack=2"', "mixture = 2", "variant 'S-UCB': Object contains unknown field `mixture`"),
        ("num_rounds = 12", "num_round = 12", "num_round"),
        ("my_strategy:PerSecond", "my_stratgy:PerSecond", "module 'my_stratgy' was not found"),
        ("my_strategy:PerSecond", "my_strategy:PerHour", "rewarded per second': strategy 'my_strategy:PerHour'"),
        ("pruning_ratio = 0.5", "pruning_ratio = 0.99\nbandit = { max_step = 0.1 }", "cannot be reached"),
        ('device_classes = "boards.toml"', 'device_classes = "board.toml"', "board.toml"),
        ("seeds = [0, 1, 2]", "seeds = 3", "seeds is 3"),
        ('training = "recorded"', 'training = "recorded"\ndata = "a.csv"', "data has no effect on recorded losses"),
        ("[common]", "[common", "cannot be used"),
    ],
)
def test_invalid_experiment_raises_before_first_job(example: Path, old: str, new: str, message: str) -> None:
    text = example.read_text()
    assert old in text
    example.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_experiment(str(example), quick=False)
    assert message in str(error.value)


def test_missing_form_raises(example: Path) -> None:
    example.write_text(example.read_text().replace("[quick]", "[full]"))
    with pytest.raises(ConfigError, match=r"no \[quick\]"):
        load_experiment(str(example), quick=True)


def test_old_key_of_device_classes_is_accepted_with_warning(example: Path, caplog: pytest.LogCaptureFixture) -> None:
    current = load_experiment(str(example), quick=True).jobs
    example.write_text(example.read_text().replace("device_classes =", "profiles ="))
    assert load_experiment(str(example), quick=True).jobs == current
    assert caplog.text.count("`profiles` is now called `device_classes`") == 1

"""Benchmarks: turns, figures that add up, memory of one's own process, energy from a board's files, a plot."""

from __future__ import annotations

import json
import shutil

import pytest

from fedspine_edge.benchmark import benchmark
from fedspine_edge.benchmark.benchmark import Subject, run_benchmark
from fedspine_edge.benchmark.power import PowerMeter, PowerSensor
from fedspine_edge.bundle.bundle import load_bundle
from fedspine_edge.cli.main import main
from fedspine_edge.errors import CheckpointError, ConfigError, DataError, DeployError


def board(root, rails):
    """sysfs as a Jetson shows its INA3221: label → (millivolts, milliamperes)."""
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    folder.mkdir(parents=True)
    for number, (label, (voltage, current)) in enumerate(rails.items(), start=1):
        (folder / f"in{number}_label").write_text(f"{label}\n")
        (folder / f"in{number}_input").write_text(f"{voltage}\n")
        (folder / f"curr{number}_input").write_text(f"{current}\n")
    return root


def test_bundles_and_torch_are_timed_in_one_run(shared_bundle, model_folder, tmp_path, capsys, monkeypatch):
    dense = shutil.copytree(shared_bundle, tmp_path / "dense.bundle")
    command = ["bench", str(shared_bundle), "--against", str(dense), "--torch", str(model_folder)]
    command += ["--batch", "1", "3", "--tokens", "8", "--repeats", "6", "--threads", "1", "--backend", "onnxruntime"]
    assert main([*command, "--json", "--plot", str(tmp_path / "plot.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [contender["name"] for contender in report["contenders"]] == ["dense", "bert", "torch bert"]
    assert [(row["subject"], row["batch"]) for row in report["rows"]] == [
        (name, batch) for batch in (1, 3) for name in ("dense", "bert", "torch bert")
    ]
    for row in report["rows"]:
        assert row["phase"] == "run"
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["sequences_per_s"] == pytest.approx(row["batch"] / row["mean_ms"] * 1e3)
        assert row["tokens_per_s"] == pytest.approx(8 * row["sequences_per_s"])
        assert row["unsteady"] == (row["p99_ms"] > 1.3 * row["p50_ms"])
    assert report["rows"][0]["ratio"] == 1
    memory = {contender["name"]: contender["peak_bytes"] for contender in report["contenders"]}
    assert 20e6 < memory["bert"] < memory["torch bert"] - 50e6  # the runtime loads no torch
    assert {contender["joules_per_turn"] for contender in report["contenders"]} == {None}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_decoder_has_a_prompt_and_steps(decoder_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SPIN_S", 0.1)
    root = board(tmp_path, {"VDD_IN": (5000, 2000)})
    report = run_benchmark(
        [Subject(name="a", path=str(decoder_bundle))],
        batches=[2],
        tokens=6,
        new_tokens=5,
        repeats=4,
        threads=1,
        sysfs=root,
    )
    assert [row.phase for row in report.rows] == ["prompt", "token"]
    assert report.rows[1].tokens_per_s == report.rows[1].sequences_per_s == pytest.approx(2e3 / report.rows[1].mean_ms)
    (contender,) = report.contenders
    assert report.power_rails == ("VDD_IN",)
    assert contender.watts == pytest.approx(10)
    assert 0 < contender.joules_per_turn < 1


def test_subjects_that_take_turns_do_not_spin_into_each_others(shared_bundle, monkeypatch):
    asked = []
    ask = benchmark._Worker.ask
    monkeypatch.setattr(
        benchmark._Worker, "ask", lambda worker, **command: asked.append(command) or ask(worker, **command)
    )
    one, two = (Subject(name=name, path=str(shared_bundle)) for name in ("one", "two"))
    for subjects in ([one], [one, two]):
        run_benchmark(subjects, tokens=4, repeats=1, threads=2)
    assert [command["spinning"] for command in asked if command["do"] == "load"] == [True, False, False]


def test_what_fails_in_a_subject_is_said_with_its_place(shared_bundle, decoder_bundle, tmp_path):
    one = Subject(name="one", path=str(shared_bundle))
    with pytest.raises(CheckpointError, match=r"absent does not exist"):
        run_benchmark([one, Subject(name="two", path=str(tmp_path / "absent"))])
    with pytest.raises(ConfigError, match="do not do the same"):
        run_benchmark([one, Subject(name="two", path=str(decoder_bundle))])
    for wrong in ({"repeats": 0}, {"batches": [0]}, {"tokens": 0}, {"threads": 0}):
        with pytest.raises(ConfigError, match=f"`{next(iter(wrong))}` is 0"):
            run_benchmark([one], **wrong)


def test_sequences_longer_than_the_model_are_told_in_the_words_of_the_command(shared_bundle, model_folder, capsys):
    command = ["bench", str(shared_bundle), "--backend", "onnxruntime", "--tokens", "5000"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "5000 --tokens were asked for; the model allows" in told
    assert "classify" not in told
    with pytest.raises(DataError, match="5000 `tokens` were asked for"):
        run_benchmark([Subject(name="one", path=str(model_folder), kind="torch")], tokens=5000, repeats=1)


def test_a_prompt_leaves_room_for_the_new_tokens(decoder_bundle):
    limit = load_bundle(decoder_bundle).manifest.max_tokens
    with pytest.raises(
        DataError, match=f"{limit} `tokens` and 1 `new_tokens` were asked for; the model allows {limit}"
    ):
        run_benchmark([Subject(name="a", path=str(decoder_bundle))], tokens=limit, new_tokens=1, repeats=1)


def test_a_subject_that_dies_or_hangs_ends_the_benchmark(shared_bundle, monkeypatch):
    with benchmark._Worker(Subject(name="one", path=str(shared_bundle)), "auto", 1) as worker:
        worker._process.kill()
        with pytest.raises(DeployError, match="runs one ended with code -9"):
            worker.ask(do="turn")
    monkeypatch.setattr(benchmark, "ANSWER_TIMEOUT_S", 0.01)
    with pytest.raises(DeployError, match="did not answer"):
        benchmark._Worker(Subject(name="one", path=str(shared_bundle)), "auto", 1)


def test_power_is_the_whole_boards_or_none(tmp_path):
    assert PowerSensor.find(tmp_path) is None
    nano = board(tmp_path / "nano", {"VDD_IN": (5096, 1200), "VDD_CPU_GPU_CV": (5088, 400), "VDD_SOC": (5088, 300)})
    assert PowerSensor.find(nano).watts() == pytest.approx(6.1152)
    agx = board(tmp_path / "agx", {"VDD_GPU_SOC": (12000, 500), "VDD_CPU_CV": (12000, 250), "VIN_SYS_5V0": (5000, 800)})
    assert PowerSensor.find(agx).watts() == pytest.approx(6 + 3 + 4)
    assert PowerSensor.find(board(tmp_path / "other", {"VDD_CORE": (1000, 1000)})) is None
    with PowerMeter(PowerSensor.find(nano), interval_s=0.001) as meter:
        pass
    assert meter.mean_w == pytest.approx(6.1152)

"""Benchmarks: interleaved runs, consistent statistics, memory per process, energy from sensor files, and the plot."""

from __future__ import annotations

import json
import shutil

import pytest

from fedspine_edge.benchmark import benchmark
from fedspine_edge.benchmark.benchmark import Candidate, run_benchmark
from fedspine_edge.benchmark.power import PowerMeter, PowerSensor
from fedspine_edge.bundle.bundle import load_bundle
from fedspine_edge.cli.main import main
from fedspine_edge.errors import CheckpointError, ConfigError, DataError, DeployError


def board(root, rails):
    """Write the sysfs files of a Jetson's INA3221: label → (millivolts, milliamperes)."""
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    folder.mkdir(parents=True)
    for number, (label, (voltage, current)) in enumerate(rails.items(), start=1):
        (folder / f"in{number}_label").write_text(f"{label}\n")
        (folder / f"in{number}_input").write_text(f"{voltage}\n")
        (folder / f"curr{number}_input").write_text(f"{current}\n")
    return root


def test_bench_times_bundles_and_torch_in_one_run(shared_bundle, model_folder, tmp_path, capsys, monkeypatch):
    dense = shutil.copytree(shared_bundle, tmp_path / "dense.bundle")
    command = ["bench", str(shared_bundle), "--against", str(dense), "--torch", str(model_folder)]
    command += ["--batch", "1", "3", "--tokens", "8", "--repeats", "6", "--threads", "1", "--backend", "onnxruntime"]
    assert main([*command, "--json", "--plot", str(tmp_path / "plot.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [candidate["name"] for candidate in report["candidates"]] == ["dense", "bert", "torch bert"]
    assert [(row["candidate"], row["batch"]) for row in report["rows"]] == [
        (name, batch) for batch in (1, 3) for name in ("dense", "bert", "torch bert")
    ]
    for row in report["rows"]:
        assert row["phase"] == "run"
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["sequences_per_s"] == pytest.approx(row["batch"] / row["mean_ms"] * 1e3)
        assert row["tokens_per_s"] == pytest.approx(8 * row["sequences_per_s"])
        assert row["unsteady"] == (row["p99_ms"] > 1.3 * row["p50_ms"])
    assert report["rows"][0]["ratio"] == 1
    memory = {candidate["name"]: candidate["peak_bytes"] for candidate in report["candidates"]}
    assert 20e6 < memory["bert"] < memory["torch bert"] - 50e6  # the process of a bundle does not import torch
    assert {candidate["joules_per_run"] for candidate in report["candidates"]} == {None}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_decoder_is_timed_by_prompt_and_token(decoder_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ENERGY_RUN_S", 0.1)
    root = board(tmp_path, {"VDD_IN": (5000, 2000)})
    report = run_benchmark(
        [Candidate(name="a", path=str(decoder_bundle))],
        batches=[2],
        tokens=6,
        new_tokens=5,
        repeats=4,
        threads=1,
        sysfs=root,
    )
    assert [row.phase for row in report.rows] == ["prompt", "token"]
    assert report.rows[1].tokens_per_s == report.rows[1].sequences_per_s == pytest.approx(2e3 / report.rows[1].mean_ms)
    (candidate,) = report.candidates
    assert report.power_rails == ("VDD_IN",)
    assert candidate.watts == pytest.approx(10)
    assert 0 < candidate.joules_per_run < 1


def test_interleaved_candidates_do_not_spin(shared_bundle, monkeypatch):
    commands = []
    request = benchmark._CandidateProcess.request
    monkeypatch.setattr(
        benchmark._CandidateProcess,
        "request",
        lambda process, **command: commands.append(command) or request(process, **command),
    )
    one, two = (Candidate(name=name, path=str(shared_bundle)) for name in ("one", "two"))
    for candidates in ([one], [one, two]):
        run_benchmark(candidates, tokens=4, repeats=1, threads=2)
    assert [command["spin_wait"] for command in commands if command["do"] == "load"] == [True, False, False]


def test_failing_candidate_is_named(shared_bundle, decoder_bundle, tmp_path):
    one = Candidate(name="one", path=str(shared_bundle))
    with pytest.raises(CheckpointError, match=r"absent does not exist"):
        run_benchmark([one, Candidate(name="two", path=str(tmp_path / "absent"))])
    with pytest.raises(ConfigError, match="have different tasks"):
        run_benchmark([one, Candidate(name="two", path=str(decoder_bundle))])
    for wrong in ({"repeats": 0}, {"batches": [0]}, {"tokens": 0}, {"threads": 0}):
        with pytest.raises(ConfigError, match=f"`{next(iter(wrong))}` is 0"):
            run_benchmark([one], **wrong)


def test_sequences_beyond_the_limit_name_the_option(shared_bundle, model_folder, capsys):
    command = ["bench", str(shared_bundle), "--backend", "onnxruntime", "--tokens", "5000"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "5000 --tokens were requested; the model allows" in message
    assert "classify" not in message
    with pytest.raises(DataError, match="5000 `tokens` were requested"):
        run_benchmark([Candidate(name="one", path=str(model_folder), kind="torch")], tokens=5000, repeats=1)


def test_prompt_and_new_tokens_must_fit_the_model(decoder_bundle):
    limit = load_bundle(decoder_bundle).manifest.max_tokens
    with pytest.raises(
        DataError, match=f"{limit} `tokens` and 1 `new_tokens` were requested; the model allows {limit}"
    ):
        run_benchmark([Candidate(name="a", path=str(decoder_bundle))], tokens=limit, new_tokens=1, repeats=1)


def test_candidate_process_that_dies_or_hangs_raises(shared_bundle, monkeypatch):
    with benchmark._CandidateProcess(Candidate(name="one", path=str(shared_bundle)), "auto", 1) as process:
        process._process.kill()
        with pytest.raises(DeployError, match="candidate one exited with code -9"):
            process.request(do="run")
    monkeypatch.setattr(benchmark, "ANSWER_TIMEOUT_S", 0.01)
    with pytest.raises(DeployError, match="did not answer"):
        benchmark._CandidateProcess(Candidate(name="one", path=str(shared_bundle)), "auto", 1)


def test_power_sensor_measures_the_whole_board_or_nothing(tmp_path):
    assert PowerSensor.find(tmp_path) is None
    nano = board(tmp_path / "nano", {"VDD_IN": (5096, 1200), "VDD_CPU_GPU_CV": (5088, 400), "VDD_SOC": (5088, 300)})
    assert PowerSensor.find(nano).watts() == pytest.approx(6.1152)
    agx = board(tmp_path / "agx", {"VDD_GPU_SOC": (12000, 500), "VDD_CPU_CV": (12000, 250), "VIN_SYS_5V0": (5000, 800)})
    assert PowerSensor.find(agx).watts() == pytest.approx(6 + 3 + 4)
    assert PowerSensor.find(board(tmp_path / "other", {"VDD_CORE": (1000, 1000)})) is None
    with PowerMeter(PowerSensor.find(nano), interval_s=0.001) as meter:
        pass
    assert meter.mean_w == pytest.approx(6.1152)

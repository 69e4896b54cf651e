"""The command tune: invalid input is reported before training, and no training is lost."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
from commands import refused, tune

from fedspine_edge.cli.main import main
from fedspine_edge.errors import CheckpointError
from fedspine_edge.files import is_mount_point
from fedspine_edge.training.checkpoint import FitCheckpoint

Fingerprint = Callable[[Path], dict[str, str]]


def test_hub_id_is_read_from_the_cache_or_refused(
    base_folder: Path,
    train_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    command = tune("some/bert", train_csv, tmp_path / "model")
    refused(capsys, command, "'some/bert' is not a local folder", "hf download some/bert --local-dir FOLDER")
    cached = tmp_path / "hub" / "models--some--bert"
    shutil.copytree(base_folder, cached / "snapshots" / "c0ffee")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0ffee")
    assert main(command) == 0
    assert json.loads((tmp_path / "model" / "layout.json").read_text())["base"] == "some/bert"


@pytest.mark.parametrize("out", ["model", "bundle", "bundle.zip"])
def test_full_disk_is_one_error_and_keeps_earlier_results(
    out: str,
    tmp_path: Path,
    base_folder: Path,
    train_csv: Path,
    tuned: Path,
    compiled: Path,
    fingerprint: Fingerprint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A limit on the file size fails in the same way as a full disk."""
    shutil.copytree(tuned if out == "model" else compiled, tmp_path / out.partition(".")[0])
    monkeypatch.setattr(FitCheckpoint, "save", lambda *_: None)
    command = ["compile", str(tuned), "--out", str(tmp_path / out), "--backend", "onnxruntime"]
    if out == "model":
        command = tune(base_folder, train_csv, tmp_path / out)
    before = fingerprint(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        refused(capsys, command, "cannot be written", "File too large", "space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = fingerprint(tmp_path)
    assert {name: after[name] for name in after if ".unfinished" not in name} == before


@pytest.mark.parametrize("wrong", ["test", "out"])
def test_tune_checks_test_file_and_output_before_training(
    wrong: str,
    base_folder: Path,
    train_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedspine_edge.tuner.EdgeTuner.fit", lambda *_, **__: pytest.fail("training started first"))
    taken = tmp_path / "taken"
    taken.write_text("an existing file")
    test = tmp_path / "absent.csv" if wrong == "test" else train_csv
    out = taken if wrong == "out" else tmp_path / "model"
    refused(
        capsys, tune(base_folder, train_csv, out, "--test", str(test)), "absent.csv" if wrong == "test" else "taken"
    )


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--learning-rate", "0", "--learning-rate is 0.0; it must be above 0"),
        ("--batch-size", "0", "--batch-size is 0; it must be at least 1"),
        ("--max-length-tokens", "3", "--max-length-tokens is 3; it must be at least 4"),
        ("--pruning-steps", "0", "--pruning-steps is 0; it must be at least 1"),
        ("--steps", "0", "--steps is 0; it must be at least 1"),
        ("--rank", "257", "--rank is 257; the LoRA rank must be within 1..256"),
        ("--seed", "-1", "--seed is -1; it must be at least 0"),
    ],
)
def test_out_of_range_number_names_its_option_before_loading(
    flag: str,
    value: str,
    expected: str,
    base_folder: Path,
    train_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedspine_edge.tuner.open_model", lambda *_, **__: pytest.fail("the model was loaded first"))
    refused(capsys, tune(base_folder, train_csv, tmp_path / "model", flag, value), f"error: {expected}")


def test_model_already_pruned_further_is_refused_before_training(
    tuned: Path,
    train_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedspine_edge.tuner.EdgeTuner.fit", lambda *_, **__: pytest.fail("training started first"))
    command = tune(tuned, train_csv, tmp_path / "model", "--rank", "2", "--pruning-ratio", "0.1")
    refused(capsys, command, "already pruned to 0.5", "base model")


def test_pruning_takes_the_given_stages_and_steps(
    base_folder: Path, train_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tune(base_folder, train_csv, tmp_path / "model", "--pruning-ratio", "0.5")
    assert main([*command, "--pruning-stages", "2", "--pruning-steps", "3"]) == 0
    expected = capsys.readouterr().err
    assert "in 2 stages, with 3 training steps in between" in expected
    assert "prune: 3 of 3" in expected


def test_unwritable_output_is_one_error(
    base_folder: Path, train_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    refused(capsys, tune(base_folder, train_csv, tmp_path / "file" / "model"), "cannot be written", "permissions")


def test_tune_logs_its_stages_and_prints_the_next_command(
    base_folder: Path, train_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*tune(base_folder, train_csv, tmp_path / "model"), "--test", str(train_csv), "--pruning-ratio", "0.5"]
    assert main(command) == 0
    done = capsys.readouterr()
    lines = iter(done.err.splitlines())
    stages = (
        "40 examples",
        "loading",
        "fit: 1 of 1, loss",
        "pruning to 0.5",
        "recover",
        "evaluate: 40 of 40",
        "saving",
    )
    for stage in stages:  # in this order
        assert any(stage in line for line in lines), (stage, done.err)
    assert done.out.endswith(f"next: fedspine-edge compile {tmp_path / 'model'}\n")
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "model")


def test_tune_continues_after_an_interruption(
    base_folder: Path,
    train_csv: Path,
    tmp_path: Path,
    fingerprint: Fingerprint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command(out: str) -> list[str]:
        return [*tune(base_folder, train_csv, tmp_path / out), "--steps", "12", "--pruning-ratio", "0.5", "--rank", "2"]

    def full(*_: object, **__: object) -> None:
        raise CheckpointError("no space", remedy="Free some space.")

    assert main(command("straight")) == 0
    monkeypatch.setattr("fedspine_edge.tuner.EdgeTuner.save", full)
    refused(capsys, command("model"), "no space", "Free some space", "run the same command to continue")
    monkeypatch.undo()
    refused(capsys, [*command("model"), "--seed", "1"], "model.unfinished", "another fit", "Delete")
    assert main(command("model")) == 0
    log = capsys.readouterr().err
    assert "continuing from" in log
    assert "fit:" not in log  # both trainings were already complete
    prints = [fingerprint(tmp_path / out) for out in ("straight", "model")]
    assert prints[0]["adapter_model.safetensors"] == prints[1]["adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "straight"]


def test_tune_checks_free_space_before_training(
    base_folder: Path,
    train_csv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    logged = [*tune(base_folder, train_csv, tmp_path / "model"), "--log-dir", str(tmp_path / "file")]
    refused(capsys, logged, "--log-dir", "cannot be used")
    monkeypatch.setattr("fedspine_edge.tuner.EdgeTuner.fit", lambda *_, **__: pytest.fail("training started first"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused(capsys, tune(base_folder, train_csv, tmp_path / "model"), "cannot be written", "free", "space")
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda *_: False)  # as on a read-only file system, even for root
    refused(capsys, tune(base_folder, train_csv, tmp_path / "model"), "is not writable", "permissions")


def test_tune_reads_labels_from_the_given_column(base_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.csv"
    data.write_text("text,stars\n" + "the film was good,1\nthe film was bad,0\n" * 8)
    assert main(tune(base_folder, data, tmp_path / "model", "--label", "stars")) == 0


def test_tune_trains_a_language_model_on_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_lm.write_folder(tmp_path / "base")
    train = tiny_lm.write_instructions(tmp_path / "train.jsonl", tiny_lm.instructions(60))
    options = ["--task", "causal_lm", "--text", "prompt", "--text-pair", "answer", "--test", str(train), "--json"]
    losses = []
    for steps in ("1", "40"):
        assert main([*tune(model, train, tmp_path / steps, *options), "--steps", steps]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["num_examples"] == 60 * 3
        losses.append(found["loss"])
    assert losses[1] < 0.8 * losses[0]
    assert json.loads((tmp_path / "40" / "layout.json").read_text())["task"] == "causal_lm"


@pytest.mark.parametrize("command", ["tune", "compile"])
def test_output_that_cannot_be_replaced_is_refused_before_the_work(
    command: str,
    base_folder: Path,
    train_csv: Path,
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr("fedspine_edge.files.is_mount_point", lambda folder: folder == mounted)
    monkeypatch.setattr("fedspine_edge.tuner.open_model", lambda *_, **__: pytest.fail("the model was loaded first"))

    def run(out: Path | str) -> list[str]:
        return (
            tune(base_folder, train_csv, Path(out)) if command == "tune" else ["compile", str(tuned), "--out", str(out)]
        )

    name = "model" if command == "tune" else "bundle"
    refused(capsys, run(mounted), f"{mounted} is a mount point", str(mounted / name))
    monkeypatch.chdir(mounted)
    monkeypatch.setattr("fedspine_edge.files.is_mount_point", lambda folder: False)
    refused(capsys, run("."), f"{mounted} is in use as the current folder")
    assert list(tmp_path.iterdir()) == [mounted]
    assert not list(mounted.iterdir())


def test_mount_points_are_recognized(tmp_path: Path) -> None:
    assert is_mount_point(Path("/proc"))
    assert not is_mount_point(tmp_path)


def test_tune_passes_criterion_scope_and_memory_options(
    base_folder: Path, train_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def stop(*_: object, **options: object) -> None:
        seen.update(options)
        raise CheckpointError("stop", remedy="-")

    monkeypatch.setattr("fedspine_edge.tuner.EdgeTuner.from_pretrained", stop)
    options = ["--criterion", "apt", "--scope", "global", "--torch-device", "cpu", "--gradient-checkpointing"]
    assert main(tune(base_folder, train_csv, tmp_path / "model", *options)) == 2
    assert (seen["pruning"].criterion, seen["pruning"].scope, seen["torch_device"]) == ("apt", "global", "cpu")
    assert seen["memory"].gradient_checkpointing


def test_tune_keeps_label_names_up_to_the_bundles_answers(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "named.csv"
    data.write_text("text,label\n" + "the film was good,positive\nthe film was bad,negative\n" * 8 + ",positive\n")
    command = tune(base_folder, data, tmp_path / "model", "--rank", "2", "--test", str(data))
    refused(capsys, command, "line 18: column 'text' is empty")
    assert main([*command, "--skip-bad-rows"]) == 0
    log = capsys.readouterr().err
    assert "labels: negative = 0, positive = 1" in log
    assert "named.csv has 16 examples" in log
    bundle = tmp_path / "bundle"
    assert main(["compile", str(tmp_path / "model"), "--out", str(bundle), "--backend", "onnxruntime"]) == 0
    capsys.readouterr()
    assert main(["run", str(bundle), "the film was good"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("negative", "positive")
    again = ["tune", "--model", str(tmp_path / "model"), "--data", str(data), "--out", str(tmp_path / "again")]
    swapped = [*again, "--labels", "positive,negative", "--skip-bad-rows", "--steps", "1"]
    refused(capsys, swapped, "classes of the model are negative, positive", "--labels")
    refused(capsys, [*again, "--labels", "a,a"], "--labels must be at least two different names")
    refused(capsys, [*again, "--labels", "a,b", "--num-labels", "3"], "--num-labels is 3, but --labels has 2")

"""The command line: help with an example everywhere, and for every bad input one clear error and exit code 2."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import one_error, refused, tune

from fedspine_edge import EdgeTuner, __version__
from fedspine_edge.cli import main as cli
from fedspine_edge.cli.main import main
from fedspine_edge.errors import DataError

ROOT = Path(__file__).parents[2]
COMMANDS = list(cli._COMMANDS)
Fingerprint = Callable[[Path], dict[str, str]]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "example:\n" in shown
    example = shown.split("example:\n")[1].strip().splitlines()[0]
    assert shlex.split(example)[:2] == ["fedspine-edge", command]
    parsed = cli.parser().parse_args(shlex.split(example, comments=True)[1:])
    assert parsed.command == command


def test_the_top_names_every_command_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in COMMANDS)
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fedspine-edge {__version__}\n"


def test_help_needs_neither_torch_nor_transformers() -> None:
    """Every command's module is loaded for the help; none may load the heavy libraries for it."""
    code = (
        "import sys; from fedspine_edge.cli.main import parser; parser().format_help(); "
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["prune"], "'prune'"),
        ([], "COMMAND"),
        (["server", "--config", "fleet.toml", "--fast"], "--fast"),
        (["server"], "--config"),
        (["tune", "--model", "m", "--data", "d", "--out", "o", "--rank", "eight"], "--rank"),
        (["compile", "m", "--precision", "int3"], "int3"),
    ],
)
def test_a_wrong_command_line_is_one_error(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, arguments, told, "--help")


def test_an_argument_too_many_names_the_command_whose_help_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["verify", "model.bundle", "model"], "verify: unrecognized arguments: model", "verify --help")


@pytest.mark.parametrize(
    ("command", "after"),
    [
        (["compile", "m"], "starts from the beginning"),
        (["tune", "--model", "m", "--data", "d", "--out", "o"], "continues where this one stopped"),
        (["server", "--config", "fleet.toml"], "continues where this one stopped"),
    ],
)
def test_an_interruption_says_whether_the_work_is_kept(
    command: list[str], after: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fedspine_edge.cli.{command[0]}.run", interrupted)
    assert main(command) == 130
    assert after in capsys.readouterr().err


def test_what_the_system_refuses_unforeseen_is_one_error_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object) -> int:
        return len(Path("/nowhere/at/all").read_text())

    monkeypatch.setattr("fedspine_edge.cli.inspect.run", run)
    refused(capsys, ["inspect", "bundle"], "/nowhere/at/all", "permissions")


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    """As in `fedspine-edge status RUN_DIR --json | head`: the pipe is closed while there is more to write."""
    program = (
        "import sys; from fedspine_edge.cli import inspect, main;"
        "inspect.run = lambda _: print('x' * 1_000_000);"
        "sys.exit(main.main(['inspect', 'bundle']))"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (1, "")


def test_the_program_prints_no_traceback_and_gives_the_code_to_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedspine_edge", "server", "--config", str(tmp_path / "absent.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    one_error(done.stderr, "absent.toml", "does not exist", "examples/fleet.toml")


# Settings


@pytest.mark.parametrize("command", ["server", "device"])
def test_a_config_file_that_is_not_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [command, "--config", str(tmp_path / "absent.toml")], "absent.toml", "does not exist")


@pytest.mark.parametrize(
    ("command", "text", "told"),
    [
        ("server", "num_round = 5", ["num_round", "Did you mean 'num_rounds'?"]),
        ("server", "[training]\ntua = 5", ["tua", "Did you mean 'tau'?"]),
        ("server", "pruning_ratio = 1.2", ["pruning_ratio", "is 1.2; it must be below 1"]),
        ("server", "ranks = [0, 8]", ["ranks is [0, 8]", "1..256"]),
        ("server", "deadline_s = 'soon'", ["deadline_s"]),
        ("server", "deadline_s = ", ["not valid TOML"]),
        ("server", "strategy = 'fedspin'", ["fedspin"]),
        ("device", "device_id = 'a'\nmodel = 'm'", ["data"]),
        ("device", "device_id = 'a b'\nmodel = 'm'\n[data]\npath = 'd.csv'", ["device_id"]),
    ],
)
def test_an_impossible_setting_names_file_key_and_remedy(
    command: str,
    text: str,
    told: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.toml").write_text(text)
    message = refused(capsys, [command, "--config", "it.toml"], *told)
    assert "it.toml" in message or "strategy" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.toml"]  # nothing was begun


# The broker


def test_a_server_without_a_broker_ends_within_seconds(
    tmp_path: Path, dead_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text(f"run_dir = '{tmp_path / 'run'}'\n[broker]\nport = {dead_port}\n")
    begun = time.monotonic()
    refused(capsys, ["server", "--config", str(config)], f"127.0.0.1:{dead_port}")
    assert time.monotonic() - begun < 20


def test_a_device_without_a_broker_ends_within_seconds(
    tmp_path: Path, dead_port: int, base_folder: Path, train_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_device(tmp_path, model=base_folder, data=train_csv, port=dead_port)
    begun = time.monotonic()
    refused(capsys, ["device", "--config", str(config)], f"127.0.0.1:{dead_port}")
    assert time.monotonic() - begun < 30


def write_device(folder: Path, *, model: Path, data: Path, port: int = 1) -> Path:
    path = folder / "device.toml"
    path.write_text(
        f"device_id = 'one'\nmodel = '{model}'\nstate_dir = '{folder / 'state'}'\n"
        f"[data]\npath = '{data}'\nholdout = 8\n[broker]\nport = {port}\n"
    )
    return path


# Models and data, by `tune` and by `device`


@pytest.fixture
def earlier(tmp_path: Path, tuned: Path, fingerprint: Fingerprint) -> Iterator[Path]:
    """A result at the place where the command would write; it must be the same afterwards."""
    out = tmp_path / "model"
    shutil.copytree(tuned, out)
    before = fingerprint(out)
    yield out
    assert fingerprint(out) == before
    assert not list(tmp_path.glob(".model*"))  # no half-written folder beside it either


@pytest.mark.parametrize(
    ("option", "value"), [("--pruning-ratio", "1.2"), ("--pruning-ratio", "-0.1"), ("--rank", "0"), ("--steps", "0")]
)
def test_impossible_numbers(
    option: str, value: str, earlier: Path, base_folder: Path, train_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, [*tune(base_folder, train_csv, earlier), option, value], value)


def test_a_model_folder_that_is_not_there(
    tmp_path: Path, earlier: Path, train_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, tune(tmp_path / "absent-model", train_csv, earlier), "absent-model")
    config = write_device(tmp_path, model=tmp_path / "absent-model", data=train_csv)
    refused(capsys, ["device", "--config", str(config)], "absent-model")
    refused(capsys, ["compile", str(tmp_path / "absent-model")], "absent-model")


def test_a_family_that_is_not_supported(
    tmp_path: Path, earlier: Path, train_csv: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "t5"
    shutil.copytree(base_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    message = refused(capsys, tune(other, train_csv, earlier), "t5")
    assert all(family in message for family in ("bert", "roberta", "llama"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ["empty"]),
        ("text,label\n", ["no"]),
        ("text,label\nthe film,0\nthe film,7\n", ["line 3", "7", "from 0 to 1"]),
        ("text,label\nthe film,-1\n", ["line 2", "-1"]),
        ("text,label\nthe film,secret words\n", ["line 2"]),
        ("sentence,label\nthe film,0\n", ["text"]),
    ],
    ids=["empty", "header only", "label too large", "label negative", "label no number", "column missing"],
)
def test_data_that_cannot_be_used(
    text: str, told: list[str], tmp_path: Path, earlier: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.csv"
    data.write_text(text)
    for arguments in (
        tune(base_folder, data, earlier),
        ["device", "--config", str(write_device(tmp_path, model=base_folder, data=data))],
    ):
        message = refused(capsys, arguments, "bad.csv", *told)
        assert "secret" not in message
        assert "the film" not in message


def test_a_data_file_that_is_not_there(
    tmp_path: Path, earlier: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, tune(base_folder, tmp_path / "absent.csv", earlier), "absent.csv", "does not exist")


def test_an_error_speaks_in_the_words_of_the_face_that_was_used(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same errors name flags, settings of device.toml, or arguments of Python."""
    no_column, no_class = tmp_path / "no-column.csv", tmp_path / "no-class.csv"
    no_column.write_text("sentence,label\nthe film,0\n")
    no_class.write_text("text,label\nthe film,7\n")
    command = tune(base_folder, no_column, tmp_path / "model")
    message = refused(capsys, command, "Name your columns with --text and --text-pair and --label.")
    assert "`" not in message
    refused(capsys, tune(base_folder, no_class, tmp_path / "model"), "(--num-labels is 2)")
    refused(
        capsys, [*tune(base_folder, no_class, tmp_path / "model"), "--rank", "0", "--num-labels", "8"], "--rank is 0"
    )
    for data, told in (
        (no_column, "data.text and data.text_pair and data.label"),
        (no_class, "(data.num_labels is 2)"),
    ):
        refused(capsys, ["device", "--config", str(write_device(tmp_path, model=base_folder, data=data))], told)
    tuner = EdgeTuner.from_pretrained(base_folder, r=2)
    with pytest.raises(DataError, match="`text` and `text_pair` and `label`"):
        tuner.fit(no_column)


@pytest.mark.parametrize("damage", ["truncated", "removed", "tampered"])
def test_a_corrupt_checkpoint(
    damage: str,
    tmp_path: Path,
    tuned: Path,
    compiled: Path,
    fingerprint: Fingerprint,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = tmp_path / "broken", tmp_path / "bundle"
    shutil.copytree(tuned, model)
    shutil.copytree(compiled, out)  # an earlier result
    weights = model / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "removed":
        weights.unlink()
    else:
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    before = fingerprint(tmp_path)
    refused(capsys, ["compile", str(model), "--out", str(out), "--backend", "onnxruntime"], "broken")
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_bundle_that_is_not_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--text", "the film"] if command == "run" else []
    refused(capsys, [command, str(tmp_path / "absent-bundle"), *more], "absent-bundle")


@pytest.mark.parametrize(("command", "told"), [("export", "absent-run does not exist"), ("report", "absent-run")])
def test_a_run_that_is_not_there(
    command: str, told: str, tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model", str(base_folder), "--out", str(tmp_path / "model")] if command == "export" else []
    refused(capsys, [command, str(tmp_path / "absent-run"), *more], told)
    assert not list(tmp_path.iterdir())

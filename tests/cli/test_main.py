"""The command line: help with an example for every command, and one error with exit code 2 for every bad input."""

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
COMMANDS = list(cli.COMMANDS)
Fingerprint = Callable[[Path], dict[str, str]]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "example:\n" in shown
    example = shown.split("example:\n")[1].strip().splitlines()[0]
    assert shlex.split(example)[:2] == ["fedspine-edge", command]
    parsed = cli.make_parser().parse_args(shlex.split(example, comments=True)[1:])
    assert parsed.command == command


def test_help_lists_every_command_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command:<10}  {summary}\n" in shown for command, summary in cli.COMMANDS.items())
    assert [group for group in cli.COMMAND_GROUPS if f"\n{group}:\n" in shown] == list(cli.COMMAND_GROUPS)
    assert "    export" not in shown  # a renamed command is hidden
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fedspine-edge {__version__}\n"


def test_help_imports_no_heavy_library() -> None:
    """The help imports the module of every command, none of which may import a heavy library."""
    code = (
        "import sys; from fedspine_edge.cli.main import make_parser; make_parser().format_help(); "
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prune"], "'prune'"),
        ([], "COMMAND"),
        (["server", "--config", "fleet.toml", "--fast"], "--fast"),
        (["server"], "--config"),
        (["tune", "--model", "m", "--data", "d", "--out", "o", "--rank", "eight"], "--rank"),
        (["compile", "m", "--precision", "int3"], "int3"),
    ],
)
def test_invalid_command_line_is_one_error(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, arguments, expected, "--help")


def test_unrecognized_argument_names_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["verify", "model.bundle", "model"], "verify: unrecognized arguments: model", "verify --help")


@pytest.mark.parametrize(
    ("command", "after"),
    [
        (["compile", "m"], "starts from the beginning"),
        (["tune", "--model", "m", "--data", "d", "--out", "o"], "continues the work"),
        (["server", "--config", "fleet.toml"], "continues the work"),
    ],
)
def test_interruption_reports_whether_work_is_kept(
    command: list[str], after: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fedspine_edge.cli.{command[0]}.run", interrupted)
    assert main(command) == 130
    assert after in capsys.readouterr().err


def test_unexpected_os_error_is_one_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        return len(Path("/nowhere/at/all").read_text())

    monkeypatch.setattr("fedspine_edge.cli.inspect.run", run)
    refused(capsys, ["inspect", "bundle"], "/nowhere/at/all", "permissions")


def test_closed_output_pipe_is_not_an_error() -> None:
    """As in `fedspine-edge status RUN_DIR --json | head`, which closes the pipe early."""
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
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, "")


def test_program_exits_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedspine_edge", "server", "--config", str(tmp_path / "absent.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    one_error(done.stderr, "absent.toml", "does not exist", "examples/fleet.toml")


# Settings


@pytest.mark.parametrize("command", ["server", "device"])
def test_missing_config_file_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [command, "--config", str(tmp_path / "absent.toml")], "absent.toml", "does not exist")


@pytest.mark.parametrize(
    ("command", "text", "expected"),
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
def test_invalid_setting_names_file_key_and_remedy(
    command: str,
    text: str,
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.toml").write_text(text)
    message = refused(capsys, [command, "--config", "it.toml"], *expected)
    assert "it.toml" in message or "strategy" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.toml"]  # nothing was created


# The broker


def test_server_without_broker_exits_within_seconds(
    tmp_path: Path, dead_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text(f"run_dir = '{tmp_path / 'run'}'\n[broker]\nport = {dead_port}\n")
    begun = time.monotonic()
    refused(capsys, ["server", "--config", str(config)], f"127.0.0.1:{dead_port}")
    assert time.monotonic() - begun < 20


def test_device_without_broker_exits_within_seconds(
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
    """Return the folder of an earlier result at the output path, which must not change."""
    out = tmp_path / "model"
    shutil.copytree(tuned, out)
    before = fingerprint(out)
    yield out
    assert fingerprint(out) == before
    assert not list(tmp_path.glob(".model*"))  # and no partly written folder beside it


@pytest.mark.parametrize(
    ("option", "value"), [("--pruning-ratio", "1.2"), ("--pruning-ratio", "-0.1"), ("--rank", "0"), ("--steps", "0")]
)
def test_out_of_range_number_is_refused(
    option: str, value: str, earlier: Path, base_folder: Path, train_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, [*tune(base_folder, train_csv, earlier), option, value], value)


def test_missing_model_folder_is_refused(
    tmp_path: Path, earlier: Path, train_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, tune(tmp_path / "absent-model", train_csv, earlier), "absent-model")
    config = write_device(tmp_path, model=tmp_path / "absent-model", data=train_csv)
    refused(capsys, ["device", "--config", str(config)], "absent-model")
    refused(capsys, ["compile", str(tmp_path / "absent-model")], "absent-model")


def test_unsupported_family_is_refused(
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
    ("text", "expected"),
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
def test_unusable_data_is_refused_without_quoting_it(
    text: str, expected: list[str], tmp_path: Path, earlier: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.csv"
    data.write_text(text)
    for arguments in (
        tune(base_folder, data, earlier),
        ["device", "--config", str(write_device(tmp_path, model=base_folder, data=data))],
    ):
        message = refused(capsys, arguments, "bad.csv", *expected)
        assert "secret" not in message
        assert "the film" not in message


def test_missing_data_file_is_refused(
    tmp_path: Path, earlier: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, tune(base_folder, tmp_path / "absent.csv", earlier), "absent.csv", "does not exist")


def test_error_names_options_settings_or_arguments(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same error names options, keys of device.toml, or arguments of Python."""
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
    for data, expected in (
        (no_column, "data.text and data.text_pair and data.label"),
        (no_class, "(data.num_labels is 2)"),
    ):
        refused(capsys, ["device", "--config", str(write_device(tmp_path, model=base_folder, data=data))], expected)
    tuner = EdgeTuner.from_pretrained(base_folder, r=2)
    with pytest.raises(DataError, match="`text` and `text_pair` and `label`"):
        tuner.fit(no_column)


@pytest.mark.parametrize("damage", ["truncated", "removed", "tampered"])
def test_corrupt_checkpoint_is_refused(
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
def test_missing_bundle_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--text", "the film"] if command == "run" else []
    refused(capsys, [command, str(tmp_path / "absent-bundle"), *more], "absent-bundle")


@pytest.mark.parametrize(("command", "expected"), [("assemble", "absent-run does not exist"), ("report", "absent-run")])
def test_missing_run_folder_is_refused(
    command: str, expected: str, tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model", str(base_folder), "--out", str(tmp_path / "model")] if command == "assemble" else []
    refused(capsys, [command, str(tmp_path / "absent-run"), *more], expected)
    assert not list(tmp_path.iterdir())


# Renamed options and commands


@pytest.mark.parametrize(
    ("command", "old", "new", "value"),
    [
        (["demo"], "--rounds", "--num-rounds", "7"),
        (["demo"], "--devices", "--num-devices", "3"),
        (["simulate"], "--rounds", "--num-rounds", "7"),
        (["simulate"], "--profiles", "--device-classes", "boards.toml"),
        (["simulate"], "--drop-out", "--disconnect-probability", "0.1"),
        (["simulate"], "--wire", "--model-shape", "minilm"),
        (["experiment"], "--engine", "--executor", "ray"),
        (["tune", "--model", "m", "--data", "d", "--out", "o"], "--r", "--rank", "4"),
    ],
)
def test_old_option_works_with_a_warning(
    command: list[str], old: str, new: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = cli.make_parser()
    current = vars(parser.parse_args([*command, new, value]))
    assert capsys.readouterr().err == ""
    assert vars(parser.parse_args([*command, old, value])) == current
    assert capsys.readouterr().err == (
        f"warning: {old} is now called {new}. The old name will stop working in the next release.\n"
    )
    with pytest.raises(SystemExit):
        main([command[0], "--help"])
    assert f"{old} " not in capsys.readouterr().out


def test_old_command_export_runs_assemble_with_a_warning(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(tmp_path / "absent-run"), "--model", str(base_folder), "--out", str(tmp_path / "model")]
    assert main(command) == 2
    warning, error = capsys.readouterr().err.splitlines()[:2]
    assert warning.startswith("warning: `fedspine-edge export` is now called `fedspine-edge assemble`.")
    assert "ONNX or GGUF" in warning
    assert "absent-run does not exist" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_each_default_once_in_one_form(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("default:") == shown.count("(default: ")
    assert "; default" not in shown
    assert "None" not in shown

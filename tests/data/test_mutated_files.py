"""Damaged data files, settings and command lines: only the errors of this package, and never the texts."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from fedspine_edge.cli.main import main
from fedspine_edge.config import DataSettings, DeviceConfig, FleetConfig, load_config
from fedspine_edge.data.loading import find_labels, read_examples
from fedspine_edge.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
SECRET = "Unmistakable"
CSV = "text,label\n" + "".join(f'"{SECRET} film, {i}",{i % 2}\n' for i in range(12))
JSON_LINES = "".join(f'{{"text": "{SECRET} film {i}", "label": {i % 2}, "x": [1, {{"y": null}}]}}\n' for i in range(12))
PIECES = [
    b'"', b"\n", b"\r", b",", b"\t", b"\0", b"{", b"}", b"[", b"]", b":", b"\\ud83d", b"\xff", b"\xed\xa0\xbd",
    b"1e999", b"nan", b"-", b"true", b"null", b"'", b"=", b"#", b"[[", b'"""', b"\xef\xbb\xbf", b"0" * 400, b"text",
    b"label",
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with a few bytes removed, repeated or inserted, or truncated."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([0, 0, 1, 3, 40]))
        piece = rng.choice(
            [b"", rng.choice(PIECES), rng.choice(PIECES), data[start:end] * 2, bytes([rng.randrange(256)])]
        )
        data = data[:start] + piece + data[end:]
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data) + 1)]
    return data


def parquet_file(folder: Path) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"{SECRET} film {i}", "label": i % 2} for i in range(12)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_mutated_data_file_is_read_or_raises_data_error(suffix: str, tmp_path: Path) -> None:
    whole = {".csv": CSV.encode(), ".tsv": CSV.replace('",', '"\t').replace("text,", "text\t").encode()}
    whole |= {".jsonl": JSON_LINES.encode()}
    source = whole[suffix] if suffix in whole else parquet_file(tmp_path)
    rng = random.Random(suffix)
    path = tmp_path / f"data{suffix}"
    for number in range(400):
        path.write_bytes(mutated(source, rng))
        task = rng.choice(["classification", "causal_lm", "token_classification"])
        try:
            read_examples(DataSettings(path=str(path)), task=task, skip_bad_rows=rng.random() < 0.3)
            find_labels(str(path), DataSettings(path=str(path)))
        except DataError as raised:
            error = raised
        else:
            continue
        assert SECRET not in str(error), (number, str(error))
        assert error.remedy


@pytest.mark.parametrize(("name", "kind"), [("fleet.toml", FleetConfig), ("device.toml", DeviceConfig)])
def test_mutated_settings_load_or_raise_config_error(name: str, kind: type, tmp_path: Path) -> None:
    source = (ROOT / "examples" / name).read_bytes()
    rng = random.Random(name)
    for number in range(300):
        path = tmp_path / name
        path.write_bytes(mutated(source, rng))
        try:
            load_config(path, kind)
        except ConfigError as raised:
            error = raised
        else:
            continue
        assert str(path) in str(error), number


def test_mutated_command_line_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values that no option accepts, for commands that then stop before the work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text(CSV)
    commands = [
        ["tune", "--model", "no/model", "--data", "train.csv", "--out", "out", "--steps", "1", "--rank", "2"],
        ["run", "nowhere", "text", "--top-k", "1", "--temperature", "0.5", "--seed", "1"],
        ["bench", "nowhere", "--batch", "1", "--tokens", "8"],
        ["compile", "nowhere", "--precision", "fp32"],
        ["inspect", "nowhere"],
        ["verify", "nowhere", "--model", "nowhere"],
        ["status", "nowhere"],
        ["report", "nowhere"],
        ["explain", "nowhere", "--device", "a", "--round", "1"],
        ["assemble", "nowhere", "--model", "nowhere", "--out", "out"],
        ["server", "--config", "nowhere.toml"],
        ["device", "--config", "nowhere.toml"],
        [
            "simulate",
            "--mix",
            "nx=1",
            "--num-devices",
            "1",
            "--num-rounds",
            "5",
            "--out",
            "sim",
            "--pruning-ratio",
            "2",
        ],
        ["experiment", "nowhere"],
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = random.Random(1)
    values = [
        "",
        "-1",
        "0",
        "nan",
        "inf",
        "1e400",
        "x",
        "\udcff",
        "a" * 5000,
        "..",
        ".",
        "/",
        "/proc/self/mem",
        "7",
    ]
    for _ in range(120):
        command = list(rng.choice(commands))
        for _ in range(rng.randint(1, 2)):
            command[rng.randrange(1, len(command))] = rng.choice(values)
        try:
            code = main(command)
        except SystemExit as ended:  # --help, as an abbreviation of an option
            code = int(ended.code or 0)
        shown = capsys.readouterr()
        assert code in (0, 1, 2), command
        assert "Traceback" not in shown.err, command
        if code == 2:
            assert "error: " in shown.err, command
    sys.stdout.flush()

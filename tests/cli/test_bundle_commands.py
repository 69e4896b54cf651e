"""The commands inspect, verify and run on real bundles of tiny models."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from tiny_deploy import tiny_model, write_byte_tokenizer, write_tokenizer

from fedspine_edge.bundle.bundle import load_bundle
from fedspine_edge.bundle.publish import seal
from fedspine_edge.cli.main import main
from fedspine_edge.model.checkpoint import save_model


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "model"
    save_model(tiny_model("llama", "causal_lm"), folder)
    write_byte_tokenizer(folder)
    assert main(["compile", str(folder), "--lora", "inputs", "--backend", "onnxruntime", "--out", f"{folder}.zip"]) == 0
    return folder


def test_inspect_shows_the_contents(decoder, capsys):
    assert main(["inspect", f"{decoder}.zip"]) == 0
    text = capsys.readouterr().out
    for words in (
        "llama, causal_lm, fp32",
        "input, rank up to 64",
        "4 tensors",
        "token by token",
        "all hashes correct",
    ):
        assert words in text
    assert main(["inspect", f"{decoder}.zip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "causal_lm"


def test_inspect_names_a_damaged_plan_and_shows_the_rest(compiled, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    shutil.copytree(compiled, bundle)
    (bundle / "engine.plan").write_bytes(b"plan")
    seal(bundle, load_bundle(bundle).manifest)
    assert main(["inspect", str(bundle)]) == 0
    assert "all hashes correct" in capsys.readouterr().out
    (bundle / "engine.plan").write_bytes(b"p")
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "engine.plan has 1 bytes instead of 4" in text
    assert "all hashes correct" not in text
    assert "bert, classification" in text


def test_verify_exits_1_for_another_model(decoder, tmp_path, capsys):
    assert main(["verify", f"{decoder}.zip", "--model", str(decoder)]) == 0
    assert "token by token" in capsys.readouterr().out
    save_model(tiny_model("llama", "causal_lm", seed=9), tmp_path / "other")
    assert main(["verify", f"{decoder}.zip", "--model", str(tmp_path / "other"), "--json"]) == 1
    assert "disagrees" in json.loads(capsys.readouterr().out)["mismatch"]


def test_run_generates_text(decoder, capsys):
    command = ["run", f"{decoder}.zip", "--backend", "onnxruntime", "--text", "hello", "--max-new-tokens", "6"]
    assert main([*command, "--adapter", str(decoder)]) == 0
    streamed = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert streamed == result["text"] + "\n"
    assert len(result["tokens"]) == 6
    drawn = [*command, "--json", "--temperature", "50", "--seed", "3"]
    texts = {}
    for top_k in ("0", "1"):
        assert main([*drawn, "--top-k", top_k]) == 0
        texts[top_k] = json.loads(capsys.readouterr().out)["results"][0]["text"]
    assert texts["1"] == result["text"] != texts["0"]  # with one candidate, sampling has no effect
    assert main([*command, "--max-new-tokens", "0"]) == 2
    assert "--max-new-tokens is 0.\n  Give at least 1." in capsys.readouterr().err
    assert main([*command, "--temperature", "1", "--seed", "-1"]) == 2
    assert "--seed is -1.\n  Give at least 0." in capsys.readouterr().err


def test_run_accepts_texts_before_and_after_options(compiled, capsys):
    command = ["run", str(compiled), "the film", "--json", "bad", "--text=-good-"]
    assert main(command) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 3
    assert main([*command, "--fast", "good"]) == 2
    assert "unrecognized arguments: bad --fast good" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compile", "FILE"], "FILE is a file, not a model folder.\n  "),
        (["inspect", "FILE"], "FILE is not a bundle: it contains no bundle.json.\n  "),
        (
            ["bench", "nowhere", "--plot", "no/folder.png"],
            "the folder of no/folder.png does not exist.\n  Create it, or change --plot",
        ),
        (["bench", "nowhere"], "error: nowhere does not exist.\n  "),
        (["bench", "nowhere", "--batch", "0"], "error: --batch is 0.\n  Give at least 1."),
        (["bench", "nowhere", "--threads", "0"], "error: --threads is 0.\n  Give at least 1."),
    ],
)
def test_invalid_path_or_number_is_one_error(arguments, expected, tmp_path, capsys):
    file = tmp_path / "train.csv"
    file.write_text("text,label\n")
    assert main([word.replace("FILE", str(file)) for word in arguments]) == 2
    assert expected.replace("FILE", str(file)) in capsys.readouterr().err


def test_int8_is_calibrated_inspected_and_verified(tmp_path, capsys):
    save_model(tiny_model("bert"), tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    rows = [f"{'good very ' * (i % 6)}film,{i % 3}" for i in range(64)]
    data = tmp_path / "data.csv"
    data.write_text("\n".join(["review,stars", *rows]))
    columns = ["--text", "review", "--label", "stars"]
    compile_it = ["compile", str(tmp_path / "model"), "--backend", "onnxruntime", "--precision", "int8"]
    assert main([*compile_it, "--calibrate", str(data)]) == 2
    assert "Name your columns with --text" in capsys.readouterr().err
    assert main([*compile_it, "--calibrate", str(data), *columns]) == 0
    log = capsys.readouterr().err
    assert "calibrating on 32 examples" in log
    assert "answered identically" in log
    bundle = str(tmp_path / "model.bundle")
    assert main(["inspect", bundle]) == 0
    text = capsys.readouterr().out
    for words in ("int8, opset 19", "12 linears, 0 left in fp16", "32 examples", "tokens 1–24", "accuracy"):
        assert words in text
    assert main(["verify", bundle, "--model", str(tmp_path / "model"), "--data", str(data), *columns, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"]["num_answers"] == 64
    assert main(["verify", bundle, "--data", str(data)]) == 2
    assert "--data needs --model" in capsys.readouterr().err
    assert main(compile_it) == 2
    assert "--calibrate" in capsys.readouterr().err


def test_run_answers_line_by_line_of_standard_input(compiled, decoder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the film was good\n\nthe film was bad\n"))
    assert main(["run", str(compiled)]) == 0
    first, blank, last = capsys.readouterr().out.splitlines()
    assert (bool(first), blank, bool(last)) == (True, "", True)
    monkeypatch.setattr("sys.stdin", io.StringIO("\nthe film was bad\n"))
    assert main(["run", str(compiled), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results[0] is None
    assert f"{results[1]['label']}\t{results[1]['probability']:.3f}" == last
    monkeypatch.setattr("sys.stdin", io.StringIO("\nab\n"))
    assert main(["run", f"{decoder}.zip", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n\n"))
    assert main(["run", str(compiled)]) == 2
    assert "no text was given" in capsys.readouterr().err

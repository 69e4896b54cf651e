"""inspect, verify and run on real bundles of tiny models, as a user types them."""

from __future__ import annotations

import json

import pytest
from tiny_deploy import tiny_model, write_byte_tokenizer

from fedspine_edge.cli.main import main


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "model"
    tiny_model("llama", "causal_lm").save(folder)
    write_byte_tokenizer(folder)
    assert main(["compile", str(folder), "--lora", "inputs", "--backend", "onnxruntime", "--out", f"{folder}.zip"]) == 0
    return folder


def test_inspect_says_what_is_inside(decoder, capsys):
    assert main(["inspect", f"{decoder}.zip"]) == 0
    text = capsys.readouterr().out
    for words in ("llama, causal_lm, fp32", "input, rank up to 64", "4 tensors", "token by token", "every hash right"):
        assert words in text
    assert main(["inspect", f"{decoder}.zip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "causal_lm"


def test_verify_compares_again_and_answers_no_to_another_model(decoder, tmp_path, capsys):
    assert main(["verify", f"{decoder}.zip", "--model", str(decoder)]) == 0
    assert "token by token" in capsys.readouterr().out
    tiny_model("llama", "causal_lm", seed=9).save(tmp_path / "other")
    assert main(["verify", f"{decoder}.zip", "--model", str(tmp_path / "other"), "--json"]) == 1
    assert "disagrees" in json.loads(capsys.readouterr().out)["mismatch"]


def test_run_continues_a_text(decoder, capsys):
    command = ["run", f"{decoder}.zip", "--backend", "onnxruntime", "--text", "hello", "--max-new-tokens", "6"]
    assert main([*command, "--adapter", str(decoder)]) == 0
    streamed = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert streamed == result["text"] + "\n"
    assert len(result["tokens"]) == 6

"""Simulated fleets with tasks other than classification: instructions and word labels."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import tiny_lm

from fedspine_edge import Session, compile_engine
from fedspine_edge.cli.main import main
from fedspine_edge.config import DataSettings, DeviceConfig, FleetConfig, convert
from fedspine_edge.errors import ConfigError, DataError
from fedspine_edge.export.fleet_model import build_finished_model
from fedspine_edge.monitoring.run_view import by_round, read_run
from fedspine_edge.simulation.evaluation import evaluate_finished_model
from fedspine_edge.simulation.virtual_fleet import simulate
from fedspine_edge.tuner import EdgeTuner

LENGTH = 24
COLUMNS = {"causal_lm": {"text": "prompt", "text_pair": "answer"}, "token_classification": {"num_labels": 3}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    language_model = tiny_lm.write_folder(tmp_path_factory.mktemp("tiny-llama"))
    return {"causal_lm": language_model, "token_classification": tiny_model}


@pytest.fixture(scope="module", params=COLUMNS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Any:
    """(task, the fleet's settings, its result, its finished model) after six rounds with pruning."""
    task = request.param
    folder = tmp_path_factory.mktemp(task)
    fleet = fleet_of(folder, task, num_rounds=6, pruning_ratio=0.4, criterion="apt", round_to=4)
    result = simulate(fleet, devices_of(folder, task, models[task]))
    finished = build_finished_model(Path(fleet.run_dir), models[task], folder / "finished")
    return task, fleet, result, finished


def write(path: Path, task: str, count: int, seed: int) -> Path:
    """`count` examples of a task in a file."""
    if task == "causal_lm":
        return tiny_lm.write_instructions(path, tiny_lm.instructions(count, seed))
    kinds = {**dict.fromkeys(tiny_bert.GOOD, 1), **dict.fromkeys(tiny_bert.BAD, 2)}
    words = [text.split() for text, _ in tiny_bert.sentences(count, seed)]
    rows = [json.dumps({"text": line, "label": [kinds.get(word, 0) for word in line]}) for line in words]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def fleet_of(folder: Path, task: str, **changes: Any) -> FleetConfig:
    settings = {"run_dir": str(folder / "run"), "task": task, "num_rounds": 3, "pruning_ratio": 0.0, "min_devices": 3}
    training = {"tau": 6, "recovery_steps": 6, "learning_rate": 1e-2, "max_length_tokens": LENGTH}
    return convert({**settings, "ranks": [2, 4], "training": training, **changes}, FleetConfig)


def devices_of(folder: Path, task: str, model: Path) -> list[DeviceConfig]:
    return [
        device_of(f"d{k}", folder, model, task=task, data=data_of(write(folder / f"{k}.jsonl", task, 96, k), task))
        for k in (1, 2, 3)
    ]


def device_of(device_id: str, folder: Path, model: Path, **settings: Any) -> DeviceConfig:
    names = {"device_id": device_id, "model": str(model), "state_dir": str(folder / device_id), "torch_device": "cpu"}
    return convert({**names, **settings}, DeviceConfig)


def data_of(path: Path, task: str) -> dict[str, Any]:
    return {"path": str(path), "holdout": 16, **COLUMNS[task]}


def test_fleet_learns_task_while_pruned(trained: Any, tmp_path: Path, models: dict[str, Path]) -> None:
    task, fleet, result, finished = trained
    assert result.pruning_ratio == pytest.approx(0.4, abs=0.1)
    assert finished.layout.pruning_ratio == result.pruning_ratio
    card = (finished.folder / "README.md").read_text()
    assert f"task: {task}" in card
    assert "trained on: 240 examples, 72 steps" in card
    rounds = by_round(read_run(Path(fleet.run_dir)).rows)
    assert [row.status for rows in rounds.values() for row in rows] == ["ok"] * 18
    assert all(last.loss_after < 0.5 * first.loss_before for first, last in zip(rounds[1], rounds[6]))

    test = convert(data_of(write(tmp_path / "test.jsonl", task, 60, 9), task), DataSettings)
    held_out = evaluate_finished_model(Path(result.final_dir), models[task], test, max_length_tokens=LENGTH)
    # two words and the end of every answer, or one label for every word
    answers = 180 if task == "causal_lm" else sum(len(text.split()) for text, _ in tiny_bert.sentences(60, 9))
    assert held_out.num_examples == answers
    assert held_out.accuracy > 0.75

    columns = {name: value for name, value in COLUMNS[task].items() if name != "num_labels"}
    options = {"torch_device": "cpu", "max_length_tokens": LENGTH, **columns}
    again = EdgeTuner.from_pretrained(finished.folder, task=task, **options).evaluate(test.path)
    assert (again["accuracy"], again["num_examples"]) == (held_out.accuracy, answers)
    assert math.isclose(again["loss"], held_out.loss, rel_tol=1e-5)


@pytest.mark.parametrize("trained", ["causal_lm"], indirect=True)
def test_language_model_runs_in_transformers_and_onnx(trained: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    *_, finished = trained
    tuner = EdgeTuner.from_pretrained(finished.folder, task="causal_lm", torch_device="cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tuner.save(tmp_path / "merged", merged=True))
    assert loaded.config.num_key_value_heads == 1
    assert loaded.config.intermediate_size < 48
    prompt, answer = tiny_lm.instructions(1, seed=9)[0]
    tokens = tuner.tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = loaded.generate(tokens, max_new_tokens=4, do_sample=False)[0, tokens.shape[1] :].tolist()
    assert tuner.tokenizer.decode(expected, skip_special_tokens=True) == answer
    with Session.load(compile_engine(finished.folder, tmp_path / "bundle"), backend="onnxruntime") as session:
        found = session.generate(prompt, max_new_tokens=4)
    assert (found.text, found.finish) == (answer, "end")
    assert list(found.tokens) == expected[: len(found.tokens)]


@pytest.mark.parametrize("task", COLUMNS)
def test_same_seed_gives_same_adapter(tmp_path: Path, models: dict[str, Path], task: str) -> None:
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (folder := tmp_path / name).mkdir()
        fleet = fleet_of(folder, task, seed=seed)
        digests.append(simulate(fleet, devices_of(folder, task, models[task])).adapter_sha256)
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_device_with_other_task_is_refused_with_reason(
    tmp_path: Path, models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    devices = devices_of(tmp_path, "causal_lm", models["causal_lm"])
    odd = "token_classification"
    data = data_of(write(tmp_path / "odd.jsonl", odd, 96, 4), odd)
    devices.append(device_of("odd", tmp_path, models[odd], task=odd, data=data))
    assert simulate(fleet_of(tmp_path, "causal_lm"), devices).num_devices == 3
    message = "does not accept this device: its task is token_classification, this fleet's is causal_lm"
    assert any(message in record.getMessage() for record in caplog.records if record.name == "fedspine_edge.device")


def test_device_with_unsupported_task_raises_at_start(tmp_path: Path, models: dict[str, Path]) -> None:
    tagged, answers = "token_classification", write(tmp_path / "answers.jsonl", "causal_lm", 40, 1)
    wrong_model = device_of("d1", tmp_path, models[tagged], task="causal_lm", data=data_of(answers, "causal_lm"))
    with pytest.raises(ConfigError, match=r"bert models do not support task 'causal_lm'.*\n.*token_classification"):
        simulate(fleet_of(tmp_path, "causal_lm"), [wrong_model])
    wrong_file = device_of("d2", tmp_path, models[tagged], task=tagged, data=data_of(answers, tagged))
    with pytest.raises(DataError, match=r"40 of 40 rows .*no column 'text'; the columns present are: prompt, answer"):
        simulate(fleet_of(tmp_path, tagged), [wrong_file])


@pytest.mark.parametrize("task", COLUMNS)
def test_simulate_command_trains_mix_on_task(
    tmp_path: Path, models: dict[str, Path], task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "all.jsonl", task, 61, 1)
    columns = ["--text", "prompt", "--text-pair", "answer"] if task == "causal_lm" else ["--num-labels", "3"]
    options = ["--mix", "tx2=1,nx=1", "--task", task, "--num-rounds", "3", "--pruning-ratio", "0", *columns]
    command = ["simulate", *options, "--data", str(data), "--out", str(tmp_path / "sim"), "--json"]
    assert main(command) == 2
    assert "Give --model and --data" in capsys.readouterr().err
    assert main([*command, "--model", str(models[task])]) == 0
    assert json.loads(capsys.readouterr().out)["num_devices"] == 2
    shares = [path.read_text().splitlines() for path in sorted((tmp_path / "sim" / "data").iterdir())]
    dealt = [json.loads(line) for pair in zip(*shares) for line in pair]
    assert [len(share) for share in shares] == [31, 30]
    assert dealt == [json.loads(line) for line in data.read_text().splitlines()[:60]]

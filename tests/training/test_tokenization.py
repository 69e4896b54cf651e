"""Tasks, data, tokens and lengths that a model cannot read are rejected before they reach it."""

import json
import shutil

import msgspec
import numpy as np
import pytest
import tiny_bert
import tiny_lm
import tiny_models as tiny
import torch
from tiny_fleet import TRAINING, Fleet, config, round_tensors
from tokenizers.normalizers import Replace

from fedspine_edge.clock import VirtualClock
from fedspine_edge.config import OptimizerSettings, SimulatedSettings
from fedspine_edge.data.examples import Example
from fedspine_edge.data.targets import IGNORED
from fedspine_edge.device.cost_meter import CostMeter
from fedspine_edge.device.round import LocalRound
from fedspine_edge.errors import CheckpointError, ConfigError, DataError
from fedspine_edge.export.tracing import task_graph
from fedspine_edge.model.flops import pass_flops
from fedspine_edge.model.loading import load_base, load_tokenizer
from fedspine_edge.protocol.messages import WaitPlan
from fedspine_edge.training import batching
from fedspine_edge.training.batching import Encoded
from fedspine_edge.training.tokenization import TextEncoder
from fedspine_edge.training.trainer import BatchSettings, Trainer


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return tiny_lm.write_folder(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def instructed(language_model, tmp_path):
    """Settings of a device with prompts and answers."""
    path = tiny_lm.write_instructions(tmp_path / "train.jsonl", tiny_lm.instructions(96))
    data = {"path": str(path), "text": "prompt", "text_pair": "answer", "holdout": 16}
    return config(language_model, path, tmp_path / "state", task="causal_lm", data=data)


@pytest.fixture
def fleet():
    return Fleet()


def test_round_of_a_language_model_sends_no_head(fleet, instructed, monkeypatch):
    trainers: list[Trainer] = []
    made = LocalRound._trainer

    def watched(self, layout):
        trainers.append(made(self, layout))
        return trainers[-1]

    monkeypatch.setattr(LocalRound, "_trainer", watched)
    driven = fleet.device(instructed).start()
    driven.settle()
    hello = fleet.statuses[-1]
    assert (hello.task, hello.num_labels, hello.num_examples) == ("causal_lm", 0, 80)
    fleet.send(adapter=fleet.offer(round_tensors(hello.model)))
    driven.settle()
    report, update = fleet.reports[-1], fleet.update()
    assert report.status == "ok"
    assert report.loss_after < report.loss_before
    assert not any(name.startswith("head.") for name in update)
    # means over the answers' tokens: two words and the end of each of 16
    [trainer] = trainers
    evaluation = trainer.evaluate()
    assert evaluation.num_examples == 16 * 3
    assert (evaluation.loss, evaluation.accuracy) == (report.loss_after, report.accuracy_after)
    batch = trainer._batch(trainer._train, range(8))
    assert len(batch["input_ids"]) < 8, "examples share rows"
    assert (batch["labels"] != IGNORED).sum() == 8 * 3
    driven.device.close()


class PowerLoss(BaseException):
    """What no handler of errors may catch."""


def test_power_loss_between_packed_steps_keeps_the_bits(instructed, tmp_path, monkeypatch):
    def round_in(folder):
        fleet = Fleet()
        settings = msgspec.structs.replace(instructed, state_dir=str(tmp_path / folder))
        driven = fleet.device(settings).start()
        try:
            fleet.send(adapter=fleet.offer(round_tensors(driven.device.spec, order=True)), pruning_ratio=0.4)
            driven.settle()
        finally:
            driven.device.close()
        return fleet.reports[-1], fleet.update()

    undisturbed = round_in("undisturbed")
    take_step = Trainer._take_step

    def dies(self, *arguments):
        if self.step == 9:
            raise PowerLoss
        take_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take_step", dies)
        with pytest.raises(PowerLoss):
            round_in("disturbed")
    report, update = round_in("disturbed")
    assert report == undisturbed[0]
    assert report.pruning_ratio == 0.4
    assert update.keys() == undisturbed[1].keys()
    for name, value in update.items():
        np.testing.assert_array_equal(value, undisturbed[1][name], err_msg=name)


def test_simulated_time_of_a_language_model_counts_logits():
    model = tiny_lm.model()
    examples = [Encoded([3, 4, 5, 6], 0, None, [IGNORED, IGNORED, 5, 6])] * 3
    simulated = SimulatedSettings(flops_per_s=1.0, step_s=0.0)
    links = {"time_factor": 1.0, "up_mbit_s": 1.0, "down_mbit_s": 1.0}
    meter = CostMeter("simulated", clock=VirtualClock(), simulated=simulated, **links)
    Trainer(model, examples, examples, TRAINING, round_steps=1, meter=meter).evaluate()
    layers = pass_flops(model.layout, model.r, 3, 4, backward=False)
    assert meter.completion_s() == layers + 2 * 6 * tiny_lm.VOCAB * 32  # two tokens of each of three answers


def test_device_rejects_the_state_of_another_task(fleet, instructed, tiny_csv, tmp_path):
    driven = fleet.device(instructed).start()
    fleet.send(adapter=fleet.offer(round_tensors(driven.device.spec)))
    driven.settle()
    driven.device.close()
    plain = config(instructed.model, tiny_csv, tmp_path / "state")
    with pytest.raises(CheckpointError, match="written with another task"):
        fleet.device(plain).start()


def test_device_with_another_tokenizer_fails_before_connecting(fleet, instructed, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(instructed.model, broken)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word: i + 60 for word, i in tokenizer["model"]["vocab"].items()}
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = {"path": instructed.data.path, "text": "prompt", "text_pair": "answer", "holdout": 16}
    settings = config(broken, tmp_path, tmp_path / "other", task="causal_lm", data=data)
    with pytest.raises(CheckpointError, match=r"gives token \d+, but the model has embeddings for 61"):
        fleet.device(settings).start()
    fleet.listen()
    assert not fleet.statuses


@pytest.mark.parametrize("words", [40, 80])
def test_plan_with_texts_beyond_the_positions_fails(fleet, tiny_folder, tmp_path, words):
    rows = [("film " * words, 0), *tiny_bert.sentences(80)]
    settings = config(tiny_folder, tiny_bert.write_csv(tmp_path / "long.csv", rows), tmp_path / "state")
    driven = fleet.device(settings).start()
    training = msgspec.structs.replace(TRAINING, max_length_tokens=100)
    fleet.send(adapter=fleet.offer(round_tensors(driven.device.spec)), training=training)
    driven.settle()
    report = fleet.reports[-1]
    if words > 64:
        assert report.status == "failed"
        assert "`max_length_tokens` is 100" in report.reason
        assert "positions for 64 tokens. Use at most 64." in report.reason  # with what to do about it
    else:  # no text is as long as it might be
        assert report.status == "ok"
    driven.device.close()


def test_texts_without_tokens_are_counted_not_quoted(language_model):
    tokenizer = load_tokenizer(language_model)
    tokenizer.backend_tokenizer.normalizer = Replace("zanzibar", "")
    texts = TextEncoder.from_model(load_base(language_model, task="causal_lm"), tokenizer)
    examples = [Example("film film", 0), Example("zanzibar", 0), Example("film zanzibar", 0)]
    with pytest.raises(DataError, match="1 of 3 texts have no tokens") as caught:
        texts.encode(examples, 24)
    assert "zanzibar" not in str(caught.value)
    assert "example 2" in caught.value.remedy
    assert len(texts.encode(examples[::2], 24)) == 2
    with pytest.raises(DataError, match="no text has a token to predict"):
        texts.encode([Example("film", 0), Example("film", 0)], 24)


def test_text_encoder_limits_lengths_to_the_positions(tiny_folder, language_model):
    model = load_base(tiny_folder)
    texts = TextEncoder.from_model(model, load_tokenizer(tiny_folder))
    assert texts.max_length_tokens() == 64
    assert texts.max_length_tokens(10) == 10
    with pytest.raises(ConfigError, match="Use at most 64"):
        texts.max_length_tokens(65)
    rotary = TextEncoder.from_model(load_base(language_model, task="causal_lm"), load_tokenizer(language_model))
    assert (rotary.max_length_tokens(), rotary.max_length_tokens(4000)) == (128, 4000)


def test_rejection_is_logged_once_by_the_device(fleet, tiny_folder, tiny_csv, tiny_base, tmp_path, caplog):
    driven = fleet.device(config(tiny_folder, tiny_csv, tmp_path / "state"), model=tiny_base).start()
    for _ in range(2):  # the server answers every status
        fleet.publish(WaitPlan(run_id="run", device_id="d1", reason="it has num_labels = 2, the fleet 3."))
        driven.settle()
    assert caplog.text.count("does not accept this device") == 1
    assert "fleet tiny does not accept this device: it has num_labels = 2, the fleet 3." in caplog.text
    assert not driven.device.finished
    assert not fleet.reports
    driven.device.close()


def test_tiny_instructions_fit_their_tokenizer(language_model):
    tokenizer = load_tokenizer(language_model)
    words = " ".join(f"{prompt} {answer}" for prompt, answer in tiny_lm.instructions(200))
    assert tokenizer.unk_token_id not in tokenizer(words)["input_ids"]
    assert set(tiny_bert.GOOD) <= set(words.split())


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_padding_token_without_an_embedding_is_replaced_by_one_with(task, language_model, tiny_folder, tiny_csv):
    folder = tiny_folder if task == "classification" else language_model
    tokenizer = load_tokenizer(folder)
    model = load_base(folder, task=task)
    vocabulary = int(model.module.get_input_embeddings().weight.shape[0])
    while len(tokenizer) <= vocabulary:
        tokenizer.add_special_tokens({"pad_token": f"<pad_{len(tokenizer)}>"})
    assert tokenizer.pad_token_id >= vocabulary
    texts = TextEncoder.from_model(model, tokenizer)
    assert 0 <= texts.pad_id < vocabulary
    model.attach_lora(2, 2.0, 0)
    words = ["a", "good", "film", "and", "a", "bad", "one"]
    examples = [Example(" ".join(words[:count]), count % 2) for count in range(1, 8)]
    encoded = texts.encode(examples, 24)
    batches = BatchSettings(pad_id=texts.pad_id)
    trainer = Trainer(model, encoded, encoded, OptimizerSettings(total_steps=2), round_steps=2, batches=batches)
    trainer.run(2)
    first = trainer.evaluate().loss
    other = Trainer(model, encoded, encoded, OptimizerSettings(), round_steps=1, batches=BatchSettings(pad_id=1))
    assert first == pytest.approx(other.evaluate().loss, rel=1e-5), "padding is masked, whatever the token"


@pytest.mark.parametrize(
    ("kind", "given"), [("gpt2_lm", False), ("llama", False), ("modernbert", False), ("bert", True)]
)
def test_token_types_reach_only_models_that_have_them(kind, given, tiny_folder):
    """GPT-2 would add `token_type_ids` as embeddings of words, and its bundle has no such input."""
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("a good film")
    model = tiny.prunable(kind)
    texts = TextEncoder.from_model(model, tokenizer)
    for examples in ([Example("a good film", 0), Example("bad", 1)], [Example("good", 0, "bad")]):
        encoded = batching.encode(examples, tokenizer, 24, segments=texts.segments)
        assert all((example.token_type_ids is not None) == given for example in encoded)
    inputs = {tensor.name for tensor in task_graph(model.merge(torch.float32).eval(), layout=model.layout).inputs}
    assert ("token_type_ids" in inputs) == given

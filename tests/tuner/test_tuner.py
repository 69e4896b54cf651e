"""`EdgeTuner` from loading to a saved model, with the errors of common mistakes."""

import numpy as np
import pytest
import tiny_bert

from fedspine_edge import ColumnNames, EdgeTuner, PruningSettings
from fedspine_edge.errors import CheckpointError, ConfigError, DataError


@pytest.fixture
def tuner(tiny_folder):
    return EdgeTuner.from_pretrained(tiny_folder, r=4, learning_rate=1e-2, torch_device="cpu")


def test_tuner_fits_prunes_saves_and_reloads(tuner, tmp_path):
    data, test = tiny_bert.sentences(240), tiny_bert.sentences(60, seed=9)
    before = tuner.evaluate(test)
    assert tuner.fit(data, steps=60) is tuner
    fitted = tuner.evaluate(test)
    assert fitted["loss"] < 0.7 * before["loss"]
    tuner.prune(0.5, steps=5).fit(lambda: data, steps=40)
    assert tuner.layout.pruning_ratio == pytest.approx(0.5, abs=0.02)
    assert len(set(tuner.layout.counts)) == 1
    pruned = tuner.evaluate(test)
    assert pruned["num_examples"] == 60
    assert pruned["accuracy"] > 0.7
    tuner.save(tmp_path / "out")
    assert f"{pruned['accuracy']:.6g}" in (tmp_path / "out" / "README.md").read_text()
    again = EdgeTuner.from_pretrained(tmp_path / "out", torch_device="cpu")
    assert again.evaluate(test) == pruned
    assert again.layout.to_dict() == tuner.layout.to_dict()
    again.fit(data, steps=2)


def test_prune_with_repair_changes_the_weights_that_are_saved(tuner, tiny_folder, tmp_path):
    data, test = tiny_bert.sentences(240), tiny_bert.sentences(60, seed=9)
    plain = EdgeTuner.from_pretrained(tiny_folder, r=4, learning_rate=1e-2, torch_device="cpu")
    for each, repair in ((tuner, True), (plain, False)):
        each.fit(data, steps=60).prune(0.6, steps=5, repair=repair)
    repaired = tuner.evaluate(test)
    assert repaired != plain.evaluate(test)
    tuner.save(tmp_path / "out")
    assert EdgeTuner.from_pretrained(tmp_path / "out", torch_device="cpu").evaluate(test) == repaired


def test_prune_to_a_preview_with_repair_needs_data(tuner):
    data = tiny_bert.sentences(64)
    tuner.fit(data, steps=5)
    preview = tuner.preview(0.5)
    tuner.prune(preview, repair=True)
    assert tuner.layout == preview.after


def test_prune_without_a_fit_warns_and_scores_first(tuner, caplog):
    with pytest.raises(DataError, match="pruning needs data"):
        tuner.prune(0.5)
    tuner.prune(0.5, tiny_bert.sentences(40), steps=3)
    assert "taking 3 scored steps" in caplog.text
    assert tuner.layout.pruning_ratio == pytest.approx(0.5, abs=0.02)


def test_prune_is_absolute_and_never_grows(tuner):
    tuner.fit(tiny_bert.sentences(40), steps=3)
    tuner.prune(0.5, stages=1)
    counts = tuner.layout.counts
    tuner.prune(0.5, stages=1)
    assert tuner.layout.counts == counts
    with pytest.raises(ConfigError, match="already pruned"):
        tuner.prune(0.1)
    with pytest.raises(ConfigError, match=r"1\.2"):
        tuner.prune(1.2)


def test_fit_counts_epochs_as_passes_over_the_data(tuner):
    tuner.fit(tiny_bert.sentences(40), epochs=2)
    assert tuner._steps_taken == 10
    with pytest.raises(ConfigError, match="not both"):
        tuner.fit(tiny_bert.sentences(40), epochs=1, steps=1)
    with pytest.raises(ConfigError, match="0 training steps are too few"):
        tuner.fit(tiny_bert.sentences(40), steps=0)


def test_fit_with_the_same_seed_gives_the_same_adapter(tiny_folder):
    def adapter(seed):
        tuner = EdgeTuner.from_pretrained(tiny_folder, r=4, torch_device="cpu", seed=seed)
        return tuner.fit(tiny_bert.sentences(40), steps=5).model.adapter_state()

    first, second, other = adapter(1), adapter(1), adapter(2)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    assert any((value != other[name]).any() for name, value in first.items())


def test_merge_gives_a_plain_model_with_equal_logits(tuner, tmp_path):
    import torch

    tuner.fit(tiny_bert.sentences(40), steps=5)
    inputs = dict(tuner.tokenizer("good film", return_tensors="pt"))
    with torch.inference_mode():
        expected = tuner.model(**inputs).logits
        torch.testing.assert_close(tuner.merge()(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    tuner.save(tmp_path / "merged", merged=True)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_tuner_reads_files_pairs_and_column_names(tiny_folder, tiny_csv, tmp_path):
    tuner = EdgeTuner.from_pretrained(tiny_folder, r=2, torch_device="cpu")
    assert tuner.evaluate(tiny_csv)["num_examples"] == 96
    assert tuner.evaluate([("good", "bad", 1), ("a", "b", 0)])["num_examples"] == 2
    with pytest.raises(DataError, match="no column 'sentence'; the columns present are: text, label"):
        EdgeTuner.from_pretrained(tiny_folder, columns=ColumnNames(text="sentence"), torch_device="cpu").fit(tiny_csv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`r` is 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"num_labels": 1}, "`num_labels` is 1"),
        ({"num_labels": 0}, "`num_labels` is 0"),
        ({"torch_device": "tpu"}, "tpu"),
        ({"max_length_tokens": 65}, "positions for 64 tokens"),
    ],
)
def test_from_pretrained_rejects_impossible_settings(tiny_folder, options, message):
    with pytest.raises(ConfigError, match=message):
        EdgeTuner.from_pretrained(tiny_folder, **{"torch_device": "cpu", **options})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "luck"}, "criterion 'luck' is unknown"),
        ({"scope": "world"}, "scope 'world' is unknown"),
        ({"importance_metric": "mean"}, "importance_metric 'mean' is unknown"),
    ],
)
def test_pruning_settings_with_unknown_names_are_rejected(settings, message):
    with pytest.raises(ConfigError, match=message):
        PruningSettings(**settings)


def test_from_pretrained_accepts_single_fields_with_a_warning(tiny_folder):
    with pytest.warns(FutureWarning) as caught:
        tuner = EdgeTuner.from_pretrained(
            tiny_folder,
            torch_device="cpu",
            text="sentence",
            criterion="apt",
            metric="signed",
            min_heads=2,
            base_dtype="bfloat16",
            gradient_checkpointing=True,
        )
    assert tuner._data_settings.text == "sentence"
    assert tuner._pruning == PruningSettings(criterion="apt", importance_metric="signed", min_heads=2)
    assert tuner.model.base_dtype == "bfloat16"
    assert tuner.model.gradient_checkpointing
    messages = [str(warning.message) for warning in caught if warning.filename == __file__]
    assert len(messages) == 3
    assert "pruning=PruningSettings(criterion='apt', importance_metric='signed', min_heads=2)" in messages[1]


def test_from_pretrained_rejects_unknown_arguments(tiny_folder):
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        EdgeTuner.from_pretrained(tiny_folder, rank=8)


def test_old_method_names_work_with_a_warning(tuner, tmp_path):
    tuner.fit(tiny_bert.sentences(40), steps=3)
    with pytest.warns(FutureWarning, match=r"use preview\(ratio\)"):
        preview = tuner.plan(0.5)
    with pytest.warns(FutureWarning, match=r"use prune\(preview\)"):
        tuner.apply(preview)
    assert tuner.layout == preview.after
    with pytest.warns(FutureWarning, match="merged=True"):
        folder = tuner.save_merged(tmp_path / "merged")
    assert not (folder / "adapter_config.json").exists()


def test_from_pretrained_names_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        EdgeTuner.from_pretrained(tmp_path / "nowhere")


def test_tuner_trains_a_language_model_on_texts(tmp_path, tiny_folder):
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=27,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / "llama" / name)
    texts = [text for text, _ in tiny_bert.sentences(40)]
    tuner = EdgeTuner.from_pretrained(tmp_path / "llama", task="causal_lm", r=4, torch_device="cpu", learning_rate=1e-2)
    before = tuner.evaluate(texts)
    tuner.fit(texts, steps=20).prune(0.25, steps=3).fit(texts, steps=10)
    after = tuner.evaluate(texts)
    assert after["loss"] < before["loss"]
    assert after["num_examples"] == sum(len(tuner.tokenizer(text)["input_ids"]) - 1 for text in texts)


def test_model_card_states_what_is_known_and_measured(tuner, tiny_folder, tmp_path):
    tuner.fit(tiny_bert.sentences(40), steps=4)
    assert "not measured" in (tuner.save(tmp_path / "out") / "README.md").read_text()
    tuner.prune(0.5, stages=1)
    accuracy = tuner.evaluate(tiny_bert.sentences(30, seed=9))["accuracy"]
    latency = tuner.measure_latency(length_tokens=16, repeats=2)
    card = (tuner.save(tmp_path / "out") / "README.md").read_text()
    heads, channels = tuner.layout.counts[0]
    for phrase in (
        f"base model: {tiny_folder.name}, weights with sha256 {tuner.model.spec.base_sha256}",
        "trained on: 40 examples, 4 steps",
        f"kept per layer: {heads}/4 heads and {channels}/64 channels",
        f"removed: {tuner.layout.pruning_ratio:.4f} of the prunable parameters, {tuner.layout.sparsity:.4f} of all",
        f"| accuracy | {accuracy:.6g} |",
        "| test examples | 30 |",
        f"latency in ms (torch, CPU, threads: 1, one text of 16 tokens, median of 2) | {latency.total_ms:.6g} |",
        "fedspine_edge.load_model",
        "because transformers alone cannot build layers of these widths",
    ):
        assert phrase in card
    again = EdgeTuner.from_pretrained(tmp_path / "out", torch_device="cpu").fit(tiny_bert.sentences(60), steps=2)
    card = (again.save(tmp_path / "again") / "README.md").read_text()
    assert f"base model: {tiny_folder.name}" in card  # what was known of the base and its training goes along
    assert "trained on: 60 examples, 6 steps" in card
    assert "accuracy |" not in card  # what was measured was of the weights before this fit


def test_fit_with_another_tokenizer_fails_before_the_first_step(tiny_folder, tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(tiny_folder, vocab_size=20)
    BertModel(config).save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((tiny_folder / name).read_bytes())
    tuner = EdgeTuner.from_pretrained(tmp_path / "small", torch_device="cpu")
    with pytest.raises(CheckpointError, match=r"(?s)token 2\d, but the model has embeddings for 20.*copy the right"):
        tuner.fit(tiny_bert.sentences(40), steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 3}, "not for classification with 3"),
        ({"task": "token_classification"}, "was saved"),
    ],
)
def test_from_pretrained_rejects_a_saved_model_of_another_task(tuner, tmp_path, options, message):
    folder = tuner.save(tmp_path / "out")
    with pytest.raises(ConfigError, match=message) as caught:
        EdgeTuner.from_pretrained(folder, torch_device="cpu", **options)
    assert caught.value.remedy


@pytest.mark.parametrize("label", [2, -1, 7])
def test_fit_rejects_labels_out_of_range_before_the_first_step(tuner, label):
    with pytest.raises(DataError, match=f"row 2: label {label} is out of range") as caught:
        tuner.fit([("good", 1), ("bad", label)], steps=1)
    assert caught.value.remedy
    assert tuner._steps_taken == 0

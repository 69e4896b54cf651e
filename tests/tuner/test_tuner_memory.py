"""Base dtypes, memory estimates and TensorBoard curves of the tuner."""

import numpy as np
import pytest
import tiny_bert

from fedspine_edge import EdgeTuner, MemorySettings
from fedspine_edge.errors import ConfigError, MissingDependency


def tuner_of(folder, **options):
    return EdgeTuner.from_pretrained(folder, r=4, learning_rate=1e-2, torch_device="cpu", **options)


@pytest.mark.parametrize("base_dtype", ["bfloat16", "int4"])
def test_tuner_with_a_smaller_base_dtype_prunes_and_reloads(base_dtype, tiny_folder, tmp_path):
    data, test = tiny_bert.sentences(240), tiny_bert.sentences(60, seed=9)
    tuner = tuner_of(tiny_folder, memory=MemorySettings(base_dtype=base_dtype))
    assert tuner.model.base_dtype == base_dtype
    tuner.fit(data, steps=60).prune(0.5, steps=5).fit(data, steps=30)
    found = tuner.evaluate(test)
    assert found["accuracy"] > 0.7
    again = EdgeTuner.from_pretrained(tuner.save(tmp_path / "out"), torch_device="cpu")
    assert again.model.base_dtype == "bfloat16"
    assert again.evaluate(test) == found
    assert (
        EdgeTuner.from_pretrained(tmp_path / "out", memory=MemorySettings(base_dtype="int8")).model.base_dtype == "int8"
    )


def test_unknown_base_dtype_raises_before_loading(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)'int5' is unknown.*int4"):
        tuner_of(tmp_path / "nowhere", memory=MemorySettings(base_dtype="int5"))


def test_tuner_estimate_follows_batch_and_data(tiny_folder):
    tuner = tuner_of(tiny_folder, batch_size=16)
    whole = tuner.estimate()
    assert whole.micro_batch == 16
    assert tuner.estimate(batch_size=4).peak_bytes < whole.peak_bytes
    short = tuner.estimate(tiny_bert.sentences(20))  # at most 12 tokens of 128
    assert short.step_bytes < whole.step_bytes / 4
    before = {name: value.copy() for name, value in tuner.model.adapter_state().items()}
    tuner.fit(tiny_bert.sentences(20), steps=1)
    assert any((value != before[name]).any() for name, value in tuner.model.adapter_state().items())


def test_fit_writes_curves_and_a_second_fit_continues_them(tiny_folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    tuner = tuner_of(tiny_folder)
    for steps in (4, 3):
        tuner.fit(
            tiny_bert.sentences(40),
            steps=steps,
            log_dir=tmp_path / "runs",
            on_step=lambda step, loss: seen.append(loss),
        )
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_allclose([event.value for event in losses], seen, rtol=1e-5)
    expected = {"loss", "grad_norm", "learning_rate", "skipped_steps", "loss_spikes", "micro_batch"}
    assert {tag.removeprefix("train/") for tag in events.Tags()["scalars"]} == expected


def test_missing_tensorboard_names_the_extra(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependency, match=r"fedspine-edge\[tensorboard\]"):
        tuner_of(tiny_folder).fit(tiny_bert.sentences(20), steps=1, log_dir=tmp_path)


def test_trainer_packs_language_models_only(tiny_folder):
    tuner = tuner_of(tiny_folder, pack=True)
    assert not tuner._trainer(tuner._encoded(tiny_bert.sentences(20)), 1)._pack

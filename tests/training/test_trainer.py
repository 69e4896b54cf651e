"""Training is reproducible across restore and compaction, skips bad steps, and survives a lack of memory."""

import math

import msgspec
import numpy as np
import pytest
import tiny_bert
import torch

from fedspine_edge.config import OptimizerSettings
from fedspine_edge.data.examples import Example
from fedspine_edge.errors import ConfigError, DataError, OutOfMemory
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.loading import load_tokenizer
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.training import batching
from fedspine_edge.training.base_model import BaseModelLoader, choose_torch_device
from fedspine_edge.training.trainer import BatchSettings, Trainer, learning_rate

TRAINING = OptimizerSettings(learning_rate=1e-2, batch_size=8, max_length_tokens=24, total_steps=100)


@pytest.fixture(scope="session")
def encoded(tiny_folder):
    examples = [Example(text, label) for text, label in tiny_bert.sentences(330)]
    return batching.encode(examples, load_tokenizer(tiny_folder), 24)


@pytest.fixture
def make(tiny_base, tiny_folder, encoded):
    def make(training=TRAINING, **options):
        model = BaseModelLoader(str(tiny_folder), num_labels=2, model=tiny_base).load()
        model.attach_lora(4, 2.0, seed=1)
        tracker = ImportanceTracker(model, seed=1)
        options = {"round_steps": 30, "tracker": tracker, "batches": BatchSettings(seed=5), **options}
        return Trainer(model, encoded[:300], encoded[300:], training, **options)

    return make


def halved(layout):
    return Layout(
        layout.spec, tuple(h[: len(h) // 2] for h in layout.heads), tuple(c[: len(c) // 2] for c in layout.channels)
    )


def test_trainer_learns_before_and_after_pruning(make):
    trainer = make()
    before = trainer.evaluate()
    trainer.run(30, scored=True)
    trainer.compact(halved(trainer.model.layout))
    trainer.run(100)
    after = trainer.evaluate()
    assert after.num_examples == 30
    assert after.loss < 0.6 * before.loss
    assert after.accuracy > 0.85
    assert trainer.skipped == 0
    assert trainer.tracker.steps == 30


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("interrupted_at", [3, 12])
def test_restored_trainer_ends_with_the_same_bits(make, interrupted_at):
    def run(trainer, until):
        trainer.run(min(until, 8), scored=True)
        if trainer.step == 8 and until > 8 and trainer.model.layout.pruning_ratio == 0:
            trainer.compact(halved(trainer.model.layout))
        trainer.run(until)

    straight = make()
    run(straight, 16)
    first = make()
    run(first, interrupted_at)
    saved, layout = first.state(), first.model.layout
    second = make()
    second.model.compact(layout)
    second = Trainer(
        second.model,
        second._train,
        second._holdout,
        TRAINING,
        round_steps=30,
        tracker=ImportanceTracker(second.model, seed=1),
        batches=BatchSettings(seed=5),
    )
    second.restore(saved)
    same(saved.tensors, second.state().tensors)
    run(second, 16)
    same(straight.state().tensors, second.state().tensors)
    assert straight.state().info == second.state().info
    assert straight.evaluate() == second.evaluate()
    assert straight.tracker.lora_importance() == second.tracker.lora_importance()


def test_learning_rate_warms_up_each_round_under_one_cosine():
    training = OptimizerSettings(learning_rate=1.0, warmup_ratio=0.1, first_step=40, total_steps=80)
    rates = [learning_rate(training, step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(0.25 * 0.5)
    assert rates[3] == pytest.approx(0.5 * (1 + math.cos(math.pi * 43 / 80)))
    assert max(rates) == rates[3]
    assert rates[39] < 0.01
    assert learning_rate(OptimizerSettings(learning_rate=1.0, warmup_ratio=0.0), 0, 10) == 1.0
    held = OptimizerSettings(learning_rate=1.0, warmup_ratio=0.0, first_step=40, total_steps=80, decay_from_step=50)
    assert [learning_rate(held, step, 20) for step in (0, 9, 10)] == [1.0, 1.0, 1.0]
    assert learning_rate(held, 25, 20) == pytest.approx(0.5)
    assert learning_rate(held, 40, 20) == pytest.approx(0.0)
    assert learning_rate(OptimizerSettings(learning_rate=1.0, total_steps=5), 50, 10) == 0.0


def test_trainer_skips_and_counts_a_non_finite_step(make):
    trainer = make()
    trainer.run(2, scored=True)
    before = trainer.model.adapter_state()
    real = trainer._forward
    trainer._forward = lambda batch: (real(batch)[0] * float("nan"), 0)
    trainer.run(5, scored=True)
    same(before, trainer.model.adapter_state())
    assert (trainer.step, trainer.skipped, trainer.tracker.steps) == (5, 3, 2)
    trainer._forward = real
    trainer.run(6)
    assert trainer.skipped == 3
    assert math.isfinite(trainer.train_loss)


def test_trainer_skips_and_counts_a_gradient_spike(make):
    trainer = make()
    trainer.run(10)
    before = trainer.model.adapter_state()
    real = trainer._forward
    trainer._forward = lambda batch: (real(batch)[0] * 100, 0)
    trainer.run(12, scored=True)
    same(before, trainer.model.adapter_state())
    assert (trainer.spikes, trainer.skipped, trainer.tracker.steps) == (2, 0, 0)
    trainer._forward = real
    trainer.run(13)
    assert trainer.spikes == 2
    assert trainer.last_step.grad_norm > 0
    assert trainer.last_step.learning_rate == learning_rate(TRAINING, 12, 30)


def test_step_below_the_clipping_norm_is_never_a_spike(make):
    """Late in a training the usual gradient is tiny, and a hard example's is many times that."""
    trainer = make(training=msgspec.structs.replace(TRAINING, max_grad_norm=1e6))
    trainer.run(10)
    real = trainer._forward
    trainer._forward = lambda batch: (real(batch)[0] * 100, 0)
    trainer.run(12, scored=True)
    assert (trainer.spikes, trainer.tracker.steps) == (0, 2)


def test_lasting_larger_gradients_are_accepted(make):
    trainer = make()
    trainer.run(10)
    real = trainer._forward
    trainer._forward = lambda batch: (real(batch)[0] * 100, 0)
    trainer.run(30)
    assert 10 <= trainer.spikes <= 12
    assert trainer.last_loss > 1


def test_float16_gradients_are_scaled_and_unscaled(make):
    trainer = make()
    trainer.model.set_base_dtype("float16")
    trainer = Trainer(trainer.model, trainer._train, trainer._holdout, TRAINING, round_steps=30)
    exact = make()
    assert trainer._loss_scale == 2**15
    examples = trainer._order.indices(0)
    (loss, values, _), (expected, expected_values, _) = (one._gradients(examples, False) for one in (trainer, exact))
    assert loss == pytest.approx(expected, rel=1e-2)
    flat, truth = (torch.cat([g.flatten() for g in gradients]) for gradients in (values, expected_values))
    assert float((flat - truth).norm() / truth.norm()) < 0.02
    trainer._loss_scale = 2.0**60  # overflows on the way back: halved until it does not, no step is lost
    trainer.run(1)
    assert (trainer.skipped, trainer.step) == (0, 1)
    assert 1.0 < trainer._loss_scale < 2.0**60


def test_trainer_clips_gradients_to_the_norm(make):
    seen = []
    trainer = make(OptimizerSettings(learning_rate=1e-3, batch_size=8, max_grad_norm=0.01, total_steps=60))
    trainer.optimizer.step = lambda: seen.append(
        torch.stack([p.grad.norm() for p in trainer.model.trainable_parameters().values()]).norm().item()
    )
    trainer.run(1)
    assert seen == [pytest.approx(0.01, rel=1e-4)]


def test_out_of_memory_halves_the_micro_batch(make):
    whole, pieces = make(), make()
    real = pieces._forward

    def tight(batch):
        if len(batch["labels"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(batch)

    pieces._forward = tight
    whole.run(1, scored=True)
    pieces.run(1, scored=True)
    assert (whole.micro_batch, pieces.micro_batch) == (8, 2)
    for name, value in whole.model.adapter_state().items():
        np.testing.assert_allclose(pieces.model.adapter_state()[name], value, atol=1e-5, err_msg=name)
    assert pieces.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
    assert pieces.evaluate().loss == pytest.approx(whole.evaluate().loss, rel=1e-4)


def test_out_of_memory_with_one_example_raises(make):
    trainer = make()

    def full(batch):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    trainer._forward = full
    with pytest.raises(OutOfMemory, match="step 1") as caught:
        trainer.run(1)
    assert "max_length_tokens" in caught.value.remedy


def test_other_runtime_errors_are_not_out_of_memory(make):
    trainer = make()

    def broken(batch):
        raise RuntimeError("shape mismatch")

    trainer._forward = broken
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.run(1)
    assert trainer.micro_batch == 8


def test_trainer_without_examples_raises_data_error(make, tiny_base):
    with pytest.raises(DataError, match="no training examples"):
        Trainer(tiny_base, [], [], TRAINING, round_steps=1)
    with pytest.raises(DataError, match="evaluate"):
        make().evaluate([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_cuda_raises_config_error():
    assert choose_torch_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="CUDA does not work here"):
        choose_torch_device("cuda")

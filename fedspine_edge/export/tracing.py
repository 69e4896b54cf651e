"""Wraps a transformers task model as a traceable module whose inputs and outputs are those of the ONNX file.

Classifiers take tokens and an attention mask. Decoders also take the KV cache of every layer and return it with the new
tokens appended:

    past_key_values.{i}.key|value   (batch, kept KV heads of layer i, past, head_dim)
    present.{i}.key|value           (batch, kept KV heads of layer i, past + sequence, head_dim)
    attention_mask                  (batch, past + sequence)

With an empty cache this is an ordinary full pass, so one ONNX graph serves the prompt and the steps. With
`lora="inputs"`, every adapted linear reads its factors, and the task head its weights, from inputs too:

    lora.{linear}.A   (in, rank)      lora.{linear}.B   (rank, out), multiplied by the scaling      head.{parameter}

The factors are stored transposed, so that the graph multiplies them without a transpose.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedspine_edge.bundle.bundle import AdapterSpec, LoraModule, TensorInfo
from fedspine_edge.config import Task
from fedspine_edge.model.architecture import task_of
from fedspine_edge.model.families import SUPPORTED, architecture_of, max_tokens_of, num_token_types_of
from fedspine_edge.model.layout import Layout, module_names, split_name
from fedspine_edge.model.lora import LoraLinear
from fedspine_edge.model.pooled_token import only_pooled_token
from fedspine_edge.model.prunable import PrunableModel


class RuntimeLora(nn.Module):  # type: ignore[misc]
    """A frozen linear whose low-rank factors are inputs of the graph: y = base(x) + (x·A)·B."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.factors: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.factors is None:
            return y
        lora_A, lora_B = self.factors
        return y + (x @ lora_A) @ lora_B


@dataclass(frozen=True)
class TaskGraph:
    """A traceable module with example inputs and the description of its inputs and outputs."""

    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    task: Task

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the positions and names of the dynamic axes of every tensor."""
        return {
            tensor.name: {index: axis for index, axis in enumerate(tensor.shape) if isinstance(axis, str)}
            for tensor in (*self.inputs, *self.outputs)
        }


class _TracedModule(nn.Module):  # type: ignore[misc]
    """Calls a task model with named tensors instead of keyword arguments, cache objects and parameters."""

    def __init__(self, model: nn.Module, input_names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._input_names = tuple(input_names)

    def forward(self, *tensors: Tensor) -> Any:
        inputs = dict(zip(self._input_names, tensors))
        factors = {name: value for name, value in inputs.items() if name.startswith("lora.")}
        for path, child in self.model.named_modules():
            if isinstance(child, RuntimeLora):
                child.factors = (factors[f"lora.{path}.A"], factors[f"lora.{path}.B"])
        head = {name.removeprefix("head."): value for name, value in inputs.items() if name.startswith("head.")}
        past = [value for name, value in inputs.items() if name.startswith("past_key_values.")]
        if past:
            return self._decode(inputs["input_ids"], inputs["attention_mask"], past, head)
        tokens = {name: value for name, value in inputs.items() if not name.startswith(("lora.", "head."))}
        return self._call(tokens, head).logits

    def _call(self, arguments: dict[str, Any], head: dict[str, Tensor]) -> Any:
        # torch.func.functional_call cannot be traced. `with_runtime_lora` made these parameters plain attributes.
        original = {name: get_attribute(self.model, name) for name in head}
        try:
            for name, value in head.items():
                _set_attribute(self.model, name, value)
            with pooled_token_only(self.model, arguments):
                return self.model(**arguments)
        finally:
            for name, value in original.items():
                _set_attribute(self.model, name, value)

    def _decode(self, ids: Tensor, mask: Tensor, past: list[Tensor], head: dict[str, Tensor]) -> tuple[Tensor, ...]:
        length, total = ids.shape[1], mask.shape[1]
        query = torch.arange(length, device=ids.device)[:, None] + (total - length)
        key = torch.arange(total, device=ids.device)[None]
        visible = (key <= query)[None] & (mask[:, None, :] > 0)
        # The position of a token is the number of visible tokens before it, which is right for padding on either side.
        positions = (visible.to(torch.float32).sum(-1) - 1).clamp(min=0).to(torch.int64)
        mask_bias = self._attention_bias(visible, query - key)
        arguments = {"input_ids": ids, "attention_mask": mask_bias, "position_ids": positions}
        out = self._call(arguments | {"past_key_values": _filled_cache(past), "use_cache": True}, head)
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))

    def _attention_bias(self, visible: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the bias of the attention scores, (batch, 1, sequence, total), or one per attention type.

        transformers uses a given mask unchanged, so sliding windows are applied here: a token sees those that are less
        than `sliding_window` positions before it.
        """
        config = self.model.config
        full, layer_types, window = _additive_mask(visible), getattr(config, "layer_types", None), None
        if layer_types is None or "sliding_attention" in layer_types:
            window = getattr(config, "sliding_window", None)
        if window is None:
            return full
        windowed = _additive_mask(visible & (distance < window)[None])
        return windowed if layer_types is None else {"full_attention": full, "sliding_attention": windowed}


def pooled_token_only(module: nn.Module, arguments: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the last layer of a classifier computes only the pooled token, as in its ONNX graph."""
    if task_of(module) != "classification" or module.config.model_type not in SUPPORTED:
        return contextlib.nullcontext()
    return only_pooled_token(module, architecture_of(module.config), arguments["input_ids"])


def _additive_mask(visible: Tensor) -> Tensor:
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]


def _filled_cache(past: Sequence[Tensor]) -> Any:
    """Return a transformers cache that contains `past`. Its own update would concatenate them with empty tensors."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    cache.layers = []
    for keys, values in zip(past[::2], past[1::2]):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def get_attribute(module: nn.Module, name: str) -> Any:
    """Return a nested attribute, such as classifier.weight."""
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def _set_attribute(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, value)


def task_graph(module: nn.Module, layout: Layout | None, adapter: AdapterSpec | None = None) -> TaskGraph:
    """Return the traceable graph of a task model.

    Args:
        module: A float32 transformers task model in eval mode.
        layout: Kept heads of every layer, which size the KV cache. Only decoders need it.
        adapter: Description of the adapter factors that become inputs.
    """
    config, task = module.config, task_of(module)
    tokens = ("batch", "sequence")
    inputs = [TensorInfo(name="input_ids", dtype="int64", shape=tokens, limit=int(config.vocab_size))]
    num_logits = int(config.vocab_size if task == "causal_lm" else config.num_labels)
    logits_shape = ("batch", num_logits) if task == "classification" else (*tokens, num_logits)
    outputs = [TensorInfo(name="logits", dtype="float32", shape=logits_shape)]
    if task == "causal_lm":
        if layout is None:
            raise ValueError("The graph of a decoder needs its layout.")
        inputs.append(TensorInfo(name="attention_mask", dtype="int64", shape=("batch", "total"), limit=2))
        past, present = _cache_tensors(layout)
        inputs += past
        outputs += present
    else:
        inputs.append(TensorInfo(name="attention_mask", dtype="int64", shape=tokens, limit=2))
        token_types = num_token_types_of(config)
        if token_types > 1:  # RoBERTa has a single type, so the input could only be zero
            inputs.append(TensorInfo(name="token_type_ids", dtype="int64", shape=tokens, default=0, limit=token_types))
    if adapter is not None:
        inputs += adapter_inputs(adapter)
    traced = _TracedModule(module, [tensor.name for tensor in inputs])
    return TaskGraph(traced.eval(), _example_inputs(module, inputs), tuple(inputs), tuple(outputs), task)


def _cache_tensors(layout: Layout) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Return the inputs and the outputs of the KV cache."""
    past, present, head_dim = [], [], layout.spec.head_dim
    for layer, (kv_heads, _) in enumerate(layout.counts):
        for kind in ("key", "value"):
            name = f"{layer}.{kind}"
            shape = ("batch", kv_heads, "past", head_dim)
            past.append(TensorInfo(name=f"past_key_values.{name}", dtype="float32", shape=shape))
            shape = ("batch", kv_heads, "total", head_dim)
            present.append(TensorInfo(name=f"present.{name}", dtype="float32", shape=shape))
    return past, present


def adapter_inputs(adapter: AdapterSpec) -> list[TensorInfo]:
    """Return the inputs of an adapter: two per linear and one per parameter of the head."""
    tensors = []
    for entry in adapter.modules:
        tensors.append(TensorInfo(name=f"lora.{entry.path}.A", dtype="float32", shape=(entry.in_features, "rank")))
        tensors.append(TensorInfo(name=f"lora.{entry.path}.B", dtype="float32", shape=("rank", entry.out_features)))
    tensors += [TensorInfo(name=f"head.{name}", dtype="float32", shape=tuple(s)) for name, s in adapter.head.items()]
    return tensors


def _example_inputs(module: nn.Module, inputs: Sequence[TensorInfo]) -> tuple[Tensor, ...]:
    """Return inputs of two rows, one of them padded, because tracing could remove a mask that consists of ones."""
    device = next(module.parameters()).device
    max_tokens = max_tokens_of(module.config)
    length = min(8, max_tokens)
    past = 3 if any(tensor.kind == "past" for tensor in inputs) and max_tokens > length + 3 else 0
    sizes = {"batch": 2, "sequence": length, "past": past, "total": length + past, "rank": 2}
    token = 1 if module.config.pad_token_id == 0 else 0
    example = []
    for tensor in inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
        if tensor.dtype != "int64":
            value = torch.zeros(shape)
        elif tensor.name == "attention_mask":
            value = torch.ones(shape, dtype=torch.int64)
            if shape[1] > 1:
                value[1, -1] = 0
        else:
            value = torch.full(shape, token if tensor.name == "input_ids" else 0, dtype=torch.int64)
        example.append(value.to(device))
    return tuple(example)


def _linears_in_file_order(model: PrunableModel) -> list[str]:
    """Return the names of all linears. Parts of a fused matrix are in the order of its rows, as in adapter files."""
    fused = model.architecture.fused
    order = {f"{path}.{part}": row for path, parts in fused.items() for row, part in enumerate(parts)}
    return sorted(
        module_names(model.spec),
        key=lambda name: (split_name(name)[0], order.get(model.architecture.linears[split_name(name)[1]], -1)),
    )


def with_runtime_lora(model: PrunableModel) -> tuple[nn.Module, AdapterSpec, dict[str, Tensor]]:
    """Return a copy of the model whose adapters are inputs, their description, and the values of the model's adapter.

    A model without an adapter gets an adapter of rank 0.
    """
    shared = {id(p): p for p in model.module.parameters()}
    module = copy.deepcopy(model.module, shared)
    modules, values = [], {}
    for name in _linears_in_file_order(model):
        path = model.architecture.path(name)
        linear = model.linear(name)
        base = linear.base_layer if isinstance(linear, LoraLinear) else linear
        parent, _, attribute = path.rpartition(".")
        setattr(module.get_submodule(parent), attribute, RuntimeLora(base))
        out_features, in_features = (int(size) for size in base.weight.shape)
        modules.append(LoraModule(path=path, in_features=in_features, out_features=out_features))
        if isinstance(linear, LoraLinear):
            values[f"lora.{path}.A"] = linear.lora_A.detach().float().T.contiguous()
            values[f"lora.{path}.B"] = (linear.lora_B.detach().float() * linear.scaling).T.contiguous()
        else:
            values[f"lora.{path}.A"] = torch.zeros(in_features, 0)
            values[f"lora.{path}.B"] = torch.zeros(0, out_features)
    head = {}
    for name in model.head_names:
        value = module.get_parameter(name).detach().float()
        head[name], values[f"head.{name}"] = tuple(int(size) for size in value.shape), value
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)
        _set_attribute(module, name, value)
    spec = AdapterSpec(
        modules=tuple(modules),
        head=head,
        base_sha256=model.spec.base_sha256,
        layout_sha256=AdapterSpec.layout_digest(
            [h.tolist() for h in model.layout.heads], [c.tolist() for c in model.layout.channels]
        ),
    )
    return module.float().eval(), spec, values

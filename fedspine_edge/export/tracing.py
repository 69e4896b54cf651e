"""What is traced: a transformers task model behind the inputs that the ONNX file will have.

Classifiers take tokens and mask. Decoders also take each layer's KV cache and give it back one run longer:

    past_key_values.{i}.key|value   (batch, kept KV heads of layer i, past, head_dim)
    present.{i}.key|value           (batch, kept KV heads of layer i, past + sequence, head_dim)
    attention_mask                  (batch, past + sequence)

With an empty cache that is the ordinary full pass, so one graph serves prompt and steps. With `lora="inputs"`
every adapted linear reads its factors, and the task head its weights, from inputs too:

    lora.{linear}.A   (in, rank)      lora.{linear}.B   (rank, out), scaling folded in      head.{parameter}

The factors lie transposed so that the graph multiplies them as they come.
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
from fedspine_edge.model.families import SUPPORTED, architecture_of
from fedspine_edge.model.layout import module_names, split_name
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
class Graph:
    """A traceable module with its example inputs and the description of what goes in and out."""

    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    task: Task

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Per tensor the positions of its dynamic axes and their names."""
        return {
            tensor.name: {index: axis for index, axis in enumerate(tensor.shape) if isinstance(axis, str)}
            for tensor in (*self.inputs, *self.outputs)
        }


class _Traced(nn.Module):  # type: ignore[misc]
    """Calls the task model with named tensors instead of keyword arguments, cache objects and parameters."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._names = tuple(names)

    def forward(self, *tensors: Tensor) -> Any:
        given = dict(zip(self._names, tensors))
        factors = {name: value for name, value in given.items() if name.startswith("lora.")}
        for path, child in self.model.named_modules():
            if isinstance(child, RuntimeLora):
                child.factors = (factors[f"lora.{path}.A"], factors[f"lora.{path}.B"])
        head = {name.removeprefix("head."): value for name, value in given.items() if name.startswith("head.")}
        past = [value for name, value in given.items() if name.startswith("past_key_values.")]
        if past:
            return self._decode(given["input_ids"], given["attention_mask"], past, head)
        tokens = {name: value for name, value in given.items() if not name.startswith(("lora.", "head."))}
        return self._call(tokens, head).logits

    def _call(self, arguments: dict[str, Any], head: dict[str, Tensor]) -> Any:
        # torch.func.functional_call does not trace; these are plain attributes since `with_runtime_lora`.
        before = {name: get_attribute(self.model, name) for name in head}
        try:
            for name, value in head.items():
                _set_attribute(self.model, name, value)
            with reading(self.model, arguments):
                return self.model(**arguments)
        finally:
            for name, value in before.items():
                _set_attribute(self.model, name, value)

    def _decode(self, ids: Tensor, mask: Tensor, past: list[Tensor], head: dict[str, Tensor]) -> tuple[Tensor, ...]:
        length, total = ids.shape[1], mask.shape[1]
        query = torch.arange(length, device=ids.device)[:, None] + (total - length)
        key = torch.arange(total, device=ids.device)[None]
        seen = (key <= query)[None] & (mask[:, None, :] > 0)
        # The position of a token is the number of tokens before it that it sees: right with padding on either side.
        positions = (seen.to(torch.float32).sum(-1) - 1).clamp(min=0).to(torch.int64)
        arguments = {"input_ids": ids, "attention_mask": self._bias(seen, query - key), "position_ids": positions}
        out = self._call(arguments | {"past_key_values": _filled_cache(past), "use_cache": True}, head)
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))

    def _bias(self, seen: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
        """What is added to attention scores, (batch, 1, sequence, total); per kind of layer where layers differ.

        A mask that is given is taken as it is, so a sliding window is cut here: a token sees those less than
        `sliding_window` before it.
        """
        config = self.model.config
        whole, kinds, window = _added(seen), getattr(config, "layer_types", None), None
        if kinds is None or "sliding_attention" in kinds:
            window = getattr(config, "sliding_window", None)
        if window is None:
            return whole
        near = _added(seen & (distance < window)[None])
        return near if kinds is None else {"full_attention": whole, "sliding_attention": near}


def reading(module: nn.Module, arguments: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """While entered, a classifier computes in its last layer the token that it reads: what its graph holds."""
    if task_of(module) != "classification" or module.config.model_type not in SUPPORTED:
        return contextlib.nullcontext()
    return only_pooled_token(module, architecture_of(module.config), arguments["input_ids"])


def _added(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def _filled_cache(past: Sequence[Tensor]) -> Any:
    """transformers' cache around tensors that exist already: its own way in would concatenate them to empty ones."""
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
    """A possibly nested attribute such as classifier.weight."""
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def _set_attribute(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, value)


def kv_heads(module: nn.Module) -> tuple[tuple[int, ...], int]:
    """Kept KV heads of every layer, and head_dim, read off the weights: configs cannot state unequal widths."""
    config = module.config
    architecture = architecture_of(config)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    layers = len(module.get_submodule(f"{architecture.backbone}.{architecture.layers}"))
    widths = (_out_features(module, architecture.path(f"layers.{layer}.k")) for layer in range(layers))
    return tuple(width // head_dim for width in widths), head_dim


def _out_features(module: nn.Module, path: str) -> int:
    """Rows of a linear, which may be one of the equal thirds of a fused `c_attn`."""
    try:
        linear = module.get_submodule(path)
    except AttributeError:
        fused = module.get_submodule(path.rpartition(".")[0])
        return int(fused.bias.shape[0]) // 3
    return int(getattr(linear, "base", linear).weight.shape[0])


def task_graph(module: nn.Module, *, max_tokens: int, adapter: AdapterSpec | None = None) -> Graph:
    """The graph of a float32 task model in eval mode; `adapter` names the factors that become inputs."""
    config, task = module.config, task_of(module)
    tokens = ("batch", "sequence")
    inputs = [TensorInfo(name="input_ids", dtype="int64", shape=tokens, limit=int(config.vocab_size))]
    last = int(config.vocab_size if task == "causal_lm" else config.num_labels)
    outputs = [
        TensorInfo(
            name="logits", dtype="float32", shape=("batch", last) if task == "classification" else (*tokens, last)
        )
    ]
    if task == "causal_lm":
        inputs.append(TensorInfo(name="attention_mask", dtype="int64", shape=("batch", "total"), limit=2))
        heads, head_dim = kv_heads(module)
        for layer, count in enumerate(heads):
            for kind in ("key", "value"):
                past, total = ("batch", count, "past", head_dim), ("batch", count, "total", head_dim)
                inputs.append(TensorInfo(name=f"past_key_values.{layer}.{kind}", dtype="float32", shape=past))
                outputs.append(TensorInfo(name=f"present.{layer}.{kind}", dtype="float32", shape=total))
    else:
        inputs.append(TensorInfo(name="attention_mask", dtype="int64", shape=tokens, limit=2))
        types = int(getattr(config, "type_vocab_size", 0) or 0)
        if types > 1:  # RoBERTa has one type: an input that can only be zero
            inputs.append(TensorInfo(name="token_type_ids", dtype="int64", shape=tokens, default=0, limit=types))
    if adapter is not None:
        inputs += adapter_inputs(adapter)
    traced = _Traced(module, [tensor.name for tensor in inputs])
    return Graph(traced.eval(), _example(module, inputs, max_tokens), tuple(inputs), tuple(outputs), task)


def adapter_inputs(adapter: AdapterSpec) -> list[TensorInfo]:
    """The inputs that carry an adapter: two per linear and one per head parameter."""
    found = []
    for entry in adapter.modules:
        found.append(TensorInfo(name=f"lora.{entry.path}.A", dtype="float32", shape=(entry.in_features, "rank")))
        found.append(TensorInfo(name=f"lora.{entry.path}.B", dtype="float32", shape=("rank", entry.out_features)))
    found += [TensorInfo(name=f"head.{name}", dtype="float32", shape=tuple(s)) for name, s in adapter.head.items()]
    return found


def _example(module: nn.Module, inputs: Sequence[TensorInfo], max_tokens: int) -> tuple[Tensor, ...]:
    """Two rows, one of them padded: a mask of ones alone could be optimised away while tracing."""
    device = next(module.parameters()).device
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


def _in_file_order(model: PrunableModel) -> list[str]:
    """Names of the linears; those that files keep as one matrix in the order of its rows, which adapters follow."""
    fused = model.architecture.fused
    order = {f"{path}.{part}": row for path, parts in fused.items() for row, part in enumerate(parts)}
    return sorted(
        module_names(model.spec),
        key=lambda name: (split_name(name)[0], order.get(model.architecture.linears[split_name(name)[1]], -1)),
    )


def with_runtime_lora(model: PrunableModel) -> tuple[nn.Module, AdapterSpec, dict[str, Tensor]]:
    """A copy of the model whose adapters are inputs, their description, and the model's own adapter as inputs.

    A model without an adapter gets one of rank 0: the base as it is.
    """
    shared = {id(p): p for p in model.module.parameters()}
    module = copy.deepcopy(model.module, shared)
    modules, values = [], {}
    for name in _in_file_order(model):
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

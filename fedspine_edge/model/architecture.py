"""The model families, one declarative entry each; the only reader of transformers' module names.

To add a family, add an `Architecture` to `SUPPORTED` and a tiny config to tests/support/tiny_models.py; every
test of the room then runs on it. See docs/models.md.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from fedspine_edge.config import Task
from fedspine_edge.errors import ConfigError, ModelError, UnknownArchitecture
from fedspine_edge.model.fused import take_apart
from fedspine_edge.model.layout import Layout, Part, split_name
from fedspine_edge.wire.messages import ModelSpec


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps the things that LoRA and pruning touch.

    Paths are relative: `layers` to the backbone, `linears` and `attention` to one layer.
    """

    family: str
    """transformers' `model_type`."""
    backbone: str
    """Attribute of the task model that holds the transformer itself."""
    layers: str
    linears: Mapping[Part, str]
    attention: str
    """The module whose forward reshapes into heads."""
    head: Mapping[Task, tuple[str, ...]]
    """Per supported task the modules of the task model that form its trainable head. Weights that a checkpoint
    brings for one of them are kept, a module that it lacks starts fresh."""
    lora_targets: tuple[str, ...]
    """PEFT's `target_modules`: suffixes that match the linears and nothing else."""
    kv_heads: str = "num_attention_heads"
    """Config attribute with the number of KV heads."""
    channels: str = "intermediate_size"
    """Config attribute with the number of FFN channels; where it is None, four times the hidden size."""
    biases: tuple[bool | str, bool | str] = (True, True)
    """Whether (attention, FFN) linears have biases, or the config attributes that say so."""
    unbiased: tuple[Part, ...] = ()
    """Parts that have none even so."""
    fused: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    """Modules that hold several linears as one matrix; `linears` then names `{module}.{part}`. See fused.py."""
    transposed: bool = False
    """Whether the weights are kept as (in, out), transformers' Conv1D."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Config values without which the model has other linears than this entry says."""
    head_counts: tuple[str, ...] = ()
    """Attributes of the attention module that hold its number of heads."""
    head_widths: tuple[str, ...] = ()
    """Attributes of the attention module that hold heads × head_dim."""
    dropouts: tuple[str, ...] = ()
    """Float attributes of the attention module that are dropout rates (`nn.Dropout` needs no mention)."""
    last_token_pools: bool = False
    """Whether classification reads the last token that is not `config.pad_token_id`, which must then be right."""
    pooling: str = ""
    """Config attribute that says "cls" where classification reads the first token alone; empty: it always does."""
    shared_attention_input: bool = True
    """Whether q, k and v are called with one tensor only; DeBERTa also projects its relative positions."""
    rms_norms: bool = False
    """Whether its norms are LLaMA's: weight · x / rms(x), with `variance_epsilon`."""
    feed_forward: str = ""
    """The module of a layer that computes down(act(gate(x)) · up(x)) and nothing else, from children of its own."""
    learned_positions: bool = False
    """Whether positions are rows of a table, which ends texts."""
    free_head_dim: bool = False
    """Whether the config states `head_dim` itself, so that a model with fewer heads is a standard checkpoint."""

    @property
    def gated_ffn(self) -> bool:
        return "gate" in self.linears

    @property
    def transposed_alone(self) -> tuple[str, ...]:
        """Paths of the transposed linears that are not part of a fused one."""
        if not self.transposed:
            return ()
        return tuple(path for path in self.linears.values() if path.rpartition(".")[0] not in self.fused)

    @property
    def transposed_paths(self) -> tuple[str, ...]:
        """Paths of every module whose stored weight is transposed."""
        return (*self.fused, *self.transposed_alone) if self.transposed else ()

    def layer_path(self, layer: int) -> str:
        return f"{self.backbone}.{self.layers}.{layer}"

    def path(self, name: str) -> str:
        """Canonical name `layers.3.q` → path of the linear in the task model."""
        layer, part = split_name(name)
        return f"{self.layer_path(layer)}.{self.linears[part]}"

    def head_modules(self, task: Task) -> tuple[str, ...]:
        """Head modules of `task`. Raises `ConfigError` for a task the family does not have."""
        if task not in self.head:
            raise ConfigError(
                f"{self.family} models do not support task {task!r}.", remedy=f"Supported: {', '.join(self.head)}."
            )
        return self.head[task]

    def has_biases(self, config: Any) -> tuple[bool, bool]:
        """Whether attention and FFN linears carry biases."""
        attention, ffn = (x if isinstance(x, bool) else bool(getattr(config, x, False)) for x in self.biases)
        return attention, ffn

    def check_config(self, config: Any) -> None:
        """Raises `UnknownArchitecture` for a variant of the family that is not supported."""
        for name, value in self.requires.items():
            if getattr(config, name, None) != value:
                raise UnknownArchitecture(
                    f"this {self.family} model has {name} = {getattr(config, name, None)!r}.",
                    remedy=f"Of this family only models with {name} = {value!r} are supported.",
                )

    def max_tokens(self, config: Any) -> int | None:
        """Tokens of the longest text that the model's table of positions allows; None where there is none."""
        used = int(config.pad_token_id) + 1 if self.family == "roberta" else 0  # positions start after padding's
        return int(config.max_position_embeddings) - used if self.learned_positions else None

    def set_widths(self, module: nn.Module, layout: Layout) -> None:
        """Write the kept head counts where the attention modules look for them."""
        spec = layout.spec
        n_rep = spec.num_heads // spec.num_kv_heads
        for layer, (heads, _) in enumerate(layout.counts):
            attention = module.get_submodule(f"{self.layer_path(layer)}.{self.attention}")
            for attribute in self.head_counts:
                setattr(attention, attribute, heads * n_rep)
            for attribute in self.head_widths:
                setattr(attention, attribute, heads * n_rep * spec.head_dim)

    def disable_dropout(self, module: nn.Module) -> None:
        """Set every dropout rate of the model to 0; docs/decisions/0020 says why."""
        for child in module.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0
        for layer in range(len(module.get_submodule(f"{self.backbone}.{self.layers}"))):
            attention = module.get_submodule(f"{self.layer_path(layer)}.{self.attention}")
            for attribute in self.dropouts:
                setattr(attention, attribute, 0.0)

    def full_config(self, config: Any, spec: ModelSpec) -> Any:
        """A copy of `config` with the unpruned widths of `spec`."""
        return self._with_widths(config, spec, spec.num_kv_heads, spec.intermediate_size)

    def standard_config(self, config: Any, layout: Layout) -> Any | None:
        """A config with which transformers itself builds the compact model, or None if it cannot.

        It can when all layers have equal widths and the family's config can state them: BERT derives `head_dim` from
        the number of heads, and LLaMA's config wants hidden_size divisible by that number.
        """
        if len(set(layout.counts)) != 1:
            return None
        heads, channels = layout.counts[0]
        if heads != layout.spec.num_kv_heads and not self.free_head_dim:
            return None
        changed = self._with_widths(config, layout.spec, heads, channels)
        try:
            type(changed).from_dict(changed.to_dict())  # runs the checks that reading the file will run
        except (ValueError, StrictDataclassError):
            return None
        return changed

    def _with_widths(self, config: Any, spec: ModelSpec, heads: int, channels: int) -> Any:
        changed = copy.deepcopy(config)
        if self.free_head_dim:
            changed.head_dim = spec.head_dim
        changed.num_attention_heads = heads * (spec.num_heads // spec.num_kv_heads)
        setattr(changed, self.kv_heads, heads)
        setattr(changed, self.channels, channels)
        return changed


_BERT_LINEARS: Mapping[Part, str] = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_BERT_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def _llama_like(family: str, **differences: Any) -> Architecture:
    """LLaMA and the families that only differ from it in biases, norms and windows."""
    return Architecture(
        family=family,
        backbone="model",
        layers="layers",
        linears={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "up": "mlp.up_proj",
            "gate": "mlp.gate_proj",
            "down": "mlp.down_proj",
        },
        attention="self_attn",
        head={"classification": ("score",), "token_classification": ("score",), "causal_lm": ()},
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"),
        kv_heads="num_key_value_heads",
        dropouts=("attention_dropout",),
        last_token_pools=True,
        rms_norms=True,
        feed_forward="mlp",
        free_head_dim=True,
        **differences,
    )


SUPPORTED: Mapping[str, Architecture] = {
    entry.family: entry
    for entry in (
        Architecture(
            family="bert",
            learned_positions=True,
            backbone="bert",
            layers="encoder.layer",
            linears=_BERT_LINEARS,
            attention="attention.self",
            head={
                "classification": ("classifier", "bert.pooler"),  # docs/decisions/0021 has the measurement
                "token_classification": ("classifier",),
            },
            lora_targets=_BERT_TARGETS,
            head_counts=("num_attention_heads",),
            head_widths=("all_head_size",),
        ),
        Architecture(
            family="roberta",
            learned_positions=True,
            backbone="roberta",
            layers="encoder.layer",
            linears=_BERT_LINEARS,
            attention="attention.self",
            head={"classification": ("classifier",), "token_classification": ("classifier",)},
            lora_targets=_BERT_TARGETS,
            head_counts=("num_attention_heads",),
            head_widths=("all_head_size",),
        ),
        Architecture(
            family="distilbert",
            learned_positions=True,
            backbone="distilbert",
            layers="transformer.layer",
            linears={
                "q": "attention.q_lin",
                "k": "attention.k_lin",
                "v": "attention.v_lin",
                "o": "attention.out_lin",
                "up": "ffn.lin1",
                "down": "ffn.lin2",
            },
            attention="attention",
            head={"classification": ("pre_classifier", "classifier"), "token_classification": ("classifier",)},
            lora_targets=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
            channels="hidden_dim",
            head_counts=("n_heads",),
        ),
        Architecture(
            family="deberta-v2",
            shared_attention_input=False,
            backbone="deberta",
            layers="encoder.layer",
            linears={
                **_BERT_LINEARS,
                "q": "attention.self.query_proj",
                "k": "attention.self.key_proj",
                "v": "attention.self.value_proj",
            },
            attention="attention.self",
            head={"classification": ("pooler", "classifier"), "token_classification": ("classifier",)},
            lora_targets=("query_proj", "key_proj", "value_proj", *_BERT_TARGETS[3:]),
            head_counts=("num_attention_heads",),
            head_widths=("all_head_size",),
            requires={"share_att_key": True},  # as DeBERTa-v3 has it; else positions have projections of their own
        ),
        Architecture(
            family="modernbert",
            backbone="model",
            layers="layers",
            linears={
                "q": "attn.Wqkv.q",
                "k": "attn.Wqkv.k",
                "v": "attn.Wqkv.v",
                "o": "attn.Wo",
                "up": "mlp.Wi.up",
                "gate": "mlp.Wi.gate",
                "down": "mlp.Wo",
            },
            attention="attn",
            head={"classification": ("head", "classifier"), "token_classification": ("head", "classifier")},
            lora_targets=("Wqkv", "attn.Wo", "Wi", "mlp.Wo"),
            biases=("attention_bias", "mlp_bias"),
            pooling="classifier_pooling",
            fused={"attn.Wqkv": ("q", "k", "v"), "mlp.Wi": ("gate", "up")},
            dropouts=("attention_dropout",),
        ),
        Architecture(
            family="gpt2",
            learned_positions=True,
            backbone="transformer",
            layers="h",
            linears={
                "q": "attn.c_attn.q",
                "k": "attn.c_attn.k",
                "v": "attn.c_attn.v",
                "o": "attn.c_proj",
                "up": "mlp.c_fc",
                "down": "mlp.c_proj",
            },
            attention="attn",
            head={"classification": ("score",), "token_classification": ("classifier",), "causal_lm": ()},
            lora_targets=("c_attn", "c_proj", "c_fc"),
            channels="n_inner",
            fused={"attn.c_attn": ("q", "k", "v")},
            transposed=True,
            head_counts=("num_heads",),
            head_widths=("split_size",),
            last_token_pools=True,
            requires={"add_cross_attention": False},
        ),
        _llama_like("llama", biases=("attention_bias", "mlp_bias")),
        _llama_like("mistral", biases=(False, False)),
        _llama_like("qwen2", biases=(True, False), unbiased=("o",)),
        _llama_like("qwen3", biases=("attention_bias", False)),
    )
}


def architecture_of(config: Any) -> Architecture:
    """The entry for a transformers config or a family name.

    Raises `UnknownArchitecture`, which lists the supported families.
    """
    family = str(config if isinstance(config, str) else getattr(config, "model_type", None))
    if family not in SUPPORTED:
        raise UnknownArchitecture(
            f"model type {family!r} is not supported.",
            remedy=f"Supported families: {', '.join(sorted(SUPPORTED))}; docs/models.md says how to add one.",
        )
    return SUPPORTED[family]


def model_spec(module: nn.Module, base_sha256: str) -> ModelSpec:
    """The prunable shape of an *unpruned* task model without adapters, whose fused linears are taken apart.

    Raises `UnknownArchitecture`, or `ModelError` where the modules are not what the table says.
    """
    config = module.config
    architecture = architecture_of(config)
    architecture.check_config(config)
    take_apart(module, architecture)
    attention_bias, ffn_bias = architecture.has_biases(config)
    num_heads = int(config.num_attention_heads)
    spec = ModelSpec(
        family=architecture.family,
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, architecture.kv_heads)),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        intermediate_size=int(getattr(config, architecture.channels) or 4 * config.hidden_size),
        gated_ffn=architecture.gated_ffn,
        attention_bias=attention_bias,
        ffn_bias=ffn_bias,
        num_parameters=sum(p.numel() for p in module.parameters()),
        base_sha256=base_sha256,
    )
    check_shapes(module, Layout.full(spec))
    return spec


def check_shapes(module: nn.Module, layout: Layout) -> None:
    """Raises `ModelError` unless every prunable linear has the shape and bias that `layout` implies."""
    architecture = architecture_of(layout.spec.family)
    biases = {part: i for i, group in enumerate((("q", "k", "v", "o"), ("up", "gate", "down"))) for part in group}
    expected_bias = (layout.spec.attention_bias, layout.spec.ffn_bias)
    for layer in range(layout.spec.num_layers):
        for part in architecture.linears:
            name = f"layers.{layer}.{part}"
            path = architecture.path(name)
            try:
                linear = module.get_submodule(path)
            except AttributeError:
                raise ModelError(f"the {architecture.family} model has no module {path!r} for {name}.") from None
            linear = getattr(linear, "base_layer", linear)
            shape = (layout.rows(name).size, layout.cols(name).size)
            if tuple(linear.weight.shape) != shape:
                raise ModelError(f"{name} ({path}) has shape {tuple(linear.weight.shape)}, its layout says {shape}.")
            if (linear.bias is not None) != (expected_bias[biases[part]] and part not in architecture.unbiased):
                raise ModelError(
                    f"{name} ({path}): bias is {linear.bias is not None}, the family entry says otherwise."
                )

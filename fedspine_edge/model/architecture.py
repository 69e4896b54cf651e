"""`Architecture`, the description of a model family: module paths, config attributes and how widths are set."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from fedspine_edge.config import Task
from fedspine_edge.errors import ConfigError, UnknownArchitecture
from fedspine_edge.model.layout import Layout, Part, split_name
from fedspine_edge.model.spec import ModelSpec

CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel")
"""Ends of the class names of transformers' language models."""


@dataclass(frozen=True)
class Architecture:
    """Module paths and config attributes of one family.

    Paths are relative: `layers` to the backbone, `linears` and `attention` to one layer.
    """

    family: str
    """transformers' `model_type`."""
    backbone: str
    """Attribute of the task model that holds the transformer without its head."""
    layers: str
    linears: Mapping[Part, str]
    attention: str
    """Module whose forward pass reshapes into heads."""
    head: Mapping[Task, tuple[str, ...]]
    """Modules of the task model that form its trainable head, by supported task. A module whose weights the checkpoint
    has keeps them; one that the checkpoint lacks is initialized."""
    lora_targets: tuple[str, ...]
    """PEFT's `target_modules`: suffixes that match the prunable linears only."""
    kv_heads: str = "num_attention_heads"
    """Config attribute with the number of KV heads."""
    channels: str = "intermediate_size"
    """Config attribute with the number of FFN channels; a value of None means four times the hidden size."""
    biases: tuple[bool | str, bool | str] = (True, True)
    """Whether the (attention, FFN) linears have biases, or the config attributes that state it."""
    unbiased: tuple[Part, ...] = ()
    """Parts without bias even where `biases` is true."""
    fused: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    """Modules that hold several linears as one matrix; `linears` then names `{module}.{part}`. See
    fused_projections.py."""
    transposed: bool = False
    """Whether weights are stored as (in, out), as in transformers' Conv1D."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Config values that this entry assumes; models with other values have other linears."""
    head_counts: tuple[str, ...] = ()
    """Attributes of the attention module that hold its number of heads."""
    head_widths: tuple[str, ...] = ()
    """Attributes of the attention module that hold heads × head_dim."""
    dropouts: tuple[str, ...] = ()
    """Float attributes of the attention module that are dropout rates, besides `nn.Dropout` modules."""
    last_token_pools: bool = False
    """Whether classification reads the last token that differs from `config.pad_token_id`, which must then be
    correct."""
    pooling: str = ""
    """Config attribute that is "cls" if classification reads only the first token; empty if it always does."""
    shared_attention_input: bool = True
    """Whether q, k and v are called with one tensor only. DeBERTa also projects its relative positions."""
    rms_norms: bool = False
    """Whether the norms are LLaMA's: weight · x / rms(x), with `variance_epsilon`."""
    feed_forward: str = ""
    """Module of a layer whose children compute down(act(gate(x)) · up(x)); empty if there is none."""
    learned_positions: bool = False
    """Whether positions are rows of a table, so that longer sequences cannot be read."""
    positions_after_padding: bool = False
    """Whether the first position is `pad_token_id` + 1, so that the rows before it are unused."""
    token_types: bool = False
    """Whether the model has an embedding for the segment of each token. GPT-2 would add the embedding of a *token*."""
    free_head_dim: bool = False
    """Whether the config states `head_dim`, so that a model with fewer heads is a standard checkpoint."""

    @property
    def gated_ffn(self) -> bool:
        """Whether the FFN has a gate."""
        return "gate" in self.linears

    @property
    def transposed_unfused(self) -> tuple[str, ...]:
        """Paths of the transposed linears that are not part of a fused projection."""
        if not self.transposed:
            return ()
        return tuple(path for path in self.linears.values() if path.rpartition(".")[0] not in self.fused)

    @property
    def transposed_paths(self) -> tuple[str, ...]:
        """Paths of every module whose stored weight is transposed."""
        return (*self.fused, *self.transposed_unfused) if self.transposed else ()

    def layer_path(self, layer: int) -> str:
        """Return the path of a layer in the task model."""
        return f"{self.backbone}.{self.layers}.{layer}"

    def path(self, name: str) -> str:
        """Return the path of a linear in the task model, from its canonical name such as `layers.3.q`."""
        layer, part = split_name(name)
        return f"{self.layer_path(layer)}.{self.linears[part]}"

    def head_modules(self, task: Task) -> tuple[str, ...]:
        """Return the head modules of `task`. Raises `ConfigError` for a task that the family does not support."""
        if task not in self.head:
            raise ConfigError(
                f"{self.family} models do not support task {task!r}.", remedy=f"Supported: {', '.join(self.head)}."
            )
        return self.head[task]

    def has_biases(self, config: Any) -> tuple[bool, bool]:
        """Return whether the attention linears and the FFN linears have biases."""
        attention, ffn = (x if isinstance(x, bool) else bool(getattr(config, x, False)) for x in self.biases)
        return attention, ffn

    def check_config(self, config: Any) -> None:
        """Raise `UnknownArchitecture` for a variant of the family that is not supported."""
        for name, value in self.requires.items():
            if getattr(config, name, None) != value:
                raise UnknownArchitecture(
                    f"this {self.family} model has {name} = {getattr(config, name, None)!r}.",
                    remedy=f"Use a {self.family} model with {name} = {value!r}; no other variant is supported.",
                )

    def max_tokens(self, config: Any) -> int:
        """Return the length in tokens, KV cache included, up to which the model has positions."""
        unused = int(config.pad_token_id) + 1 if self.positions_after_padding else 0
        return int(config.max_position_embeddings) - unused

    def hard_max_tokens(self, config: Any) -> int | None:
        """Return `max_tokens` where a longer sequence cannot be read, and None where positions are computed."""
        return self.max_tokens(config) if self.learned_positions else None

    def num_token_types(self, config: Any) -> int:
        """Return the number of segments that the model distinguishes; `token_type_ids` is an input from 2 on."""
        return int(getattr(config, "type_vocab_size", 0) or 0) if self.token_types else 0

    def set_widths(self, module: nn.Module, layout: Layout) -> None:
        """Set the kept head counts on the attention modules."""
        spec = layout.spec
        n_rep = spec.num_heads // spec.num_kv_heads
        for layer, (heads, _) in enumerate(layout.counts):
            attention = module.get_submodule(f"{self.layer_path(layer)}.{self.attention}")
            for attribute in self.head_counts:
                setattr(attention, attribute, heads * n_rep)
            for attribute in self.head_widths:
                setattr(attention, attribute, heads * n_rep * spec.head_dim)

    def disable_dropout(self, module: nn.Module) -> None:
        """Set every dropout rate of the model to 0. docs/decisions/0020 gives the reasons."""
        for child in module.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0
        for layer in range(len(module.get_submodule(f"{self.backbone}.{self.layers}"))):
            attention = module.get_submodule(f"{self.layer_path(layer)}.{self.attention}")
            for attribute in self.dropouts:
                setattr(attention, attribute, 0.0)

    def full_config(self, config: Any, spec: ModelSpec) -> Any:
        """Return a copy of `config` with the unpruned widths of `spec`."""
        return self._with_widths(config, spec, spec.num_kv_heads, spec.intermediate_size)

    def standard_config(self, config: Any, layout: Layout) -> Any | None:
        """Return a config with which transformers builds the compact model, or None if no config can state its widths.

        All layers must have equal widths. BERT derives `head_dim` from the number of heads, and LLaMA's config requires
        that hidden_size be divisible by that number.
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


def task_of(module: nn.Module) -> Task:
    """Return the task of a transformers task model, by the name of its class."""
    kind = type(module).__name__
    if "ForTokenClassification" in kind:
        return "token_classification"
    return "causal_lm" if kind.endswith(CAUSAL_CLASSES) else "classification"

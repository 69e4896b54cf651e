"""What a model family is: where it keeps what LoRA and pruning touch, and how it is told its widths."""

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
    """Whether positions are rows of a table, so that a longer sequence cannot be read at all."""
    positions_after_padding: bool = False
    """Whether the first position is `pad_token_id` + 1, so that the rows up to it are never used."""
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

    def max_tokens(self, config: Any) -> int:
        """Return the length in tokens, KV cache included, up to which the model has positions."""
        unused = int(config.pad_token_id) + 1 if self.positions_after_padding else 0
        return int(config.max_position_embeddings) - unused

    def hard_max_tokens(self, config: Any) -> int | None:
        """Return `max_tokens` where a longer sequence cannot be read, and None where positions are computed."""
        return self.max_tokens(config) if self.learned_positions else None

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


def task_of(module: nn.Module) -> Task:
    """Return the task of a transformers task model, by the name of its class."""
    kind = type(module).__name__
    if "ForTokenClassification" in kind:
        return "token_classification"
    return "causal_lm" if kind.endswith(CAUSAL_CLASSES) else "classification"

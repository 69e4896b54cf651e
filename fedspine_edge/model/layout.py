"""`Layout`, the heads and channels that a pruned model keeps, and the sizes that follow from it.

All indices are in original coordinates: a kept index names a head or channel of the unpruned model, however often
the model was pruned. The module uses numpy only, so that the server can use it without torch.

A *head* is an attention group: one KV head with the `n_rep` query heads that read it. In plain multi-head attention
it is one head. A *channel* is one intermediate unit of the FFN. Source: docs/concepts/pruning.md, "Groups".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedspine_edge.errors import ConfigError, LayoutError
from fedspine_edge.model.spec import ModelSpec

Indices = npt.NDArray[np.int64]
GROUP_KINDS = ("heads", "channels")
"""The two kinds of prunable groups, also the names of the attributes of `Layout` and `Order`."""
Part = Literal["q", "k", "v", "o", "up", "gate", "down"]

ATTENTION_PARTS: tuple[Part, ...] = ("q", "k", "v", "o")
ROW_PARTS: frozenset[str] = frozenset({"q", "k", "v", "up", "gate"})
"""Parts whose output rows belong to groups; o and down lose input columns."""


def parts(spec: ModelSpec) -> tuple[Part, ...]:
    """Return the prunable linears of one layer, in canonical order."""
    return (*ATTENTION_PARTS, "up", "gate", "down") if spec.gated_ffn else (*ATTENTION_PARTS, "up", "down")


def module_names(spec: ModelSpec) -> list[str]:
    """Return the canonical names `layers.{i}.{part}` of all prunable linears."""
    return [f"layers.{i}.{part}" for i in range(spec.num_layers) for part in parts(spec)]


def split_name(name: str) -> tuple[int, Part]:
    """Split `layers.3.q` into (3, "q"). Raises `LayoutError` for anything else."""
    pieces = name.split(".")
    known = pieces[2:3] and pieces[2] in (*ATTENTION_PARTS, "up", "gate", "down")
    if len(pieces) != 3 or pieces[0] != "layers" or not pieces[1].isdecimal() or not known:
        raise LayoutError(f"{name!r} is not a canonical module name such as 'layers.0.q'.")
    return int(pieces[1]), pieces[2]  # type: ignore[return-value]


def full_shape(spec: ModelSpec, part: Part) -> tuple[int, int]:
    """Return (out_features, in_features) of an unpruned linear."""
    query = spec.num_heads * spec.head_dim
    key = spec.num_kv_heads * spec.head_dim
    return {
        "q": (query, spec.hidden_size),
        "k": (key, spec.hidden_size),
        "v": (key, spec.hidden_size),
        "o": (spec.hidden_size, query),
        "up": (spec.intermediate_size, spec.hidden_size),
        "gate": (spec.intermediate_size, spec.hidden_size),
        "down": (spec.hidden_size, spec.intermediate_size),
    }[part]


def head_parameters(spec: ModelSpec) -> int:
    """Return the parameters of one attention group: its rows of q, k, v (with biases) and its columns of o."""
    rows = (spec.num_heads // spec.num_kv_heads + 2) * spec.head_dim
    columns = (spec.num_heads // spec.num_kv_heads) * spec.head_dim
    return rows * (spec.hidden_size + int(spec.attention_bias)) + columns * spec.hidden_size


def channel_parameters(spec: ModelSpec) -> int:
    """Return the parameters of one FFN channel: its row of up (and gate) with biases and its column of down."""
    rows = 2 if spec.gated_ffn else 1
    return rows * (spec.hidden_size + int(spec.ffn_bias)) + spec.hidden_size


def prunable_parameters(spec: ModelSpec) -> int:
    """Return the parameters in all heads and channels of the unpruned model, of which `pruning_ratio` is a share."""
    per_layer = spec.num_kv_heads * head_parameters(spec) + spec.intermediate_size * channel_parameters(spec)
    return spec.num_layers * per_layer


def target_counts(
    spec: ModelSpec,
    pruning_ratio: float,
    *,
    round_to: int = 8,
    at_most: tuple[int, int] | None = None,
    at_least: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    """Return the (heads, channels) that each layer keeps at `pruning_ratio` with `scope="layer"`.

    The number of heads is rounded to the nearest integer, and the number of channels, a multiple of `round_to`, makes
    up the difference, so that the ratio is met within one group.

    Args:
        spec: Unpruned shape.
        pruning_ratio: Share of prunable parameters to remove.
        round_to: Divisor of the kept channel count.
        at_most: Counts that the model has now. They never grow, even if rounding the heads would allow more channels.
        at_least: Counts that stay at any ratio; channels are rounded up to a multiple of `round_to`.
    """
    check_ratio(pruning_ratio)
    fewest_heads, fewest_channels = smallest_counts(spec, round_to, at_least)
    per_head, per_channel = head_parameters(spec), channel_parameters(spec)
    channels_full = spec.intermediate_size
    to_remove = pruning_ratio * (spec.num_kv_heads * per_head + channels_full * per_channel)
    heads = max(fewest_heads, spec.num_kv_heads - int(pruning_ratio * spec.num_kv_heads + 0.5))
    channels = channels_full - (to_remove - (spec.num_kv_heads - heads) * per_head) / per_channel
    if pruning_ratio > 0:
        channels = int(channels / round_to + 0.5) * round_to
    channels = int(min(channels_full, max(fewest_channels, channels)))
    if at_most is not None:
        heads, channels = min(heads, at_most[0]), min(channels, at_most[1])
    return heads, channels


def smallest_counts(spec: ModelSpec, round_to: int, at_least: tuple[int, int]) -> tuple[int, int]:
    """Return the (heads, channels) that stay in every layer at any ratio. Raises `ConfigError` for impossible
    minimums."""
    if round_to < 1:
        raise ConfigError(f"round_to is {round_to}; it must be at least 1.")
    heads, channels = at_least
    if not (1 <= heads <= spec.num_kv_heads and 1 <= channels <= spec.intermediate_size):
        raise ConfigError(
            f"the minimum is {heads} heads and {channels} channels; a layer of this model has {spec.num_kv_heads} "
            f"heads and {spec.intermediate_size} channels.",
            remedy="Set minimums between 1 and the counts of a layer.",
        )
    return heads, min(-(-channels // round_to) * round_to, spec.intermediate_size)


def check_ratio(pruning_ratio: float, present: Layout | None = None) -> None:
    """Raise `ConfigError` unless 0 ≤ pruning_ratio < 1 and the `present` layout has not already removed more."""
    if not 0.0 <= pruning_ratio < 1.0:
        raise ConfigError(
            f"`pruning_ratio` is {pruning_ratio}; it must be at least 0 and below 1.",
            remedy="It is the share of prunable parameters to remove; 0.5 removes half.",
        )
    if present is None:
        return
    unit = 1.0 / present.spec.num_kv_heads  # rounding to whole groups overshoots by less than this
    if pruning_ratio < present.pruning_ratio - unit:
        raise ConfigError(
            f"the model is already pruned to {present.pruning_ratio:.3f}; it cannot grow back to {pruning_ratio}.",
            remedy="Load the base model again to prune less.",
        )


@dataclass(frozen=True)
class Order:
    """Heads and channels of every layer, from most to least important; every prefix of it is a layout."""

    heads: tuple[Indices, ...]
    channels: tuple[Indices, ...]


@dataclass(frozen=True)
class Layout:
    """Heads and channels that each layer keeps, as sorted int64 indices in original coordinates."""

    spec: ModelSpec
    heads: tuple[Indices, ...]
    channels: tuple[Indices, ...]

    def __post_init__(self) -> None:
        spec = self.spec
        for kind, kept, limit in (
            ("heads", self.heads, spec.num_kv_heads),
            ("channels", self.channels, spec.intermediate_size),
        ):
            if len(kept) != spec.num_layers:
                raise LayoutError(f"the layout has {kind} for {len(kept)} layers; the model has {spec.num_layers}.")
            for layer, index in enumerate(kept):
                if index.ndim != 1 or index.size == 0 or index.dtype != np.int64:
                    raise LayoutError(f"layer {layer}, {kind}: expected a non-empty int64 vector, got {index!r}.")
                if index[0] < 0 or index[-1] >= limit or (np.diff(index) <= 0).any():
                    raise LayoutError(
                        f"layer {layer}, {kind}: indices must be sorted, unique and within 0..{limit - 1}."
                    )

    @classmethod
    def full(cls, spec: ModelSpec) -> Layout:
        """Return the layout of the unpruned model."""
        heads, channels = np.arange(spec.num_kv_heads), np.arange(spec.intermediate_size)
        return cls(spec, (heads,) * spec.num_layers, (channels,) * spec.num_layers)

    @classmethod
    def prefix(cls, spec: ModelSpec, order: Order, counts: Sequence[tuple[int, int]]) -> Layout:
        """Return the layout of the first (heads, channels) of `order` in each layer."""
        if not len(order.heads) == len(order.channels) == len(counts) == spec.num_layers:
            raise LayoutError(f"the order and the counts must cover {spec.num_layers} layers.")
        return cls(
            spec,
            tuple(np.sort(index[:n]) for index, (n, _) in zip(order.heads, counts)),
            tuple(np.sort(index[:n]) for index, (_, n) in zip(order.channels, counts)),
        )

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Number of (heads, channels) kept in each layer."""
        return [(h.size, c.size) for h, c in zip(self.heads, self.channels)]

    @property
    def removed_parameters(self) -> int:
        """Parameters of the unpruned model that were removed, including biases."""
        kept = sum(h * head_parameters(self.spec) + c * channel_parameters(self.spec) for h, c in self.counts)
        return prunable_parameters(self.spec) - kept

    @property
    def pruning_ratio(self) -> float:
        """Share of the prunable parameters that was removed."""
        return self.removed_parameters / prunable_parameters(self.spec)

    @property
    def sparsity(self) -> float:
        """Share of all parameters that was removed."""
        return self.removed_parameters / self.spec.num_parameters

    def rows(self, name: str) -> Indices:
        """Return the kept rows (outputs) of a linear in its original weight."""
        layer, part = split_name(name)
        if part in ("up", "gate"):
            return self.channels[layer]
        if part in ("o", "down"):
            return np.arange(self.spec.hidden_size)
        return self._head_elements(layer, part)

    def cols(self, name: str) -> Indices:
        """Return the kept columns (inputs) of a linear in its original weight."""
        layer, part = split_name(name)
        if part == "down":
            return self.channels[layer]
        return self._head_elements(layer, part) if part == "o" else np.arange(self.spec.hidden_size)

    def group_of(self, name: str, *, by_position: bool = False) -> npt.NDArray[np.int32]:
        """Return the group of each kept row (q, k, v, up, gate) or column (o, down).

        The group is the original head or channel or, with `by_position`, its position among the kept ones.
        """
        layer, part = split_name(name)
        if part in ("up", "gate", "down"):
            kept, repeat = self.channels[layer], 1
        else:
            kept, repeat = self.heads[layer], self._group_width(part)
        group = np.arange(kept.size) if by_position else kept
        return np.repeat(group, repeat).astype(np.int32)

    def gather(
        self, name: str, lora_A: npt.NDArray[Any], lora_B: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return A (r, kept in) and B (kept out, r) of a linear from A (r, in) and B (out, r) in full coordinates."""
        return lora_A[:, self.cols(name)], lora_B[self.rows(name)]

    def scatter(
        self, name: str, lora_A: npt.NDArray[Any], lora_B: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the inverse of `gather`, with zeros in the rows and columns that are not kept.

        Raises `ValueError` for other shapes than A (r, kept in) and B (kept out, r).
        """
        out_features, in_features = full_shape(self.spec, split_name(name)[1])
        full_A = np.zeros((lora_A.shape[0], in_features), dtype=lora_A.dtype)
        full_B = np.zeros((out_features, lora_B.shape[1]), dtype=lora_B.dtype)
        full_A[:, self.cols(name)] = lora_A
        full_B[self.rows(name)] = lora_B
        return full_A, full_B

    def is_within(self, other: Layout) -> bool:
        """Return whether `other` keeps everything that this layout keeps."""
        pairs = [*zip(self.heads, other.heads), *zip(self.channels, other.channels)]
        return all(np.isin(kept, available, assume_unique=True).all() for kept, available in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, for JSON."""
        return {"heads": [h.tolist() for h in self.heads], "channels": [c.tolist() for c in self.channels]}

    @classmethod
    def from_dict(cls, spec: ModelSpec, data: dict[str, Any]) -> Layout:
        """Read what `to_dict` returned. Raises `LayoutError` if it does not fit `spec`."""
        try:
            heads = tuple(np.array(h, dtype=np.int64) for h in data["heads"])
            channels = tuple(np.array(c, dtype=np.int64) for c in data["channels"])
        except (KeyError, TypeError, ValueError) as error:
            raise LayoutError(f"not a layout: {error!r}; the lists 'heads' and 'channels' are required.") from error
        return cls(spec, heads, channels)

    def to_tensors(self, prefix: str = "layout") -> dict[str, npt.NDArray[Any]]:
        """Return int32 tensors `{prefix}.{i}.heads` and `{prefix}.{i}.channels` of every layer."""
        found: dict[str, npt.NDArray[Any]] = {}
        for layer, (heads, channels) in enumerate(zip(self.heads, self.channels)):
            found[f"{prefix}.{layer}.heads"] = heads.astype(np.int32)
            found[f"{prefix}.{layer}.channels"] = channels.astype(np.int32)
        return found

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: Mapping[str, npt.NDArray[Any]], prefix: str = "layout") -> Layout:
        """Return the inverse of `to_tensors`. Raises `LayoutError` when a tensor is missing or does not fit `spec`."""
        kept: dict[str, list[Indices]] = {kind: [] for kind in GROUP_KINDS}
        for kind in GROUP_KINDS:
            for layer in range(spec.num_layers):
                index = tensors.get(f"{prefix}.{layer}.{kind}")
                if index is None:
                    raise LayoutError(f"{prefix}.{layer}.{kind} is missing.")
                kept[kind].append(index.astype(np.int64))
        return cls(spec, tuple(kept["heads"]), tuple(kept["channels"]))

    def _group_width(self, part: str) -> int:
        n_rep = self.spec.num_heads // self.spec.num_kv_heads if part in ("q", "o") else 1
        return n_rep * self.spec.head_dim

    def _head_elements(self, layer: int, part: str) -> Indices:
        width = self._group_width(part)
        return (self.heads[layer][:, None] * width + np.arange(width)).reshape(-1)


def intersection(layouts: Sequence[Layout]) -> Layout:
    """Return the groups that all of `layouts` keep."""

    def common(per_device: Sequence[Sequence[Indices]]) -> tuple[Indices, ...]:
        kept = list(per_device[0])
        for other in per_device[1:]:
            kept = [np.intersect1d(a, b, assume_unique=True) for a, b in zip(kept, other)]
        return tuple(kept)

    return Layout(layouts[0].spec, common([x.heads for x in layouts]), common([x.channels for x in layouts]))


def union(layouts: Sequence[Layout]) -> Layout:
    """Return the groups that at least one of `layouts` keeps."""

    def either(per_device: Sequence[Sequence[Indices]]) -> tuple[Indices, ...]:
        return tuple(np.unique(np.concatenate(layer)) for layer in zip(*per_device))

    return Layout(layouts[0].spec, either([x.heads for x in layouts]), either([x.channels for x in layouts]))


def keep_positions(kept: Indices, wanted: Indices) -> Indices:
    """Return the positions of `wanted` within `kept`. Raises `LayoutError` if an element was removed earlier."""
    positions = np.searchsorted(kept, wanted)
    missing = (positions >= kept.size) | (kept[np.minimum(positions, kept.size - 1)] != wanted)
    if missing.any():
        raise LayoutError(f"{int(missing.sum())} of the indices were removed earlier, first {wanted[missing][0]}.")
    return positions.astype(np.int64)

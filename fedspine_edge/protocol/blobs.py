"""Schema of the tensors in blobs: their names, the types allowed for each, and conversions to layouts and orders.

| Name                              | Blobs         | Content                                                        |
|-----------------------------------|---------------|----------------------------------------------------------------|
| `layers.{i}.{part}.lora_A/lora_B` | round, update | adapter                                                        |
| `head.{name}`                     | round, update | task head                                                      |
| `held.{i}.heads/channels`         | round         | layout whose rows and columns the adapter slices hold          |
| `order.{i}.heads/channels`        | round         | consensus order, a permutation of all heads or channels        |
| `keep.{i}.heads/channels`         | update        | layout of the device after the round                           |
| `scored.{i}.heads/channels`       | update        | layout whose groups were scored                                |
| `scores.{i}.heads/channels`       | update        | importance of each scored group, aligned with `scored`         |

numpy only, since server and devices share it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from fedspine_edge.arrays import Array, Tensors
from fedspine_edge.errors import BlobError
from fedspine_edge.model.layout import GROUP_KINDS, Indices, Layout, Order, module_names
from fedspine_edge.model.spec import ModelSpec

Factors = Mapping[str, tuple[Array, Array]]
"""Module name → (A, B)."""

BlobKind = Literal["round", "update"]

HELD, KEEP, SCORED = "held", "keep", "scored"
"""Prefixes of layouts, see `Layout.to_tensors`."""
ORDER, SCORES = "order", "scores"

_LAYER = r"(?:0|[1-9][0-9]{0,3})"
_GROUPS = "|".join(GROUP_KINDS)
_FLOAT, _INDEX = frozenset({"float32", "float16"}), frozenset({"int32"})
_ADAPTER_AND_HEAD = (
    (re.compile(rf"layers\.{_LAYER}\.(?:q|k|v|o|up|gate|down)\.lora_[AB]"), _FLOAT),
    (re.compile(r"head(?:\.[A-Za-z0-9_]{1,64}){1,6}"), _FLOAT),
)
ALLOWED_TENSORS: dict[str, tuple[tuple[re.Pattern[str], frozenset[str]], ...]] = {
    "round": (*_ADAPTER_AND_HEAD, (re.compile(rf"(?:{ORDER}|{HELD})\.{_LAYER}\.(?:{_GROUPS})"), _INDEX)),
    "update": (
        *_ADAPTER_AND_HEAD,
        (re.compile(rf"(?:{KEEP}|{SCORED})\.{_LAYER}\.(?:{_GROUPS})"), _INDEX),
        (re.compile(rf"{SCORES}\.{_LAYER}\.(?:{_GROUPS})"), frozenset({"float32"})),
    ),
}


def allowed_dtypes(name: str, kind: BlobKind) -> frozenset[str] | None:
    """Return the element types a tensor of this name may have, or None when such a blob may not contain it."""
    return next((dtypes for pattern, dtypes in ALLOWED_TENSORS[kind] if pattern.fullmatch(name)), None)


def group_names(prefix: str, num_layers: int) -> list[str]:
    """Return `{prefix}.{i}.heads` and `{prefix}.{i}.channels` of every layer."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(num_layers) for kind in GROUP_KINDS]


def is_adapter(name: str) -> bool:
    """Return whether the tensor belongs to the adapter."""
    return name.startswith("layers.")


def is_head(name: str) -> bool:
    """Return whether the tensor belongs to the task head."""
    return name.startswith("head.")


def head_tensors(tensors: Mapping[str, Array]) -> Tensors:
    """Return the task head among `tensors`."""
    return {name: value for name, value in tensors.items() if is_head(name)}


def adapter_and_head(tensors: Mapping[str, Array]) -> Tensors:
    """Return the adapter and the task head among `tensors`."""
    return {name: value for name, value in tensors.items() if is_adapter(name) or is_head(name)}


def adapter_tensors(factors: Factors) -> Tensors:
    """Return (A, B) of every module as named tensors."""
    found: Tensors = {}
    for name, (A, B) in factors.items():
        found[f"{name}.lora_A"], found[f"{name}.lora_B"] = A, B
    return found


def gather_adapter(tensors: Mapping[str, Array], layout: Layout, r: int | None = None) -> Tensors:
    """Return the adapter at the rows and columns that `layout` keeps.

    Args:
        tensors: Adapter in full coordinates, A (r_max, in) and B (out, r_max); other tensors are left out.
        layout: The layout to gather for.
        r: Number of components to take, the lowest first; None takes all.
    """
    factors = {}
    for name in module_names(layout.spec):
        factors[name] = layout.gather(name, tensors[f"{name}.lora_A"][:r], tensors[f"{name}.lora_B"][:, :r])
    return adapter_tensors(factors)


def order_to_tensors(order: Order) -> Tensors:
    """Return `order` as int32 tensors `order.{i}.heads` and `order.{i}.channels`."""
    found: Tensors = {}
    for layer, (heads, channels) in enumerate(zip(order.heads, order.channels)):
        found[f"{ORDER}.{layer}.heads"] = heads.astype(np.int32)
        found[f"{ORDER}.{layer}.channels"] = channels.astype(np.int32)
    return found


def order_from_tensors(spec: ModelSpec, tensors: Mapping[str, Array]) -> Order | None:
    """Return the consensus order in a round's tensors, or None while there is none.

    Raises `BlobError` unless it is a permutation of all heads and channels in every layer.
    """
    if not any(name.startswith(f"{ORDER}.") for name in tensors):
        return None

    def permutations(kind: str, size: int) -> tuple[Indices, ...]:
        found = []
        for layer in range(spec.num_layers):
            index = np.asarray(tensors.get(f"{ORDER}.{layer}.{kind}", ()), dtype=np.int64)
            if not np.array_equal(np.sort(index, axis=None), np.arange(size)) or index.ndim != 1:
                raise BlobError(f"the round's order of layer {layer} {kind} is not a permutation of 0..{size - 1}.")
            found.append(index)
        return tuple(found)

    return Order(permutations("heads", spec.num_kv_heads), permutations("channels", spec.intermediate_size))


def scores_to_tensors(scored: Layout, heads: Sequence[Array], channels: Sequence[Array]) -> Tensors:
    """Return `scored.*` and `scores.*`.

    Args:
        scored: Layout whose groups were scored.
        heads: Per layer one score for each head that `scored` keeps.
        channels: Per layer one score for each channel that `scored` keeps.
    """
    found = scored.to_tensors(SCORED)
    for layer in range(scored.spec.num_layers):
        found[f"{SCORES}.{layer}.heads"] = np.asarray(heads[layer], dtype=np.float32)
        found[f"{SCORES}.{layer}.channels"] = np.asarray(channels[layer], dtype=np.float32)
    return found

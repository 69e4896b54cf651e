"""`ModelSpec`, the prunable shape of a model in plain numbers. Needs no torch."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from fedspine_edge.files import Sha256

Label = Annotated[str, Meta(max_length=64, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")]
"""A short text without control characters, safe to show in logs and on terminals."""

MAX_LAYERS = 400
"""So that adapter, indices and scores of every layer fit into one blob (20 tensors a layer, `codec.MAX_TENSORS`)."""

LayerCount = Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
Width = Annotated[int, Meta(ge=1, le=2**20)]
HeadCount = Annotated[int, Meta(ge=1, le=2**12)]
ParameterCount = Annotated[int, Meta(ge=1, le=2**43)]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The numbers that define the prunable groups of a model, from which the server plans.

    Canonical linear names are `layers.{i}.{part}` with parts q, k, v, o, up, down and, for gated FFNs, gate.
    """

    family: Label
    num_layers: LayerCount
    hidden_size: Width
    num_heads: HeadCount
    num_kv_heads: HeadCount
    head_dim: HeadCount
    intermediate_size: Width
    gated_ffn: bool
    attention_bias: bool
    ffn_bias: bool
    num_parameters: ParameterCount
    """Parameters of the unpruned model, including the task head and excluding adapters."""
    base_sha256: Sha256
    """Digest of the frozen base weights. Devices with another base cannot join the fleet."""

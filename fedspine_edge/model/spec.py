"""`ModelSpec`, the prunable shape of a model in plain numbers. Needs no torch."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Meta(ge=1)]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The numbers that define the prunable groups of a model, from which the server plans.

    Canonical linear names are `layers.{i}.{part}` with parts q, k, v, o, up, down and, for gated FFNs, gate.
    """

    family: str
    num_layers: Positive
    hidden_size: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    intermediate_size: Positive
    gated_ffn: bool
    attention_bias: bool
    ffn_bias: bool
    num_parameters: Positive
    """Parameters of the unpruned model, including the task head and excluding adapters."""
    base_sha256: Sha256
    """Digest of the frozen base weights. Devices with another base cannot join the fleet."""

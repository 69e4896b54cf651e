"""What was measured of a model on its way into a bundle: parts of bundle.json."""

from __future__ import annotations

from typing import Literal

import msgspec

Metric = Literal["accuracy", "token_accuracy", "next_token_accuracy"]


class BundleRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything inside bundle.json."""


class Verification(BundleRecord, frozen=True, kw_only=True):
    """How far one implementation is from its reference over a number of inputs."""

    subject: str
    reference: str
    shapes: tuple[tuple[int, int], ...]
    """(batch, tokens) of each compared input."""
    max_abs_diff: float
    cosine: float
    """Smallest cosine similarity of a row of outputs."""
    argmax_agreement: float
    """Share of rows with the same largest output."""
    tolerance: float
    """The largest `max_abs_diff` that would have been accepted."""

    @property
    def summary(self) -> str:
        return (
            f"largest difference {self.max_abs_diff:.2g} (tolerance {self.tolerance:.2g}), cosine {self.cosine:.6f}, "
            f"{self.argmax_agreement:.1%} same answers"
        )


class Accuracy(BundleRecord, frozen=True, kw_only=True):
    """What the user's own examples say of a model in float32, before, and in the bundle's precision, after."""

    metric: Metric
    before: float
    """Share of right answers of the torch model."""
    after: float
    loss_before: float
    """Mean cross entropy, in nats."""
    loss_after: float
    agreement: float
    """Share of answers that both give alike, right or wrong."""
    num_answers: int
    held_out: bool
    """Whether the examples were not those calibrated on; false where there were too few to part them."""

    @property
    def summary(self) -> str:
        return (
            f"{self.metric.replace('_', ' ')} {self.before:.1%} in torch, {self.after:.1%} in the bundle, "
            f"{self.agreement:.1%} answered alike; loss {self.loss_before:.4f} and {self.loss_after:.4f}; "
            f"{self.num_answers} answers" + ("" if self.held_out else ", calibrated on them too: there are too few")
        )


class Quantization(BundleRecord, frozen=True, kw_only=True):
    """How linears became 8 or 4 bits wide."""

    tool: str
    """Name and version of what placed and scaled the QuantizeLinear and DequantizeLinear nodes."""
    linears: int
    """Linears that are quantised."""
    left_out: int = 0
    """Linears of layers that are not, because their width is no multiple of the block."""
    calibration_examples: int = 0
    block_size: int = 0
    """Weights that share a scale (int4); 0 for one scale per output channel."""

    @property
    def summary(self) -> str:
        how = f"blocks of {self.block_size}" if self.block_size else f"{self.calibration_examples} examples"
        return f"{self.linears} linears, {self.left_out} left in fp16, by {self.tool}, {how}"

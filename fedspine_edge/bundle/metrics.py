"""Measurements that `compile_engine` records in bundle.json: verification, accuracy and quantization."""

from __future__ import annotations

from typing import Literal

import msgspec

Metric = Literal["accuracy", "token_accuracy", "next_token_accuracy"]


class BundleRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of every record inside bundle.json."""


class Verification(BundleRecord, frozen=True, kw_only=True, omit_defaults=True):
    """Comparison of one implementation with its reference on a number of inputs."""

    subject: str
    reference: str
    shapes: tuple[tuple[int, int], ...]
    """(batch, tokens) of each input."""
    max_abs_diff: float
    cosine: float
    """Smallest cosine similarity of any row of outputs."""
    argmax_agreement: float
    """Share of rows in which both implementations have the same largest output."""
    tolerance: float
    """Largest `max_abs_diff` that is accepted."""
    noise: float | None = None
    """Rounding error of the model itself, if it determined the tolerance. None is omitted from the file."""
    mismatch: str | None = None
    """The mismatch, if the user accepted one. None is omitted from the file, as it was before this field existed."""

    @property
    def summary(self) -> str:
        return (
            f"largest difference {self.max_abs_diff:.2g} (tolerance {self.tolerance:.2g}), cosine {self.cosine:.6f}, "
            f"{self.argmax_agreement:.1%} identical answers"
            + (f"; the model's own rounding error is {self.noise:.2g}" if self.noise else "")
            + ("; this mismatch was accepted" if self.mismatch else "")
        )


class Accuracy(BundleRecord, frozen=True, kw_only=True):
    """Accuracy on the user's examples before compilation (float32 in torch) and after (the bundle)."""

    metric: Metric
    before: float
    """Share of correct answers of the torch model."""
    after: float
    """Share of correct answers of the bundle."""
    loss_before: float
    """Mean cross entropy, in nats."""
    loss_after: float
    agreement: float
    """Share of examples that both answer identically, correctly or not."""
    num_answers: int
    held_out: bool
    """Whether the examples are disjoint from those used for calibration; False if there were too few to split."""

    @property
    def summary(self) -> str:
        return (
            f"{self.metric.replace('_', ' ')} {self.before:.1%} in torch, {self.after:.1%} in the bundle, "
            f"{self.agreement:.1%} answered identically; loss {self.loss_before:.4f} and {self.loss_after:.4f}; "
            f"{self.num_answers} answers" + ("" if self.held_out else ", which also calibrated the model")
        )


class Quantization(BundleRecord, frozen=True, kw_only=True):
    """Quantization of the linears to 8 or 4 bits."""

    tool: str
    """Name and version of the tool that placed and scaled the QuantizeLinear and DequantizeLinear nodes."""
    linears: int
    """Number of quantized linears."""
    left_out: int = 0
    """Number of linears inside layers that are not quantized, because no block size divides their width."""
    calibration_examples: int = 0
    block_size: int = 0
    """Number of weights that share a scale (int4); 0 for one scale per output channel."""

    @property
    def summary(self) -> str:
        how = f"blocks of {self.block_size}" if self.block_size else f"{self.calibration_examples} examples"
        return f"{self.linears} linears, {self.left_out} left in fp16, by {self.tool}, {how}"

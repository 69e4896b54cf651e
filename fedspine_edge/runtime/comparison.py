"""Compares the outputs of two implementations of a model over several input shapes, ignoring padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import PLAN, BundleManifest, EngineInfo, Precision, TensorInfo
from fedspine_edge.bundle.metrics import Verification
from fedspine_edge.errors import DataError, ExportMismatch
from fedspine_edge.runtime.kv_cache import empty_kv_cache
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner
from fedspine_edge.runtime.runner import Runner

Inputs = dict[str, Array]

TOLERANCE: dict[Precision, float] = {
    "fp32": 3e-4,
    "fp16": 2e-2,
    "bf16": 1e-1,
    "int8": 0.5,
    "fp8": 0.5,
    "int4": 0.5,
}
"""Largest accepted absolute difference, relative to the largest reference output if that exceeds 1.

Measured: 4e-8 for MiniLM. For a 30-layer SmolLM2 with logits up to 35, the export differs from torch by 2e-4, and torch
in float32 differs from torch in float64 by 1e-4; both are ten times as large after pruning without recovery. float16
resolves 1e-3 and bfloat16 8e-3. In 8 and 4 bits the largest of a thousand differences is not informative, so cosine and
answers are compared instead.

ONNX Runtime's CPU provider computes float16 nodes in float32, so fp16 shows the rounding of the weights but not all of
a GPU's arithmetic. Engines are therefore compared again on the device that builds them (`verify_engine`)."""

MIN_COSINE: dict[Precision, float] = {
    "fp32": 0.9999,
    "fp16": 0.999,
    "bf16": 0.99,
    "int8": 0.97,
    "fp8": 0.97,
    "int4": 0.95,
}
"""Smallest accepted cosine similarity: of the worst row, or of a whole batch if linears have 8 or 4 bits."""

MIN_AGREEMENT: dict[Precision, float] = {
    "fp32": 1.0,
    "fp16": 1.0,
    "bf16": 1.0,
    "int8": 0.9,
    "fp8": 0.9,
    "int4": 0.9,
}
"""Smallest accepted share of rows with the same largest output.

Measured on a fine-tuned MiniLM: int8 0.97, fp8 0.99, int4 0.97."""


NOISE_FACTOR = 4.0
"""Accepted error relative to the rounding error of the reference. Both are maxima over the same logits, but the order
of summation differs. A change of one linear by 5% exceeds it by orders of magnitude."""

PreciseReference = Callable[[Inputs, dict[str, Array]], tuple[dict[str, Array], float]]
"""Function of inputs and expected outputs. It returns more precise expected outputs and the rounding error that is
normal for the model: a difference from them of `NOISE_FACTOR` × this error is no defect."""


class Implementation(Protocol):
    """Computes outputs from inputs."""

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]: ...


def random_inputs(
    tensors: Sequence[TensorInfo],
    shapes: Sequence[tuple[int, int]],
    max_tokens: int,
    seed: int = 0,
    *,
    pad: int = 0,
    adapter: Mapping[str, Array] | None = None,
) -> list[Inputs]:
    """Return random tokens for each (batch, tokens), an empty KV cache, and the given inputs of the adapter.

    Rows after the first are padded on the right to random lengths with the token `pad`. This token occurs nowhere else,
    because some classifiers read the last token that differs from it.
    """
    rng = np.random.default_rng(seed)
    found = []
    for batch, tokens in dict.fromkeys((batch, min(tokens, max_tokens)) for batch, tokens in shapes):
        mask = np.ones((batch, tokens), dtype=np.int64)
        for row in range(1, batch):
            mask[row, rng.integers(1, tokens + 1) :] = 0
        inputs = empty_kv_cache(tensors, batch) | dict(adapter or {})
        for tensor in tensors:
            if tensor.name == "attention_mask":
                inputs[tensor.name] = mask
            elif tensor.kind == "tokens":
                inputs[tensor.name] = rng.integers(0, tensor.limit or 2, size=(batch, tokens), dtype=np.int64)
        ids = inputs["input_ids"]
        ids[ids == pad] = 1 if pad == 0 else 0
        ids[mask == 0] = pad
        found.append(inputs)
    return found


def compare(
    implementation: Implementation,
    reference_run: Callable[[Inputs], dict[str, Array]],
    inputs: Sequence[Inputs],
    outputs: Sequence[TensorInfo],
    *,
    precision: Precision,
    subject: str,
    reference: str,
    precise: PreciseReference | None = None,
    accept_mismatch: bool = False,
) -> Verification:
    """Compare an implementation with a reference, ignoring padded positions.

    A row is one set of logits: of a sequence (classification) or of a position (causal model). In 16 and 32 bits, a row
    also counts as identical if the reference has another output that equals the largest within the tolerance.

    Args:
        implementation: Implementation to check.
        reference_run: Function that computes the expected outputs.
        inputs: Inputs to compare on.
        outputs: Outputs to compare.
        precision: Precision of the implementation, which determines the tolerances.
        subject: Name of the implementation, for messages.
        reference: Name of the reference, for messages.
        precise: Measures the rounding error of the model. It is called only for inputs whose difference exceeds the
            fixed tolerance, because some models amplify rounding errors more than others.
        accept_mismatch: Whether to record a mismatch instead of raising it. Outputs that are not finite, or have
            another shape, always raise.

    Raises `ExportMismatch` if the difference exceeds a tolerance.
    """
    if not inputs:
        raise DataError("No inputs were given, so there is nothing to compare.", remedy="Give at least one input.")
    worst, worst_tolerance, worst_place = 0.0, TOLERANCE[precision], ""
    coarse = precision in ("int8", "fp8", "int4")
    cosine, agreeing, rows, noise = 1.0, 0, 0, 0.0
    for batch in inputs:
        actual, expected = implementation.run(batch), reference_run(batch)
        shape = batch["input_ids"].shape
        for tensor in outputs:
            a, b = _rows(actual[tensor.name], batch), _rows(expected[tensor.name], batch)
            place = f"{tensor.name} at (batch, tokens) = {shape}"
            if a.shape != b.shape or not np.isfinite(a).all():
                raise ExportMismatch(
                    f"{subject} disagrees with {reference}: {place} has shape {a.shape} and "
                    f"{np.count_nonzero(~np.isfinite(a))} non-finite values; the reference has shape {b.shape}.",
                    remedy=_REMEDY[precision],
                )
            tolerance = TOLERANCE[precision] * max(1.0, float(np.abs(b).max()))
            difference = float(np.abs(a - b).max())
            if difference > tolerance and precise is not None:
                better, error = precise(batch, expected)
                b = _rows(better[tensor.name], batch)
                difference, noise = float(np.abs(a - b).max()), max(noise, error)
                tolerance = max(tolerance, NOISE_FACTOR * error)
            if not worst_place or difference / tolerance > worst / worst_tolerance:
                worst, worst_tolerance, worst_place = difference, tolerance, place
            cosine = min(cosine, _cosine(a, b) if coarse else _smallest_cosine(a, b, tolerance))
            margin = b.max(axis=-1) - np.take_along_axis(b, a.argmax(axis=-1)[:, None], axis=-1)[:, 0]
            agreeing += int((margin <= (0 if coarse else 2 * tolerance)).sum())
            rows += len(a)
    verification = Verification(
        subject=subject,
        reference=reference,
        shapes=tuple(tuple(batch["input_ids"].shape) for batch in inputs),
        max_abs_diff=worst,
        cosine=cosine,
        argmax_agreement=agreeing / rows,
        tolerance=worst_tolerance,
        noise=noise or None,
    )
    enough = agreeing / rows >= MIN_AGREEMENT[precision]
    if worst > worst_tolerance or cosine < MIN_COSINE[precision] or not enough:
        message = (
            f"{subject} disagrees with {reference}: {worst_place} differs by {worst:.3g} (tolerance "
            f"{worst_tolerance:.3g}), smallest cosine {cosine:.6f} (minimum {MIN_COSINE[precision]}), "
            f"{rows - agreeing} of {rows} rows have another largest output (maximum "
            f"{1 - MIN_AGREEMENT[precision]:.0%})."
        )
        if accept_mismatch:
            return msgspec.structs.replace(verification, mismatch=message)
        raise ExportMismatch(message, remedy=f"{_REMEDY[precision]} {_ACCEPT}")
    return verification


_ACCEPT = "`accept_mismatch` writes the bundle anyway and records the mismatch in it."

_REMEDY: dict[Precision, str] = {
    "fp32": "This is a defect of the export. Please report it with the model's config.json.",
    "fp16": "The model loses too much accuracy in float16. Set `precision` to bf16 or fp32.",
    "bf16": "The model loses too much accuracy in bfloat16. Set `precision` to fp16 or fp32.",
    "int8": "The model loses too much accuracy in 8 bits. Calibrate on more examples, or set `precision` to fp16.",
    "fp8": "The model loses too much accuracy in 8 bits. Calibrate on more examples, or set `precision` to fp16.",
    "int4": "The model loses too much accuracy with 4-bit weights. Set `precision` to int8 or fp16.",
}


def _rows(logits: Array, batch: Inputs) -> Array:
    if logits.ndim == 2:
        return logits
    kept: Array = logits[batch["attention_mask"] > 0]
    return kept


def _smallest_cosine(a: Array, b: Array, tolerance: float) -> float:
    """Return the smallest cosine of the rows whose norm is large enough for a meaningful direction."""
    norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    long = np.minimum(*norms) > 100 * tolerance
    if not long.any():
        return 1.0
    dots = (a.astype(np.float64) * b).sum(axis=-1)[long]
    return float(min(1.0, (dots / (norms[0] * norms[1])[long]).min()))


def _cosine(a: Array, b: Array) -> float:
    """Return the cosine of all rows as one vector, because small rows of a quantized model have no stable direction."""
    flat = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
    norms = float(np.linalg.norm(flat[0]) * np.linalg.norm(flat[1]))
    return min(1.0, float(flat[0] @ flat[1]) / norms) if norms else 1.0


def logits_of(outputs: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Return the outputs to compare. Errors of the KV cache become visible in the logits of later steps."""
    return tuple(tensor for tensor in outputs if not tensor.name.startswith("present."))


def verify_engine(
    runner: Runner,
    model: Path,
    manifest: BundleManifest,
    info: EngineInfo,
    *,
    adapter: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> Verification:
    """Compare an engine with ONNX Runtime on its ONNX file, at the corners of the engine's profiles.

    Raises `ExportMismatch`, which names the worst output and its difference.
    """
    # Only profiles that start with an empty cache are compared; generation covers the others.
    initial = [profile for profile in info.profiles if profile.past[0] == 0]
    shapes = [(profile.batch[i], profile.tokens[i]) for profile in initial for i in range(3)]
    reference = OnnxRuntimeRunner(model)
    try:
        return compare(
            runner,
            reference.run,
            random_inputs(
                manifest.inputs, shapes, manifest.max_tokens, seed, pad=manifest.pad_token_id, adapter=adapter
            ),
            logits_of(manifest.outputs),
            # An fp32 engine keeps the tight tolerance, because TF32 is off unless it is requested.
            precision="fp16" if "TF32" in info.flags else manifest.precision,
            subject=f"{PLAN} on {info.backend} {info.version}",
            reference=f"{model.name} on ONNX Runtime",
        )
    finally:
        reference.close()

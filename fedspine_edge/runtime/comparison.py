"""Do two implementations compute the same? Compared over several shapes; padding does not count. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import PLAN, BundleManifest, EngineInfo, Precision, TensorInfo
from fedspine_edge.bundle.metrics import Verification
from fedspine_edge.errors import DataError, ExportMismatch
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner, Runner, empty_past

Inputs = dict[str, Array]

TOLERANCE: dict[Precision, float] = {
    "fp32": 3e-4,
    "fp16": 2e-2,
    "bf16": 1e-1,
    "int8": 0.5,
    "fp8": 0.5,
    "int4": 0.5,
}
"""Largest absolute difference, relative to the largest reference output where that exceeds 1. Measured: 4e-8 for
MiniLM; for a 30-layer SmolLM2 with logits up to 35 the export differs from torch by 2e-4, as much as torch in
float32 from torch in float64 (1e-4), and pruned without recovery both grow tenfold. float16 resolves 1e-3,
bfloat16 8e-3. Of 8 and 4 bits the answers are judged, below; the largest of a thousand differences says little.

ONNX Runtime's CPU provider computes float16 nodes in float32: there, fp16 shows the rounding of the weights but not
all of a GPU's arithmetic. The engine is therefore compared again on the device that builds it (`verify_engine`)."""

MIN_COSINE: dict[Precision, float] = {
    "fp32": 0.9999,
    "fp16": 0.999,
    "bf16": 0.99,
    "int8": 0.97,
    "fp8": 0.97,
    "int4": 0.95,
}
"""Of the worst row; of all rows of a batch together where linears have 8 or 4 bits."""

MIN_AGREEMENT: dict[Precision, float] = {
    "fp32": 1.0,
    "fp16": 1.0,
    "bf16": 1.0,
    "int8": 0.9,
    "fp8": 0.9,
    "int4": 0.9,
}
"""Share of rows with the same largest output. Measured on a fine-tuned MiniLM: int8 0.97, fp8 0.99, int4 0.97."""


class Runs(Protocol):
    """What is compared: anything that computes outputs from inputs."""

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
    """Random tokens for each (batch, tokens), an empty KV cache, and the adapter's inputs as given.

    Rows after the first are right-padded to random lengths with the token `pad`, which occurs nowhere else: some
    classifiers read the last token that is another.
    """
    rng = np.random.default_rng(seed)
    found = []
    for batch, tokens in dict.fromkeys((batch, min(tokens, max_tokens)) for batch, tokens in shapes):
        mask = np.ones((batch, tokens), dtype=np.int64)
        for row in range(1, batch):
            mask[row, rng.integers(1, tokens + 1) :] = 0
        inputs = empty_past(tensors, batch) | dict(adapter or {})
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
    subject_runner: Runs,
    reference_run: Callable[[Inputs], dict[str, Array]],
    inputs: Sequence[Inputs],
    outputs: Sequence[TensorInfo],
    *,
    precision: Precision,
    subject: str,
    reference: str,
) -> Verification:
    """Compares two implementations; positions that are padding do not count.

    A row is one set of logits: a sequence (classification) or a position (causal model). In 16 and 32 bits two rows
    agree on their largest output also where the reference holds another that is as large within the tolerance.
    """
    if not inputs:
        raise DataError("There is nothing to compare: no inputs were given.")
    worst, worst_tolerance, worst_place = 0.0, TOLERANCE[precision], ""
    coarse = precision in ("int8", "fp8", "int4")
    cosine, agreeing, rows = 1.0, 0, 0
    for batch in inputs:
        ours, theirs = subject_runner.run(batch), reference_run(batch)
        shape = batch["input_ids"].shape
        for tensor in outputs:
            a, b = _rows(ours[tensor.name], batch), _rows(theirs[tensor.name], batch)
            place = f"{tensor.name} at (batch, tokens) = {shape}"
            if a.shape != b.shape or not np.isfinite(a).all():
                raise ExportMismatch(
                    f"{subject} against {reference}: {place} is {a.shape} with "
                    f"{np.count_nonzero(~np.isfinite(a))} non-finite values; the reference is {b.shape}.",
                    remedy=_REMEDY[precision],
                )
            tolerance = TOLERANCE[precision] * max(1.0, float(np.abs(b).max()))
            difference = float(np.abs(a - b).max())
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
    )
    enough = agreeing / rows >= MIN_AGREEMENT[precision]
    if worst > worst_tolerance or cosine < MIN_COSINE[precision] or not enough:
        raise ExportMismatch(
            f"{subject} disagrees with {reference}: {worst_place} differs by {worst:.3g} (tolerance "
            f"{worst_tolerance:.3g}), smallest cosine {cosine:.6f} (at least {MIN_COSINE[precision]}), "
            f"{rows - agreeing} of {rows} rows pick another class (at most {1 - MIN_AGREEMENT[precision]:.0%}).",
            remedy=_REMEDY[precision],
        )
    return verification


_REMEDY: dict[Precision, str] = {
    "fp32": "This is a defect of the export: please report it with the model's config.json.",
    "fp16": "The model does not bear float16; use `precision` bf16 or fp32.",
    "bf16": "The model does not bear bfloat16; use `precision` fp16 or fp32.",
    "int8": "The model does not bear 8 bits as calibrated; calibrate on more of its own data, or use `precision` fp16.",
    "fp8": "The model does not bear 8 bits as calibrated; calibrate on more of its own data, or use `precision` fp16.",
    "int4": "The model does not bear 4-bit weights; use `precision` int8 or fp16.",
}


def _rows(logits: Array, batch: Inputs) -> Array:
    if logits.ndim == 2:
        return logits
    kept: Array = logits[batch["attention_mask"] > 0]
    return kept


def _smallest_cosine(a: Array, b: Array, tolerance: float) -> float:
    """Over rows that are long enough to have a direction at this tolerance."""
    norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    long = np.minimum(*norms) > 100 * tolerance
    if not long.any():
        return 1.0
    dots = (a.astype(np.float64) * b).sum(axis=-1)[long]
    return float(min(1.0, (dots / (norms[0] * norms[1])[long]).min()))


def _cosine(a: Array, b: Array) -> float:
    """Of all rows as one long vector: a quantised model's small rows have no stable direction."""
    flat = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
    norms = float(np.linalg.norm(flat[0]) * np.linalg.norm(flat[1]))
    return min(1.0, float(flat[0] @ flat[1]) / norms) if norms else 1.0


def logits_of(outputs: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """What is compared: the KV cache shows in the logits of the steps after it."""
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
    """Compares an engine with ONNX Runtime on the file it was built from, at the corners of its profiles.

    Raises `ExportMismatch`, naming the worst output and the numbers.
    """
    # Profiles for steps after a cache are covered by generating; here every input starts with an empty one.
    fresh = [profile for profile in info.profiles if profile.past[0] == 0]
    shapes = [(profile.batch[i], profile.tokens[i]) for profile in fresh for i in range(3)]
    reference = OnnxRuntimeRunner(model)
    try:
        return compare(
            runner,
            reference.run,
            random_inputs(
                manifest.inputs, shapes, manifest.max_tokens, seed, pad=manifest.pad_token_id, adapter=adapter
            ),
            logits_of(manifest.outputs),
            # An fp32 engine keeps the tight tolerance: the builder leaves TF32 off unless it is asked for.
            precision="fp16" if "TF32" in info.flags else manifest.precision,
            subject=f"{PLAN} on {info.backend} {info.version}",
            reference=f"{model.name} on ONNX Runtime",
        )
    finally:
        reference.close()

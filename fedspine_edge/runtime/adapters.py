"""Reads PEFT adapters, validates them and arranges them as inputs of a bundle's ONNX graph."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import ADAPTER, AdapterSpec, BundleManifest, LoraModule
from fedspine_edge.errors import CheckpointError, DeployError
from fedspine_edge.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LAYOUT
from fedspine_edge.model.peft_config import PeftConfig

PREFIX = "base_model.model."


def bundled_adapter(folder: Path, manifest: BundleManifest) -> dict[str, Array]:
    """Return the inputs of a bundle's own adapter; empty if adapters are not inputs of the model."""
    return {} if manifest.adapter is None else _tensors(folder / ADAPTER)


def read_adapter(folder: str | Path, manifest: BundleManifest, default: dict[str, Array]) -> dict[str, Array]:
    """Return the adapter inputs of the model from a PEFT folder, as `PrunableModel.save` and `save_pretrained` write.

    Linears without an adapter get zeros, which is equivalent to rank 0. A head that the adapter does not contain is
    taken from the bundle. Lower ranks are padded with zeros, which do not change the product.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors.
        manifest: Manifest of the bundle.
        default: Inputs of the bundle's own adapter.

    Raises:
        DeployError: The bundle was compiled with its adapter merged.
        CheckpointError: The adapter is damaged, is not plain LoRA, has a rank above 64, or belongs to another model.
            A model of equal widths that kept different channels is another model.
    """
    spec = manifest.adapter
    if spec is None:
        raise DeployError(
            "This bundle has its adapter merged into the weights.",
            remedy="Recompile its model with: fedspine-edge compile MODEL --lora inputs",
        )
    folder = Path(folder)
    config = PeftConfig.read(folder)
    _check_model(folder, spec)
    tensors = _tensors(folder / ADAPTER_WEIGHTS)
    inputs = {name: array for name, array in default.items() if name.startswith("head.")}
    factors: dict[str, dict[str, Array]] = {entry.path: {} for entry in spec.modules}
    parts: dict[str, list[LoraModule]] = {}
    for entry in spec.modules:
        parts.setdefault(entry.path.rpartition(".")[0], []).append(entry)
    owners = {entry.path: entry.path for entry in spec.modules}
    for key, array in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match and match[1] in factors:
            factors[match[1]][match[2]] = array
        elif match and match[1] in parts:
            _split_fused(match[2], array, parts[match[1]], factors, f"{folder / ADAPTER_WEIGHTS}: {name}")
            owners |= {entry.path: match[1] for entry in parts[match[1]]}
        elif not match and name in spec.head:
            _check_array(array, tuple(spec.head[name]), f"{folder / ADAPTER_WEIGHTS}: {name}")
            inputs[f"head.{name}"] = np.ascontiguousarray(array, np.float32)
        else:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS} adapts {name!r}, for which this bundle has no input.",
                remedy="The adapter belongs to another base model or task.",
            )
    for path, pair in factors.items():
        if "A" in pair:
            _check_rank(pair["A"], config, owners[path], f"{folder / ADAPTER_WEIGHTS}: {owners[path]}")
        if len(pair) == 2 and pair["B"].ndim == 2 and pair["B"].shape[1] == pair["A"].shape[0]:
            # Adapters of fused linears that were stacked from one adapter per part have zeros outside their own block.
            used = np.any(pair["B"] != 0, axis=0) | ~np.isfinite(pair["B"]).all(axis=0)
            pair["A"], pair["B"] = pair["A"][used], pair["B"][:, used]
    rank = max((pair["A"].shape[0] for pair in factors.values() if pair.get("A", np.zeros(0)).ndim == 2), default=0)
    if rank > spec.max_rank:
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS} has rank {rank}; the bundle supports ranks up to {spec.max_rank}.",
            remedy="Train an adapter of a lower rank.",
        )
    for entry in spec.modules:
        pair, where = factors[entry.path], f"{folder / ADAPTER_WEIGHTS}: {entry.path}"
        lora_A = np.zeros((entry.in_features, rank), np.float32)
        lora_B = np.zeros((rank, entry.out_features), np.float32)
        if pair:
            if set(pair) != {"A", "B"}:
                raise CheckpointError(f"{where} has only one of lora_A and lora_B.", remedy="Copy the adapter again.")
            r = len(pair["A"])
            _check_array(pair["A"], (r, entry.in_features), f"{where}.lora_A")
            _check_array(pair["B"], (entry.out_features, r), f"{where}.lora_B")
            lora_A[:, :r] = pair["A"].T
            lora_B[:r] = pair["B"].T * np.float32(config.scaling(owners[entry.path]))
        inputs[f"lora.{entry.path}.A"], inputs[f"lora.{entry.path}.B"] = lora_A, lora_B
    return inputs


def _split_fused(
    side: str, array: Array, entries: list[LoraModule], factors: dict[str, dict[str, Array]], where: str
) -> None:
    """Split PEFT's adapter of a fused matrix (GPT-2's c_attn) by linear: they share A and split the rows of B."""
    ends = np.cumsum([entry.out_features for entry in entries])
    if side == "B" and (array.ndim != 2 or array.shape[0] != ends[-1]):
        raise CheckpointError(f"{where} has shape {array.shape}; {ends[-1]} rows are required.", remedy=_REMEDY)
    for entry, end in zip(entries, ends):
        factors[entry.path][side] = array if side == "A" else array[end - entry.out_features : end]


def _check_array(array: Array, shape: tuple[int, ...], where: str) -> None:
    """Raise `CheckpointError` unless `array` has this shape and finite floating-point values."""
    if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise CheckpointError(
            f"{where} has dtype {array.dtype} and shape {array.shape}, or is not finite; finite floats of shape "
            f"{shape} are required.",
            remedy="The adapter is damaged or belongs to a model of other widths.",
        )


def _check_rank(lora_A: Array, config: PeftConfig, module: str, where: str) -> None:
    """Raise `CheckpointError` if the rank of a module differs from the one that determines its scaling."""
    if lora_A.ndim == 2 and len(lora_A) != config.rank(module):
        raise CheckpointError(
            f"{where} has rank {len(lora_A)}; {ADAPTER_CONFIG} states {config.rank(module):g}.",
            remedy="The two files belong to different adapters; copy both again.",
        )


def _check_model(folder: Path, spec: AdapterSpec) -> None:
    """Compare the base and the kept channels with layout.json, which this package saves with an adapter."""
    path = folder / LAYOUT
    if not path.is_file():
        return
    try:
        layout = json.loads(path.read_text(encoding="utf-8"))
        base, kept = layout["spec"]["base_sha256"], AdapterSpec.layout_digest(layout["heads"], layout["channels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}.", remedy="Copy the adapter again.") from error
    if base != spec.base_sha256:
        raise CheckpointError(f"The adapter in {folder} was trained on another base model.", remedy=_REMEDY)
    if kept != spec.layout_sha256:
        raise CheckpointError(f"The adapter in {folder} was trained on other heads and channels.", remedy=_REMEDY)


_REMEDY = "Set an adapter of the pruned model that this bundle was compiled from."


def _tensors(path: Path) -> dict[str, Array]:
    """Read a safetensors file. Types that numpy does not have are converted to float32."""
    try:
        entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        return {name: _to_numpy(entry) for name, entry in entries}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.", remedy=_MISSING) from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", remedy="Copy the adapter again.") from error


_MISSING = "Save the adapter as safetensors, for example with PEFT's save_pretrained(..., safe_serialization=True)."

_NUMPY_TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}


def _to_numpy(entry: Mapping[str, Any]) -> Array:
    """Return a tensor of a safetensors file as an array; bfloat16 and float8 become float32 without loss."""
    dtype, data = entry["dtype"], bytes(entry["data"])
    if dtype == "BF16":
        array: Array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F8_E5M2":
        array = (np.frombuffer(data, np.uint8).astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    elif dtype == "F8_E4M3":
        array = _float8_e4m3(np.frombuffer(data, np.uint8))
    elif dtype in _NUMPY_TYPES:
        array = np.frombuffer(data, f"<{_NUMPY_TYPES[dtype]}")
    else:
        raise ValueError(f"a tensor has the type {dtype}")
    shaped: Array = array.reshape(entry["shape"])
    return shaped


def _float8_e4m3(codes: Array) -> Array:
    """Decode float8 e4m3fn: 4 exponent bits with bias 7, 3 mantissa bits, NaN at 0x7F and 0xFF, and no infinity."""
    codes = codes.astype(np.int32)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values = np.where(codes & 0x80, -magnitude, magnitude)
    result: Array = np.where((codes & 0x7F) == 0x7F, np.nan, values).astype(np.float32)
    return result

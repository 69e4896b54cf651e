"""Reads PEFT adapters, validates them and arranges them as inputs of a bundle's ONNX graph."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import ADAPTER, AdapterSpec, BundleManifest, LoraModule
from fedspine_edge.errors import CheckpointError, DeployError

CONFIG, WEIGHTS, LAYOUT = "adapter_config.json", "adapter_model.safetensors", "layout.json"
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
    config = _config(folder)
    _check_model(folder, spec)
    tensors = _tensors(folder / WEIGHTS)
    inputs = {name: array for name, array in default.items() if name.startswith("head.")}
    factors: dict[str, dict[str, Array]] = {entry.path: {} for entry in spec.modules}
    parts: dict[str, list[LoraModule]] = {}
    for entry in spec.modules:
        parts.setdefault(entry.path.rpartition(".")[0], []).append(entry)
    for key, array in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match and match[1] in factors:
            factors[match[1]][match[2]] = array
        elif match and match[1] in parts:
            _split_fused(match[2], array, parts[match[1]], factors, f"{folder / WEIGHTS}: {name}")
        elif not match and name in spec.head:
            _check_array(array, tuple(spec.head[name]), f"{folder / WEIGHTS}: {name}")
            inputs[f"head.{name}"] = np.ascontiguousarray(array, np.float32)
        else:
            raise CheckpointError(
                f"{folder / WEIGHTS} adapts {name!r}, for which this bundle has no input.",
                remedy="The adapter belongs to another base model or task.",
            )
    for pair in factors.values():
        if len(pair) == 2 and pair["B"].ndim == 2 and pair["B"].shape[1] == pair["A"].shape[0]:
            # Adapters of fused linears that were stacked from one adapter per part have zeros outside their own block.
            used = np.any(pair["B"] != 0, axis=0) | ~np.isfinite(pair["B"]).all(axis=0)
            pair["A"], pair["B"] = pair["A"][used], pair["B"][:, used]
    rank = max((pair["A"].shape[0] for pair in factors.values() if pair.get("A", np.zeros(0)).ndim == 2), default=0)
    if rank > spec.max_rank:
        raise CheckpointError(
            f"{folder / WEIGHTS} has rank {rank}; the bundle supports ranks up to {spec.max_rank}.",
            remedy="Train an adapter of a lower rank.",
        )
    for entry in spec.modules:
        pair, where = factors[entry.path], f"{folder / WEIGHTS}: {entry.path}"
        lora_A = np.zeros((entry.in_features, rank), np.float32)
        lora_B = np.zeros((rank, entry.out_features), np.float32)
        if pair:
            if set(pair) != {"A", "B"}:
                raise CheckpointError(f"{where} has only one of lora_A and lora_B.", remedy="Copy the adapter again.")
            r = len(pair["A"])
            _check_array(pair["A"], (r, entry.in_features), f"{where}.lora_A")
            _check_array(pair["B"], (entry.out_features, r), f"{where}.lora_B")
            lora_A[:, :r] = pair["A"].T
            lora_B[:r] = pair["B"].T * np.float32(_scaling(config, entry.path))
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


def _scaling(config: dict[str, Any], path: str) -> float:
    """Return lora_alpha / r of a linear (/ sqrt(r) with rslora). PEFT's patterns match the end of a path."""

    def pattern(name: str, default: float) -> float:
        for key, value in (config.get(name) or {}).items():
            if path == key or re.fullmatch(rf"(.*\.)?({key})", path):
                return float(value)
        return default

    r = pattern("rank_pattern", float(config["r"]))
    alpha = pattern("alpha_pattern", float(config["lora_alpha"]))
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def _config(folder: Path) -> dict[str, Any]:
    """Read and validate adapter_config.json."""
    path = folder / CONFIG
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        plain = config["peft_type"] == "LORA" and not config.get("use_dora") and config.get("bias", "none") == "none"
        positive = float(config["r"]) >= 1 and float(config["lora_alpha"]) > 0
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG}.", remedy="Point to a PEFT adapter folder.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}.", remedy="Copy the adapter again.") from error
    if not plain or not positive:
        raise CheckpointError(
            f"{path} describes an adapter that is not plain LoRA without biases.",
            remedy="Train an adapter with peft_type LORA.",
        )
    return config


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
    try:
        return dict(load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", remedy="Copy the adapter again.") from error

"""Reads and writes adapters in PEFT's file format.

PEFT has one adapter for a fused linear (GPT-2's `c_attn`), and this package has one per part. When saving, the adapters
of the parts are stacked into one of the summed rank with a block-diagonal B, which gives the same product. When
loading, such an adapter is split again; an adapter that PEFT trained is split along the rows of B.

PEFT names the tensors `base_model.model.{path}.lora_A.weight` and, for modules in `modules_to_save` (the task head),
`base_model.model.{path}`. Ranks and alphas may differ between modules (`rank_pattern`, `alpha_pattern`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from fedspine_edge.errors import CheckpointError
from fedspine_edge.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LAYOUT
from fedspine_edge.model.deterministic_init import kaiming_uniform
from fedspine_edge.model.layout import full_shape, module_names, split_name
from fedspine_edge.model.peft_config import PeftConfig
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.model.weight_files import read_tensors, refuse_pickles

PREFIX = "base_model.model."
TASK_TYPES = {"classification": "SEQ_CLS", "token_classification": "TOKEN_CLS", "causal_lm": "CAUSAL_LM"}


def save_adapter(model: PrunableModel, folder: Path) -> None:
    """Write the adapter and the head of `model` into the existing folder `folder`."""
    r = model.r
    if r is None:
        raise CheckpointError("the model has no adapter to save.", remedy="Call attach_lora first.")
    fused = model.architecture.fused
    stacked = {path: len(parts) * r for path, parts in fused.items()}
    config = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[model.task],
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": _number(model.scaling * r),
        "rank_pattern": stacked,
        "alpha_pattern": {path: _number(model.scaling * rank) for path, rank in stacked.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": model.architecture.transposed,
        "inference_mode": True,
        "target_modules": list(model.architecture.lora_targets),
        "modules_to_save": list(model.architecture.head_modules(model.task)) or None,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {}
    for name, parameter in model.trainable_parameters().items():
        if name.startswith("head."):
            key = PREFIX + name.removeprefix("head.")
        else:
            module, _, side = name.rpartition(".")
            key = f"{PREFIX}{model.architecture.path(module)}.{side}.weight"
        tensors[key] = parameter.detach().to("cpu").contiguous()
    for layer in range(model.spec.num_layers):
        for path, parts in fused.items():
            fused_path = f"{PREFIX}{model.architecture.layer_path(layer)}.{path}"
            pairs = [[tensors.pop(f"{fused_path}.{p}.{side}.weight") for p in parts] for side in ("lora_A", "lora_B")]
            tensors[f"{fused_path}.lora_A.weight"] = torch.cat(pairs[0])
            tensors[f"{fused_path}.lora_B.weight"] = torch.block_diag(*pairs[1])
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: PrunableModel, folder: str | Path, *, seed: int = 0) -> None:
    """Load a PEFT LoRA adapter, and the head that was saved with it, into `model`.

    Modules without an adapter get a new one whose B is zero. Adapters of different ranks are padded to the largest rank
    with a seeded A and a zero B, which changes nothing and can be trained. Different alphas are merged into B. An
    adapter of the unpruned model is gathered to the model's layout.

    Raises `CheckpointError`, before anything has changed, for other kinds of adapters, modules that are not prunable
    linears, shapes of another base, damaged files and non-finite values.
    """
    folder = Path(folder)
    config = PeftConfig.read(folder)
    _check_base(model, folder)
    if not (folder / ADAPTER_WEIGHTS).exists():
        refuse_pickles(folder)
    tensors, ranks = _split_fused_adapters(model, read_tensors(folder / ADAPTER_WEIGHTS))
    paths = {model.architecture.path(name): name for name in module_names(model.spec)}
    factors: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    state: dict[str, npt.NDArray[np.float32]] = {}
    for key, tensor in tensors.items():
        array = tensor.to(torch.float32).numpy()
        match = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", key.removeprefix(PREFIX))
        if match and match[1] in paths:
            factors.setdefault(paths[match[1]], {})[match[2]] = array
        elif not match and key.removeprefix(PREFIX) in model.head_names:
            state[f"head.{key.removeprefix(PREFIX)}"] = array
        else:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS} adapts {key!r}, which is neither a prunable linear nor the head of this "
                f"{model.spec.family} model.",
                remedy="The adapter belongs to another base model or task.",
            )
    largest = max((pair["lora_A"].shape[0] for pair in factors.values() if "lora_A" in pair), default=0)
    if largest == 0:
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS} has no LoRA factors for this model.",
            remedy="Pass an adapter that PEFT's save_pretrained wrote for this base model.",
        )
    scaling = config.scaling(None)
    for path, name in paths.items():
        pair = factors.get(name, {})
        if pair and set(pair) != {"lora_A", "lora_B"}:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: {path} has only one of lora_A and lora_B.",
                remedy="Copy the adapter again.",
            )
        declared = config.rank(ranks.get(path, path))
        if pair and pair["lora_A"].shape[0] != declared and path not in ranks:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: {path} has rank {pair['lora_A'].shape[0]}; {ADAPTER_CONFIG} states "
                f"{declared:g}.",
                remedy="The two files belong to different adapters; copy both again.",
            )
        ratio = config.scaling(ranks.get(path, path)) / scaling
        state.update(_padded(model, name, pair, largest, ratio, seed))
    if any(name.startswith("head.") for name in state):  # PEFT saves the classifier, but not the pooler
        state = {**{n: v for n, v in model.adapter_state().items() if n.startswith("head.")}, **state}
    model.load_adapter(state, scaling=scaling)


def _padded(
    model: PrunableModel, name: str, pair: dict[str, Any], r: int, ratio: float, seed: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the factors of a linear padded to rank `r`, with B multiplied by `ratio`; new ones if `pair` is empty."""
    rows, cols = model.layout.rows(name).size, model.layout.cols(name)
    full = full_shape(model.spec, split_name(name)[1])[1]
    fresh = kaiming_uniform(seed, name, r, full)
    if not pair:
        return {f"{name}.lora_A": fresh[:, cols], f"{name}.lora_B": np.zeros((rows, r), np.float32)}
    lora_A, lora_B = pair["lora_A"], pair["lora_B"]
    rank = lora_A.shape[0]
    if rank < r and lora_A.ndim == lora_B.ndim == 2:
        fill = fresh if lora_A.shape[1] == full else fresh[:, cols]
        if fill.shape[1] == lora_A.shape[1]:  # otherwise load_adapter reports the shapes
            lora_A = np.concatenate([lora_A, fill[rank:]])
            lora_B = np.concatenate([lora_B, np.zeros((lora_B.shape[0], r - rank), np.float32)], axis=1)
    return {f"{name}.lora_A": lora_A, f"{name}.lora_B": lora_B * np.float32(ratio)}


def _split_fused_adapters(
    model: PrunableModel, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Replace the adapters of fused linears by one per part.

    Returns the tensors, and for the path of each part the path of the fused module, whose rank and alpha apply. An
    adapter that `save_adapter` stacked is recognized by a B that is zero outside its diagonal blocks.
    """
    found = dict(tensors)
    owners: dict[str, str] = {}
    for layer in range(model.spec.num_layers):
        for path, parts in model.architecture.fused.items():
            fused_path = f"{model.architecture.layer_path(layer)}.{path}"
            keys = [
                k for side in "AB" for k in found if k.removeprefix(PREFIX).startswith(f"{fused_path}.lora_{side}.")
            ]
            owners |= {f"{fused_path}.{part}": fused_path for part in parts}
            if len(keys) != 2:
                continue
            lora_A, lora_B = found.pop(keys[0]), found.pop(keys[1])
            n = len(parts)
            rows = lora_B.chunk(n)
            pairs = [(lora_A, piece) for piece in rows]
            if lora_A.shape[0] % n == 0 and lora_B.shape[0] % n == 0:
                blocks = [piece.chunk(n, dim=1)[i] for i, piece in enumerate(rows)]
                if torch.equal(torch.block_diag(*blocks), lora_B):
                    pairs = list(zip(lora_A.chunk(n), blocks))
            for part, (a, b) in zip(parts, pairs):
                found[f"{PREFIX}{fused_path}.{part}.lora_A.weight"] = a.contiguous()
                found[f"{PREFIX}{fused_path}.{part}.lora_B.weight"] = b.contiguous()
    return found, owners


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _check_base(model: PrunableModel, folder: Path) -> None:
    """Raise `CheckpointError` if a folder that this package saved names other base weights than the model's."""
    manifest = folder / LAYOUT
    if not manifest.exists():
        return
    try:
        base = json.loads(manifest.read_text(encoding="utf-8"))["spec"]["base_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} is damaged: {error!r}.", remedy="Copy the adapter again.") from error
    if base != model.spec.base_sha256:
        raise CheckpointError(
            f"the adapter in {folder} was trained on base {str(base)[:12]}; this model has base "
            f"{model.spec.base_sha256[:12]}.",
            remedy="Load the base model it was trained on.",
        )

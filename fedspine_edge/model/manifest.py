"""The two kinds of layout.json: that of a saved model folder and that of a finished fleet run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from fedspine_edge.config import Task
from fedspine_edge.errors import CheckpointError
from fedspine_edge.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LAYOUT, WEIGHTS, Sha256
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.spec import ModelSpec


class ModelManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """layout.json of a saved model: kept indices, unpruned shape, task, and the hash of every other file."""

    format: Literal["fedspine_edge"] = "fedspine_edge"
    version: Literal[1] = 1
    task: Task
    num_labels: int
    labels: list[str]
    spec: ModelSpec
    heads: list[list[int]]
    """Kept heads of each layer, numbered as in the unpruned model."""
    channels: list[list[int]]
    """Kept channels of each layer, likewise."""
    pruning_ratio: float
    sparsity: float
    r: int | None
    """Rank of the adapter in the folder; null if there is none or it was merged."""
    scaling: float
    head_names: list[str]
    standard: bool
    """Whether transformers' own from_pretrained can read the folder."""
    base: str = ""
    """Name of the base model: the name of its folder or GGUF file, or its hub id."""
    trained_examples: int = 0
    """Size of the largest data set that it was trained on; 0 if unknown."""
    trained_steps: int = 0
    sha256: dict[str, Sha256]
    """SHA-256 of every other file of the folder, by name."""

    def to_layout(self) -> Layout:
        """Return the kept groups. Raises `LayoutError` if they do not fit `spec`."""
        return Layout.from_dict(self.spec, {"heads": self.heads, "channels": self.channels})


class FleetLayout(msgspec.Struct, frozen=True, kw_only=True):
    """layout.json of a finished fleet run, beside its adapter.safetensors."""

    heads: list[list[int]]
    """Kept heads of each layer, numbered as in the unpruned model."""
    channels: list[list[int]]
    """Kept channels of each layer, likewise."""
    spec: ModelSpec
    scaling: float
    """lora_alpha / r of the adapter."""
    r: int
    """Rank of the adapter."""
    seed: int
    """Seed of the run, from which devices initialized the task head."""
    task: Task
    num_labels: int
    trained_examples: int
    """Examples of all devices of the last round."""
    trained_steps: int
    """Steps of one device through all rounds."""
    adapter_sha256: Sha256

    def to_layout(self) -> Layout:
        """Return the kept groups. Raises `LayoutError` if they do not fit `spec`."""
        return Layout.from_dict(self.spec, {"heads": self.heads, "channels": self.channels})


def read_manifest(folder: Path) -> ModelManifest:
    """Read layout.json of a saved model. Raises `CheckpointError`."""
    if not folder.is_dir():
        what = "is a file, not a model folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}.", remedy="Pass a folder that `tune` or `assemble` wrote.")
    path = folder / LAYOUT
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {LAYOUT}: it was not saved by this package.",
            remedy="Pass a folder that `tune` or `assemble` wrote; load_base(folder) reads a plain one.",
        )
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=ModelManifest)
    except (msgspec.DecodeError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}.", remedy="Copy the saved folder again, or save the model again."
        ) from error
    needed = {WEIGHTS, "config.json"} | ({ADAPTER_CONFIG, ADAPTER_WEIGHTS} if manifest.r is not None else set())
    if not needed <= set(manifest.sha256):
        raise CheckpointError(
            f"{path} has no hash for {sorted(needed - set(manifest.sha256))[0]}.",
            remedy="It was edited or belongs to another folder; copy the saved folder again.",
        )
    if any(Path(name).name != name for name in manifest.sha256):
        raise CheckpointError(
            f"{path} names files outside its folder.", remedy="It was tampered with; do not use this folder."
        )
    return manifest

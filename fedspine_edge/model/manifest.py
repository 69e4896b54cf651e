"""layout.json of a saved model: what was kept, of what, for which task, and the hash of every file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from fedspine_edge.config import Task
from fedspine_edge.errors import CheckpointError
from fedspine_edge.files import LAYOUT, WEIGHTS
from fedspine_edge.model import peft_format
from fedspine_edge.model.spec import ModelSpec, Sha256


class ModelManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Contents of layout.json."""

    format: Literal["fedspine_edge"] = "fedspine_edge"
    version: Literal[1] = 1
    task: Task
    num_labels: int
    labels: list[str]
    spec: ModelSpec
    heads: list[list[int]]
    """Per layer the kept heads, in the unpruned model's numbering."""
    channels: list[list[int]]
    pruning_ratio: float
    sparsity: float
    r: int | None
    """Rank of the adapter beside the weights; null if merged or never attached."""
    scaling: float
    head_names: list[str]
    standard: bool
    """Whether transformers' own from_pretrained can read the folder."""
    base: str = ""
    """Name of the base model: its folder's, its GGUF file's or its hub id."""
    trained_examples: int = 0
    """Examples of the largest data set it was trained on here; 0 where that is not known."""
    trained_steps: int = 0
    sha256: dict[str, Sha256]


def read_manifest(folder: Path) -> ModelManifest:
    """layout.json of a saved model. Raises `CheckpointError`."""
    if not folder.is_dir():
        what = "is a file, not a model folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}.", remedy="Give a folder that `tune` or `export` wrote.")
    path = folder / LAYOUT
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {LAYOUT}: it was not saved by this package.",
            remedy="Give a folder that `tune` or `export` wrote; load_base(folder) loads a plain Hugging Face one.",
        )
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=ModelManifest)
    except (msgspec.DecodeError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}.", remedy="Copy the saved folder again, or save the model again."
        ) from error
    needed = {WEIGHTS, "config.json"} | (set(peft_format.FILES) if manifest.r is not None else set())
    if not needed <= set(manifest.sha256):
        raise CheckpointError(
            f"{path} has no hash for {sorted(needed - set(manifest.sha256))[0]}.",
            remedy="It was edited or is of another folder; copy the saved folder again.",
        )
    if any(Path(name).name != name for name in manifest.sha256):
        raise CheckpointError(
            f"{path} names files outside its folder.", remedy="It was tampered with; do not use this folder."
        )
    return manifest

"""A finished fleet run as a model: the base, compacted to the fleet's layout, with the global adapter in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.numpy import load

from fedspine_edge.config import Task
from fedspine_edge.errors import CheckpointError, LayoutError
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.loading import load_base
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.codec import digest


def load_fleet_model(final: Path, base: str | Path, *, pruned: bool = True) -> PrunableModel:
    """Load the model that a fleet trained.

    Args:
        final: The `final` folder of the server's run: `adapter.safetensors` and `layout.json`.
        base: The base model that the devices trained on.
        pruned: False keeps every head and channel and only adds the adapter.

    Raises `CheckpointError` for missing or damaged files, or for another base model than the fleet's.
    """
    description = _read_description(final / "layout.json")
    adapter_bytes = _read(final / "adapter.safetensors")
    try:
        spec = msgspec.convert(description["spec"], ModelSpec)
        layout = Layout.from_dict(spec, description)
        seed, scaling = description["seed"], description["scaling"]
        task, num_labels = msgspec.convert(description["task"], Task), description["num_labels"]
        adapter_sha256 = description["adapter_sha256"]
        examples, steps = int(description["trained_examples"]), int(description["trained_steps"])
    except (KeyError, msgspec.ValidationError, LayoutError) as error:
        raise CheckpointError(f"{final / 'layout.json'} is not a fleet's layout: {error}.") from error
    if digest(adapter_bytes) != adapter_sha256:
        raise CheckpointError(
            f"{final / 'adapter.safetensors'} is not the file that the run wrote (its hash differs).",
            remedy="Copy the run's folder again.",
        )
    try:
        adapter = load(adapter_bytes)
    except SafetensorError as error:
        raise CheckpointError(f"{final / 'adapter.safetensors'} cannot be read: {error}.") from error
    model = load_base(base, task=task, num_labels=num_labels, seed=seed)
    if model.spec.base_sha256 != spec.base_sha256:
        raise CheckpointError(
            f"{base} is not the model that the fleet trained: its weights have the digest "
            f"{model.spec.base_sha256[:12]}…, the fleet's {spec.base_sha256[:12]}….",
            remedy="Give the same base model that the devices have.",
        )
    if pruned:
        model.compact(layout)
    model.load_adapter(adapter, scaling=scaling)
    model.trained_examples, model.trained_steps = examples, steps
    return model


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} is not a fleet's layout.")
    return description

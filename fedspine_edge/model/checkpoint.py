"""Saving and loading of pruned models: a Hugging Face folder with `layout.json`, in which every file is hashed.

    config.json                 transformers' config (with the compact widths if it can state them)
    model.safetensors           compact base and task head
    adapter_config.json         adapter in PEFT's format; absent from a merged model
    adapter_model.safetensors
    layout.json                 `ModelManifest`: kept indices, unpruned shape, task, hashes
    tokenizer files, README.md

A folder is written beside its target and renamed, so that readers see either the old or the new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fedspine_edge.errors import CheckpointError, LayoutError, MissingDependency
from fedspine_edge.files import GENERATION_CONFIG, LAYOUT, TOKENIZER_FILES, WEIGHTS, reason_not_to_replace
from fedspine_edge.model import peft_format
from fedspine_edge.model.families import architecture_of
from fedspine_edge.model.fused_projections import from_files, split_fused, to_files
from fedspine_edge.model.layout import module_names
from fedspine_edge.model.loading import (
    LOAD_FAILURES,
    auto_class,
    load_tokenizer,
    needs_sentencepiece,
    quiet,
    require_transformers,
)
from fedspine_edge.model.lora import plain_linear
from fedspine_edge.model.manifest import ModelManifest, read_manifest
from fedspine_edge.model.model_card import model_card
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.model.weight_files import check_finite, file_sha256, read_tensors

_SPACE = "Check space and permissions, or choose another folder."
_SAME_FOLDER = "The files of a saved folder belong together; copy the whole folder again."


def save_model(
    model: PrunableModel, folder: str | Path, *, merged: bool = False, metrics: Mapping[str, float] | None = None
) -> Path:
    """Write base, adapter, head, layout and tokenizer to `folder` atomically, and return its absolute path.

    Args:
        model: Model to save.
        folder: New or empty folder, or a saved model, which is replaced.
        merged: Whether to merge the adapter into the weights instead of writing it as separate files.
        metrics: Measured numbers for the model card.

    Raises `CheckpointError` if `folder` holds something other than a saved model of this package, which is left
    unchanged, or if weights are not finite.
    """
    target = check_target(folder)
    staging = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        _write(model, staging, merged, metrics or {})
        _replace_folder(staging, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}.", remedy=_SPACE) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def check_target(folder: str | Path, *, needed_bytes: int = 0) -> Path:
    """Return the absolute path of `folder` if `save_model` may write `needed_bytes` there.

    Raises `CheckpointError` if it holds something other than a saved model of this package, or if the place is
    read-only or full.
    """
    target = Path(folder).expanduser().absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / LAYOUT).exists()):
        raise CheckpointError(
            f"{target} exists and is not a model saved by this package; nothing was written.",
            remedy="Choose a new or empty folder.",
        )
    if reason := reason_not_to_replace(target):
        raise CheckpointError(
            f"{target} {reason}; nothing was written.", remedy=f"Choose a folder in it, such as {target / 'model'}."
        )
    present = next(parent for parent in target.parents if parent.exists())
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        what = "is not writable" if present.is_dir() else "is a file"
        raise CheckpointError(f"{target} cannot be written: {present} {what}.", remedy=_SPACE)
    if (free := shutil.disk_usage(present).free) < needed_bytes:
        raise CheckpointError(
            f"{target} cannot be written: it needs {needed_bytes / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free.",
            remedy=_SPACE,
        )
    return target


def load_model(folder: str | Path) -> PrunableModel:
    """Load a model that `save_model` wrote, including models whose layers have different widths.

    Raises `CheckpointError` if anything is missing, truncated, altered or inconsistent.
    """
    transformers = require_transformers()
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    for name, expected in manifest.sha256.items():
        if file_sha256(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name} is not the file that was saved (its SHA-256 differs).",
                remedy="It is truncated, damaged or from another model; copy the folder again.",
            )
    try:
        layout = manifest.to_layout()
    except LayoutError as error:
        raise CheckpointError(f"{folder / LAYOUT}: {error.message}", remedy=_SAME_FOLDER) from error
    architecture = architecture_of(manifest.spec.family)
    tensors = read_tensors(folder / WEIGHTS)
    with quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config = architecture.full_config(config, manifest.spec)
            module = _empty_module(auto_class(transformers, manifest.task), config)
            if config.tie_word_embeddings and _has_separate_head(module, tensors):
                config.tie_word_embeddings = False  # earlier versions saved the wrong flag
                module = _empty_module(auto_class(transformers, manifest.task), config)
        except LOAD_FAILURES as error:
            raise CheckpointError(
                f"{folder / 'config.json'} does not describe the model: {error}.", remedy=_SAME_FOLDER
            ) from error
    split_fused(module, architecture)
    for name in module_names(manifest.spec):
        path = architecture.path(name)
        parent, _, attribute = path.rpartition(".")
        bias = module.get_submodule(path).bias
        shape = (layout.rows(name).size, layout.cols(name).size)
        linear = plain_linear(
            torch.empty(shape, device="meta"), None if bias is None else torch.empty(shape[0], device="meta")
        )
        setattr(module.get_submodule(parent), attribute, linear)
    tensors = from_files(tensors, architecture, manifest.spec.num_layers)
    _load_tensors(module, tensors, folder)
    module.config.use_cache = False
    if (folder / GENERATION_CONFIG).is_file():  # its end tokens can differ from those of config.json
        try:
            module.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        except LOAD_FAILURES as error:
            raise CheckpointError(
                f"{folder / GENERATION_CONFIG} cannot be read: {error}.", remedy=_SAME_FOLDER
            ) from error
    model = PrunableModel(
        module.eval(),
        manifest.spec,
        layout,
        task=manifest.task,
        num_labels=manifest.num_labels,
        head_names=tuple(manifest.head_names),
        folder=folder,
    )
    check_finite(module, folder)
    model.scaling = manifest.scaling
    model.base = manifest.base
    model.trained_examples, model.trained_steps = manifest.trained_examples, manifest.trained_steps
    if manifest.r is not None:
        peft_format.load_adapter(model, folder)
    return model


def _empty_module(auto: Any, config: Any) -> Any:
    """Return a module with parameters on the meta device and real buffers, since no file holds RoPE's tables."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return auto.from_config(config)


def _has_separate_head(module: Any, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether `tensors` hold an output embedding that differs from the input embedding."""
    output = module.get_output_embeddings()
    if output is None:
        return False
    names = {id(child): f"{name}.weight" for name, child in module.named_modules()}
    first, second = (tensors.get(names[id(child)]) for child in (module.get_input_embeddings(), output))
    return first is not None and second is not None and not torch.equal(first, second)


def _load_tensors(module: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    try:
        unexpected = module.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not have the widths of {LAYOUT}: {error}.", remedy=_SAME_FOLDER
        ) from error
    module.tie_weights()
    missing = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if missing or unexpected:
        raise CheckpointError(
            f"{folder / WEIGHTS} has missing or unknown tensors, first {[*missing, *unexpected][0]!r}.",
            remedy=_SAME_FOLDER,
        )


def _write(model: PrunableModel, folder: Path, merged: bool, metrics: Mapping[str, float]) -> None:
    tensors = _base_tensors(model, merged)
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(
            f"weight {broken[0]!r} has non-finite values; nothing was written.",
            remedy="Training diverged: load the base again and lower the learning rate.",
        )
    save_file(to_files(tensors, model.architecture, model.spec.num_layers), folder / WEIGHTS, metadata={"format": "pt"})
    with_adapter = model.r is not None and not merged
    if with_adapter:
        peft_format.save_adapter(model, folder)
    standard = model.architecture.standard_config(model.module.config, model.layout)
    config = standard or model.architecture.full_config(model.module.config, model.spec)
    config.architectures = [type(model.module).__name__]
    config.use_cache = True
    output = model.module.get_output_embeddings()
    if output is not None:  # a merged checkpoint may have two matrices although its config says that they are tied
        config.tie_word_embeddings = output.weight is model.module.get_input_embeddings().weight
    config.save_pretrained(folder)
    if model.task == "causal_lm" and getattr(model.module, "generation_config", None) is not None:
        _write_generation_config(model, folder)
    _write_tokenizer(model, folder)
    config_labels = model.module.config.id2label if model.num_labels else {}
    manifest = ModelManifest(
        task=model.task,
        num_labels=model.num_labels,
        labels=[str(config_labels[i]) for i in range(model.num_labels)],
        spec=model.spec,
        heads=[h.tolist() for h in model.layout.heads],
        channels=[c.tolist() for c in model.layout.channels],
        pruning_ratio=model.layout.pruning_ratio,
        sparsity=model.layout.sparsity,
        r=model.r if with_adapter else None,
        scaling=model.scaling,
        head_names=list(model.head_names),
        standard=standard is not None,
        base=model.base,
        trained_examples=model.trained_examples,
        trained_steps=model.trained_steps,
        sha256={file.name: file_sha256(file) for file in sorted(folder.iterdir())},
    )
    (folder / LAYOUT).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    (folder / "README.md").write_text(model_card(manifest, metrics), encoding="utf-8")


def _base_tensors(model: PrunableModel, merged: bool) -> dict[str, torch.Tensor]:
    """Return base and head under the names of transformers; tied tensors appear once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.module.state_dict(keep_vars=True).items():
        if name.endswith((".lora_A", ".lora_B")) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensors[name.replace(".base_layer.", ".")] = tensor.detach().to("cpu").contiguous()
    if merged and model.r is not None:
        for name in module_names(model.spec):
            tensors[f"{model.architecture.path(name)}.weight"] = model.linear(name).merged_weight().to("cpu")
    return tensors


def _write_generation_config(model: PrunableModel, folder: Path) -> None:
    """Copy the generation config of the base, or write the one that transformers derived from the base's files."""
    if model.folder is not None and (model.folder / GENERATION_CONFIG).is_file():
        shutil.copyfile(model.folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    else:
        (folder / GENERATION_CONFIG).write_text(model.module.generation_config.to_json_string(), encoding="utf-8")


def _write_tokenizer(model: PrunableModel, folder: Path) -> None:
    """Copy the tokenizer of the base, if there is one."""
    if model.folder is None:
        return
    if model.gguf_file is not None or needs_sentencepiece(model.folder):  # written as tokenizer.json
        with contextlib.suppress(CheckpointError, MissingDependency):
            load_tokenizer(model.folder, gguf_file=model.gguf_file).save_pretrained(folder)
    if model.gguf_file is not None:
        return
    for name in TOKENIZER_FILES:
        if (model.folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(model.folder / name, folder / name)


def _replace_folder(staging: Path, target: Path) -> None:
    """Move `staging` to `target`; the old folder is removed only when the new one is in place."""
    readable = (staging / LAYOUT).stat().st_mode
    for file in staging.iterdir():
        file.chmod(readable)  # safetensors writes files for the owner only; a service may run as another user
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)

"""A model folder in, a checked bundle out: export → verify → build → verify → publish.

bundle = compile_engine("out/", precision="fp16")          # where the model was trained
compile_engine("out.bundle", "out.bundle")                 # on the device: a new plan from the bundle's own
                                                           # model.onnx; needs neither torch nor transformers
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedspine_edge.deploy.archive import check_archive_target, is_archive, pack
from fedspine_edge.deploy.build import (
    BACKENDS,
    BackendChoice,
    EngineRequest,
    Report,
    add_engine,
    choose_backend,
    copy_bundle,
)
from fedspine_edge.deploy.bundle import (
    ADAPTER,
    MODEL,
    TOKENIZER,
    TOKENIZER_FILES,
    LayerWidths,
    Manifest,
    Precision,
    Profile,
    check_target,
    is_bundle,
    producer_versions,
    rebuild_command,
    seal,
    staging,
)
from fedspine_edge.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from fedspine_edge.model.prunable import PrunableModel

Lora = Literal["merge", "inputs"]


def compile_engine(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    precision: Precision | None = None,
    profiles: Sequence[Profile] | None = None,
    backend: BackendChoice = "auto",
    lora: Lora | None = None,
    labels: Sequence[str] | None = None,
    progress: Report | None = None,
    opset: int = 17,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """Makes a bundle that ONNX Runtime can run and, where TensorRT is at hand, holds an engine as well.

    Args:
        folder: What `PrunableModel.save`, `EdgeTuner.save` or `save_pretrained` wrote; or a bundle, whose plan
            is then built anew from its own model.onnx.
        out: Where the bundle goes, a folder or a .zip file; default `<folder>.bundle`, and a bundle itself when it
            is rebuilt. An existing
            bundle is replaced only when everything succeeded.
        precision: "fp32" (default) or "fp16"; a bundle that is rebuilt keeps its own.
        profiles: Shapes to build the engine for; default batch 1–8 and up to 128 tokens.
        backend: "auto" builds for TensorRT, else TensorRT-RTX, where that is installed and there is a GPU (or
            `compute_capabilities` are given, which TensorRT-RTX can build for without one), else no engine.
            "onnxruntime" never builds one; the other two build or fail.
        lora: "merge" (default) folds the adapter into the weights; "inputs" keeps adapters apart, so that
            `Session.set_adapter` exchanges them at run time, at any rank up to 64, without a rebuild.
        labels: Class names in the order of the logits; default the model's own.
        progress: Called with one line per step.
        opset: ONNX opset, 17 to 20.
        compute_capabilities: SM numbers such as ("86", "120"), TensorRT-RTX only.
        workspace_bytes: Scratch memory for the builder; None leaves its default.
        flags: Builder flags by name, such as ("TF32",).

    Returns the bundle's folder or file.

    Raises:
        ConfigError: An argument is wrong, or `out` holds something that is not a bundle.
        CheckpointError: The model folder cannot be read.
        ExportMismatch: The export disagrees with torch, or the engine with ONNX Runtime.
        EngineBuildError: TensorRT could not build.
        MissingDependency: A package that was asked for is absent.
    """
    folder = Path(folder)
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}.", remedy=f"Choose one of: {', '.join(BACKENDS)}")
    if precision not in (None, "fp32", "fp16"):
        raise ConfigError(f"precision is {precision!r}.", remedy="Choose fp32 or fp16.")
    if lora not in (None, "merge", "inputs"):
        raise ConfigError(f"lora is {lora!r}.", remedy="Choose merge or inputs.")
    from_bundle = is_bundle(folder)
    if from_bundle and lora is not None:
        raise ConfigError(f"{folder} is a bundle; lora= is for model folders.", remedy="Compile the model folder.")
    if out is None:
        out = folder if from_bundle else folder.absolute().with_name(f"{folder.absolute().name}.bundle")
    out = Path(out)
    if is_archive(out):
        check_archive_target(out.absolute())
        with tempfile.TemporaryDirectory(prefix="fedspine-compile-") as scratch:
            settings: dict[str, Any] = {"precision": precision, "profiles": profiles, "backend": backend, "lora": lora}
            settings |= {"labels": labels, "progress": progress, "opset": opset, "flags": flags}
            settings |= {"compute_capabilities": compute_capabilities, "workspace_bytes": workspace_bytes}
            return pack(compile_engine(folder, Path(scratch) / "bundle", **settings), out)
    check_target(out)
    report = progress or (lambda line: None)
    request = EngineRequest(
        backend=backend,
        profiles=tuple(profiles) if profiles is not None else None,
        compute_capabilities=tuple(compute_capabilities),
        workspace_bytes=workspace_bytes,
        flags=tuple(flags),
    )
    chosen = choose_backend(request)  # before the export, so that a missing package is said at once
    with staging(out) as draft:
        if from_bundle:
            manifest = copy_bundle(folder, draft, precision, labels)
        else:
            manifest = _export(folder, draft, precision or "fp32", opset, lora or "merge", labels, report)
        manifest = add_engine(draft, manifest, request, chosen, rebuild_command(out), report)
        seal(draft, manifest)
        report(f"writing {out}")
    return out


def _export(
    folder: Path,
    draft: Path,
    precision: Precision,
    opset: int,
    lora: Lora,
    labels: Sequence[str] | None,
    report: Report,
) -> Manifest:
    from fedspine_edge.deploy.export import export_onnx, load_folder, merged_module
    from fedspine_edge.deploy.verify import verify_adapters, verify_cache, verify_onnx

    report(f"loading {folder}")
    model = load_folder(folder)
    names = _label_names(model, labels)
    module = merged_module(model)
    report(f"exporting to ONNX ({precision}, opset {opset})")
    adapter, values = None, None
    if lora == "inputs":
        from safetensors.torch import save_file

        from fedspine_edge.deploy.graphs import with_runtime_lora

        runtime, adapter, factors = with_runtime_lora(model)
        save_file(factors, draft / ADAPTER)
        values = {name: tensor.numpy() for name, tensor in factors.items()}
        exported = export_onnx(runtime, draft / MODEL, opset=opset, precision=precision, adapter=adapter)
    else:
        exported = export_onnx(module, draft / MODEL, opset=opset, precision=precision)
    report("comparing ONNX Runtime with torch")
    verification = verify_onnx(exported, module, adapter=values)
    report(f"largest difference {verification.max_abs_diff:.2g} (tolerance {verification.tolerance:.2g})")
    steps = None
    if exported.task == "causal_lm" and exported.max_tokens >= 11:
        steps = verify_cache(exported, module, adapter=values)
        report(f"token by token: largest difference {steps.max_abs_diff:.2g} (tolerance {steps.tolerance:.2g})")
    if adapter is not None:
        ranks = verify_adapters(exported, runtime, adapter)
        report(f"other adapters: largest difference {ranks.max_abs_diff:.2g} (tolerance {ranks.tolerance:.2g})")
    _copy_tokenizer(folder, draft)
    return Manifest(
        producer=producer_versions("torch", "transformers", "onnx", "onnxruntime"),
        task=exported.task,
        family=model.spec.family,
        precision=precision,
        opset=opset,
        inputs=exported.inputs,
        outputs=exported.outputs,
        max_tokens=exported.max_tokens,
        pad_token_id=exported.pad_token_id,
        labels=names,
        end_token_ids=_end_tokens(module),
        adapter=adapter,
        widths=tuple(LayerWidths(heads=heads, channels=channels) for heads, channels in model.layout.counts),
        sparsity=model.layout.sparsity,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        verification=verification,
        cache_verification=steps,
    )


def _end_tokens(module: nn.Module) -> tuple[int, ...]:
    """What the generation settings, else the config, call the end of a text."""
    for source in (getattr(module, "generation_config", None), module.config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(int(token) for token in (found if isinstance(found, (list, tuple)) else (found,)))
    return ()


def _label_names(model: PrunableModel, labels: Sequence[str] | None) -> tuple[str, ...]:
    if model.task == "causal_lm":
        if labels is not None:
            raise ConfigError("labels were given for a causal language model, which has none.")
        return ()
    if labels is None:
        own = model.module.config.id2label
        return tuple(str(own[index]) for index in range(model.num_labels))
    if len(labels) != model.num_labels:
        raise ConfigError(f"{len(labels)} labels were given for a model with {model.num_labels} classes.")
    return tuple(labels)


def _copy_tokenizer(folder: Path, draft: Path) -> None:
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, draft / name)
    if (draft / TOKENIZER).is_file() or not any((draft / name).is_file() for name in TOKENIZER_FILES):
        return
    # Only the slow tokenizer's files: the runtime reads tokenizer.json alone, so it is made here.
    from fedspine_edge.model.checkpoint import load_tokenizer

    load_tokenizer(folder).backend_tokenizer.save(str(draft / TOKENIZER))

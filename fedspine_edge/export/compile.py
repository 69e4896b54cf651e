"""A model folder in, a checked bundle out: export → verify → build → verify → publish.

bundle = compile_engine("out/", precision="fp16")          # where the model was trained
compile_engine("out.bundle", "out.bundle")                 # on the device: a new plan from the bundle's own
                                                           # model.onnx; needs neither torch nor transformers
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from fedspine_edge.bundle.archive import check_archive_target, is_archive, pack
from fedspine_edge.bundle.bundle import BundleManifest, OptimizationProfile, Precision, is_bundle, rebuild_command
from fedspine_edge.bundle.publish import check_target, seal, staging
from fedspine_edge.data.loading import Data
from fedspine_edge.engine.tensorrt_builder import OnStep
from fedspine_edge.errors import ConfigError
from fedspine_edge.export.calibration import profile_of, read_data
from fedspine_edge.runtime.engine_build import (
    BACKENDS,
    BackendChoice,
    EngineRequest,
    ProgressCallback,
    add_engine,
    choose_backend,
    copy_bundle,
)

Lora = Literal["merge", "inputs"]


def compile_engine(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    precision: Precision | None = None,
    profiles: Sequence[OptimizationProfile] | None = None,
    backend: BackendChoice = "auto",
    lora: Lora | None = None,
    calibrate: Data | None = None,
    labels: Sequence[str] | None = None,
    progress: ProgressCallback | None = None,
    on_build_step: OnStep | None = None,
    opset: int | None = None,
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
        precision: "fp32" (default), "fp16", "bf16", or, for the linears inside the layers with all else in float16,
            "int8", "fp8" or "int4" (weights alone); a bundle that is rebuilt keeps its own.
        profiles: Shapes to build the engine for; default batch 1–8 and the lengths of `calibrate`, else up to 128
            tokens.
        backend: "auto" builds for TensorRT, else TensorRT-RTX, where that is installed and there is a GPU (or
            `compute_capabilities` are given, which TensorRT-RTX can build for without one), else no engine.
            "onnxruntime" never builds one; the other two build or fail.
        lora: "merge" (default) folds the adapter into the weights; "inputs" keeps adapters apart, so that
            `Session.set_adapter` exchanges them at run time, at any rank up to 64, without a rebuild.
        calibrate: Examples of the user's own, as `EdgeTuner.fit` takes them; int8 and fp8 need them. Activations are
            calibrated on 128; accuracy before and after is measured on up to 1,000 others and kept in the bundle.
        labels: Class names in the order of the logits; default the model's own.
        progress: Called with one line per step.
        on_build_step: Called while TensorRT builds, with its phase and the share done, 0 to 1.
        opset: ONNX opset, 17 to 20; None takes the lowest that has the precision, which most parsers read.
        compute_capabilities: SM numbers such as ("86", "120"), TensorRT-RTX only.
        workspace_bytes: Scratch memory for the builder; None takes half of what is available.
        flags: Builder flags by name, such as ("TF32",).

    Returns the bundle's folder or file.

    Raises:
        ConfigError: An argument is wrong, or `out` holds something that is not a bundle.
        CheckpointError: The model folder cannot be read.
        ExportMismatch: The export disagrees with torch, or the engine with ONNX Runtime.
        DataError: The examples of `calibrate` cannot be read.
        EngineBuildError: TensorRT could not build.
        MissingDependency: A package that was asked for is absent.
    """
    folder = Path(folder)
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}.", remedy=f"Choose one of: {', '.join(BACKENDS)}")
    if precision is not None and precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}.", remedy=f"Choose one of: {', '.join(get_args(Precision))}")
    if lora not in (None, "merge", "inputs"):
        raise ConfigError(f"lora is {lora!r}.", remedy="Choose merge or inputs.")
    from_bundle = is_bundle(folder)
    if from_bundle and lora is not None:
        raise ConfigError(f"{folder} is a bundle; `lora` is for model folders.", remedy="Compile the model folder.")
    if out is None:
        out = folder if from_bundle else folder.absolute().with_name(f"{folder.absolute().name}.bundle")
    out = Path(out)
    if is_archive(out):
        check_archive_target(out.absolute())
        with tempfile.TemporaryDirectory(prefix="fedspine-compile-") as scratch:
            settings: dict[str, Any] = {"precision": precision, "profiles": profiles, "backend": backend, "lora": lora}
            settings |= {
                "calibrate": calibrate,
                "labels": labels,
                "progress": progress,
                "on_build_step": on_build_step,
                "opset": opset,
                "flags": flags,
            }
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
            if calibrate is not None:
                manifest = _with_profile_of(calibrate, draft, manifest)
        else:
            from fedspine_edge.export.export_bundle import export_model_to_bundle

            manifest = export_model_to_bundle(
                folder,
                draft,
                precision=precision or "fp32",
                opset=opset,
                runtime_adapter=lora == "inputs",
                labels=labels,
                examples=calibrate,
                report=report,
            )
        manifest = add_engine(draft, manifest, request, chosen, rebuild_command(out), report, on_build_step)
        seal(draft, manifest)
        report(f"writing {out}")
    return out


def _with_profile_of(examples: Data, draft: Path, manifest: BundleManifest) -> BundleManifest:
    """The manifest with the profile that the user's examples ask for."""
    data = read_data(
        examples,
        draft,
        task=manifest.task,
        num_labels=max(2, len(manifest.labels)),
        inputs=manifest.inputs,
        max_tokens=manifest.max_tokens,
        pad_token_id=manifest.pad_token_id,
    )
    return msgspec.structs.replace(manifest, default_profile=profile_of(data.lengths, manifest.max_tokens))

"""Compiles a model folder to a verified bundle: export, verify, build the engine, verify it, publish.

bundle = compile_engine("out/", precision="fp16")   # on the machine that trained the model
compile_engine("out.bundle", "out.bundle")          # on the device: builds an engine from the bundle's own
                                                    # model.onnx; needs neither torch nor transformers
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import msgspec

from fedspine_edge.bundle.archive import bundle_folder, check_archive_target, is_archive, pack
from fedspine_edge.bundle.bundle import BundleManifest, OptimizationProfile, Precision, is_bundle, rebuild_command
from fedspine_edge.bundle.publish import check_target, seal, staging
from fedspine_edge.data.loading import Data
from fedspine_edge.engine.tensorrt_builder import BACKENDS, BackendChoice, EngineOptions, OnStep
from fedspine_edge.errors import ConfigError
from fedspine_edge.export.calibration import profile_for_lengths, read_user_data
from fedspine_edge.export.options import ExportOptions, Lora, ProgressCallback
from fedspine_edge.runtime.engine_build import add_engine, copy_bundle, select_backend


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
    accept_mismatch: bool = False,
    progress: ProgressCallback | None = None,
    on_build_step: OnStep | None = None,
    opset: int | None = None,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """Write a bundle that runs on ONNX Runtime and, if TensorRT is available, contains an engine.

    Args:
        folder: Folder that `PrunableModel.save`, `EdgeTuner.save` or `save_pretrained` wrote; or a bundle, whose engine
            is then rebuilt from its own model.onnx.
        out: Folder or .zip file of the new bundle (default: `<folder>.bundle`, or the bundle itself when an engine is
            rebuilt). An existing bundle is replaced only when everything has succeeded.
        precision: "fp32" (default); "fp16" or "bf16", which keep norms, softmax and logits in float32; or, for the
            linears of the layers with everything else in float16, "int8", "fp8" or "int4" (weights only). A bundle
            keeps its precision.
        profiles: Shapes to build the engine for. The default is batch 1–8 and the lengths of `calibrate`, or up to 128
            tokens without it.
        backend: "auto" builds with TensorRT, or else TensorRT-RTX, if it is installed and there is a GPU (or
            `compute_capabilities` are given, for which TensorRT-RTX can build without one); otherwise the bundle has no
            engine. "onnxruntime" never builds an engine. "tensorrt" and "tensorrt_rtx" build one or raise.
        lora: "merge" (default) merges the adapter into the weights. "inputs" keeps adapters separate, so that
            `Session.set_adapter` replaces them at run time, at any rank up to 64, without a rebuild.
        calibrate: Examples in the form that `EdgeTuner.fit` accepts; required for int8 and fp8. 128 of them calibrate
            activations, and up to 1,000 others measure the accuracy before and after, which the bundle records.
        labels: Class names in the order of the logits (default: those of the model).
        accept_mismatch: Whether to write the bundle even if the ONNX model disagrees with torch. The mismatch is then
            recorded in the bundle.
        progress: Called with one line per step.
        on_build_step: Called while TensorRT builds, with its phase and the share that is done, 0 to 1.
        opset: ONNX opset, 17 to 20. None selects the lowest one that supports the precision, for the widest parser
            support.
        compute_capabilities: SM numbers such as ("86", "120"), for TensorRT-RTX only.
        workspace_bytes: Limit of the builder's scratch memory. On a board whose CPU and GPU share memory, None selects
            half of what is available.
        flags: Names of additional builder flags, such as ("TF32",).

    Returns the folder or file of the bundle.

    Raises:
        ConfigError: An argument is invalid, or `out` exists and is not a bundle.
        CheckpointError: The model folder cannot be read.
        ExportMismatch: The export disagrees with torch, or the engine with ONNX Runtime.
        DataError: The examples of `calibrate` cannot be read.
        EngineBuildError: TensorRT could not build the engine.
        MissingDependency: A required package is missing.
    """
    folder = Path(folder)
    if backend not in BACKENDS:
        raise ConfigError(f"`backend` is {backend!r}.", remedy=f"Choose one of: {', '.join(BACKENDS)}")
    if precision is not None and precision not in get_args(Precision):
        raise ConfigError(f"`precision` is {precision!r}.", remedy=f"Choose one of: {', '.join(get_args(Precision))}")
    if lora not in (None, "merge", "inputs"):
        raise ConfigError(f"`lora` is {lora!r}.", remedy="Choose merge or inputs.")
    from_bundle = is_archive(folder) or is_bundle(folder)
    if from_bundle and lora is not None:
        raise ConfigError(
            f"{folder} is a bundle, but `lora` applies only to model folders.", remedy="Compile the model folder."
        )
    if out is None:
        if not folder.absolute().name:
            raise ConfigError(
                f"{folder} is not a model folder.", remedy="Give a folder that `tune` or `assemble` wrote."
            )
        out = folder if from_bundle else folder.absolute().with_name(f"{folder.absolute().name}.bundle")
    out = Path(out)
    export = ExportOptions(
        precision=precision,
        opset=opset,
        lora=lora or "merge",
        labels=labels,
        calibrate=calibrate,
        accept_mismatch=accept_mismatch,
    )
    engine = EngineOptions(
        backend=backend,
        profiles=tuple(profiles) if profiles is not None else None,
        compute_capabilities=tuple(compute_capabilities),
        workspace_bytes=workspace_bytes,
        flags=tuple(flags),
    )
    report = progress or (lambda line: None)
    if not is_archive(out):
        check_target(out)
        _compile_to_folder(folder, out, export, engine, rebuild_command(out), report, on_build_step)
        report(f"writing {out}")
        return out
    check_archive_target(out.absolute())
    with tempfile.TemporaryDirectory(prefix="fedspine-compile-") as scratch:
        bundle = Path(scratch) / "bundle"
        _compile_to_folder(folder, bundle, export, engine, rebuild_command(out), report, on_build_step)
        report(f"writing {out}")
        return pack(bundle, out)


def _compile_to_folder(
    source: Path,
    out: Path,
    export: ExportOptions,
    engine: EngineOptions,
    rebuild: str,
    report: ProgressCallback,
    on_step: OnStep | None,
) -> None:
    """Compile `source`, a model folder or a bundle, to the bundle folder `out`.

    `rebuild` is the command that rebuilds the engine of the final bundle, for error messages.
    """
    selected = select_backend(engine)  # before the export, so that a missing package is reported at once
    with staging(out) as staged:
        if is_archive(source) or is_bundle(source):
            with bundle_folder(source) as bundle:
                # If none can be built here, an engine for another machine is kept unless the user requests none.
                keep_engine = isinstance(selected, str) and engine.backend == "auto"
                manifest = copy_bundle(bundle, staged, export.precision, export.labels, keep_engine=keep_engine)
            if export.calibrate is not None:
                manifest = _with_profile_for(export.calibrate, staged, manifest)
        else:
            from fedspine_edge.export.export_bundle import export_model_to_bundle

            manifest = export_model_to_bundle(source, staged, export, report)
        manifest = add_engine(staged, manifest, engine, selected, rebuild, report, on_step)
        seal(staged, manifest)


def _with_profile_for(examples: Data, folder: Path, manifest: BundleManifest) -> BundleManifest:
    """Return the manifest with the default profile for the lengths of the user's examples."""
    data = read_user_data(examples, folder, manifest)
    return msgspec.structs.replace(manifest, default_profile=profile_for_lengths(data.lengths, manifest.max_tokens))

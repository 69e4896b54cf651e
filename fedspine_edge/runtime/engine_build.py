"""Adds an engine to a bundle: builds it from the bundle's model.onnx, compares it with ONNX Runtime, publishes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from fedspine_edge.bundle.bundle import (
    MODEL,
    PLAN,
    TIMING_CACHE,
    BundleManifest,
    EngineInfo,
    OptimizationProfile,
    Precision,
    damage_of,
    load_bundle,
    rebuild_command,
)
from fedspine_edge.bundle.publish import seal, staging
from fedspine_edge.engine import cuda_driver, tensorrt_api
from fedspine_edge.engine.tensorrt_builder import BackendChoice, EngineOptions, OnnxModel, OnStep, build_plan
from fedspine_edge.errors import ConfigError, DeployError, EngineIncompatible, MissingDependency
from fedspine_edge.runtime.adapters import bundled_adapter
from fedspine_edge.runtime.comparison import verify_engine
from fedspine_edge.runtime.engine_runner import EngineRunner, Plan

ProgressCallback = Callable[[str], None]


def rebuild_engine(folder: Path, backend: BackendChoice = "auto", progress: ProgressCallback | None = None) -> None:
    """Replace the engine of a bundle with one built on this machine, for the profiles of the old engine.

    Raises `EngineBuildError`, `MissingDependency` or `EngineIncompatible`. The bundle is then unchanged.
    """
    manifest = load_bundle(folder, ignore=(PLAN, TIMING_CACHE)).manifest
    profiles = manifest.engine.profiles if manifest.engine is not None else None
    flags = manifest.engine.flags if manifest.engine is not None else ()
    # Of the recorded flags only TF32 was requested; the others are the builder's defaults.
    options = EngineOptions(backend=backend, profiles=profiles, flags=("TF32",) if "TF32" in flags else ())
    selected = select_backend(options)
    report = progress or (lambda line: None)
    if isinstance(selected, str):
        raise EngineIncompatible(
            f"No engine can be built here: {selected}.", remedy="Load the bundle with `backend` onnxruntime."
        )
    with staging(folder) as staged:
        manifest = copy_bundle(folder, staged, None, None)
        manifest = add_engine(staged, manifest, options, selected, rebuild_command(folder), report)
        seal(staged, manifest)


def select_backend(options: EngineOptions) -> tensorrt_api.Backend | str:
    """Return the TensorRT to build with, or the reason why there is none."""
    if options.backend == "onnxruntime":
        return "only ONNX Runtime was requested"
    if options.backend != "auto":
        return tensorrt_api.find_backend(options.backend)
    if cuda_driver.device_info() is None and not options.compute_capabilities:
        return "this machine has no GPU that CUDA can see, and no compute capability was given"
    reasons = []
    # TensorRT, unlike TensorRT-RTX, builds only for the GPU of this machine.
    names: tuple[tensorrt_api.BackendName, ...] = (
        ("tensorrt_rtx",) if options.compute_capabilities else ("tensorrt", "tensorrt_rtx")
    )
    for name in names:
        try:
            return tensorrt_api.find_backend(name)
        except (MissingDependency, EngineIncompatible) as error:
            reasons.append(error.message)
    return "; ".join(reasons)


def copy_bundle(
    folder: Path,
    target: Path,
    precision: Precision | None,
    labels: Sequence[str] | None,
    *,
    keep_engine: bool = False,
) -> BundleManifest:
    """Copy a bundle, by default without its plan, which is about to be replaced and may therefore be damaged.

    The timing cache is copied unless it is damaged; TensorRT rejects one of another release or chip.

    Args:
        folder: Bundle to copy.
        target: Empty folder.
        precision: Requested precision; it must be that of the bundle, or None.
        labels: New class names, or None to keep the bundle's.
        keep_engine: Whether to copy the plan if it is not damaged.

    Returns the manifest of the copy.
    """
    bundle = load_bundle(folder, ignore=(PLAN, TIMING_CACHE))
    manifest = bundle.manifest
    if precision not in (None, manifest.precision):
        raise ConfigError(
            f"{folder} is a bundle in {manifest.precision}; it cannot be converted to {precision}.",
            remedy="Compile the model folder that it was made from.",
        )
    if labels is not None and len(labels) != len(manifest.labels):
        raise ConfigError(
            f"{len(labels)} labels were given for a model with {len(manifest.labels)} classes.",
            remedy="Give one label per class, in the order of the logits.",
        )
    for name, entry in manifest.files.items():
        rebuildable = name in (PLAN, TIMING_CACHE)
        if (name != PLAN or keep_engine) and not (rebuildable and damage_of(folder / name, entry)):
            shutil.copyfile(folder / name, target / name)
    manifest = msgspec.structs.replace(manifest, labels=tuple(labels) if labels is not None else manifest.labels)
    if (target / PLAN).is_file():
        return manifest
    return msgspec.structs.replace(manifest, engine=None, engine_absent="")


def add_engine(
    folder: Path,
    manifest: BundleManifest,
    options: EngineOptions,
    selected: tensorrt_api.Backend | str,
    rebuild: str,
    report: ProgressCallback,
    on_step: OnStep | None = None,
) -> BundleManifest:
    """Build an engine from `folder`/model.onnx, verify it if this machine can run it, and write it to `folder`.

    Args:
        folder: Bundle that is being assembled.
        manifest: Its manifest.
        options: Settings of the build.
        selected: Result of `select_backend`; with a reason instead of a backend, no engine is built.
        rebuild: Command that rebuilds the engine, for error messages.
        report: Called with one line per step.
        on_step: Called repeatedly while the engine is built.

    Returns the manifest with the engine, or with the reason for its absence.
    """
    if isinstance(selected, str) and manifest.engine is not None:
        report(f"keeping the {manifest.engine.backend} {manifest.engine.version} engine of the bundle: {selected}")
        return manifest
    if isinstance(selected, str):
        report(f"no engine: {selected}")
        return msgspec.structs.replace(manifest, engine_absent=selected)
    device = cuda_driver.device_info()
    timing_cache = (folder / TIMING_CACHE).read_bytes() if (folder / TIMING_CACHE).is_file() else b""
    result = build_plan(
        selected,
        OnnxModel(path=folder / MODEL, inputs=manifest.inputs, opset=manifest.opset),
        msgspec.structs.replace(options, profiles=_profiles_for(options.profiles, manifest)),
        device=device,
        timing_cache=timing_cache,
        progress=report,
        on_step=on_step,
    )
    if result.timing_cache:
        (folder / TIMING_CACHE).write_bytes(result.timing_cache)
    (folder / PLAN).write_bytes(result.plan)
    info = _verify_plan(folder, Plan(result.plan, result.info, rebuild), manifest, selected, device, report)
    producer = manifest.producer | {selected.name: selected.version}
    return msgspec.structs.replace(manifest, engine=info, producer=producer)


def _profiles_for(
    requested: tuple[OptimizationProfile, ...] | None, manifest: BundleManifest
) -> tuple[OptimizationProfile, ...]:
    max_tokens = manifest.max_tokens
    if requested is None:
        low, optimum, high = (min(tokens, max_tokens) for tokens in OptimizationProfile().tokens)
        full_pass = manifest.default_profile or OptimizationProfile(tokens=(low, optimum, high))
        if manifest.task != "causal_lm" or max_tokens < 2:
            return (full_pass,)
        longest = min(max_tokens, 1024) - 1
        return full_pass, OptimizationProfile(tokens=(1, 1, 1), past=(1, min(256, longest), longest))
    if not requested:
        raise ConfigError("`profiles` is empty.", remedy="Omit it to use the default profiles.")
    for profile in requested:
        longest = profile.tokens[2] + profile.past[2]
        if profile.tokens[2] > max_tokens or profile.past[2] > max_tokens:
            raise ConfigError(
                f"A profile has {longest} tokens; the model allows {max_tokens}.", remedy="Reduce its maximum."
            )
    return requested


def _verify_plan(
    folder: Path,
    plan: Plan,
    manifest: BundleManifest,
    backend: tensorrt_api.Backend,
    device: cuda_driver.DeviceInfo | None,
    report: ProgressCallback,
) -> EngineInfo:
    """Compare the plan with ONNX Runtime if this machine can run it, and record the result or the obstacle."""
    info = plan.info
    if device is None or device.sm not in info.compute_capabilities:
        here = f"this machine's GPU is SM {device.sm}" if device is not None else "built on a machine without a GPU"
        return msgspec.structs.replace(
            info, not_verified=f"{here}; the engine is for SM {', '.join(info.compute_capabilities)}"
        )
    try:
        driver = cuda_driver.open_cuda()
    except MissingDependency as error:
        report(f"the engine was not verified: {error.message}")
        return msgspec.structs.replace(info, not_verified=error.message)
    report("comparing the engine with ONNX Runtime")
    try:
        runner = EngineRunner(plan, manifest, backend=backend, cuda=driver)
    except EngineIncompatible as error:
        raise DeployError(f"The engine that was just built cannot be loaded: {error.message}") from error
    try:
        verification = verify_engine(runner, folder / MODEL, manifest, info, adapter=bundled_adapter(folder, manifest))
    finally:
        runner.close()
    return msgspec.structs.replace(info, verification=verification, not_verified="")

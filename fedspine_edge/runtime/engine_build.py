"""A bundle gets its engine: built from its own model.onnx, compared, published. No torch, no transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from fedspine_edge.bundle.bundle import (
    MODEL,
    PLAN,
    TIMINGS,
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
from fedspine_edge.engine.tensorrt_builder import OnStep, build_plan
from fedspine_edge.errors import ConfigError, DeployError, EngineIncompatible, MissingDependency

BackendChoice = Literal["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"]
BACKENDS: tuple[str, ...] = ("auto", "onnxruntime", "tensorrt", "tensorrt_rtx")
ProgressCallback = Callable[[str], None]


def rebuild_engine(folder: Path, backend: BackendChoice = "auto", progress: ProgressCallback | None = None) -> None:
    """Replaces the engine of a bundle by one built here, for the profiles that the old one had.

    Raises `EngineBuildError`, `MissingDependency` or `EngineIncompatible`; the bundle is then as it was.
    """
    manifest = load_bundle(folder, ignore=(PLAN, TIMINGS)).manifest
    profiles = manifest.engine.profiles if manifest.engine is not None else None
    flags = manifest.engine.flags if manifest.engine is not None else ()
    asked = ("TF32",) if "TF32" in flags else ()  # the others are the builder's own defaults
    request = EngineRequest(
        backend=backend, profiles=profiles, compute_capabilities=(), workspace_bytes=None, flags=asked
    )
    chosen = choose_backend(request)
    report = progress or (lambda line: None)
    if isinstance(chosen, str):
        raise EngineIncompatible(
            f"No engine can be built here: {chosen}.", remedy="Load it with `backend` onnxruntime."
        )
    with staging(folder) as draft:
        manifest = copy_bundle(folder, draft, None, None)
        manifest = add_engine(draft, manifest, request, chosen, rebuild_command(folder), report)
        seal(draft, manifest)


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    backend: BackendChoice
    profiles: tuple[OptimizationProfile, ...] | None
    compute_capabilities: tuple[str, ...]
    workspace_bytes: int | None
    flags: tuple[str, ...]


def choose_backend(request: EngineRequest) -> tensorrt_api.Backend | str:
    """The TensorRT to build with, or the reason why there is none."""
    if request.backend == "onnxruntime":
        return "only ONNX Runtime was asked for"
    if request.backend != "auto":
        return tensorrt_api.find_backend(request.backend)
    if cuda_driver.device_info() is None and not request.compute_capabilities:
        return "this machine has no GPU that CUDA can see, and no compute capability was named"
    reasons = []
    # TensorRT proper builds for the GPU of this machine alone.
    names: tuple[tensorrt_api.BackendName, ...] = (
        ("tensorrt_rtx",) if request.compute_capabilities else ("tensorrt", "tensorrt_rtx")
    )
    for name in names:
        try:
            return tensorrt_api.find_backend(name)
        except (MissingDependency, EngineIncompatible) as error:
            reasons.append(error.message)
    return "; ".join(reasons)


def copy_bundle(folder: Path, draft: Path, precision: Precision | None, labels: Sequence[str] | None) -> BundleManifest:
    """The bundle without its plan. A damaged plan does not matter: it is what will be replaced.

    The timings stay: TensorRT refuses those of another release or chip. Damaged ones are left behind.
    """
    bundle = load_bundle(folder, ignore=(PLAN, TIMINGS))
    manifest = bundle.manifest
    if precision not in (None, manifest.precision):
        raise ConfigError(
            f"{folder} is a bundle in {manifest.precision}; it cannot become {precision}.",
            remedy="Compile the model folder it was made from.",
        )
    if labels is not None and len(labels) != len(manifest.labels):
        raise ConfigError(f"{len(labels)} labels were given for a model with {len(manifest.labels)} classes.")
    for name, entry in manifest.files.items():
        if name != PLAN and (name != TIMINGS or not damage_of(folder / name, entry)):
            shutil.copyfile(folder / name, draft / name)
    return msgspec.structs.replace(
        manifest, engine=None, engine_absent="", labels=tuple(labels) if labels is not None else manifest.labels
    )


def add_engine(
    draft: Path,
    manifest: BundleManifest,
    request: EngineRequest,
    chosen: tensorrt_api.Backend | str,
    rebuild: str,
    report: ProgressCallback,
    on_step: OnStep | None = None,
) -> BundleManifest:
    if isinstance(chosen, str):
        report(f"no engine: {chosen}")
        return msgspec.structs.replace(manifest, engine_absent=chosen)
    device = cuda_driver.device_info()
    timings = (draft / TIMINGS).read_bytes() if (draft / TIMINGS).is_file() else b""
    plan, info, timings = build_plan(
        chosen,
        draft / MODEL,
        manifest.inputs,
        _profiles_for(request.profiles, manifest),
        device=device,
        compute_capabilities=request.compute_capabilities,
        workspace_bytes=request.workspace_bytes,
        flags=request.flags,
        opset=manifest.opset,
        timings=timings,
        progress=report,
        on_step=on_step,
    )
    if timings:
        (draft / TIMINGS).write_bytes(timings)
    (draft / PLAN).write_bytes(plan)
    info = _verify_plan(draft, plan, manifest, info, chosen, device, rebuild, report)
    producer = manifest.producer | {chosen.name: chosen.version}
    return msgspec.structs.replace(manifest, engine=info, producer=producer)


def _profiles_for(
    wanted: tuple[OptimizationProfile, ...] | None, manifest: BundleManifest
) -> tuple[OptimizationProfile, ...]:
    max_tokens = manifest.max_tokens
    if wanted is None:
        low, common, high = (min(tokens, max_tokens) for tokens in OptimizationProfile().tokens)
        whole = manifest.default_profile or OptimizationProfile(tokens=(low, common, high))
        if manifest.task != "causal_lm" or max_tokens < 2:
            return (whole,)
        longest = min(max_tokens, 1024) - 1
        return whole, OptimizationProfile(tokens=(1, 1, 1), past=(1, min(256, longest), longest))
    if not wanted:
        raise ConfigError("profiles is empty.", remedy="Leave it out for the default.")
    for profile in wanted:
        longest = profile.tokens[2] + profile.past[2]
        if profile.tokens[2] > max_tokens or profile.past[2] > max_tokens:
            raise ConfigError(f"A profile asks for {longest} tokens; the model allows {max_tokens}.")
    return wanted


def _verify_plan(
    draft: Path,
    plan: bytes,
    manifest: BundleManifest,
    info: EngineInfo,
    backend: tensorrt_api.Backend,
    device: cuda_driver.DeviceInfo | None,
    rebuild: str,
    report: ProgressCallback,
) -> EngineInfo:
    """Runs the plan where this machine can, and writes down why where it cannot."""
    from fedspine_edge.runtime.adapters import bundled_adapter
    from fedspine_edge.runtime.comparison import verify_engine
    from fedspine_edge.runtime.engine_runner import EngineRunner

    if device is None or device.sm not in info.compute_capabilities:
        here = f"this machine's GPU is SM {device.sm}" if device is not None else "built on a machine without a GPU"
        return msgspec.structs.replace(
            info, not_verified=f"{here}; it is for SM {', '.join(info.compute_capabilities)}"
        )
    try:
        driver = cuda_driver.open_cuda()
    except MissingDependency as error:
        report(f"the engine was not run: {error.message}")
        return msgspec.structs.replace(info, not_verified=error.message)
    report("comparing the engine with ONNX Runtime")
    try:
        runner = EngineRunner(
            plan, info, manifest.inputs, manifest.outputs, backend=backend, cuda=driver, rebuild=rebuild
        )
    except EngineIncompatible as error:
        raise DeployError(f"The engine that was just built does not load: {error.message}") from error
    try:
        verification = verify_engine(runner, draft / MODEL, manifest, info, adapter=bundled_adapter(draft, manifest))
    finally:
        runner.close()
    return msgspec.structs.replace(info, verification=verification, not_verified="")

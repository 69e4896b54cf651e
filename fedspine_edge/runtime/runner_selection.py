"""Selects the backend that runs a bundle on this machine, with the reason for the choice."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.bundle.archive import pack
from fedspine_edge.bundle.bundle import PLAN, TIMING_CACHE, Bundle, damage_of, load_bundle, rebuild_command
from fedspine_edge.engine import cuda_driver, tensorrt_api
from fedspine_edge.engine.tensorrt_builder import BackendChoice
from fedspine_edge.errors import EngineBuildError, EngineIncompatible, FedspineError, MissingDependency
from fedspine_edge.runtime.engine_build import rebuild_engine
from fedspine_edge.runtime.engine_runner import EngineRunner, Plan
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner
from fedspine_edge.runtime.runner import Runner

log = logging.getLogger("fedspine_edge.runtime")


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of `Session.load`.

    Attributes:
        backend: Requested backend.
        threads: Threads of ONNX Runtime, or None for its default.
        spin_wait: Whether ONNX Runtime's threads spin while they wait.
        rebuild: Whether to rebuild an engine that is missing, damaged or incompatible.
        archive: Packed bundle that the folder was unpacked from, to store a rebuilt engine in.
    """

    backend: BackendChoice = "auto"
    threads: int | None = None
    spin_wait: bool = True
    rebuild: bool = False
    archive: Path | None = None


@dataclass(frozen=True)
class OpenedBundle:
    """A verified bundle with its runner.

    Attributes:
        bundle: The verified bundle.
        runner: The runner.
        backend: "onnxruntime", "tensorrt" or "tensorrt_rtx".
        why: One sentence with the reason for the choice of the backend.
    """

    bundle: Bundle
    runner: Runner
    backend: str
    why: str


def open_bundle(folder: Path, options: LoadOptions) -> OpenedBundle:
    """Verify a bundle and load it on a backend; see `Session.load` for the choice and the errors."""
    opened = _open(folder, options)
    timing_cache = opened.bundle.manifest.files.get(TIMING_CACHE)
    if timing_cache is not None and (problem := damage_of(folder / TIMING_CACHE, timing_cache)):
        remedy = f"To restore it, run: {rebuild_command(options.archive or folder)}"
        log.warning(
            "%s %s. The bundle runs without it, but its next engine build takes longer. %s",
            (options.archive or folder) / TIMING_CACHE,
            problem,
            remedy,
        )
    return opened


def _open(folder: Path, options: LoadOptions) -> OpenedBundle:
    if options.backend == "onnxruntime":
        # A damaged plan is irrelevant here.
        bundle = load_bundle(folder, ignore=(PLAN, TIMING_CACHE), source=options.archive)
        return _on_onnxruntime(bundle, options, "ONNX Runtime, as requested.")
    try:
        return _on_engine(load_bundle(folder, ignore=(TIMING_CACHE,), source=options.archive), options.backend)
    except (EngineIncompatible, MissingDependency) as error:
        reason: FedspineError = error
    if options.rebuild:
        try:
            rebuild_engine(folder, options.backend)
            if options.archive is not None:
                pack(folder, options.archive)
            return _on_engine(load_bundle(folder, source=options.archive), options.backend)
        except (EngineIncompatible, EngineBuildError, MissingDependency) as error:
            reason = error
    # "auto" falls back to ONNX Runtime, but it never hides a damaged plan.
    if options.backend != "auto" or (not options.rebuild and _plan_is_damaged(folder)):
        raise reason
    bundle = load_bundle(folder, ignore=(PLAN, TIMING_CACHE), source=options.archive)
    return _on_onnxruntime(bundle, options, f"ONNX Runtime, because: {reason.message}")


def _plan_is_damaged(folder: Path) -> bool:
    try:
        load_bundle(folder, ignore=(TIMING_CACHE,))
    except EngineIncompatible:
        return True
    return False


def _on_onnxruntime(bundle: Bundle, options: LoadOptions, why: str) -> OpenedBundle:
    runner = OnnxRuntimeRunner(bundle.model_path, threads=options.threads, spin_wait=options.spin_wait)
    return OpenedBundle(bundle, runner, "onnxruntime", why)


def _on_engine(bundle: Bundle, requested: str) -> OpenedBundle:
    info, rebuild = bundle.manifest.engine, rebuild_command(bundle.source)
    if info is None:
        reason = bundle.manifest.engine_absent or "none was built"
        raise EngineIncompatible(f"{bundle.source} has no engine: {reason}", remedy=f"Build one with: {rebuild}")
    if requested not in ("auto", info.backend):
        raise EngineIncompatible(
            f"{bundle.source} contains an engine for {info.backend}, not for {requested}.",
            remedy=f"Build one with: {rebuild} --backend {requested}",
        )
    backend, device = tensorrt_api.find_backend(info.backend), cuda_driver.device_info()
    if device is None:
        # Rebuilding would not help, so the remedy is the missing driver.
        raise EngineIncompatible(
            "The engine cannot be used here: this machine has no GPU that CUDA can see "
            f"({cuda_driver.why_no_device()}).",
            remedy="Install or load the NVIDIA driver (JetPack contains it) and check it with fedspine-edge doctor, or "
            "load the bundle with `backend` onnxruntime.",
        )
    tensorrt_api.check_engine(info, backend, device, rebuild)
    driver = cuda_driver.open_cuda()
    plan = Plan(bundle.plan_path.read_bytes(), info, rebuild)
    runner = EngineRunner(plan, bundle.manifest, backend=backend, cuda=driver)
    why = f"the {info.backend} {info.version} engine, which was built for this GPU, through {driver.name}."
    return OpenedBundle(bundle, runner, info.backend, why)

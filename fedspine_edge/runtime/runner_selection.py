"""Which backend runs a bundle here, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.bundle.archive import pack
from fedspine_edge.bundle.bundle import PLAN, TIMINGS, Bundle, damage_of, load_bundle, rebuild_command
from fedspine_edge.engine import cuda_driver, tensorrt_api
from fedspine_edge.errors import EngineBuildError, EngineIncompatible, FedspineError, MissingDependency
from fedspine_edge.runtime.engine_build import BackendChoice, rebuild_engine
from fedspine_edge.runtime.engine_runner import EngineRunner
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner, Runner

log = logging.getLogger("fedspine_edge.runtime")


@dataclass(frozen=True)
class OpenedBundle:
    """A checked bundle and what runs it: "onnxruntime", "tensorrt" or "tensorrt_rtx", with one sentence on why."""

    bundle: Bundle
    runner: Runner
    backend: str
    why: str


def open_bundle(
    folder: Path,
    backend: BackendChoice,
    *,
    threads: int | None,
    spinning: bool,
    rebuild: bool,
    archive: Path | None,
) -> OpenedBundle:
    """Checks a bundle and loads it on `backend`; see `Session.load` for the choice and the errors.

    Args:
        archive: The single file that `folder` was unpacked from, to pack a rebuilt engine into.
    """
    opened = _open(folder, backend, threads=threads, spinning=spinning, rebuild=rebuild, archive=archive)
    timings = opened.bundle.manifest.files.get(TIMINGS)
    if timings is not None and (problem := damage_of(folder / TIMINGS, timings)):
        remedy = "Copy it again." if archive else f"Where it runs, this restores it: {rebuild_command(folder)}"
        log.warning(
            "%s %s. The bundle runs without it; only its next build takes longer. %s",
            *((archive or folder) / TIMINGS, problem, remedy),
        )
    return opened


def _open(
    folder: Path,
    backend: BackendChoice,
    *,
    threads: int | None,
    spinning: bool,
    rebuild: bool,
    archive: Path | None,
) -> OpenedBundle:
    if backend == "onnxruntime":
        checked = load_bundle(folder, ignore=(PLAN, TIMINGS))  # a damaged plan does no harm here
        return _on_onnxruntime(checked, threads, spinning, "ONNX Runtime, as asked for.")
    try:
        return _on_engine(load_bundle(folder, ignore=(TIMINGS,)), backend)
    except (EngineIncompatible, MissingDependency) as error:
        reason: FedspineError = error
    if rebuild:
        try:
            rebuild_engine(folder, backend)
            if archive is not None:
                pack(folder, archive)
            return _on_engine(load_bundle(folder), backend)
        except (EngineIncompatible, EngineBuildError, MissingDependency) as error:
            reason = error
    # With auto, what remains is ONNX Runtime; a damaged plan, though, is never passed over in silence.
    if backend != "auto" or (not rebuild and _plan_is_damaged(folder)):
        raise reason
    checked = load_bundle(folder, ignore=(PLAN, TIMINGS))
    return _on_onnxruntime(checked, threads, spinning, f"ONNX Runtime, because: {reason.message}")


def _plan_is_damaged(folder: Path) -> bool:
    try:
        load_bundle(folder, ignore=(TIMINGS,))
    except EngineIncompatible:
        return True
    return False


def _on_onnxruntime(bundle: Bundle, threads: int | None, spinning: bool, why: str) -> OpenedBundle:
    runner = OnnxRuntimeRunner(bundle.model_path, threads=threads, spinning=spinning)
    return OpenedBundle(bundle, runner, "onnxruntime", why)


def _on_engine(bundle: Bundle, wanted: str) -> OpenedBundle:
    info, rebuild = bundle.manifest.engine, rebuild_command(bundle.folder)
    if info is None:
        reason = bundle.manifest.engine_absent or "none was built"
        raise EngineIncompatible(f"{bundle.folder} has no engine: {reason}", remedy=f"Build one with: {rebuild}")
    if wanted not in ("auto", info.backend):
        raise EngineIncompatible(
            f"{bundle.folder} holds an engine for {info.backend}, not for {wanted}.",
            remedy=f"Build one with: {rebuild} --backend {wanted}",
        )
    backend, device = tensorrt_api.find_backend(info.backend), cuda_driver.device_info()
    if device is None:
        # To build anew would not help: say what is missing.
        raise EngineIncompatible(
            "The engine cannot be used here: this machine has no GPU that CUDA can see "
            f"({cuda_driver.why_no_device()}).",
            remedy="Install or load the NVIDIA driver (a Jetson has it from JetPack) and check with fedspine-edge "
            "doctor, or load with `backend` onnxruntime.",
        )
    tensorrt_api.check_engine(info, backend, device, rebuild)
    driver = cuda_driver.open_cuda()
    runner = EngineRunner(
        bundle.plan_path.read_bytes(),
        info,
        bundle.manifest.inputs,
        bundle.manifest.outputs,
        backend=backend,
        cuda=driver,
        rebuild=rebuild,
    )
    why = f"the {info.backend} {info.version} engine, which was built for this GPU, through {driver.name}."
    return OpenedBundle(bundle, runner, info.backend, why)

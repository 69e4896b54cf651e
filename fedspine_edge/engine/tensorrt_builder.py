"""Builds a serialized TensorRT engine (a plan) from an ONNX file, with progress reports and support for Ctrl-C.

TensorRT builds on a separate thread and releases the GIL meanwhile, so the main thread still receives Ctrl-C. The
builder is then asked to stop at its next step, and the build ends cleanly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from fedspine_edge.bundle.bundle import EngineInfo, OptimizationProfile, TensorInfo
from fedspine_edge.engine import tensorrt_api
from fedspine_edge.engine.build_errors import explain_build_failure, parser_errors
from fedspine_edge.engine.cuda_driver import DeviceInfo
from fedspine_edge.errors import EngineBuildError

BackendChoice = Literal["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"]
BACKENDS: tuple[str, ...] = get_args(BackendChoice)
OnStep = Callable[[str, float], None]
"""Called with the builder's current phase and the share of the build that is done, 0 to 1."""
_CANCEL_TIMEOUT_S = 120.0
"""A builder that is still running this long after it was asked to stop is abandoned."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of an engine build."""

    backend: BackendChoice = "auto"
    profiles: tuple[OptimizationProfile, ...] | None = None
    """Shapes to optimize for; None selects the default profiles of the model."""
    compute_capabilities: tuple[str, ...] = ()
    """SM numbers, such as "86", to build for without that GPU (TensorRT-RTX only)."""
    workspace_bytes: int | None = None
    """Limit of the builder's scratch memory. None selects half of the available memory on a board whose CPU and GPU
    share it, and TensorRT's default elsewhere."""
    flags: tuple[str, ...] = ()
    """Names of additional builder flags, such as "TF32". TF32 is off unless it is named, so that fp32 means fp32."""


class OnnxModel(msgspec.Struct, frozen=True, kw_only=True):
    """An ONNX file to build an engine from. External weights are expected beside it."""

    path: Path
    inputs: tuple[TensorInfo, ...]
    opset: int = 17


class BuildResult(NamedTuple):
    """A plan, the record of its build, and the timing cache that speeds up the next build of a similar model."""

    plan: bytes
    info: EngineInfo
    timing_cache: bytes


def build_plan(
    backend: tensorrt_api.Backend,
    model: OnnxModel,
    options: EngineOptions,
    *,
    device: DeviceInfo | None,
    timing_cache: bytes = b"",
    progress: Callable[[str], None] | None = None,
    on_step: OnStep | None = None,
) -> BuildResult:
    """Parse an ONNX file and build a plan.

    Args:
        backend: TensorRT or TensorRT-RTX.
        model: The ONNX file.
        options: Settings of the build; `profiles` must be given.
        device: The GPU of this machine, or None.
        timing_cache: Timing cache of an earlier build. It is ignored if TensorRT rejects it.
        progress: Called with one line per step.
        on_step: Called repeatedly while the engine is built.

    Raises:
        EngineBuildError: TensorRT failed; the error contains its messages and a remedy.
        KeyboardInterrupt: Ctrl-C was pressed and the builder has stopped.
    """
    name, version = backend.name, backend.version
    report = progress or (lambda line: None)
    if model.opset > tensorrt_api.newest_opset(backend):
        raise EngineBuildError(
            f"{name} {version} supports opsets up to {tensorrt_api.newest_opset(backend)}; "
            f"{model.path.name} has opset {model.opset}.",
            remedy="Export the model again without setting an opset, or update TensorRT.",
        )
    log: list[str] = []
    logger = tensorrt_api.make_logger(backend, log)

    def checked(value: Any, problem: str) -> Any:
        if not value:
            raise explain_build_failure(name, version, log, problem)
        return value

    builder = checked(backend.module.Builder(logger), "could not create a builder")
    network = builder.create_network(tensorrt_api.network_flags(backend.module))
    if network is None:
        raise explain_build_failure(name, version, log, "could not create a network")
    parser = backend.module.OnnxParser(network, logger)
    report(f"{name} {version}: parsing {model.path.name}")
    if not parser.parse_from_file(str(model.path)):
        raise explain_build_failure(name, version, parser_errors(parser) or log, f"could not parse {model.path}")
    config = checked(builder.create_builder_config(), "could not create a builder configuration")
    tensorrt_api.set_flags(backend, config, options.flags)
    workspace_bytes = options.workspace_bytes
    if workspace_bytes is None and device is not None and device.l4t:
        workspace_bytes = available_bytes() // 2
    if workspace_bytes:
        config.set_memory_pool_limit(backend.module.MemoryPoolType.WORKSPACE, workspace_bytes)
    profiles = options.profiles or ()
    for profile in profiles:
        if config.add_optimization_profile(_trt_profile(builder, model.inputs, profile)) < 0:
            raise explain_build_failure(name, version, log, f"rejected the profile {profile}")
    targets = tensorrt_api.set_targets(backend, config, device, options.compute_capabilities, log)
    if tensorrt_api.has_timing_cache(backend):
        reused = tensorrt_api.load_timing_cache(config, timing_cache)
        report(f"{name} {version}: " + ("reusing the timing cache of the bundle" if reused else "timing kernels"))
    report(f"{name} {version}: building for SM {', '.join(targets)}")
    plan = _build_serialized_network(backend, builder, network, config, on_step)
    if plan is None or plan.nbytes == 0:
        raise explain_build_failure(name, version, log, "could not build an engine")
    members = backend.module.BuilderFlag.__members__
    info = EngineInfo(
        backend=name,
        version=version,
        compute_capabilities=targets,
        built_on=device.name if device is not None else "",
        l4t=device.l4t if device is not None else "",
        flags=tuple(flag for flag, value in members.items() if config.get_flag(value)),
        profiles=tuple(profiles),
        workspace_bytes=workspace_bytes or 0,
        not_verified="not run yet",
    )
    new_cache = tensorrt_api.serialize_timing_cache(config) if tensorrt_api.has_timing_cache(backend) else b""
    return BuildResult(bytes(plan), info, new_cache)


def available_bytes(path: str = "/proc/meminfo") -> int:
    """Return Linux's estimate of the memory that programs can use without swapping, or 0 if it is not available."""
    try:
        for line in Path(path).read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _trt_profile(builder: Any, inputs: Sequence[TensorInfo], profile: OptimizationProfile) -> Any:
    """Return TensorRT's optimization profile for `profile`."""
    trt_profile = builder.create_optimization_profile()
    for tensor in inputs:
        shapes = [tensor.sized(profile.sizes(corner)) for corner in range(3)]
        if shapes[0] != tensor.shape:  # inputs of a fixed shape take no profile
            trt_profile.set_shape(tensor.name, *shapes)
    return trt_profile


def _build_serialized_network(
    backend: tensorrt_api.Backend, builder: Any, network: Any, config: Any, on_step: OnStep | None
) -> Any:
    """Return the serialized network, or None. Ctrl-C or an exception from `on_step` stops the builder and is raised."""
    progress = BuildProgress()
    cancelled, finished = threading.Event(), threading.Event()
    errors: list[BaseException] = []
    result: list[Any] = []

    def notify(phase: str) -> None:
        if on_step is not None and not cancelled.is_set():
            try:
                on_step(phase, progress.done)
            except BaseException as error:  # an exception must not pass through TensorRT's stack frames
                errors.append(error)
                cancelled.set()

    def on_phase_start(phase: str, parent: str, steps: int) -> None:
        progress.start(phase, parent, steps)
        notify(phase)

    def on_step_complete(phase: str, step: int) -> bool:
        progress.step(phase, step)
        notify(phase)
        return not cancelled.is_set()

    def build() -> None:
        try:
            result.append(builder.build_serialized_network(network, config))
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    config.progress_monitor = monitor = tensorrt_api.make_progress_monitor(
        backend, on_phase_start, on_step_complete, progress.finish
    )
    thread = threading.Thread(target=build, name="tensorrt-builder", daemon=True)
    try:
        thread.start()
        while not finished.wait(0.2):
            pass
    except KeyboardInterrupt:
        cancelled.set()
        if thread in threading.enumerate():  # Ctrl-C may have come before the thread started
            finished.wait(_CANCEL_TIMEOUT_S)
        raise
    finally:
        del monitor  # TensorRT holds only a plain pointer to it, so it must live until here
    if errors:
        raise errors[0]
    return result[0]


class BuildProgress:
    """Computes the completed share of a build from TensorRT's nested phases.

    A phase inside another phase is part of the outer phase's current step.
    """

    def __init__(self) -> None:
        self._phases: dict[str, tuple[str, int, int]] = {}
        self.done = 0.0
        """Completed share, 0 to 1. It never decreases."""

    def start(self, phase: str, parent: str, steps: int) -> None:
        """Record that `phase`, which has `steps` steps, started inside `parent`."""
        self._phases[phase] = (parent, max(1, steps), 0)

    def step(self, phase: str, step: int) -> float:
        """Record that a step of `phase` is complete, and return the completed share of the build."""
        if phase in self._phases:
            parent, steps, _ = self._phases[phase]
            self._phases[phase] = (parent, steps, min(steps, step + 1))
        share = 0.0
        while phase in self._phases:
            parent, steps, completed = self._phases[phase]
            share = min(1.0, (completed + share) / steps)
            phase = parent
        self.done = max(self.done, share)
        return self.done

    def finish(self, phase: str) -> None:
        """Record that `phase` has ended."""
        self._phases.pop(phase, None)

"""An ONNX file becomes a serialized plan: parse, profile, build; with progress, and an end when Ctrl-C is pressed.

TensorRT builds on a thread of its own here. It lets go of the interpreter meanwhile, so the main thread goes on
hearing Ctrl-C; the builder is then told to stop at its next step, and nothing is left half done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedspine_edge.bundle.bundle import EngineInfo, OptimizationProfile, TensorInfo
from fedspine_edge.engine import tensorrt_api
from fedspine_edge.engine.build_errors import explain_build_failure, parser_errors
from fedspine_edge.engine.cuda_driver import DeviceInfo
from fedspine_edge.errors import EngineBuildError

OnStep = Callable[[str, float], None]
"""Called with what the builder does and the share of the work done, 0 to 1."""
_CANCEL_WITHIN_S = 120.0
"""A builder that has not ended by then after it was told to stop is left behind."""


class Built(NamedTuple):
    """A plan, what it was made by and for, and the timings that make the next build of a like model quicker."""

    plan: bytes
    info: EngineInfo
    timings: bytes


def build_plan(
    backend: tensorrt_api.Backend,
    model: Path,
    inputs: Sequence[TensorInfo],
    profiles: Sequence[OptimizationProfile],
    *,
    device: DeviceInfo | None,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    flags: Sequence[str] = (),
    opset: int = 17,
    timings: bytes = b"",
    progress: Callable[[str], None] | None = None,
    on_step: OnStep | None = None,
) -> Built:
    """Parses an ONNX file and builds a serialized plan.

    Args:
        model: The ONNX file; external weights are looked up beside it.
        inputs: The model's inputs; the profiles size their dynamic axes.
        profiles: Shapes to optimise for; at least one.
        device: The GPU of this machine, or None.
        compute_capabilities: SM numbers such as "86" to build for without that GPU; TensorRT-RTX only.
        workspace_bytes: Scratch memory the builder may use; None takes half of what is available on a board whose CPU
            and GPU share it, and TensorRT's default elsewhere.
        flags: Further builder flags by name, such as "TF32". TF32 is off unless named, so that fp32 means fp32.
        opset: Of the file.
        timings: Timing cache of an earlier build; refused ones are not used.
        progress: Called with a line per step.
        on_step: Called while the engine is built.

    Raises:
        EngineBuildError: With TensorRT's own words and what to do about them.
        KeyboardInterrupt: Ctrl-C was pressed; the builder has stopped.
    """
    name, version = backend.name, backend.version
    report = progress or (lambda line: None)
    if opset > tensorrt_api.newest_opset(backend):
        raise EngineBuildError(
            f"{name} {version} reads opset {tensorrt_api.newest_opset(backend)} at most; {model.name} has {opset}.",
            remedy="Export anew without naming an opset, or update TensorRT.",
        )
    log: list[str] = []
    logger = tensorrt_api.make_logger(backend, log)

    def checked(value: Any, problem: str) -> Any:
        if not value:
            raise explain_build_failure(name, version, log, problem)
        return value

    builder = checked(backend.module.Builder(logger), "could not create a builder")
    flag_bits = tensorrt_api.network_flags(backend.module)
    network = builder.create_network(flag_bits)
    if network is None:
        raise explain_build_failure(name, version, log, "could not create a network")
    parser = backend.module.OnnxParser(network, logger)
    report(f"{name} {version}: parsing {model.name}")
    if not parser.parse_from_file(str(model)):
        raise explain_build_failure(name, version, parser_errors(parser) or log, f"could not parse {model}")
    config = checked(builder.create_builder_config(), "could not create a builder configuration")
    tensorrt_api.set_flags(backend, config, flags)
    if workspace_bytes is None and device is not None and device.l4t:
        workspace_bytes = available_bytes() // 2
    if workspace_bytes:
        config.set_memory_pool_limit(backend.module.MemoryPoolType.WORKSPACE, workspace_bytes)
    for profile in profiles:
        optimization_profile = builder.create_optimization_profile()
        for tensor in inputs:
            shapes = [tensor.sized(profile.sizes(corner)) for corner in range(3)]
            if shapes[0] != tensor.shape:  # a fixed shape takes no profile
                optimization_profile.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(optimization_profile) < 0:
            raise explain_build_failure(name, version, log, f"refused the profile {profile}")
    targets = tensorrt_api.set_targets(backend, config, device, compute_capabilities, log)
    if tensorrt_api.keeps_timings(backend):
        reused = tensorrt_api.use_timings(config, timings)
        report(f"{name} {version}: " + ("reusing the bundle's timings" if reused else "timing kernels anew"))
    report(f"{name} {version}: building for SM {', '.join(targets)}")
    plan = _built(backend, builder, network, config, on_step)
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
    return Built(bytes(plan), info, tensorrt_api.timings_of(config) if tensorrt_api.keeps_timings(backend) else b"")


def available_bytes(path: str = "/proc/meminfo") -> int:
    """Memory that programs can still have without swapping, as Linux estimates it; 0 where it does not say."""
    try:
        for line in Path(path).read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _built(backend: tensorrt_api.Backend, builder: Any, network: Any, config: Any, on_step: OnStep | None) -> Any:
    """The serialized network, or None. Ctrl-C, or an error of `on_step`, stops the builder and is raised again."""
    share = Share()
    cancelled, ended = threading.Event(), threading.Event()
    failed: list[BaseException] = []
    result: list[Any] = []

    def tell(phase: str) -> None:
        if on_step is not None and not cancelled.is_set():
            try:
                on_step(phase, share.done)
            except BaseException as error:  # it must not cross TensorRT's frames
                failed.append(error)
                cancelled.set()

    def started(phase: str, parent: str, steps: int) -> None:
        share.start(phase, parent, steps)
        tell(phase)

    def stepped(phase: str, step: int) -> bool:
        share.step(phase, step)
        tell(phase)
        return not cancelled.is_set()

    def build() -> None:
        try:
            result.append(builder.build_serialized_network(network, config))
        except BaseException as error:
            failed.append(error)
        finally:
            ended.set()

    config.progress_monitor = watcher = tensorrt_api.monitor(backend, started, stepped, share.finish)
    thread = threading.Thread(target=build, name="tensorrt-builder", daemon=True)
    try:
        thread.start()
        while not ended.wait(0.2):
            pass
    except KeyboardInterrupt:
        cancelled.set()
        if thread in threading.enumerate():  # it may have been about to start
            ended.wait(_CANCEL_WITHIN_S)
        raise
    finally:
        del watcher  # TensorRT holds it by a plain pointer: it must live until here
    if failed:
        raise failed[0]
    return result[0]


class Share:
    """How much of a build is done, from phases within phases.

    A phase that runs inside another is a part of that one's current step.
    """

    def __init__(self) -> None:
        self._phases: dict[str, tuple[str, int, int]] = {}
        self.done = 0.0
        """0 to 1; it never falls."""

    def start(self, phase: str, parent: str, steps: int) -> None:
        self._phases[phase] = (parent, max(1, steps), 0)

    def step(self, phase: str, step: int) -> float:
        """The share done after a step."""
        if phase in self._phases:
            parent, steps, _ = self._phases[phase]
            self._phases[phase] = (parent, steps, min(steps, step + 1))
        share = 0.0
        while phase in self._phases:
            parent, steps, done = self._phases[phase]
            share = min(1.0, (done + share) / steps)
            phase = parent
        self.done = max(self.done, share)
        return self.done

    def finish(self, phase: str) -> None:
        self._phases.pop(phase, None)

"""Everything that differs between TensorRT releases, in one place: 10.3 to 11, and TensorRT-RTX.

`builder.py` builds with what is here, `engine.py` runs what `open_engine` returns. Networks are always strongly typed,
so precision is what the ONNX file says: the way weak typing was set (FP16 and INT8 builder flags) is gone in 11.
Flags are kept and compared by name, because their integers differ between releases. Every return value is
checked; TensorRT reports most failures as None or False plus a line in its log, which the errors raised here carry.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from fedspine_edge.bundle.bundle import EngineInfo, Precision
from fedspine_edge.engine.build_errors import explain_build_failure, last_words
from fedspine_edge.engine.cuda_driver import DeviceInfo
from fedspine_edge.errors import ConfigError, DeployError, EngineBuildError, EngineIncompatible, MissingDependency

Started = Callable[[str, str, int], None]
Stepped = Callable[[str, int], bool]
BackendName = Literal["tensorrt", "tensorrt_rtx"]
OLDEST = (10, 3)
"""JetPack 6.2's TensorRT; older ones have neither int64 inputs nor the strong typing this relies on."""


_NEWEST_OPSET = (((11, 0), 25), ((10, 6), 22), ((10, 3), 21))
"""Newest opset that the parser of a release knows (the ONNX release it is built with). For 10.3 NVIDIA documents 20,
and int4, whose DequantizeLinear in blocks is of opset 21."""


def opset_for(precision: Precision) -> int:
    """The lowest opset that has a precision, so that the oldest parsers read it: 19 scales in float16 and has
    float8, 21 has int4 in blocks."""
    return {"int8": 19, "fp8": 19, "int4": 21}.get(precision, 17)


def newest_opset(backend: Backend) -> int:
    """What the parser reads at most."""
    if backend.name == "tensorrt_rtx":  # 1.x carries the parser of 10.12 and later
        return 22
    return next((opset for version, opset in _NEWEST_OPSET if _numbers(backend.version) >= version), 17)


@dataclass(frozen=True)
class Backend:
    """An importable TensorRT: its Python module and exact version."""

    name: BackendName
    module: ModuleType
    version: str


def find_backend(name: BackendName) -> Backend:
    """Imports TensorRT or TensorRT-RTX.

    Raises:
        MissingDependency: The package or one of its libraries is absent; the message carries the reason.
        EngineIncompatible: It is older than `OLDEST`.
    """
    try:
        module = importlib.import_module(name)
        version = str(module.__version__)
    except (ImportError, OSError, AttributeError) as error:
        remedy = (
            "Install it with: pip install tensorrt-rtx-cu13"
            if name == "tensorrt_rtx"
            else "On a Jetson it comes with JetPack: sudo apt install python3-libnvinfer, in a venv made with "
            "--system-site-packages. Elsewhere: pip install tensorrt 'fedspine-edge[tensorrt]'"
        )
        raise MissingDependency(f"{name} cannot be imported: {error}", remedy=remedy) from error
    if name == "tensorrt" and _numbers(version) < OLDEST:
        raise EngineIncompatible(
            f"TensorRT {version} is too old; {'.'.join(map(str, OLDEST))} or newer is needed.",
            remedy="Update to JetPack 6.2 or newer.",
        )
    return Backend(name, module, version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def make_logger(backend: Backend, messages: list[str]) -> Any:
    """A TensorRT logger that keeps warnings and errors in `messages` instead of printing them."""
    trt = backend.module
    severity = trt.ILogger.Severity
    kept = {severity.INTERNAL_ERROR: "internal error", severity.ERROR: "error", severity.WARNING: "warning"}

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            if level in kept:
                messages.append(f"{kept[level]}: {text}")

    return Collector()


def network_flags(trt: ModuleType) -> int:
    """Strongly typed where that is still a choice (10.x), plus explicit batch where it still has to be asked for."""
    members = trt.NetworkDefinitionCreationFlag.__members__
    asked = [members[name] for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH") if name in members]
    return sum(1 << int(flag) for flag in asked)


def set_flags(backend: Backend, config: Any, names: Sequence[str]) -> None:
    members = backend.module.BuilderFlag.__members__
    for name in names:
        if name not in members:
            raise ConfigError(
                f"{backend.name} {backend.version} has no builder flag {name!r}.",
                remedy=f"It has: {', '.join(members)}",
            )
    if "TF32" in members and "TF32" not in names:
        config.clear_flag(members["TF32"])
    for name in names:
        config.set_flag(members[name])


def set_targets(
    backend: Backend, config: Any, device: DeviceInfo | None, wanted: Sequence[str], log: list[str]
) -> tuple[str, ...]:
    """Tells the builder which chips to build for and returns their SM numbers."""
    if not wanted:
        if device is None:
            raise EngineBuildError(
                f"{backend.name} needs a GPU to build for, and this machine has none.",
                remedy="Build on the device itself: fedspine-edge compile BUNDLE --out BUNDLE. TensorRT-RTX alone can "
                "build without a GPU, for compute capabilities named explicitly.",
            )
        return (device.sm,)
    members = getattr(getattr(backend.module, "ComputeCapability", None), "__members__", {})
    names = ["SM" + str(value).upper().removeprefix("SM").replace(".", "") for value in wanted]
    for name in names:
        if name not in members:
            known = [member for member in members if member.startswith("SM")]
            raise EngineBuildError(
                f"{backend.name} {backend.version} cannot build for {name}.",
                remedy=f"It knows: {', '.join(known)}" if known else "It builds for the GPU of this machine alone.",
            )
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not config.set_compute_capability(members[name], index):
            raise explain_build_failure(backend.name, backend.version, log, f"refused compute capability {name}")
    return tuple(name[2:] for name in names)


def keeps_timings(backend: Backend) -> bool:
    """Whether a timing cache speeds later builds up; TensorRT-RTX times kernels where they run, and keeps none."""
    return backend.name == "tensorrt"


def use_timings(config: Any, timings: bytes) -> bool:
    """Starts from the timings of an earlier build; False where TensorRT refused them (another release or chip)."""
    cache = config.create_timing_cache(timings)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return bool(timings)
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return False


def timings_of(config: Any) -> bytes:
    """The timings of the build that has just ended."""
    cache = config.get_timing_cache()
    return bytes(cache.serialize()) if cache is not None else b""


def monitor(backend: Backend, started: Started, stepped: Stepped, finished: Callable[[str], None]) -> Any:
    """An IProgressMonitor that calls back: phase, phase around it and steps; phase and step; phase.

    TensorRT calls it on the thread that builds. `stepped` answers whether to go on.
    """
    trt = backend.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            started(phase_name, parent_phase or "", num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return stepped(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            finished(phase_name)

    return Monitor()


def check_engine(info: EngineInfo, backend: Backend, device: DeviceInfo | None, rebuild: str) -> None:
    """Compares what a plan was built by and for with what is here, before TensorRT sees a byte of it.

    Raises `EngineIncompatible`, naming the difference and the command `rebuild`.
    """
    problem = ""
    if info.backend != backend.name:
        problem = f"it was built by {info.backend}, not {backend.name}"
    elif info.version != backend.version:
        problem = f"it was built by {info.backend} {info.version} and {backend.version} is installed"
    elif device is None:
        problem = "this machine has no GPU that CUDA can see"
    elif device.sm not in info.compute_capabilities:
        problem = f"it was built for SM {', '.join(info.compute_capabilities)} and this GPU is SM {device.sm}"
    elif info.l4t != device.l4t:
        problem = f"it was built on L4T {info.l4t or '(none)'} and this is {device.l4t or '(none)'}"
    if problem:
        raise EngineIncompatible(f"The engine cannot be used here: {problem}.", remedy=f"Build it anew: {rebuild}")


@dataclass
class OpenEngine:
    """A deserialised plan and everything that must live as long as it does; contexts are made from it."""

    backend: Backend
    logger: Any
    runtime: Any
    engine: Any
    log: list[str]

    @property
    def memory_bytes(self) -> int:
        """Scratch memory that one context at a time needs, for the largest of its profiles."""
        return int(self.engine.device_memory_size_v2)

    @property
    def captures_itself(self) -> bool:
        """TensorRT-RTX captures CUDA graphs by itself: it compiles kernels as shapes come, so only it knows when."""
        return hasattr(self.backend.module, "CudaGraphStrategy")

    def context(self, profile: int, memory: int, stream: int) -> Any:
        """A context on `profile` whose scratch memory, at least `memory_bytes`, is the caller's.

        So several contexts can share one block as long as they run one after the other (ICudaEngine,
        ExecutionContextAllocationStrategy.USER_MANAGED). Needs an active CUDA context.
        """
        trt = self.backend.module
        user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.captures_itself:
            settings = self.engine.create_runtime_config()
            settings.set_execution_context_allocation_strategy(user_managed)
            settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self.engine.create_execution_context(settings)
        else:
            context = self.engine.create_execution_context(user_managed)
        if context is None:
            raise self.refused("create an execution context")
        context.set_device_memory(memory, self.memory_bytes)
        if not context.set_optimization_profile_async(profile, stream):
            raise self.refused(f"select profile {profile}")
        return context

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether a run of `context` can be captured into a CUDA graph; where TensorRT cannot say, trying tells."""
        ask = getattr(context, "is_stream_capturable", None)
        return not self.captures_itself and (ask is None or bool(ask(stream)))

    def close(self) -> None:
        """Lets TensorRT's objects go, in the order it asks for; needs an active CUDA context."""
        self.engine = None
        self.runtime = None

    def refused(self, action: str) -> DeployError:
        """The error for a call that answered False or None, with what TensorRT logged."""
        return DeployError(
            f"{self.backend.name} {self.backend.version} could not {action}. {last_words(self.log)}",
            remedy="Check free memory and the GPU with: fedspine-edge doctor; then build the engine anew.",
        )


def open_engine(backend: Backend, plan: bytes, rebuild: str) -> OpenEngine:
    """Deserialises a plan.

    Needs an active CUDA context. Raises `EngineIncompatible` with TensorRT's own words.
    """
    log: list[str] = []
    logger = make_logger(backend, log)
    runtime = backend.module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineIncompatible(
            f"{backend.name} {backend.version} could not deserialise the plan. {last_words(log)}",
            remedy=f"Build it anew: {rebuild}",
        )
    return OpenEngine(backend, logger, runtime, engine, log)

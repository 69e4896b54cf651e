"""All TensorRT API calls that differ between releases: TensorRT 10.3 to 11 and TensorRT-RTX.

`engine.tensorrt_builder` builds plans with these functions, and `runtime.engine_runner` runs the engines that
`open_engine` returns. Networks are always strongly typed, so the ONNX file determines the precision; the FP16 and INT8
builder flags of weak typing were removed in TensorRT 11. Flags are stored and compared by name, because their integer
values differ between releases. Every return value is checked: TensorRT reports most failures as None or False plus a
line in its log, which the errors raised here include.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from fedspine_edge.bundle.bundle import EngineInfo, Precision
from fedspine_edge.engine.build_errors import explain_build_failure, last_messages
from fedspine_edge.engine.cuda_driver import DeviceInfo
from fedspine_edge.errors import ConfigError, DeployError, EngineBuildError, EngineIncompatible, MissingDependency

OnPhaseStart = Callable[[str, str, int], None]
OnStepComplete = Callable[[str, int], bool]
BackendName = Literal["tensorrt", "tensorrt_rtx"]
OLDEST = (10, 3)
"""TensorRT of JetPack 6.2. Older releases lack int64 inputs and strong typing, which are required here."""


_NEWEST_OPSET = (((11, 0), 25), ((10, 6), 22), ((10, 3), 21))
"""Newest opset that the parser of each release supports, which follows from the ONNX release it is built with. For 10.3
NVIDIA documents opset 20, and int4, whose blocked DequantizeLinear belongs to opset 21."""


def opset_for(precision: Precision) -> int:
    """Return the lowest opset that supports a precision, so that the oldest parsers can read the file.

    Opset 19 added float16 scales and float8; opset 21 added blocked int4.
    """
    return {"int8": 19, "fp8": 19, "int4": 21}.get(precision, 17)


def newest_opset(backend: Backend) -> int:
    """Return the newest opset that the parser supports."""
    if backend.name == "tensorrt_rtx":  # 1.x contains the parser of TensorRT 10.12 or later
        return 22
    return next((opset for version, opset in _NEWEST_OPSET if _numbers(backend.version) >= version), 17)


@dataclass(frozen=True)
class Backend:
    """An imported TensorRT: its name, Python module and exact version."""

    name: BackendName
    module: ModuleType
    version: str


def find_backend(name: BackendName) -> Backend:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        MissingDependency: The package or one of its libraries is missing; the message contains the reason.
        EngineIncompatible: The installed release is older than `OLDEST`.
    """
    try:
        module = importlib.import_module(name)
        version = str(module.__version__)
    except (ImportError, OSError, AttributeError) as error:
        remedy = (
            "Install it with: pip install tensorrt-rtx-cu13"
            if name == "tensorrt_rtx"
            else "On a Jetson, JetPack contains it: run sudo apt install python3-libnvinfer and create the virtual "
            "environment with --system-site-packages. Elsewhere: pip install tensorrt 'fedspine-edge[tensorrt]'"
        )
        raise MissingDependency(f"{name} cannot be imported: {error}", remedy=remedy) from error
    if name == "tensorrt" and _numbers(version) < OLDEST:
        raise EngineIncompatible(
            f"TensorRT {version} is too old; {'.'.join(map(str, OLDEST))} or newer is required.",
            remedy="Update to JetPack 6.2 or newer.",
        )
    return Backend(name, module, version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def make_logger(backend: Backend, messages: list[str]) -> Any:
    """Return a TensorRT logger that appends warnings and errors to `messages` instead of printing them."""
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
    """Return the network flags: strongly typed and explicit batch, where the release still has these flags."""
    members = trt.NetworkDefinitionCreationFlag.__members__
    wanted = [members[name] for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH") if name in members]
    return sum(1 << int(flag) for flag in wanted)


def set_flags(backend: Backend, config: Any, names: Sequence[str]) -> None:
    """Set builder flags by name and clear TF32 unless it is named. Raises `ConfigError` for an unknown flag."""
    members = backend.module.BuilderFlag.__members__
    for name in names:
        if name not in members:
            raise ConfigError(
                f"{backend.name} {backend.version} has no builder flag {name!r}.",
                remedy=f"Choose from: {', '.join(members)}",
            )
    if "TF32" in members and "TF32" not in names:
        config.clear_flag(members["TF32"])
    for name in names:
        config.set_flag(members[name])


def set_targets(
    backend: Backend, config: Any, device: DeviceInfo | None, wanted: Sequence[str], log: list[str]
) -> tuple[str, ...]:
    """Set the compute capabilities to build for, and return them as SM numbers."""
    if not wanted:
        if device is None:
            raise EngineBuildError(
                f"{backend.name} needs a GPU to build for, and this machine has none.",
                remedy="Build on the device itself: fedspine-edge compile BUNDLE --out BUNDLE. Only TensorRT-RTX can "
                "build without a GPU, for explicit compute capabilities.",
            )
        return (device.sm,)
    members = getattr(getattr(backend.module, "ComputeCapability", None), "__members__", {})
    names = ["SM" + str(value).upper().removeprefix("SM").replace(".", "") for value in wanted]
    for name in names:
        if name not in members:
            known = [member for member in members if member.startswith("SM")]
            raise EngineBuildError(
                f"{backend.name} {backend.version} cannot build for {name}.",
                remedy=f"Choose from: {', '.join(known)}" if known else "It builds only for the GPU of this machine.",
            )
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not config.set_compute_capability(members[name], index):
            raise explain_build_failure(backend.name, backend.version, log, f"rejected compute capability {name}")
    return tuple(name[2:] for name in names)


def has_timing_cache(backend: Backend) -> bool:
    """Return whether `backend` uses a timing cache. TensorRT-RTX does not: it selects kernels when the engine runs."""
    return backend.name == "tensorrt"


def load_timing_cache(config: Any, timing_cache: bytes) -> bool:
    """Load the timing cache of an earlier build. Return False if TensorRT rejects it (another release or chip)."""
    cache = config.create_timing_cache(timing_cache)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return bool(timing_cache)
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return False


def serialize_timing_cache(config: Any) -> bytes:
    """Return the timing cache of the build that has just ended."""
    cache = config.get_timing_cache()
    return bytes(cache.serialize()) if cache is not None else b""


def make_progress_monitor(
    backend: Backend, on_phase_start: OnPhaseStart, on_step_complete: OnStepComplete, on_finish: Callable[[str], None]
) -> Any:
    """Return an IProgressMonitor that calls the given functions on the thread that builds.

    Args:
        backend: TensorRT or TensorRT-RTX.
        on_phase_start: Called with the phase, its parent phase and its number of steps.
        on_step_complete: Called with the phase and the step; returns whether to continue.
        on_finish: Called with the phase.
    """
    trt = backend.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            on_phase_start(phase_name, parent_phase or "", num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return on_step_complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            on_finish(phase_name)

    return Monitor()


def check_engine(info: EngineInfo, backend: Backend, device: DeviceInfo | None, rebuild: str) -> None:
    """Compare the builder and target of a plan with this machine, before TensorRT reads the plan.

    Raises `EngineIncompatible`, which names the difference and the command `rebuild`.
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
        raise EngineIncompatible(f"The engine cannot be used here: {problem}.", remedy=f"Rebuild it: {rebuild}")


@dataclass
class OpenEngine:
    """A deserialized engine and the objects that must live as long as it does."""

    backend: Backend
    logger: Any
    runtime: Any
    engine: Any
    log: list[str]

    @property
    def memory_bytes(self) -> int:
        """Scratch memory that one context needs, for the largest profile."""
        return int(self.engine.device_memory_size_v2)

    @property
    def captures_graphs_internally(self) -> bool:
        """Whether the engine captures CUDA graphs itself, as TensorRT-RTX does because it compiles kernels lazily."""
        return hasattr(self.backend.module, "CudaGraphStrategy")

    def context(self, profile: int, memory: int, stream: int) -> Any:
        """Create an execution context that uses scratch memory of the caller.

        Several contexts can share one block as long as they run one after the other (ICudaEngine,
        ExecutionContextAllocationStrategy.USER_MANAGED). Needs an active CUDA context.

        Args:
            profile: Index of the optimization profile.
            memory: Device address of at least `memory_bytes` bytes.
            stream: Stream on which the profile is selected.
        """
        trt = self.backend.module
        user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.captures_graphs_internally:
            settings = self.engine.create_runtime_config()
            settings.set_execution_context_allocation_strategy(user_managed)
            settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self.engine.create_execution_context(settings)
        else:
            context = self.engine.create_execution_context(user_managed)
        if context is None:
            raise self.failure("create an execution context")
        context.set_device_memory(memory, self.memory_bytes)
        if not context.set_optimization_profile_async(profile, stream):
            raise self.failure(f"select profile {profile}")
        return context

    def capturable(self, context: Any, stream: int) -> bool:
        """Return whether to try to capture a run of `context` into a CUDA graph. Old releases cannot tell before."""
        query = getattr(context, "is_stream_capturable", None)
        return not self.captures_graphs_internally and (query is None or bool(query(stream)))

    def close(self) -> None:
        """Release TensorRT's objects in the required order. Needs an active CUDA context."""
        self.engine = None
        self.runtime = None

    def failure(self, action: str) -> DeployError:
        """Return the exception for a call that returned False or None, with TensorRT's log messages."""
        return DeployError(
            f"{self.backend.name} {self.backend.version} could not {action}. {last_messages(self.log)}",
            remedy="Check free memory and the GPU with fedspine-edge doctor, then rebuild the engine.",
        )


def open_engine(backend: Backend, plan: bytes, rebuild: str) -> OpenEngine:
    """Deserialize a plan.

    Needs an active CUDA context. Raises `EngineIncompatible` with TensorRT's messages.
    """
    log: list[str] = []
    logger = make_logger(backend, log)
    runtime = backend.module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineIncompatible(
            f"{backend.name} {backend.version} could not deserialize the plan. {last_messages(log)}",
            remedy=f"Rebuild it: {rebuild}",
        )
    return OpenEngine(backend, logger, runtime, engine, log)

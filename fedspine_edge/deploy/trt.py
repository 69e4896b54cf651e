"""Everything that differs between TensorRT releases, in one place: 10.3 to 11, and TensorRT-RTX.

The rest of the package sees `find_backend`, `build_plan` and `open_engine`. Networks are always strongly typed,
so precision is what the ONNX file says: the way weak typing was set (FP16 and INT8 builder flags) is gone in 11.
Flags are kept and compared by name, because their integers differ between releases. Every return value is
checked; TensorRT reports most failures as None or False plus a line in its log, which the errors raised here carry.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from fedspine_edge.deploy.bundle import EngineInfo, Precision, Profile, TensorInfo
from fedspine_edge.deploy.cuda import DeviceInfo
from fedspine_edge.errors import ConfigError, DeployError, EngineBuildError, EngineIncompatible, MissingDependency

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
            "--system-site-packages. Elsewhere: pip install 'fedspine-edge[tensorrt]'"
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


def build_plan(
    backend: Backend,
    model: Path,
    inputs: Sequence[TensorInfo],
    profiles: Sequence[Profile],
    *,
    device: DeviceInfo | None,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    flags: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> tuple[bytes, EngineInfo]:
    """Parses an ONNX file and builds a serialized plan.

    Args:
        model: The ONNX file; external weights are looked up beside it.
        inputs: The model's inputs; the profiles size their dynamic axes.
        profiles: Shapes to optimise for; at least one.
        device: The GPU of this machine, or None.
        compute_capabilities: SM numbers such as "86" to build for without that GPU; TensorRT-RTX only.
        workspace_bytes: Scratch memory the builder may use; None leaves TensorRT's default.
        flags: Further builder flags by name, such as "TF32". TF32 is off unless named, so that fp32 means fp32.

    Raises:
        EngineBuildError: With TensorRT's own words and what to do about them.
    """
    trt = backend.module
    log: list[str] = []
    logger = make_logger(backend, log)
    builder = trt.Builder(logger)
    if not builder:
        raise translate(backend, log, "could not create a builder")
    network = _checked(backend, log, builder.create_network(_network_flags(trt)), "could not create a network")
    parser = trt.OnnxParser(network, logger)
    if progress:
        progress(f"{backend.name} {backend.version}: parsing {model.name}")
    if not parser.parse_from_file(str(model)):
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise translate(backend, [f"error: {text}" for text in errors] or log, f"could not parse {model}")
    config = _checked(backend, log, builder.create_builder_config(), "could not create a builder configuration")
    _set_flags(backend, config, flags)
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    for profile in profiles:
        optimization_profile = builder.create_optimization_profile()
        for tensor in inputs:
            shapes = [tensor.sized(profile.sizes(corner)) for corner in range(3)]
            if shapes[0] != tensor.shape:  # a fixed shape takes no profile
                optimization_profile.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(optimization_profile) < 0:
            raise translate(backend, log, f"refused the profile {profile}")
    targets = _set_targets(backend, config, device, compute_capabilities, log)
    if progress:
        progress(f"{backend.name} {backend.version}: building for SM {', '.join(targets)}")
    plan = builder.build_serialized_network(network, config)
    if plan is None or plan.nbytes == 0:
        raise translate(backend, log, "could not build an engine")
    info = EngineInfo(
        backend=backend.name,
        version=backend.version,
        compute_capabilities=targets,
        built_on=device.name if device is not None else "",
        l4t=device.l4t if device is not None else "",
        flags=tuple(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)),
        profiles=tuple(profiles),
        not_verified="not run yet",
    )
    return bytes(plan), info


def _network_flags(trt: ModuleType) -> int:
    """Strongly typed where that is still a choice (10.x), plus explicit batch where it still has to be asked for."""
    members = trt.NetworkDefinitionCreationFlag.__members__
    asked = [members[name] for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH") if name in members]
    return sum(1 << int(flag) for flag in asked)


def _set_flags(backend: Backend, config: Any, names: Sequence[str]) -> None:
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


def _set_targets(
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
            raise translate(backend, log, f"refused compute capability {name}")
    return tuple(name[2:] for name in names)


def _checked(backend: Backend, log: list[str], value: Any, problem: str) -> Any:
    if value is None:
        raise translate(backend, log, problem)
    return value


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
            f"{self.backend.name} {self.backend.version} could not {action}. {_last_words(self.log)}",
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
            f"{backend.name} {backend.version} could not deserialise the plan. {_last_words(log)}",
            remedy=f"Build it anew: {rebuild}",
        )
    return OpenEngine(backend, logger, runtime, engine, log)


_REMEDIES: tuple[tuple[str, str, str], ...] = (
    (
        r"HW-specific datatypes|(?:fp8|float8|fp4|bf16|bfloat16)\S* .{0,60}not supported",
        "the model uses a number format that this GPU lacks",
        "float8 needs SM 89 or newer (Jetson Thor, not Orin), bfloat16 SM 80: compile with precision='int8' or 'fp16'.",
    ),
    (
        r"no (?:importer|checker) registered for op|unsupported .{0,40}op|UNSUPPORTED_NODE|plugin not found",
        "the ONNX file has an operator this release cannot parse",
        "Export with opset 17 (the default), which spells attention and norms out in basic operators.",
    ),
    (
        r"could not find any implementation for node|out ?of ?memory|insufficient memory|MEM_ALLOC|cudaError 2\b",
        "it ran out of memory (an operator without an implementation is how TensorRT most often reports that)",
        "Close other programs, never train while building, lower the profile's largest batch and tokens, or set "
        "workspace_bytes below the free memory.",
    ),
    (
        r"strongly.?typed|must have the same type|types? mismatch|input types.*differ",
        "the ONNX file mixes types that a strongly typed network does not allow",
        "Export it anew with this release and report the model if it persists.",
    ),
    (
        r"opset|IR version",
        "the ONNX file is of a version this release does not read",
        "Export with opset 17, the default.",
    ),
    (
        r"cudaError 35|driver version is insufficient|no CUDA-capable device",
        "it found no usable CUDA driver",
        "Check the GPU with: fedspine-edge doctor",
    ),
    (
        r"compute capability|unsupported SM|architecture is not supported",
        "it does not support this GPU",
        "Build on the device that will run the engine, with the TensorRT of that device.",
    ),
)


def translate(backend: Backend, log: Sequence[str], problem: str) -> EngineBuildError:
    """An `EngineBuildError` from TensorRT's log: the likely cause, its last errors, and the remedy."""
    text = "\n".join(line for line in log if not line.startswith("warning"))
    unknown = ("", "for a reason of its own", "Use backend='onnxruntime', which needs no TensorRT.")
    _, cause, remedy = next((row for row in _REMEDIES if re.search(row[0], text, flags=re.IGNORECASE)), unknown)
    return EngineBuildError(f"{backend.name} {backend.version} {problem}: {cause}. {_last_words(log)}", remedy=remedy)


def _last_words(log: Sequence[str], count: int = 3) -> str:
    errors = [line for line in log if not line.startswith("warning")]
    return "It said: " + " | ".join(errors[-count:] or log[-count:]) if log else "It gave no reason."

"""Two ways to run a bundle behind one small interface: ONNX Runtime, and a TensorRT or TensorRT-RTX engine."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedspine_edge.deploy.bundle import EngineInfo, TensorInfo
from fedspine_edge.deploy.cuda import Cuda
from fedspine_edge.deploy.trt import Backend, OpenEngine, open_engine
from fedspine_edge.deploy.widen import widened_copy
from fedspine_edge.errors import DataError, DeployError, EngineIncompatible, MissingDependency

Array = npt.NDArray[Any]


def empty_past(tensors: Sequence[TensorInfo], batch: int) -> dict[str, Array]:
    """The KV cache of nothing: every cache input with 0 tokens."""
    sizes = {"batch": batch, "past": 0}
    return {t.name: np.zeros(t.sized(sizes), dtype=t.dtype) for t in tensors if t.kind == "past"}


def past_name(present: str) -> str:
    """The input that takes an output of the previous step: present.0.key → past_key_values.0.key."""
    return present.replace("present.", "past_key_values.", 1)


class Runner(Protocol):
    """Runs checked inputs; safe to call from several threads.

    `run` computes every output. `step` computes the logits of a decoder's next tokens: its inputs lack the cache,
    which is the opaque state that the step before returned (None at first).

    `max_batch` and `max_tokens` are the largest shape it can take, None where only the model limits it.
    """

    max_batch: int | None
    max_tokens: int | None

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]: ...
    def step(self, inputs: dict[str, Array], state: Any) -> tuple[Array, Any]: ...
    def close(self) -> None: ...


class OnnxRuntimeRunner:
    """model.onnx on ONNX Runtime's CPU provider.

    Args:
        model: The ONNX file.
        threads: Threads within an operator; None takes ONNX Runtime's default, one per core.
    """

    max_batch: int | None = None
    max_tokens: int | None = None

    def __init__(self, model: Path, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependency.of("onnxruntime", extra="export", purpose="Running a bundle") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads

        def load(path: Path) -> Any:
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        try:
            try:
                self._session: Any = load(model)
            except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:  # no bfloat16 kernels on the CPU
                with widened_copy(model) as copy:
                    self._session = load(copy)
        except MissingDependency:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            raise DeployError(
                f"ONNX Runtime {onnxruntime.__version__} could not load {model}: {error}",
                remedy="Update onnxruntime, or export the model anew with an older opset (17).",
            ) from error
        self._value: Any = onnxruntime.OrtValue.ortvalue_from_numpy
        self._outputs = [output.name for output in self._session.get_outputs()]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._past = [
            (cache.name, kinds[cache.type], cache.shape)
            for cache in self._session.get_inputs()
            if cache.name.startswith("past_key_values.")
        ]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return dict(zip(self._outputs, self._live().run(self._outputs, inputs)))

    def step(self, inputs: dict[str, Array], state: dict[str, Any] | None) -> tuple[Array, dict[str, Any]]:
        feeds = {name: self._value(array) for name, array in inputs.items()}
        if state is None:
            batch = len(inputs["input_ids"])
            for name, kind, (_, heads, _, head_dim) in self._past:
                feeds[name] = self._value(np.zeros((batch, heads, 0, head_dim), kind))
        else:
            feeds |= state
        # The cache stays in ONNX Runtime's own memory from step to step: numpy would copy it twice.
        values = dict(zip(self._outputs, self._live().run_with_ort_values(self._outputs, feeds)))
        logits: Array = values.pop("logits").numpy()
        return logits, {past_name(name): value for name, value in values.items()}

    def _live(self) -> Any:
        session = self._session
        if session is None:
            raise DeployError("This session is closed.", remedy="Load the bundle again.")
        return session

    def close(self) -> None:
        self._session = None


class EngineRunner:
    """A serialized plan with one execution context, one stream and buffers sized for the largest profile.

    Runs are serialised by a lock, because a context can run only one shape at a time. The CUDA context is made
    current around every call, so any thread may call.
    """

    def __init__(
        self,
        plan: bytes,
        info: EngineInfo,
        inputs: tuple[TensorInfo, ...],
        outputs: tuple[TensorInfo, ...],
        *,
        backend: Backend,
        cuda: Cuda,
        rebuild: str,
    ) -> None:
        self._info, self._inputs, self._outputs, self._cuda = info, inputs, outputs, cuda
        self._rebuild = rebuild
        self.max_batch: int | None = max(profile.batch[2] for profile in info.profiles)
        self.max_tokens: int | None = max(profile.tokens[2] for profile in info.profiles)
        self._resident: dict[str, Array] = {}
        self._adapter = frozenset(tensor.name for tensor in inputs if tensor.kind == "adapter")
        self._lock = threading.Lock()
        self._device: dict[str, int] = {}
        self._host: dict[str, npt.NDArray[np.uint8]] = {}
        self._profile = 0
        try:
            with cuda.active():
                self._open: OpenEngine | None = open_engine(backend, plan, rebuild)
                self._check_tensors()
                self._stream = cuda.stream()
                self._allocate()
        except BaseException:
            self._open = None
            cuda.close()
            raise

    @property
    def _opened(self) -> OpenEngine:
        if self._open is None:
            raise DeployError("This session is closed.", remedy="Load the bundle again.")
        return self._open

    def _check_tensors(self) -> None:
        engine = self._opened.engine
        found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        expected = {tensor.name for tensor in (*self._inputs, *self._outputs)}
        if found != expected:
            raise EngineIncompatible(
                f"The engine's tensors {sorted(found)} are not the bundle's {sorted(expected)}.",
                remedy=f"Build it anew: {self._rebuild}",
            )

    def _allocate(self) -> None:
        """One device and one pinned host buffer per tensor, large enough for every profile."""
        corners = [profile.sizes(2) for profile in self._info.profiles]
        sizes = {axis: max(corner[axis] for corner in corners) for axis in corners[0]}
        for tensor in (*self._inputs, *self._outputs):
            size_bytes = math.prod(tensor.sized(sizes)) * np.dtype(tensor.dtype).itemsize
            self._device[tensor.name] = self._cuda.alloc(size_bytes)
            self._host[tensor.name] = self._cuda.pinned(size_bytes)
            self._check(
                self._opened.context.set_tensor_address(tensor.name, self._device[tensor.name]),
                f"take the address of {tensor.name}",
            )

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        batch, tokens = inputs["input_ids"].shape
        past = inputs["attention_mask"].shape[1] - tokens
        with self._lock:
            context = self._opened.context
            with self._cuda.active():
                self._choose_profile(batch, tokens, past)
                for name, array in inputs.items():
                    self._check(context.set_input_shape(name, array.shape), f"take {name} of {array.shape}")
                    if self._unchanged(name, array):
                        continue
                    staged = self._host[name][: array.nbytes]
                    staged[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    self._cuda.to_device(self._device[name], staged, self._stream)
                self._check(context.execute_async_v3(self._stream), "start the engine")
                results = {}
                for tensor in self._outputs:
                    shape = tuple(context.get_tensor_shape(tensor.name))
                    size_bytes = math.prod(shape) * np.dtype(tensor.dtype).itemsize
                    staged = self._host[tensor.name][:size_bytes]
                    self._cuda.to_host(staged, self._device[tensor.name], self._stream)
                    results[tensor.name] = (staged, tensor.dtype, shape)
                self._cuda.synchronize(self._stream)
                # The pinned buffer is reused by the next call, so the caller gets a copy.
                return {name: raw.view(dtype).reshape(shape).copy() for name, (raw, dtype, shape) in results.items()}

    def _unchanged(self, name: str, array: Array) -> bool:
        """Whether this very array is on the device already: an adapter stays there until another is set."""
        if array.nbytes == 0 or self._resident.get(name) is array:
            return True
        if name in self._adapter:
            self._resident[name] = array
        return False

    def step(self, inputs: dict[str, Array], state: dict[str, Array] | None) -> tuple[Array, dict[str, Array]]:
        # The cache crosses to the host and back at every step; docs/deployment.md says so.
        past = empty_past(self._inputs, len(inputs["input_ids"])) if state is None else state
        outputs = self.run(inputs | past)
        logits = outputs.pop("logits")
        return logits, {past_name(name): value for name, value in outputs.items()}

    def _choose_profile(self, batch: int, tokens: int, past: int) -> None:
        if self._info.profiles[self._profile].covers(batch, tokens, past):
            return
        for index, profile in enumerate(self._info.profiles):
            if profile.covers(batch, tokens, past):
                self._check(
                    self._opened.context.set_optimization_profile_async(index, self._stream),
                    f"switch to profile {index}",
                )
                self._cuda.synchronize(self._stream)
                self._profile = index
                return
        after = f" after {past}" if past else ""
        known = "; ".join(
            f"batch {profile.batch[0]}–{profile.batch[2]}, tokens {profile.tokens[0]}–{profile.tokens[2]}"
            + (f" after {profile.past[0]}–{profile.past[2]}" if profile.past[2] else "")
            for profile in self._info.profiles
        )
        raise DataError(
            f"The engine has no profile for batch {batch} × {tokens} tokens{after}; it has: {known}.",
            remedy="Build it anew with a profile that covers this shape, or load with backend='onnxruntime'.",
        )

    def _check(self, done: object, action: str) -> None:
        # set_tensor_address, set_input_shape and execute_async_v3 answer False and leave the reason in the log.
        if not done:
            words = " | ".join(self._opened.log[-3:]) or "no reason given"
            raise DeployError(f"TensorRT could not {action}: {words}", remedy=f"Build it anew: {self._rebuild}")

    def close(self) -> None:
        with self._lock:
            if self._open is None:
                return
            with self._cuda.active():
                self._open = None
            self._cuda.close()

"""Two ways to run a bundle behind one small interface: ONNX Runtime, and a TensorRT or TensorRT-RTX engine."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedspine_edge.deploy.bundle import EngineInfo, TensorInfo
from fedspine_edge.deploy.cuda import Cuda
from fedspine_edge.deploy.trt import Backend, OpenEngine, open_engine
from fedspine_edge.errors import DataError, DeployError, EngineIncompatible, MissingDependency

Array = npt.NDArray[Any]


class Runner(Protocol):
    """Runs checked inputs; safe to call from several threads.

    `max_batch` and `max_tokens` are the largest shape it can take, None where only the model limits it.
    """

    max_batch: int | None
    max_tokens: int | None

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]: ...
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
        try:
            self._session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            raise DeployError(
                f"ONNX Runtime {onnxruntime.__version__} could not load {model}: {error}",
                remedy="Update onnxruntime, or export the model anew with an older opset (17).",
            ) from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs)))

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
        axes = {"batch": self.max_batch or 1, "sequence": self.max_tokens or 1}
        for tensor in (*self._inputs, *self._outputs):
            shape = [axes[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
            size_bytes = math.prod(shape) * np.dtype(tensor.dtype).itemsize
            self._device[tensor.name] = self._cuda.alloc(size_bytes)
            self._host[tensor.name] = self._cuda.pinned(size_bytes)
            self._check(
                self._opened.context.set_tensor_address(tensor.name, self._device[tensor.name]),
                f"take the address of {tensor.name}",
            )

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        batch, tokens = next(iter(inputs.values())).shape
        with self._lock:
            context = self._opened.context
            with self._cuda.active():
                self._choose_profile(batch, tokens)
                for name, array in inputs.items():
                    self._check(context.set_input_shape(name, array.shape), f"take {name} of {array.shape}")
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

    def _choose_profile(self, batch: int, tokens: int) -> None:
        if self._info.profiles[self._profile].covers(batch, tokens):
            return
        for index, profile in enumerate(self._info.profiles):
            if profile.covers(batch, tokens):
                self._check(
                    self._opened.context.set_optimization_profile_async(index, self._stream),
                    f"switch to profile {index}",
                )
                self._cuda.synchronize(self._stream)
                self._profile = index
                return
        known = "; ".join(
            f"batch {profile.batch[0]}–{profile.batch[2]}, tokens {profile.tokens[0]}–{profile.tokens[2]}"
            for profile in self._info.profiles
        )
        raise DataError(
            f"The engine has no profile for batch {batch} × {tokens} tokens; it has: {known}.",
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

"""Execution slots: a CUDA stream with the buffers, execution contexts and CUDA graphs that one run at a time needs.

A run stages the inputs in pinned memory, copies them to the device, executes the engine, copies the requested outputs
back and waits. On a board whose CPU and GPU share memory, the engine reads and writes the pinned memory and nothing is
copied.

The second run of a shape gets its own context and a CUDA graph of the whole run, which replaces the individual calls
from the third run on. Each graph has its own context, as NVIDIA's guide recommends, because a graph becomes invalid
when its context is used with another shape. All contexts of a slot share one block of scratch memory.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import TensorInfo
from fedspine_edge.engine.cuda_driver import Cuda
from fedspine_edge.engine.tensorrt_api import OpenEngine
from fedspine_edge.errors import DeployError
from fedspine_edge.runtime.buffers import Buffer, DeviceTensor, OutputSlice

MAX_CUDA_GRAPHS = 8
"""CUDA graphs that a slot keeps. The least recently used one is evicted, because texts come in many lengths."""


@dataclass(frozen=True)
class InferenceRequest:
    """One run of the engine.

    Attributes:
        profile: Index of the optimization profile that covers the shapes.
        inputs: Inputs that are copied from the host.
        device_tensors: Inputs and outputs that stay on the device.
        outputs: Outputs to copy to the host, with the slice of each.
        sizes: Size of every dynamic axis.
        cacheable: Whether the same shapes are likely to recur, so that a CUDA graph pays off.
    """

    profile: int
    inputs: Mapping[str, Array]
    device_tensors: Mapping[str, DeviceTensor]
    outputs: Mapping[str, OutputSlice]
    sizes: Mapping[str, int]
    cacheable: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        """Key of the CUDA graph for these shapes."""
        return (self.profile, *((name, array.shape) for name, array in self.inputs.items()), *self.outputs.items())


@dataclass
class _CudaGraph:
    handle: int
    context: Any  # must outlive the graph, which uses its state


class ExecutionSlot:
    """One stream with its buffers, scratch memory, contexts and CUDA graphs.

    All methods need an active CUDA context and one caller at a time. After an error the slot must be freed, because
    the state of its stream is unknown.

    Args:
        cuda: Driver.
        engine: Deserialized engine.
        tensors: Inputs and outputs that are copied from or to the host.
        limits: Largest size in bytes of each of them.

    Attributes:
        no_cuda_graphs: Reason why this slot captures no CUDA graphs; empty if it does.
    """

    def __init__(
        self, cuda: Cuda, engine: OpenEngine, tensors: Mapping[str, TensorInfo], limits: Mapping[str, int]
    ) -> None:
        self._cuda, self._engine, self._tensors = cuda, engine, tensors
        self._contexts: dict[int, Any] = {}
        self._cuda_graphs: OrderedDict[tuple[Any, ...], _CudaGraph] = OrderedDict()
        self._run_counts: Counter[tuple[Any, ...]] = Counter()
        self._uploaded_adapter: dict[str, Array] = {}
        self._buffers = {name: Buffer(cuda, limits[name]) for name in tensors}
        self.no_cuda_graphs = "" if cuda.graphs else f"{cuda.name} does not support CUDA graphs"
        if engine.captures_graphs_internally:
            self.no_cuda_graphs = "TensorRT-RTX captures CUDA graphs internally"
        self._scratch = 0
        self._stream = cuda.stream()
        try:
            self._scratch = cuda.alloc(engine.memory_bytes)
        except BaseException:
            cuda.destroy_stream(self._stream)
            raise

    def reserve(self, sizes_bytes: Mapping[str, int]) -> None:
        """Allocate buffers of the given sizes in advance, so that typical runs do not have to."""
        for name, size in sizes_bytes.items():
            self._buffers[name].reserve(size, size)

    def run(self, request: InferenceRequest) -> dict[str, Array]:
        """Run the engine and return copies of the requested outputs. After an error the stream is idle."""
        try:
            return self._run(request)
        except BaseException:
            with suppress(DeployError):
                self._cuda.synchronize(self._stream)
            raise

    def _run(self, request: InferenceRequest) -> dict[str, Array]:
        self._reserve_for(request)
        self._stage(request)
        graph = self._cuda_graphs.get(request.key)
        if graph is not None:
            self._cuda_graphs.move_to_end(request.key)
            self._cuda.launch(graph.handle, self._stream)
        elif self._should_capture(request):
            context = self._engine.context(request.profile, self._scratch, self._stream)
            self._bind(context, request)
            self._enqueue(context, request)  # the first run after a change of shape performs setup, so run it first
            self._capture(context, request)
        else:
            context = self._contexts.get(request.profile)
            if context is None:
                context = self._engine.context(request.profile, self._scratch, self._stream)
                self._contexts[request.profile] = context
            self._bind(context, request)
            self._enqueue(context, request)
        self._cuda.synchronize(self._stream)
        return {
            name: self._buffers[name].result(output, self._tensors[name].dtype)
            for name, output in request.outputs.items()
        }

    def _reserve_for(self, request: InferenceRequest) -> None:
        needed = {name: (array.nbytes, array.nbytes) for name, array in request.inputs.items()}
        for name, output in request.outputs.items():
            needed[name] = (output.rows * output.stride_bytes, output.size_bytes)
        grown = [name for name, sizes in needed.items() if self._buffers[name].reserve(*sizes)]
        if grown:
            self._evict_cuda_graphs(0)  # they contain the old addresses
            for name in grown:
                self._uploaded_adapter.pop(name, None)

    def _stage(self, request: InferenceRequest) -> None:
        """Copy inputs to pinned memory. Adapters are uploaded at once and stay on the device until they change."""
        for name, array in request.inputs.items():
            if self._tensors[name].kind != "adapter":
                self._buffers[name].stage(array)
            elif self._uploaded_adapter.get(name) is not array:
                self._buffers[name].stage(array)
                self._buffers[name].upload(array.nbytes, self._stream)
                self._uploaded_adapter[name] = array

    def _bind(self, context: Any, request: InferenceRequest) -> None:
        for name, array in request.inputs.items():
            self._check(context.set_input_shape(name, array.shape), f"set the shape of {name} to {array.shape}")
            self._check(context.set_tensor_address(name, self._buffers[name].address), f"set the address of {name}")
        for name, tensor in request.device_tensors.items():
            if tensor.is_input:
                self._check(context.set_input_shape(name, tensor.shape), f"set the shape of {name} to {tensor.shape}")
            self._check(context.set_tensor_address(name, tensor.address), f"set the address of {name}")
        for name in request.outputs:
            self._check(context.set_tensor_address(name, self._buffers[name].address), f"set the address of {name}")
            actual, expected = tuple(context.get_tensor_shape(name)), self._tensors[name].sized(dict(request.sizes))
            self._check(actual == expected, f"produce {name} of shape {expected}: its shape is {actual}")

    def _enqueue(self, context: Any, request: InferenceRequest) -> None:
        for name, array in request.inputs.items():
            if self._tensors[name].kind != "adapter":
                self._buffers[name].upload(array.nbytes, self._stream)
        self._check(context.execute_async_v3(self._stream), "start the engine")
        for name, output in request.outputs.items():
            self._buffers[name].download(output, self._stream)

    def _should_capture(self, request: InferenceRequest) -> bool:
        if not request.cacheable or self.no_cuda_graphs:
            return False
        if len(self._run_counts) > 16 * MAX_CUDA_GRAPHS:
            self._run_counts.clear()
        self._run_counts[request.key] += 1
        return self._run_counts[request.key] == 2

    def _capture(self, context: Any, request: InferenceRequest) -> None:
        self._cuda.synchronize(self._stream)
        if not self._engine.capturable(context, self._stream):
            return
        try:
            handle = self._cuda.capture(self._stream, lambda: self._enqueue(context, request))
        except DeployError as error:
            self.no_cuda_graphs = error.message  # the run itself has succeeded; later runs use individual calls
            return
        self._cuda_graphs[request.key] = _CudaGraph(handle, context)
        self._evict_cuda_graphs(MAX_CUDA_GRAPHS)

    def _evict_cuda_graphs(self, keep: int) -> None:
        """Destroy the least recently used CUDA graphs until `keep` remain. Their shapes can be captured again."""
        while len(self._cuda_graphs) > keep:
            key, graph = self._cuda_graphs.popitem(last=False)
            self._run_counts.pop(key, None)
            self._cuda.destroy_graph(graph.handle)

    def _check(self, succeeded: object, action: str) -> None:
        # set_tensor_address, set_input_shape and execute_async_v3 return False and write the reason to the log.
        if not succeeded:
            raise self._engine.failure(action)

    def free(self) -> None:
        """Free everything, even if the driver fails to free some of it; then raise the last error."""
        with ExitStack() as stack:
            stack.callback(self._cuda.destroy_stream, self._stream)
            stack.callback(self._cuda.free, self._scratch)
            for buffer in self._buffers.values():
                stack.callback(buffer.free)
            stack.callback(self._contexts.clear)
            handles = [graph.handle for graph in self._cuda_graphs.values()]
            stack.callback(self._cuda_graphs.clear)
            for handle in handles:
                stack.callback(self._cuda.destroy_graph, handle)
            # Callbacks run in reverse order, so nothing is freed before the device has stopped using it.
            stack.callback(self._cuda.synchronize, self._stream)

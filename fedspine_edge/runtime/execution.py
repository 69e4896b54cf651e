"""Where an engine's runs take place: a stream, buffers, contexts, CUDA graphs. One run at a time per lane.

A run is: stage the inputs in pinned memory, copy them to the device, execute, copy the wanted outputs back, wait. On
a board whose CPU and GPU share memory the engine reads and writes the pinned memory itself and nothing is copied.

A shape that comes a second time gets a context of its own and a CUDA graph of the whole run, which takes the place of
the single calls from the third time on. One context per graph, all of a lane on the same scratch memory, is what
NVIDIA's guide asks for: a graph is void once its context has seen another shape.
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

MAX_GRAPHS = 8
"""Graphs a lane keeps; the one unused for longest makes room. Texts of any length would otherwise fill the memory."""


@dataclass(frozen=True)
class InferenceRequest:
    """One run of the engine.

    Attributes:
        profile: Index of the optimisation profile that covers the shapes.
        inputs: From the host.
        kept: Inputs and outputs that stay on the device.
        outputs: What the host wants to have, and which part of it.
        sizes: The size of every dynamic axis.
        repeats: Whether the same shapes are likely to come again, so that a CUDA graph pays.
    """

    profile: int
    inputs: Mapping[str, Array]
    kept: Mapping[str, DeviceTensor]
    outputs: Mapping[str, OutputSlice]
    sizes: Mapping[str, int]
    repeats: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.profile, *((name, array.shape) for name, array in self.inputs.items()), *self.outputs.items())


@dataclass
class _Graph:
    handle: int
    context: Any  # must outlive the graph, which uses its state


class ExecutionSlot:
    """One stream with its buffers, scratch memory, contexts and graphs.

    All methods need an active CUDA context and one caller at a time. After an error the lane must be freed: what is
    still on the stream is unknown.

    Attributes:
        no_graphs: Why this lane captures no CUDA graphs; empty where it does.
    """

    def __init__(
        self, cuda: Cuda, engine: OpenEngine, tensors: Mapping[str, TensorInfo], limits: Mapping[str, int]
    ) -> None:
        self._cuda, self._engine, self._tensors = cuda, engine, tensors
        self._contexts: dict[int, Any] = {}
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._resident: dict[str, Array] = {}
        self._buffers = {name: Buffer(cuda, limits[name]) for name in tensors}
        self.no_graphs = "" if cuda.graphs else f"{cuda.name} has no CUDA graphs"
        if engine.captures_itself:
            self.no_graphs = "TensorRT-RTX captures them by itself"
        self._memory = 0
        self._stream = cuda.stream()
        try:
            self._memory = cuda.alloc(engine.memory_bytes)
        except BaseException:
            cuda.destroy_stream(self._stream)
            raise

    def reserve(self, sizes_bytes: Mapping[str, int]) -> None:
        """Makes room for inputs and outputs before they come, so that no run has to."""
        for name, size in sizes_bytes.items():
            self._buffers[name].reserve(size, size)

    def run(self, job: InferenceRequest) -> dict[str, Array]:
        """The outputs that `job` wants, as copies; after an error nothing of the run is under way any more."""
        try:
            return self._run(job)
        except BaseException:
            with suppress(DeployError):
                self._cuda.synchronize(self._stream)
            raise

    def _run(self, job: InferenceRequest) -> dict[str, Array]:
        self._make_room(job)
        self._stage(job)
        graph = self._graphs.get(job.key)
        if graph is not None:
            self._graphs.move_to_end(job.key)
            self._cuda.launch(graph.handle, self._stream)
        elif self._wants_graph(job):
            context = self._engine.context(job.profile, self._memory, self._stream)
            self._bind(context, job)
            self._enqueue(context, job)  # before capturing: the first run after a change of shape sets things up
            self._keep_graph(context, job)
        else:
            context = self._contexts.get(job.profile)
            if context is None:
                context = self._engine.context(job.profile, self._memory, self._stream)
                self._contexts[job.profile] = context
            self._bind(context, job)
            self._enqueue(context, job)
        self._cuda.synchronize(self._stream)
        return {name: self._buffers[name].result(part, self._tensors[name].dtype) for name, part in job.outputs.items()}

    def _make_room(self, job: InferenceRequest) -> None:
        needed = {name: (array.nbytes, array.nbytes) for name, array in job.inputs.items()}
        for name, part in job.outputs.items():
            needed[name] = (part.rows * part.stride_bytes, part.size_bytes)
        grown = [name for name, sizes in needed.items() if self._buffers[name].reserve(*sizes)]
        if grown:
            self._drop_graphs(0)  # they hold the old addresses
            for name in grown:
                self._resident.pop(name, None)

    def _stage(self, job: InferenceRequest) -> None:
        """Inputs into pinned memory; an adapter goes to the device at once, and stays until another is set."""
        for name, array in job.inputs.items():
            if self._tensors[name].kind != "adapter":
                self._buffers[name].stage(array)
            elif self._resident.get(name) is not array:
                self._buffers[name].stage(array)
                self._buffers[name].upload(array.nbytes, self._stream)
                self._resident[name] = array

    def _bind(self, context: Any, job: InferenceRequest) -> None:
        for name, array in job.inputs.items():
            self._check(context.set_input_shape(name, array.shape), f"take {name} of {array.shape}")
            self._check(context.set_tensor_address(name, self._buffers[name].address), f"take the address of {name}")
        for name, tensor in job.kept.items():
            if tensor.is_input:
                self._check(context.set_input_shape(name, tensor.shape), f"take {name} of {tensor.shape}")
            self._check(context.set_tensor_address(name, tensor.address), f"take the address of {name}")
        for name in job.outputs:
            self._check(context.set_tensor_address(name, self._buffers[name].address), f"take the address of {name}")
            given, expected = tuple(context.get_tensor_shape(name)), self._tensors[name].sized(dict(job.sizes))
            self._check(given == expected, f"give {name} of {expected}: it would give {given}")

    def _enqueue(self, context: Any, job: InferenceRequest) -> None:
        for name, array in job.inputs.items():
            if self._tensors[name].kind != "adapter":
                self._buffers[name].upload(array.nbytes, self._stream)
        self._check(context.execute_async_v3(self._stream), "start the engine")
        for name, part in job.outputs.items():
            self._buffers[name].download(part, self._stream)

    def _wants_graph(self, job: InferenceRequest) -> bool:
        if not job.repeats or self.no_graphs:
            return False
        if len(self._seen) > 16 * MAX_GRAPHS:
            self._seen.clear()
        self._seen[job.key] += 1
        return self._seen[job.key] == 2

    def _keep_graph(self, context: Any, job: InferenceRequest) -> None:
        self._cuda.synchronize(self._stream)
        if not self._engine.capturable(context, self._stream):
            return
        try:
            handle = self._cuda.capture(self._stream, lambda: self._enqueue(context, job))
        except DeployError as error:
            self.no_graphs = error.message  # the run itself is done; it stays with single calls from now on
            return
        self._graphs[job.key] = _Graph(handle, context)
        self._drop_graphs(MAX_GRAPHS)

    def _drop_graphs(self, most: int) -> None:
        """Drops the graphs unused for longest until `most` are left; such a shape may earn one again."""
        while len(self._graphs) > most:
            key, graph = self._graphs.popitem(last=False)
            self._seen.pop(key, None)
            self._cuda.destroy_graph(graph.handle)

    def _check(self, done: object, action: str) -> None:
        # set_tensor_address, set_input_shape and execute_async_v3 answer False and leave the reason in the log.
        if not done:
            raise self._engine.refused(action)

    def free(self) -> None:
        """Gives everything back, also where the device refuses some of it; then raises the last refusal."""
        with ExitStack() as stack:
            stack.callback(self._cuda.destroy_stream, self._stream)
            stack.callback(self._cuda.free, self._memory)
            for buffer in self._buffers.values():
                stack.callback(buffer.free)
            stack.callback(self._contexts.clear)
            handles = [graph.handle for graph in self._graphs.values()]
            stack.callback(self._graphs.clear)
            for handle in handles:
                stack.callback(self._cuda.destroy_graph, handle)
            # Last in, first out: nothing is freed before the device has stopped using it.
            stack.callback(self._cuda.synchronize, self._stream)

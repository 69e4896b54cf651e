"""A fake TensorRT for tests without a GPU: its plan is the path of an ONNX file, which ONNX Runtime computes.

It uses the driver of fake_libcuda.cpp: inputs are read from device addresses and outputs are written to them when the
stream executes the work. It rejects everything that TensorRT forbids: unset shapes or addresses, shapes outside the
profile, missing scratch memory, and CUDA graphs that are launched after their context was used with another shape.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from types import SimpleNamespace

import numpy as np

from fedspine_edge.engine import tensorrt_api

SCRATCH_BYTES = 4096
KINDS = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class Logger:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class FakeTensorRT:
    """Imitates the module `tensorrt`, or `tensorrt_rtx` with `rtx`. `backend` is the result of `find_backend`.

    Args:
        driver: The `FakeDriver`.
        profiles: Profiles of the manifest, to reject other shapes.
        rtx: Whether to imitate TensorRT-RTX.
        refuse: Step that fails: "plan", "context", "profile", "shape", "address" or "run".
    """

    def __init__(self, driver, profiles, *, rtx=False, refuse=""):
        self.driver, self.profiles, self.refuse, self.rtx = driver, profiles, refuse, rtx
        self.contexts, self.executions, self.log = 0, 0, None
        self._works, self._tokens = {}, itertools.count(1)
        self._trampoline = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)(lambda token: self._works[token]())
        names = {
            "ILogger": Logger,
            "Runtime": self._runtime,
            "ExecutionContextAllocationStrategy": SimpleNamespace(USER_MANAGED="user managed"),
        }
        if rtx:
            names["CudaGraphStrategy"] = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
        self.backend = tensorrt_api.Backend("tensorrt_rtx" if rtx else "tensorrt", SimpleNamespace(**names), "10.3.0")

    def _runtime(self, logger):
        self.log = logger

        def deserialize(plan):
            if self.refuse == "plan":
                logger.log(Logger.Severity.ERROR, "magic tag does not match")
                return None
            return Engine(self, bytes(plan).decode())

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def enqueue(self, stream, work):
        token = next(self._tokens)
        self._works[token] = work
        return self.driver.lib.fake_enqueue(stream, self._trampoline, token) == 0


class Engine:
    """Imitates an engine with an ONNX file."""

    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, module, path):
        import onnxruntime

        self.module = module
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = {each.name: each for each in self.session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index):
        return [*self.inputs, *self.outputs][index]

    def create_runtime_config(self):
        assert self.module.rtx
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda how: None, cuda_graph_strategy=None)

    def create_execution_context(self, strategy):
        if self.module.refuse == "context":
            return None
        if self.module.rtx:
            assert strategy.cuda_graph_strategy == "whole graph"
        else:
            assert strategy == "user managed"
        self.module.contexts += 1
        return Context(self)


class Context:
    """Imitates an execution context; `epoch` counts its changes of shape."""

    def __init__(self, engine):
        self.engine, self.module, self.driver = engine, engine.module, engine.module.driver
        self.shapes, self.addresses = {}, {}
        self.profile, self.memory, self.epoch, self.settled = None, (0, 0), 0, -1

    def set_device_memory(self, memory, size):
        self.memory = (memory, size)

    def set_optimization_profile_async(self, index, stream):
        self.profile, self.shapes = index, {}
        return self.module.refuse != "profile"

    def set_input_shape(self, name, shape):
        if self.shapes.get(name) != tuple(shape):
            self.shapes[name] = tuple(shape)
            self.epoch += 1
        return self.module.refuse != "shape"

    def set_tensor_address(self, name, address):
        assert address > 0
        assert address % 256 == 0, "TensorRT requires addresses aligned to 256 bytes"
        self.addresses[name] = address
        return self.module.refuse != "address"

    def get_tensor_shape(self, name):
        sizes = {
            axis: size
            for each in self.engine.inputs.values()
            for axis, size in zip(each.shape, self.shapes.get(each.name, each.shape))
        }
        known = {axis: size for axis, size in sizes.items() if isinstance(size, int)}
        if "past" in known:
            known["total"] = known["past"] + known["sequence"]
        return tuple(
            known.get(axis, axis) if isinstance(axis, str) else axis for axis in self.engine.outputs[name].shape
        )

    def execute_async_v3(self, stream):
        engine, module = self.engine, self.module
        complete = self.shapes.keys() == engine.inputs.keys()
        complete &= self.addresses.keys() == {*engine.inputs, *engine.outputs}
        if not complete or self.memory[1] < SCRATCH_BYTES or module.refuse == "run" or not self._in_profile():
            module.log.log(Logger.Severity.ERROR, "execution was refused")
            return False
        if self.driver.capturing(stream) and self.settled != self.epoch:
            return False  # TensorRT completes a change of shape in the next run, which therefore cannot be captured
        self.settled = self.epoch
        shapes, addresses, epoch = dict(self.shapes), dict(self.addresses), self.epoch

        def work():
            if self.epoch != epoch:
                return 700  # the CUDA graph belongs to an earlier shape
            module.executions += 1
            try:
                self.driver.write(self.memory[0], np.zeros(SCRATCH_BYTES, np.uint8))
                feeds = {
                    name: self.driver.read(addresses[name], shapes[name], KINDS[each.type])
                    for name, each in engine.inputs.items()
                }
                for name, value in zip(engine.outputs, engine.session.run(list(engine.outputs), feeds)):
                    self.driver.write(addresses[name], value)
            except MemoryError:
                return 700
            return 0

        return module.enqueue(stream, work)

    def _in_profile(self):
        batch, tokens = self.shapes["input_ids"]
        past = self.shapes["attention_mask"][1] - tokens
        return self.module.profiles[self.profile].covers(batch, tokens, past)


class FakeDriver:
    """Controls fake_libcuda.cpp."""

    def __init__(self, library):
        self.lib = library
        for name in ("fake_read", "fake_write"):
            getattr(library, name).argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)
        library.fake_enqueue.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64)
        library.fake_set.argtypes = (ctypes.c_char_p, ctypes.c_long)
        library.fake_count.restype = library.fake_alive.restype = ctypes.c_long

    def reset(self, **settings):
        self.lib.fake_reset()
        for name, value in settings.items():
            self.set(name, value)

    def set(self, name, value):
        self.lib.fake_set(name.encode(), value)

    def fail(self, call, number, code=1):
        """Make the `number`-th call of a driver function, counted from the start, return an error."""
        self.set(f"fail {call}", number)
        self.set("fail with", code)

    def count(self, name):
        return self.lib.fake_count(name.encode())

    def alive(self):
        """Return the number of live resources by kind; empty if everything was freed."""
        kinds = ("device", "pinned", "stream", "graph", "instance", "retained", "context")
        return {kind: count for kind in kinds if (count := self.lib.fake_alive(kind.encode()))}

    def capturing(self, stream):
        return bool(self.lib.fake_capturing(ctypes.c_uint64(stream)))

    def read(self, address, shape, dtype):
        array = np.empty(shape, dtype)
        if array.nbytes and self.lib.fake_read(address, array.ctypes.data, array.nbytes):
            raise MemoryError
        assert math.prod(shape) == array.size
        return array

    def write(self, address, array):
        array = np.ascontiguousarray(array)
        if array.nbytes and self.lib.fake_write(address, array.ctypes.data, array.nbytes):
            raise MemoryError

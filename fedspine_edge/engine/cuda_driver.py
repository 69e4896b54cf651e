"""The CUDA driver calls that an engine needs, through NVIDIA's cuda-python or through pycuda.

Both use the device's *primary* context. It is retained, pushed before every use and popped after it, so that torch in
the same process keeps working. Nothing is initialized on import. `device_info` calls the driver library directly and
needs neither package.

Names and semantics follow the CUDA driver API reference (groups CTX, MEM, STREAM and GRAPH).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedspine_edge.errors import DeployError, MissingDependency

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU: its name, its SM number (such as "87") and, on a Jetson, its L4T release."""

    name: str
    sm: str
    l4t: str = ""


def device_info(index: int = 0) -> DeviceInfo | None:
    """Return the GPU with this index, or None if there is no driver or no such device."""
    found = _query_driver(index)
    return found if isinstance(found, DeviceInfo) else None


def why_no_device(index: int = 0) -> str:
    """Return the reason why `device_info` finds no GPU, for an error message; empty if it finds one."""
    found = _query_driver(index)
    return found if isinstance(found, str) else ""


def _query_driver(index: int) -> DeviceInfo | str:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the NVIDIA driver's libcuda.so.1 is not installed"
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    calls: tuple[tuple[str, Callable[[], int]], ...] = (
        ("cuInit", lambda: driver.cuInit(0)),
        ("cuDeviceGet", lambda: driver.cuDeviceGet(ctypes.byref(device), index)),
        ("cuDeviceGetName", lambda: driver.cuDeviceGetName(name, len(name), device)),
        # 75 and 76 are COMPUTE_CAPABILITY_MAJOR and _MINOR.
        ("cuDeviceGetAttribute", lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)),
        ("cuDeviceGetAttribute", lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)),
    )
    for call, function in calls:
        error = function()
        if error != 0:
            return f"the driver is installed, but {call} returns error {error}"
    return DeviceInfo(name.value.decode(errors="replace"), f"{major.value}{minor.value}", l4t_release())


def l4t_release(path: str = "/etc/nv_tegra_release") -> str:
    """Return the Jetson Linux release, such as "36.4.3"; empty on other machines."""
    try:
        first = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[0]
        release, revision = first.split(",")[:2]
        return f"{release.split('R')[1].split()[0]}.{revision.split(':')[1].strip()}"
    except (OSError, IndexError, ValueError):
        return ""


class Cuda(Protocol):
    """CUDA operations that the engine runner needs.

    All methods except `active` and `close` must be called inside `with cuda.active()`. Addresses are device addresses.
    `pinned` memory is page-locked host memory, which makes copies asynchronous.
    """

    name: str
    unified: bool
    """Whether CPU and GPU share one memory, as on a Jetson. Then `address_of` pinned memory replaces copies."""
    graphs: bool
    """Whether `capture` is supported."""

    def active(self) -> AbstractContextManager[None]: ...
    def stream(self) -> int: ...
    def synchronize(self, stream: int) -> None: ...
    def destroy_stream(self, stream: int) -> None: ...
    def alloc(self, size_bytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def pinned(self, size_bytes: int) -> Bytes: ...
    def address_of(self, pinned: Bytes) -> int: ...
    def free_pinned(self, pinned: Bytes) -> None: ...
    def to_device(self, address: int, host: Bytes, stream: int) -> None: ...
    def to_host(self, host: Bytes, address: int, stream: int) -> None: ...
    def capture(self, stream: int, work: Callable[[], None]) -> int: ...
    def launch(self, graph: int, stream: int) -> None: ...
    def destroy_graph(self, graph: int) -> None: ...
    def close(self) -> None: ...


def open_cuda(index: int = 0) -> Cuda:
    """Open the device with cuda-python, which supports CUDA graphs, or with pycuda if cuda-python is not installed.

    Raises:
        MissingDependency: Neither package can be imported.
        DeployError: The driver is missing or reports an error.
    """
    failures = []
    for backend in (CudaPython, PyCuda):
        try:
            return backend(index)
        except (ImportError, RuntimeError) as error:
            # Without a driver, cuda-python raises RuntimeError and pycuda raises ImportError.
            if isinstance(error, RuntimeError) or "libcuda" in str(error):
                raise DeployError(
                    f"{backend.name} is installed, but the NVIDIA driver is not: {error}",
                    remedy="Install or load the driver (JetPack contains it), then run: fedspine-edge doctor",
                ) from error
            failures.append(f"{backend.name}: {error}")
    raise MissingDependency(
        f"Running an engine needs cuda-python or pycuda ({'; '.join(failures)}).",
        remedy="Install cuda-python for the driver's CUDA version (12.6 on JetPack 6) with pip install cuda-python, or "
        "install pycuda, which needs the CUDA toolkit, with pip install pycuda.",
    )


def _failure(name: str) -> DeployError:
    """Return the exception for a failed driver call, given the driver's name of the error."""
    if "OUT_OF_MEMORY" in name or "out of memory" in name:
        return DeployError(
            f"The GPU is out of memory ({name}).",
            remedy="Close other programs, or build the engine with a smaller maximum batch and fewer tokens.",
        )
    return DeployError(f"A CUDA driver call failed: {name}.", remedy="Check the GPU with: fedspine-edge doctor")


class CudaPython:
    """`Cuda` through cuda-python's driver API, in which every call returns (error, *results)."""

    name = "cuda-python"
    graphs = True

    def __init__(self, index: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError:  # cuda-python before 12.6
            from cuda import cuda as driver

        self._driver = driver
        self._call(driver.cuInit(0))
        self._device = self._call(driver.cuDeviceGet(index))
        attributes = driver.CUdevice_attribute
        self.unified = all(
            self._call(driver.cuDeviceGetAttribute(attribute, self._device))
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_INTEGRATED,
                attributes.CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY,
            )
        )
        self._context = self._call(driver.cuDevicePrimaryCtxRetain(self._device))

    def _call(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if int(error) != 0:
            raise _failure(getattr(error, "name", str(error)))
        return values[0] if values else None

    @contextmanager
    def active(self) -> Iterator[None]:
        self._call(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._call(self._driver.cuCtxPopCurrent())

    def stream(self) -> int:
        return int(self._call(self._driver.cuStreamCreate(1)))  # CU_STREAM_NON_BLOCKING

    def synchronize(self, stream: int) -> None:
        self._call(self._driver.cuStreamSynchronize(stream))

    def destroy_stream(self, stream: int) -> None:
        self._call(self._driver.cuStreamDestroy(stream))

    def alloc(self, size_bytes: int) -> int:
        return int(self._call(self._driver.cuMemAlloc(max(size_bytes, 1))))

    def free(self, address: int) -> None:
        self._call(self._driver.cuMemFree(address))

    def pinned(self, size_bytes: int) -> Bytes:
        size = max(size_bytes, 1)
        flags = 1 | (2 if self.unified else 0)  # CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP
        address = int(self._call(self._driver.cuMemHostAlloc(size, flags)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def address_of(self, pinned: Bytes) -> int:
        return int(self._call(self._driver.cuMemHostGetDevicePointer(pinned.ctypes.data, 0)))

    def free_pinned(self, pinned: Bytes) -> None:
        self._call(self._driver.cuMemFreeHost(pinned.ctypes.data))

    def to_device(self, address: int, host: Bytes, stream: int) -> None:
        self._call(self._driver.cuMemcpyHtoDAsync(address, host.ctypes.data, host.nbytes, stream))

    def to_host(self, host: Bytes, address: int, stream: int) -> None:
        self._call(self._driver.cuMemcpyDtoHAsync(host.ctypes.data, address, host.nbytes, stream))

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        driver = self._driver
        # Thread-local, so that other threads can allocate memory during the capture.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(driver.cuStreamBeginCapture(stream, mode))
        try:
            work()
        except BaseException:
            # The stream must leave capture mode after any error. An incomplete graph is useless.
            error, graph = driver.cuStreamEndCapture(stream)
            if int(error) == 0 and int(graph) != 0:
                driver.cuGraphDestroy(graph)
            raise
        graph = self._call(driver.cuStreamEndCapture(stream))
        try:
            return int(self._call(driver.cuGraphInstantiate(graph, 0)))
        finally:
            self._call(driver.cuGraphDestroy(graph))  # the instance is an independent copy

    def launch(self, graph: int, stream: int) -> None:
        self._call(self._driver.cuGraphLaunch(graph, stream))

    def destroy_graph(self, graph: int) -> None:
        self._call(self._driver.cuGraphExecDestroy(graph))

    def close(self) -> None:
        self._call(self._driver.cuDevicePrimaryCtxRelease(self._device))


class PyCuda:
    """`Cuda` through pycuda, which has no CUDA graphs. It avoids pycuda.autoinit, which creates its own context."""

    name = "pycuda"
    graphs = False

    def __init__(self, index: int) -> None:
        import pycuda.driver as driver

        self._driver = driver
        try:
            driver.init()
            device = driver.Device(index)
            attributes = driver.device_attribute
            self.unified = all(map(device.get_attribute, (attributes.INTEGRATED, attributes.CAN_MAP_HOST_MEMORY)))
            self._context = device.retain_primary_context()
        except driver.Error as error:
            raise _failure(str(error)) from error
        # pycuda frees a resource when the last reference to its object is dropped, so references are kept here.
        self._streams: dict[int, Any] = {}
        self._buffers: dict[int, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        except self._driver.Error as error:
            raise _failure(str(error)) from error
        finally:
            self._driver.Context.pop()

    def stream(self) -> int:
        stream = self._driver.Stream(1)  # CU_STREAM_NON_BLOCKING
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def synchronize(self, stream: int) -> None:
        self._streams[stream].synchronize()

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]

    def alloc(self, size_bytes: int) -> int:
        buffer = self._driver.mem_alloc(max(size_bytes, 1))
        self._buffers[int(buffer)] = buffer
        return int(buffer)

    def free(self, address: int) -> None:
        self._buffers.pop(address).free()

    def pinned(self, size_bytes: int) -> Bytes:
        flags = self._driver.host_alloc_flags
        wanted = flags.PORTABLE | (flags.DEVICEMAP if self.unified else 0)
        array: Bytes = self._driver.pagelocked_empty(max(size_bytes, 1), np.uint8, mem_flags=wanted)
        return array

    def address_of(self, pinned: Bytes) -> int:
        return int(pinned.base.get_device_pointer())  # type: ignore[union-attr]

    def free_pinned(self, pinned: Bytes) -> None:
        pinned.base.free()  # type: ignore[union-attr]

    def to_device(self, address: int, host: Bytes, stream: int) -> None:
        self._driver.memcpy_htod_async(address, host, self._streams[stream])

    def to_host(self, host: Bytes, address: int, stream: int) -> None:
        self._driver.memcpy_dtoh_async(host, address, self._streams[stream])

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        raise NotImplementedError

    def launch(self, graph: int, stream: int) -> None:
        raise NotImplementedError

    def destroy_graph(self, graph: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        # pycuda's detach() of a primary context pushes it and relies on a pop that cuDevicePrimaryCtxRelease does not
        # perform; on a thread other than the one that created the context it does nothing. Therefore push the context,
        # pop it through the driver, and then detach.
        self._context.push()
        ctypes.CDLL("libcuda.so.1").cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        self._context.detach()

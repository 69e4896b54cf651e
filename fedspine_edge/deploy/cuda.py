"""The few CUDA driver calls that running an engine needs, through pycuda or NVIDIA's cuda-python.

Both drive the device's *primary* context, retained and pushed around every use and popped after it, so that
torch in the same process keeps working; nothing is initialised on import. `device_info` asks the driver
library directly and needs neither package.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedspine_edge.errors import DeployError, MissingDependency

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU: its name, its SM number such as "87" and, on a Jetson, its L4T release."""

    name: str
    sm: str
    l4t: str = ""


def device_info(index: int = 0) -> DeviceInfo | None:
    """The GPU with this index, or None when there is no driver or no such device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    calls: tuple[Callable[[], int], ...] = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), index),
        lambda: driver.cuDeviceGetName(name, len(name), device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # COMPUTE_CAPABILITY_MAJOR
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),  # COMPUTE_CAPABILITY_MINOR
    )
    if any(call() != 0 for call in calls):
        return None
    return DeviceInfo(name.value.decode(errors="replace"), f"{major.value}{minor.value}", l4t_release())


def l4t_release(path: str = "/etc/nv_tegra_release") -> str:
    """The Jetson Linux release such as "36.4.3"; empty on anything else."""
    try:
        first = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[0]
        release, revision = first.split(",")[:2]
        return f"{release.split('R')[1].split()[0]}.{revision.split(':')[1].strip()}"
    except (OSError, IndexError, ValueError):
        return ""


class Cuda(Protocol):
    """What the engine runner needs. All but `active` is called inside `with cuda.active()`."""

    name: str

    def active(self) -> Any: ...
    def stream(self) -> int: ...
    def synchronize(self, stream: int) -> None: ...
    def alloc(self, size_bytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def pinned(self, size_bytes: int) -> Bytes: ...
    def to_device(self, address: int, host: Bytes, stream: int) -> None: ...
    def to_host(self, host: Bytes, address: int, stream: int) -> None: ...
    def close(self) -> None: ...


def open_cuda(index: int = 0) -> Cuda:
    """pycuda where it is installed, else cuda-python. Raises `MissingDependency` when neither is."""
    failures = []
    for backend in (PyCuda, CudaPython):
        try:
            return backend(index)
        except (ImportError, RuntimeError) as error:  # cuda-python raises the latter without a driver
            failures.append(f"{backend.name}: {error}")
    raise MissingDependency(
        f"Running an engine needs pycuda or cuda-python ({'; '.join(failures)}).",
        remedy="Install one: pip install pycuda (needs the CUDA toolkit), or pip install cuda-python.",
    )


class PyCuda:
    """`Cuda` through pycuda; never pycuda.autoinit, which would make a context of its own."""

    name = "pycuda"

    def __init__(self, index: int) -> None:
        import pycuda.driver as driver

        self._driver = driver
        driver.init()
        self._context = driver.Device(index).retain_primary_context()
        self._streams: dict[int, Any] = {}
        self._buffers: dict[int, Any] = {}
        self._pinned: list[Any] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()

    def stream(self) -> int:
        stream = self._driver.Stream()
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def synchronize(self, stream: int) -> None:
        self._streams[stream].synchronize()

    def alloc(self, size_bytes: int) -> int:
        buffer = self._driver.mem_alloc(max(size_bytes, 1))
        self._buffers[int(buffer)] = buffer
        return int(buffer)

    def free(self, address: int) -> None:
        self._buffers.pop(address).free()

    def pinned(self, size_bytes: int) -> Bytes:
        array: Bytes = self._driver.pagelocked_empty(max(size_bytes, 1), np.uint8)
        self._pinned.append(array)
        return array

    def to_device(self, address: int, host: Bytes, stream: int) -> None:
        self._driver.memcpy_htod_async(address, host, self._streams[stream])

    def to_host(self, host: Bytes, address: int, stream: int) -> None:
        self._driver.memcpy_dtoh_async(host, address, self._streams[stream])

    def close(self) -> None:
        with self.active():
            for buffer in self._buffers.values():
                buffer.free()
            # pycuda frees these when their last reference goes, which must happen inside the context.
            self._buffers.clear()
            self._streams.clear()
            self._pinned.clear()
        self._context.detach()


class CudaPython:
    """`Cuda` through cuda-python's driver API, in which every call returns (error, *results)."""

    name = "cuda-python"

    def __init__(self, index: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError:  # cuda-python before 12.6
            from cuda import cuda as driver

        self._driver = driver
        self._call(driver.cuInit(0))
        self._device = self._call(driver.cuDeviceGet(index))
        self._context = self._call(driver.cuDevicePrimaryCtxRetain(self._device))
        self._buffers: set[int] = set()
        self._streams: set[int] = set()
        self._pinned: list[int] = []

    def _call(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if int(error) != 0:
            raise DeployError(f"CUDA driver call failed: {error}.", remedy="Check the GPU with: fedspine-edge doctor")
        return values[0] if values else None

    @contextmanager
    def active(self) -> Iterator[None]:
        self._call(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._call(self._driver.cuCtxPopCurrent())

    def stream(self) -> int:
        stream = int(self._call(self._driver.cuStreamCreate(1)))  # CU_STREAM_NON_BLOCKING
        self._streams.add(stream)
        return stream

    def synchronize(self, stream: int) -> None:
        self._call(self._driver.cuStreamSynchronize(stream))

    def alloc(self, size_bytes: int) -> int:
        address = int(self._call(self._driver.cuMemAlloc(max(size_bytes, 1))))
        self._buffers.add(address)
        return address

    def free(self, address: int) -> None:
        self._buffers.remove(address)
        self._call(self._driver.cuMemFree(address))

    def pinned(self, size_bytes: int) -> Bytes:
        address = int(self._call(self._driver.cuMemAllocHost(max(size_bytes, 1))))
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(size_bytes, 1)).from_address(address))

    def to_device(self, address: int, host: Bytes, stream: int) -> None:
        self._call(self._driver.cuMemcpyHtoDAsync(address, host.ctypes.data, host.nbytes, stream))

    def to_host(self, host: Bytes, address: int, stream: int) -> None:
        self._call(self._driver.cuMemcpyDtoHAsync(host.ctypes.data, address, host.nbytes, stream))

    def close(self) -> None:
        with self.active():
            for address in [*self._buffers]:
                self.free(address)
            for address in self._pinned:
                self._call(self._driver.cuMemFreeHost(address))
            for stream in self._streams:
                self._call(self._driver.cuStreamDestroy(stream))
            self._pinned.clear()
            self._streams.clear()
        self._call(self._driver.cuDevicePrimaryCtxRelease(self._device))

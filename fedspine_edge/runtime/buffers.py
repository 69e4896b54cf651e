"""Memory of an engine's inputs and outputs: device buffers with pinned host memory for the copies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.engine.cuda_driver import Bytes, Cuda

ALIGNMENT = 256
"""Alignment of cuMemAlloc, which TensorRT requires of tensor addresses."""


@dataclass(frozen=True)
class DeviceTensor:
    """An input or output tensor that stays on the device, such as a part of the KV cache."""

    address: int
    shape: tuple[int, ...]
    is_input: bool


@dataclass(frozen=True)
class OutputSlice:
    """The part of an output of shape (batch, tokens, ...) that is copied to the host.

    It consists of `rows` pieces of `row_bytes` bytes, each at the end of a stride: one row per sequence for the logits
    of the last tokens, or a single row for the whole output.
    """

    shape: tuple[int, ...]
    rows: int
    row_bytes: int
    stride_bytes: int

    @classmethod
    def whole(cls, shape: tuple[int, ...], itemsize: int) -> OutputSlice:
        """Return the slice that contains the whole output."""
        size = math.prod(shape) * itemsize
        return cls(shape, 1, size, size)

    @classmethod
    def last_tokens(cls, shape: tuple[int, ...], itemsize: int) -> OutputSlice:
        """Return the slice that contains the last token of every sequence."""
        batch, tokens, *rest = shape
        row = math.prod(rest) * itemsize
        return cls((batch, 1, *rest), batch, row, tokens * row)

    @property
    def size_bytes(self) -> int:
        return self.rows * self.row_bytes

    def copies(self) -> list[tuple[int, int, int]]:
        """Return (offset on the device, offset on the host, number of bytes) for each row."""
        skipped = self.stride_bytes - self.row_bytes
        return [
            (row * self.stride_bytes + skipped, row * self.row_bytes, self.row_bytes)
            for row in range(self.rows if self.row_bytes else 0)
        ]


class Buffer:
    """The device memory of one tensor and the pinned host memory that is copied to or from it.

    Where CPU and GPU share memory, the pinned memory is used by both and nothing is copied. The buffer grows on
    demand, by at least a factor of two and up to `limit_bytes`.
    """

    def __init__(self, cuda: Cuda, limit_bytes: int) -> None:
        self._cuda, self._limit = cuda, limit_bytes
        self._device: int | None = None
        self._device_bytes = 0
        self._host: Bytes | None = None
        self.address = 0

    def reserve(self, device_bytes: int, host_bytes: int) -> bool:
        """Grow to the given sizes if necessary, and return whether an address changed. No run may be in progress."""
        if self._cuda.unified:
            device_bytes = host_bytes = max(device_bytes, host_bytes)
        grew = False
        if self._host is None or host_bytes > self._host.nbytes:
            size = self._grown(host_bytes, 0 if self._host is None else self._host.nbytes)
            self._free_host()
            self._host = self._cuda.pinned(size)
            grew = True
            if self._cuda.unified:
                self.address = self._cuda.address_of(self._host)
        if not self._cuda.unified and (self._device is None or device_bytes > self._device_bytes):
            size = self._grown(device_bytes, self._device_bytes)
            self._free_device()
            self._device = self.address = self._cuda.alloc(size)
            self._device_bytes = size
            grew = True
        return grew

    def _grown(self, needed: int, current: int) -> int:
        return max(needed, min(2 * current, self._limit), 1)

    @property
    def host(self) -> Bytes:
        assert self._host is not None
        return self._host

    def stage(self, array: Array) -> None:
        """Copy an input into the pinned memory."""
        self.host[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def upload(self, size_bytes: int, stream: int) -> None:
        """Copy the first `size_bytes` bytes of the pinned memory to the device."""
        if size_bytes and not self._cuda.unified:
            self._cuda.to_device(self.address, self.host[:size_bytes], stream)

    def download(self, output: OutputSlice, stream: int) -> None:
        """Copy a slice of the output to the pinned memory."""
        if not self._cuda.unified:
            for source, target, size in output.copies():
                self._cuda.to_host(self.host[target : target + size], self.address + source, stream)

    def result(self, output: OutputSlice, dtype: str) -> Array:
        """Return the downloaded slice as a new array, because the next run overwrites the pinned memory."""
        rows = np.empty((output.rows, output.row_bytes), np.uint8)
        for row, (source, target, size) in zip(rows, output.copies()):
            start = source if self._cuda.unified else target
            row[:] = self.host[start : start + size]
        array: Array = rows.reshape(-1).view(dtype).reshape(output.shape)
        return array

    def free(self) -> None:
        """Free the host and the device memory."""
        self._free_host()
        self._free_device()

    def _free_host(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            self._cuda.free_pinned(host)

    def _free_device(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            self._cuda.free(device)

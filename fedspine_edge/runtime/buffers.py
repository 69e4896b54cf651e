"""Where an engine's tensors lie: buffers that the host sees, and the KV cache that it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import TensorInfo
from fedspine_edge.engine.cuda_driver import Bytes, Cuda
from fedspine_edge.errors import DeployError

ALIGNMENT = 256
"""What cuMemAlloc aligns to, and TensorRT asks of its tensors' addresses."""


@dataclass(frozen=True)
class OutputSlice:
    """What the host wants of an output of (batch, tokens, ...): `rows` pieces of `row_bytes`, each the end of a stride.

    One row per sequence for the logits of last tokens; one row in all for everything.
    """

    shape: tuple[int, ...]
    rows: int
    row_bytes: int
    stride_bytes: int

    @classmethod
    def whole(cls, shape: tuple[int, ...], itemsize: int) -> OutputSlice:
        size = math.prod(shape) * itemsize
        return cls(shape, 1, size, size)

    @classmethod
    def last_tokens(cls, shape: tuple[int, ...], itemsize: int) -> OutputSlice:
        batch, tokens, *rest = shape
        row = math.prod(rest) * itemsize
        return cls((batch, 1, *rest), batch, row, tokens * row)

    @property
    def size_bytes(self) -> int:
        return self.rows * self.row_bytes

    def copies(self) -> list[tuple[int, int, int]]:
        """(offset on the device, offset on the host, bytes) of each row."""
        skipped = self.stride_bytes - self.row_bytes
        return [
            (row * self.stride_bytes + skipped, row * self.row_bytes, self.row_bytes)
            for row in range(self.rows if self.row_bytes else 0)
        ]


class Buffer:
    """The device memory of one tensor and, as far as the host sees it, the pinned memory beside it.

    It grows to what is needed, at least doubling, and never beyond `limit_bytes`.
    """

    def __init__(self, cuda: Cuda, limit_bytes: int) -> None:
        self._cuda, self._limit = cuda, limit_bytes
        self._device: int | None = None
        self._device_bytes = 0
        self._host: Bytes | None = None
        self.address = 0

    def reserve(self, device_bytes: int, host_bytes: int) -> bool:
        """Makes room; True where the addresses are new. No run may be under way."""
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

    def _grown(self, needed: int, present: int) -> int:
        return max(needed, min(2 * present, self._limit), 1)

    @property
    def host(self) -> Bytes:
        assert self._host is not None
        return self._host

    def stage(self, array: Array) -> None:
        """Puts an input where `upload` takes it from."""
        self.host[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def upload(self, size_bytes: int, stream: int) -> None:
        if size_bytes and not self._cuda.unified:
            self._cuda.to_device(self.address, self.host[:size_bytes], stream)

    def download(self, part: OutputSlice, stream: int) -> None:
        if not self._cuda.unified:
            for source, target, size in part.copies():
                self._cuda.to_host(self.host[target : target + size], self.address + source, stream)

    def result(self, part: OutputSlice, dtype: str) -> Array:
        """A copy of what `download` brought: the next run overwrites the pinned memory."""
        rows = np.empty((part.rows, part.row_bytes), np.uint8)
        for row, (source, target, size) in zip(rows, part.copies()):
            start = source if self._cuda.unified else target
            row[:] = self.host[start : start + size]
        found: Array = rows.reshape(-1).view(dtype).reshape(part.shape)
        return found

    def free(self) -> None:
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


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor that is on the device already (`is_input`) or stays there: in the KV cache."""

    address: int
    shape: tuple[int, ...]
    is_input: bool


class KvCache:
    """The KV cache of one text, in two halves on the device: a step reads one and writes the other.

    present = past with the new tokens behind it, so every step writes the cache anew. For that reason the half to be
    written can grow without copying a byte.
    """

    def __init__(self, cuda: Cuda, tensors: Sequence[tuple[TensorInfo, TensorInfo]], batch: int, limit: int) -> None:
        self._cuda, self._tensors, self._batch, self._limit = cuda, tensors, batch, limit
        self.tokens = 0
        self._halves = [0, 0]
        self._capacity = [0, 0]
        try:
            for half in (0, 1):
                self._halves[half] = cuda.alloc(ALIGNMENT)  # an empty tensor needs an address, too
        except BaseException:
            self.free()
            raise

    def bind(self, tokens: int) -> dict[str, DeviceTensor]:
        """Where the next step, of `tokens` new tokens, reads the cache and writes it."""
        total = self.tokens + tokens
        if total > self._limit:
            raise DeployError(f"The KV cache holds at most {self._limit} tokens, not {total}.")
        if total > self._capacity[1]:
            self._grow(total)
        kept = {}
        for half, length in ((0, self.tokens), (1, total)):
            addresses = self._addresses(half)
            for pair in self._tensors:
                tensor = pair[half]
                shape = tensor.sized({"batch": self._batch, "past": length, "total": length})
                kept[tensor.name] = DeviceTensor(next(addresses), shape, is_input=half == 0)
        return kept

    def advance(self, tokens: int) -> None:
        """After the step: what it wrote is what the next one reads."""
        self.tokens += tokens
        self._halves.reverse()
        self._capacity.reverse()

    def _grow(self, total: int) -> None:
        capacity = min(self._limit, max(2 * self._capacity[1], -(-total // 64) * 64))
        address, self._halves[1], self._capacity[1] = self._halves[1], 0, 0
        self._cuda.free(address)
        self._halves[1] = self._cuda.alloc(sum(self._sizes(capacity)))
        self._capacity[1] = capacity

    def _sizes(self, capacity: int) -> list[int]:
        sizes = {"batch": self._batch, "past": capacity, "total": capacity}
        exact = [math.prod(past.sized(sizes)) * np.dtype(past.dtype).itemsize for past, _ in self._tensors]
        return [-(-size // ALIGNMENT) * ALIGNMENT for size in exact]

    def _addresses(self, half: int) -> Iterator[int]:
        address = self._halves[half]
        for size in self._sizes(self._capacity[half]):
            yield address
            address += size

    def free(self) -> None:
        with ExitStack() as stack:
            for address in self._halves:
                if address:
                    stack.callback(self._cuda.free, address)
            self._halves = [0, 0]

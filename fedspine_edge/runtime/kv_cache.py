"""The KV cache of decoders at run time: tensor names, the empty cache, and the cache of an engine on the device.

`OnnxRuntimeRunner` keeps its cache as ONNX Runtime's own values; `KvCache` is the cache of a TensorRT engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import TensorInfo
from fedspine_edge.engine.cuda_driver import Cuda
from fedspine_edge.errors import DeployError
from fedspine_edge.runtime.buffers import ALIGNMENT, DeviceTensor


def past_name(present: str) -> str:
    """Return the input that receives an output of the previous step: present.0.key → past_key_values.0.key."""
    return present.replace("present.", "past_key_values.", 1)


def empty_kv_cache(tensors: Sequence[TensorInfo], batch: int) -> dict[str, Array]:
    """Return every KV cache input among `tensors` with zero tokens."""
    sizes = {"batch": batch, "past": 0}
    return {t.name: np.zeros(t.sized(sizes), dtype=t.dtype) for t in tensors if t.kind == "past"}


class KvCache:
    """The KV cache of one batch of sequences in two device buffers: each step reads one and writes the other.

    The model's `present` outputs contain the whole past plus the new tokens, so every step rewrites the cache. The
    buffer to be written can therefore grow without copying its content.

    Args:
        cuda: Driver; its context must be active in every call.
        tensors: Pairs of a `past_key_values` input and the `present` output that belongs to it.
        batch: Number of sequences.
        max_tokens: Capacity limit in tokens per sequence.
    """

    def __init__(
        self, cuda: Cuda, tensors: Sequence[tuple[TensorInfo, TensorInfo]], batch: int, max_tokens: int
    ) -> None:
        self._cuda, self._tensors, self._batch, self._max_tokens = cuda, tensors, batch, max_tokens
        self.tokens = 0
        self._buffers = [0, 0]
        self._capacity = [0, 0]
        try:
            for index in (0, 1):
                self._buffers[index] = cuda.alloc(ALIGNMENT)  # even an empty tensor needs an address
        except BaseException:
            self.free()
            raise

    def bind(self, tokens: int) -> dict[str, DeviceTensor]:
        """Return the tensors that the next step, which adds `tokens` tokens, reads and writes.

        Raises `DeployError` if the cache would exceed its limit.
        """
        total = self.tokens + tokens
        if total > self._max_tokens:
            raise DeployError(f"The KV cache holds at most {self._max_tokens} tokens, but {total} are needed.")
        if total > self._capacity[1]:
            self._grow(total)
        bound = {}
        for index, length in ((0, self.tokens), (1, total)):
            addresses = self._addresses(index)
            for pair in self._tensors:
                tensor = pair[index]
                shape = tensor.sized({"batch": self._batch, "past": length, "total": length})
                bound[tensor.name] = DeviceTensor(next(addresses), shape, is_input=index == 0)
        return bound

    def advance(self, tokens: int) -> None:
        """Swap the buffers after a step, so that the next step reads what this one wrote."""
        self.tokens += tokens
        self._buffers.reverse()
        self._capacity.reverse()

    def _grow(self, total: int) -> None:
        capacity = min(self._max_tokens, max(2 * self._capacity[1], -(-total // 64) * 64))
        address, self._buffers[1], self._capacity[1] = self._buffers[1], 0, 0
        self._cuda.free(address)
        self._buffers[1] = self._cuda.alloc(sum(self._tensor_bytes(capacity)))
        self._capacity[1] = capacity

    def _tensor_bytes(self, capacity: int) -> list[int]:
        sizes = {"batch": self._batch, "past": capacity, "total": capacity}
        exact = [math.prod(past.sized(sizes)) * np.dtype(past.dtype).itemsize for past, _ in self._tensors]
        return [-(-size // ALIGNMENT) * ALIGNMENT for size in exact]

    def _addresses(self, index: int) -> Iterator[int]:
        address = self._buffers[index]
        for size in self._tensor_bytes(self._capacity[index]):
            yield address
            address += size

    def free(self) -> None:
        """Free both buffers."""
        with ExitStack() as stack:
            for address in self._buffers:
                if address:
                    stack.callback(self._cuda.free, address)
            self._buffers = [0, 0]

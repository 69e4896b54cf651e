"""Runs a TensorRT or TensorRT-RTX engine: which profile, which lane, where the KV cache lies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import EngineInfo, TensorInfo
from fedspine_edge.engine.cuda_driver import Cuda
from fedspine_edge.engine.tensorrt_api import Backend, OpenEngine, open_engine
from fedspine_edge.errors import DataError, DeployError, EngineIncompatible
from fedspine_edge.runtime.buffers import KvCache, OutputSlice
from fedspine_edge.runtime.execution import ExecutionSlot, InferenceRequest
from fedspine_edge.runtime.onnxruntime_runner import past_name

MAX_LANES = 2
"""Runs at the same time. A second one fills the gaps of the first; each costs the engine's scratch memory once more."""
LANE_TIMEOUT_S = 60.0
"""How long a run waits for a lane, and `close` for the runs."""


class EngineRunner:
    """A serialized plan, ready to run; safe to call from several threads.

    Lanes are made when they are needed: one caller has one. A lane in which something failed is thrown away and
    the next run makes a new one. The CUDA context is made current around every call, so any thread may call.

    Args:
        plan: What the builder returned.
        info: The sidecar's account of it, already checked against this machine.
        inputs: The model's inputs.
        outputs: The model's outputs.
        backend: The TensorRT that built it.
        cuda: The driver; this runner closes it.
        rebuild: The command that builds the engine anew, for errors.
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
        self._info, self._cuda, self._rebuild = info, cuda, rebuild
        self._inputs, self._outputs = inputs, outputs
        by_name = {tensor.name: tensor for tensor in (*inputs, *outputs)}
        self._cached = [(by_name[past_name(t.name)], t) for t in outputs if t.name.startswith("present.")]
        on_device = {tensor.name for pair in self._cached for tensor in pair}
        self._tensors = by_name
        self._staged = {name: tensor for name, tensor in by_name.items() if name not in on_device}
        self.max_batch: int | None = max(profile.batch[2] for profile in info.profiles)
        self.max_tokens: int | None = max(profile.tokens[2] for profile in info.profiles)
        self._max_cached = max(profile.tokens[2] + profile.past[2] for profile in info.profiles)
        self._changed = threading.Condition()
        self._idle: list[ExecutionSlot] = []
        self._count = 0
        self._caches: set[KvCache] = set()
        self._open: OpenEngine | None = None
        try:
            with cuda.active():
                self._open = open_engine(backend, plan, rebuild)
                self._check_tensors(self._open)
                self._idle.append(self._new_lane(self._open))
                self._count = 1
        except BaseException:
            if self._open is not None:
                with suppress(DeployError), cuda.active():  # TensorRT's objects must go inside the context
                    self._open.close()
            cuda.close()
            raise

    def _check_tensors(self, opened: OpenEngine) -> None:
        found = {opened.engine.get_tensor_name(index) for index in range(opened.engine.num_io_tensors)}
        if found != self._tensors.keys():
            raise EngineIncompatible(
                f"The engine's tensors {sorted(found)} are not the bundle's {sorted(self._tensors)}.",
                remedy=f"Build it anew: {self._rebuild}",
            )

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        batch, tokens = inputs["input_ids"].shape
        profile = self._profile(batch, tokens, 0)
        staged = {name: array for name, array in inputs.items() if name in self._staged}
        sizes = self._sizes(inputs, past=0)
        outputs = {
            tensor.name: OutputSlice.whole(tensor.sized(sizes), np.dtype(tensor.dtype).itemsize)
            for tensor in self._outputs
            if tensor.name in self._staged
        }
        if not self._cached:
            with self._lane() as lane:
                return lane.run(InferenceRequest(profile, staged, {}, outputs, sizes))
        with self._lane() as lane:
            cache = KvCache(self._cuda, self._cached, batch, self._max_cached)
            try:
                return lane.run(InferenceRequest(profile, staged, cache.bind(tokens), outputs, sizes, repeats=False))
            finally:
                cache.free()

    def step(self, inputs: dict[str, Array], state: KvCache | None, *, last: bool = False) -> tuple[Array, KvCache]:
        """See `Runner`. The cache never leaves the device: what one step writes is what the next one reads."""
        batch, tokens = inputs["input_ids"].shape
        profile = self._profile(batch, tokens, 0 if state is None else state.tokens)
        logits = self._tensors["logits"]
        sizes = self._sizes(inputs, past=0 if state is None else state.tokens)
        part = (OutputSlice.last_tokens if last else OutputSlice.whole)(
            logits.sized(sizes), np.dtype(logits.dtype).itemsize
        )
        with self._lane() as lane:
            cache = state or KvCache(self._cuda, self._cached, batch, self._max_cached)
            self._caches.add(cache)
            try:
                job = InferenceRequest(profile, inputs, cache.bind(tokens), {"logits": part}, sizes, repeats=False)
                found = lane.run(job)["logits"]
            except BaseException:
                if state is None:  # the caller has nothing yet that it could `forget`
                    self._caches.discard(cache)
                    cache.free()
                raise
            cache.advance(tokens)
            return found, cache

    def forget(self, state: KvCache | None) -> None:
        with self._changed:
            if state is None or state not in self._caches:  # after `close`, for instance
                return
            self._caches.remove(state)
        with self._cuda.active():
            state.free()

    def _sizes(self, inputs: dict[str, Array], past: int) -> dict[str, int]:
        batch, tokens = inputs["input_ids"].shape
        sizes = {"batch": batch, "sequence": tokens, "past": past, "total": past + tokens}
        for tensor in self._inputs:
            if "rank" in tensor.shape:
                sizes["rank"] = inputs[tensor.name].shape[tensor.shape.index("rank")]
        return sizes

    def _profile(self, batch: int, tokens: int, past: int) -> int:
        for index, profile in enumerate(self._info.profiles):
            if profile.covers(batch, tokens, past):
                return index
        after = f" after {past}" if past else ""
        known = "; ".join(
            f"batch {profile.batch[0]}–{profile.batch[2]}, tokens {profile.tokens[0]}–{profile.tokens[2]}"
            + (f" after {profile.past[0]}–{profile.past[2]}" if profile.past[2] else "")
            for profile in self._info.profiles
        )
        raise DataError(
            f"The engine has no profile for batch {batch} × {tokens} tokens{after}; it has: {known}.",
            remedy="Build it anew with a profile that covers this shape, or load with `backend` onnxruntime.",
        )

    @contextmanager
    def _lane(self) -> Iterator[ExecutionSlot]:
        """A lane of one's own, inside the CUDA context."""
        opened, lane = self._take()
        failed = lane is None
        try:
            with self._cuda.active():
                failed = True
                if lane is None:
                    lane = self._new_lane(opened)
                try:
                    yield lane
                    failed = False
                finally:
                    if failed:
                        with suppress(DeployError):  # it must not hide the error that led here
                            lane.free()
        finally:
            with self._changed:
                if failed or lane is None:
                    self._count -= 1
                else:
                    self._idle.append(lane)
                self._changed.notify()

    def _take(self) -> tuple[OpenEngine, ExecutionSlot | None]:
        """An idle lane, or None where the caller may make one; waits while all are busy."""
        with self._changed:
            free = self._changed.wait_for(
                lambda: self._open is None or self._idle or self._count < MAX_LANES, timeout=LANE_TIMEOUT_S
            )
            if not free:
                raise DeployError(
                    f"All {MAX_LANES} lanes of the engine were busy for {LANE_TIMEOUT_S:.0f} s.",
                    remedy="Check the GPU with: fedspine-edge doctor; send fewer requests at a time.",
                )
            if self._open is None:
                raise DeployError("This session is closed.", remedy="Load the bundle again.")
            if self._idle:
                return self._open, self._idle.pop()
            self._count += 1
            return self._open, None

    def _new_lane(self, opened: OpenEngine) -> ExecutionSlot:
        limits, common = self._sizes_bytes(2), self._sizes_bytes(1)
        lane = ExecutionSlot(self._cuda, opened, self._staged, limits)
        try:
            lane.reserve(common)
        except BaseException:
            lane.free()
            raise
        return lane

    def _sizes_bytes(self, corner: int) -> dict[str, int]:
        """Bytes of every tensor of the host's at the profiles' smallest (0), most common or largest (2) shape."""
        corners = [profile.sizes(corner) for profile in self._info.profiles]
        sizes = {axis: max(each[axis] for each in corners) for axis in corners[0]}
        return {
            name: int(np.prod(tensor.sized(sizes))) * np.dtype(tensor.dtype).itemsize
            for name, tensor in self._staged.items()
        }

    def close(self) -> None:
        """Waits for the runs under way and gives everything back; calling it again does nothing."""
        with self._changed:
            opened, self._open = self._open, None
            if opened is None:
                return
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._idle) == self._count, timeout=LANE_TIMEOUT_S)
            lanes, self._idle, caches, self._caches = self._idle, [], self._caches, set()
        with ExitStack() as stack:
            stack.callback(self._cuda.close)
            stack.enter_context(self._cuda.active())
            stack.callback(opened.close)
            for lane in lanes:
                stack.callback(lane.free)
            for cache in caches:
                stack.callback(cache.free)

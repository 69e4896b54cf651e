"""Runs a TensorRT or TensorRT-RTX engine: selects the optimization profile and the execution slot of every run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import BundleManifest, EngineInfo
from fedspine_edge.engine.cuda_driver import Cuda
from fedspine_edge.engine.tensorrt_api import Backend, OpenEngine, open_engine
from fedspine_edge.errors import DataError, DeployError, EngineIncompatible
from fedspine_edge.runtime.buffers import OutputSlice
from fedspine_edge.runtime.execution import ExecutionSlot, InferenceRequest
from fedspine_edge.runtime.kv_cache import KvCache, past_name

MAX_SLOTS = 2
"""Number of concurrent runs. A second one uses the gaps of the first; each needs the engine's scratch memory."""
SLOT_TIMEOUT_S = 60.0
"""Time that a run waits for a slot, and that `close` waits for the runs in progress."""


@dataclass(frozen=True)
class Plan:
    """A serialized engine with the record of its build, which was already compared with this machine."""

    data: bytes
    info: EngineInfo
    rebuild: str
    """Command that rebuilds the engine, for error messages."""


class EngineRunner:
    """Implements `Runner` with an engine. All methods can be called from several threads.

    Execution slots are created on demand, so a single caller uses one. A slot in which something failed is discarded,
    and the next run creates a new one. The CUDA context is made current around every call.

    Args:
        plan: The serialized engine.
        manifest: Manifest of the bundle, which describes the model's inputs and outputs.
        backend: The TensorRT that built the plan.
        cuda: Driver; this runner closes it.
    """

    def __init__(self, plan: Plan, manifest: BundleManifest, *, backend: Backend, cuda: Cuda) -> None:
        self._profiles, self._cuda, self._rebuild = plan.info.profiles, cuda, plan.rebuild
        self._inputs, self._outputs = manifest.inputs, manifest.outputs
        self._tensors = {tensor.name: tensor for tensor in (*self._inputs, *self._outputs)}
        self._cache_tensors = [
            (self._tensors[past_name(t.name)], t) for t in self._outputs if t.name.startswith("present.")
        ]
        on_device = {tensor.name for pair in self._cache_tensors for tensor in pair}
        self._host_tensors = {name: tensor for name, tensor in self._tensors.items() if name not in on_device}
        self.max_batch: int | None = max(profile.batch[2] for profile in self._profiles)
        self.max_tokens: int | None = max(profile.tokens[2] for profile in self._profiles)
        self._max_cached_tokens = max(profile.tokens[2] + profile.past[2] for profile in self._profiles)
        self._changed = threading.Condition()
        self._idle_slots: list[ExecutionSlot] = []
        self._slot_count = 0
        self._caches: set[KvCache] = set()
        self._engine: OpenEngine | None = None
        try:
            with cuda.active():
                self._engine = open_engine(backend, plan.data, plan.rebuild)
                self._check_tensors(self._engine)
                self._idle_slots.append(self._new_slot(self._engine))
                self._slot_count = 1
        except BaseException:
            if self._engine is not None:
                with suppress(DeployError), cuda.active():  # TensorRT's objects must be released inside the context
                    self._engine.close()
            cuda.close()
            raise

    def _check_tensors(self, engine: OpenEngine) -> None:
        found = {engine.engine.get_tensor_name(index) for index in range(engine.engine.num_io_tensors)}
        if found != self._tensors.keys():
            raise EngineIncompatible(
                f"The engine has the tensors {sorted(found)}, but the bundle has {sorted(self._tensors)}.",
                remedy=f"Rebuild it: {self._rebuild}",
            )

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        batch, tokens = inputs["input_ids"].shape
        profile = self._select_profile(batch, tokens, 0)
        host_inputs = {name: array for name, array in inputs.items() if name in self._host_tensors}
        sizes = self._axis_sizes(inputs, past=0)
        outputs = {
            tensor.name: OutputSlice.whole(tensor.sized(sizes), np.dtype(tensor.dtype).itemsize)
            for tensor in self._outputs
            if tensor.name in self._host_tensors
        }
        with self._slot() as slot:
            if not self._cache_tensors:
                return slot.run(InferenceRequest(profile, host_inputs, {}, outputs, sizes))
            cache = KvCache(self._cuda, self._cache_tensors, batch, self._max_cached_tokens)
            try:
                return slot.run(
                    InferenceRequest(profile, host_inputs, cache.bind(tokens), outputs, sizes, cacheable=False)
                )
            finally:
                cache.free()

    def step(self, inputs: dict[str, Array], state: KvCache | None, *, last: bool = False) -> tuple[Array, KvCache]:
        """See `Runner`. The KV cache never leaves the device."""
        batch, tokens = inputs["input_ids"].shape
        past = 0 if state is None else state.tokens
        profile = self._select_profile(batch, tokens, past)
        logits = self._tensors["logits"]
        sizes = self._axis_sizes(inputs, past=past)
        make_slice = OutputSlice.last_tokens if last else OutputSlice.whole
        output = make_slice(logits.sized(sizes), np.dtype(logits.dtype).itemsize)
        with self._slot() as slot:
            cache = state or KvCache(self._cuda, self._cache_tensors, batch, self._max_cached_tokens)
            self._caches.add(cache)
            try:
                request = InferenceRequest(
                    profile, inputs, cache.bind(tokens), {"logits": output}, sizes, cacheable=False
                )
                result = slot.run(request)["logits"]
            except BaseException:
                if state is None:  # the caller has no state yet that it could `release`
                    self._caches.discard(cache)
                    cache.free()
                raise
            cache.advance(tokens)
            return result, cache

    def release(self, state: KvCache | None) -> None:
        with self._changed:
            if state is None or state not in self._caches:  # after `close`, for instance
                return
            self._caches.remove(state)
        with self._cuda.active():
            state.free()

    def _axis_sizes(self, inputs: dict[str, Array], past: int) -> dict[str, int]:
        batch, tokens = inputs["input_ids"].shape
        sizes = {"batch": batch, "sequence": tokens, "past": past, "total": past + tokens}
        for tensor in self._inputs:
            if "rank" in tensor.shape:
                sizes["rank"] = inputs[tensor.name].shape[tensor.shape.index("rank")]
        return sizes

    def _select_profile(self, batch: int, tokens: int, past: int) -> int:
        for index, profile in enumerate(self._profiles):
            if profile.covers(batch, tokens, past):
                return index
        after = f" after {past}" if past else ""
        available = "; ".join(
            f"batch {profile.batch[0]}–{profile.batch[2]}, tokens {profile.tokens[0]}–{profile.tokens[2]}"
            + (f" after {profile.past[0]}–{profile.past[2]}" if profile.past[2] else "")
            for profile in self._profiles
        )
        raise DataError(
            f"The engine has no profile for batch {batch} × {tokens} tokens{after}. Its profiles: {available}.",
            remedy="Rebuild it with a profile that covers this shape, or load with `backend` onnxruntime.",
        )

    @contextmanager
    def _slot(self) -> Iterator[ExecutionSlot]:
        """Yield an execution slot for exclusive use, inside the CUDA context."""
        engine, slot = self._acquire()
        failed = slot is None
        try:
            with self._cuda.active():
                failed = True
                if slot is None:
                    slot = self._new_slot(engine)
                try:
                    yield slot
                    failed = False
                finally:
                    if failed:
                        with suppress(DeployError):  # it must not hide the original error
                            slot.free()
        finally:
            with self._changed:
                if failed or slot is None:
                    self._slot_count -= 1
                else:
                    self._idle_slots.append(slot)
                self._changed.notify()

    def _acquire(self) -> tuple[OpenEngine, ExecutionSlot | None]:
        """Return an idle slot, or None if the caller may create one. Wait while all slots are busy."""
        with self._changed:
            available = self._changed.wait_for(
                lambda: self._engine is None or self._idle_slots or self._slot_count < MAX_SLOTS,
                timeout=SLOT_TIMEOUT_S,
            )
            if not available:
                raise DeployError(
                    f"All {MAX_SLOTS} execution slots of the engine were busy for {SLOT_TIMEOUT_S:.0f} s.",
                    remedy="Check the GPU with fedspine-edge doctor, or send fewer concurrent requests.",
                )
            if self._engine is None:
                raise DeployError("This session is closed.", remedy="Load the bundle again.")
            if self._idle_slots:
                return self._engine, self._idle_slots.pop()
            self._slot_count += 1
            return self._engine, None

    def _new_slot(self, engine: OpenEngine) -> ExecutionSlot:
        slot = ExecutionSlot(self._cuda, engine, self._host_tensors, self._host_bytes(2))
        try:
            slot.reserve(self._host_bytes(1))
        except BaseException:
            slot.free()
            raise
        return slot

    def _host_bytes(self, corner: int) -> dict[str, int]:
        """Return the size of every host tensor at the profiles' minimum (0), optimum (1) or maximum (2) shape."""
        corners = [profile.sizes(corner) for profile in self._profiles]
        sizes = {axis: max(each[axis] for each in corners) for axis in corners[0]}
        return {
            name: int(np.prod(tensor.sized(sizes))) * np.dtype(tensor.dtype).itemsize
            for name, tensor in self._host_tensors.items()
        }

    def close(self) -> None:
        """Wait for the runs in progress and free everything. Calling it again has no effect."""
        with self._changed:
            engine, self._engine = self._engine, None
            if engine is None:
                return
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._idle_slots) == self._slot_count, timeout=SLOT_TIMEOUT_S)
            slots, self._idle_slots, caches, self._caches = self._idle_slots, [], self._caches, set()
        with ExitStack() as stack:
            stack.callback(self._cuda.close)
            stack.enter_context(self._cuda.active())
            stack.callback(engine.close)
            for slot in slots:
                stack.callback(slot.free)
            for cache in caches:
                stack.callback(cache.free)

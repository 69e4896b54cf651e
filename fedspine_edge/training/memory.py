"""Estimate of the memory that training needs, from a dry run of one step on fake tensors (shapes without storage).

The model runs forward and backward on torch's fake tensors while every allocation and release is counted. The result
therefore follows the family, widths, rank, batch, length, dtype, quantization and gradient checkpointing without a
formula for any of them. Memory outside of torch's allocations is a measured allowance.
docs/results/memory.md compares estimates with measured peaks.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedspine_edge.kernels import native
from fedspine_edge.kernels.quantized import QuantizedWeight
from fedspine_edge.model.layout import module_names
from fedspine_edge.model.lora import stored_weight
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.training.batching import Encoded, Ints, collate, pack
from fedspine_edge.training.loss import can_pack, loss_sum

CPU_ALLOWANCE_BYTES = 28 << 20
"""Code, threads and workspaces that libraries load in the first steps on a CPU, measured on x86-64."""

ONEDNN_ALLOWANCE_BYTES = 16 << 20
"""Additional memory in 16 bits, where oneDNN compiles products for each shape and reorders weights."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of training in bytes, and its parts."""

    weights_bytes: int
    """Frozen base, head and buffers."""
    adapters_bytes: int
    """Adapters."""
    optimizer_bytes: int
    """Adam's two moments of adapters and head."""
    step_bytes: int
    """Peak of activations, gradients and temporary tensors in a step."""
    allowance_bytes: int
    """Memory of libraries outside of torch's allocations."""
    micro_batch: int
    """Examples per forward pass."""
    data_bytes: int = 0
    """Training examples as text and as tokens; 0 if no data was given."""

    @property
    def peak_bytes(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__ if "bytes" in name)

    def __str__(self) -> str:
        mib = {name: round(getattr(self, name) / 2**20, 1) for name in self.__dataclass_fields__ if "bytes" in name}
        shown = {name: value for name, value in mib.items() if value or name != "data_bytes"}
        parts = ", ".join(f"{name.removesuffix('_bytes')} {value}" for name, value in shown.items())
        return f"{self.peak_bytes / 2**20:.1f} MiB at {self.micro_batch} examples at a time: {parts}"


def estimate(
    model: PrunableModel, *, micro_batch: int, tokens: int, r: int | None = None, pack_rows: bool = False
) -> MemoryEstimate:
    """Estimate the peak memory of training steps.

    Args:
        model: Model at the layout to be trained.
        micro_batch: Examples per forward pass.
        tokens: Length of the longest example in tokens.
        r: Rank of the adapters (default: that of the model).
        pack_rows: Whether examples share rows.
    """
    if r is not None and r != model.r:
        model = _copy_sharing_tensors(model)
        model.attach_lora(r, model.scaling, seed=0)
    tokens = _at_most(tokens, model)
    adapters = [p for n, p in model.trainable_parameters().items() if ".lora_" in n]
    trained = list(model.trainable_parameters().values())
    everything = _bytes(*model.module.parameters(), *model.module.buffers())
    stored = [stored_weight(_base(model, name)) for name in module_names(model.spec)]
    largest = max(weight.shape.numel() for weight in stored)
    step = _traced_peak(model, _batch(model, micro_batch, tokens, pack_rows))
    # After the backward pass, gradients remain and one linear is scored, which may need more than the step.
    quantized = any(isinstance(weight, QuantizedWeight) for weight in stored)
    scoring = 4 * largest * (3 * (not native.available()) + quantized)
    return MemoryEstimate(
        weights_bytes=everything - _bytes(*adapters),
        adapters_bytes=_bytes(*adapters),
        optimizer_bytes=2 * sum(p.numel() * p.element_size() for p in trained),
        step_bytes=max(step, _bytes(*trained) + scoring),
        allowance_bytes=_allowance(model),
        micro_batch=micro_batch,
    )


def rank_costs(model: PrunableModel, *, tokens: int, limit_bytes: int = 0) -> tuple[int, int]:
    """Return (bytes at rank 0, bytes per rank) of a step on one example at the model's layout.

    A dry run takes about a second. If every rank fits into `limit_bytes` at a wider layout that was estimated before,
    the result of that layout is returned.

    Args:
        model: Model with adapters of any rank, or none.
        tokens: Length of the example in tokens.
        limit_bytes: Available memory.
    """
    tokens = _at_most(tokens, model)
    size, known = (*_widths(model), tokens), _known_costs(*_kind(model))
    for other, costs in known:
        if other == size or (_covers(other, size) and costs[0] + LARGEST_RANK * costs[1] <= limit_bytes):
            return costs
    packs = can_pack(model, tokens)
    peak = estimate(model, micro_batch=1, tokens=tokens, r=REFERENCE_RANK, pack_rows=packs).peak_bytes
    spec = model.spec
    adapters = sum(model.layout.rows(name).size + model.layout.cols(name).size for name in module_names(spec))
    # parameter, gradient and two moments in float32, and x·Aᵀ of every linear
    per_rank = 16 * adapters + model.compute_dtype.itemsize * tokens * len(module_names(spec))
    costs = (peak - REFERENCE_RANK * per_rank, per_rank)
    known.appendleft((size, costs))
    return costs


def fitting_micro_batch(model: PrunableModel, *, batch_size: int, tokens: int, limit_bytes: int) -> int:
    """Return the largest micro-batch that fits, at least 1: the batch size halved until a step fits `limit_bytes`."""
    known, micro_batch = _known_peaks(*_kind(model)), batch_size
    while micro_batch > 1:
        size = (*_widths(model), model.r or 0, micro_batch, tokens)
        if any(_covers(other, size) and peak <= limit_bytes for other, peak in known):
            break  # a larger step is known to fit
        packs = can_pack(model, tokens)
        peak = estimate(model, micro_batch=micro_batch, tokens=tokens, pack_rows=packs).peak_bytes
        known.appendleft((size, peak))
        if peak <= limit_bytes:
            break
        micro_batch //= 2
    return max(1, micro_batch)


LARGEST_RANK = 256
REFERENCE_RANK = 8
FEW_LAYERS, MORE_LAYERS = 3, 5
"""Depths of the dry runs from which the peak of a deeper model with equal layers is extrapolated linearly."""

Size = tuple[int, ...]
"""Kept heads and channels of every layer, and other numbers with which the peak grows."""


@lru_cache(maxsize=16)
def _known_costs(*kind: Any) -> deque[tuple[Size, tuple[int, int]]]:
    """Return the results of `rank_costs` for one kind of model, latest first."""
    return deque(maxlen=64)


@lru_cache(maxsize=16)
def _known_peaks(*kind: Any) -> deque[tuple[Size, int]]:
    """Return the estimated peaks for one kind of model, latest first."""
    return deque(maxlen=64)


def _kind(model: PrunableModel) -> tuple[Any, ...]:
    return (model.spec, model.task, model.base_dtype, model.gradient_checkpointing, _device(model))


def _widths(model: PrunableModel) -> Size:
    return tuple(count for counts in model.layout.counts for count in counts)


def _covers(larger: Size, smaller: Size) -> bool:
    return all(a >= b for a, b in zip(larger, smaller, strict=True))


def _traced_peak(model: PrunableModel, batch: dict[str, Ints]) -> int:
    """Return the peak bytes of one forward and backward pass, in addition to the model itself."""
    depth = model.spec.num_layers
    if depth <= MORE_LAYERS or len(set(model.layout.counts)) > 1:
        return _peak(model, batch)
    few, more = (_peak(_fewer_layers(model, count), batch) for count in (FEW_LAYERS, MORE_LAYERS))
    return few + (more - few) * (depth - FEW_LAYERS) // (MORE_LAYERS - FEW_LAYERS)


def _fewer_layers(model: PrunableModel, count: int) -> PrunableModel:
    """Return a shallower model on the same tensors. It keeps the last layer, which may compute less than the others."""
    shallow = _copy_sharing_tensors(model)
    path, _, attribute = f"{model.architecture.backbone}.{model.architecture.layers}".rpartition(".")
    parent = shallow.module.get_submodule(path)
    layers = getattr(parent, attribute)
    setattr(parent, attribute, layers[: count - 1] + layers[-1:])
    shallow.module.config.num_hidden_layers = count
    return shallow


def _step(model: PrunableModel, batch: dict[str, Ints]) -> None:
    model.module.train(model.gradient_checkpointing)
    loss, _ = loss_sum(model, batch)
    loss.backward()


def _batch(model: PrunableModel, rows: int, tokens: int, pack_rows: bool) -> dict[str, Ints]:
    token = 1 if model.module.config.pad_token_id == 0 else 0
    ids = [token] * tokens
    labels = None if model.task != "token_classification" else [0] * tokens
    segments = [0] * tokens if model.architecture.num_token_types(model.module.config) > 1 else None
    examples = [Encoded(ids, 0, segments, labels)] * rows
    return pack(examples, range(rows), 0, tokens) if pack_rows else collate(examples, range(rows), 0)


def _at_most(tokens: int, model: PrunableModel) -> int:
    limit = model.architecture.hard_max_tokens(model.module.config)
    return tokens if limit is None else min(tokens, limit)


def _base(model: PrunableModel, name: str) -> nn.Module:
    linear = model.linear(name)
    return getattr(linear, "base_layer", linear)


def _allowance(model: PrunableModel) -> int:
    if _device(model) != "cpu":
        return 0
    return CPU_ALLOWANCE_BYTES + (0 if model.compute_dtype == torch.float32 else ONEDNN_ALLOWANCE_BYTES)


def _device(model: PrunableModel) -> str:
    return str(next(model.module.parameters()).device.type)


def _bytes(*tensors: Tensor) -> int:
    """Return the bytes of the storages of `tensors`, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class _Allocations(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of storages that are allocated while it is active and not yet released."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def ignore(self, tensors: list[Tensor]) -> None:
        """Do not count the storages of these tensors."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[id(storage)] = storage

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def released(_: Any) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, released)


def _copy_sharing_tensors(model: PrunableModel) -> PrunableModel:
    """Return a copy of the model that shares all tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.module.parameters(), *model.module.buffers())})


def _peak(model: PrunableModel, batch: dict[str, Ints]) -> int:
    """Return the peak of allocated bytes while a copy of `model` on fake tensors takes a step."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        fakes: dict[int, Any] = {}
        for parameter in model.module.parameters():
            fakes[id(parameter)] = nn.Parameter(fake.from_tensor(parameter.data), parameter.requires_grad)
        for buffer in model.module.buffers():
            fakes[id(buffer)] = fake.from_tensor(buffer)
        allocations = _Allocations()
        allocations.ignore(list(fakes.values()))
        fake_model = copy.deepcopy(model, fakes)
        with allocations:
            _step(fake_model, batch)
        return allocations.peak

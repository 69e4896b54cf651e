"""How much memory training will take, from a rehearsal of one step on tensors without contents.

The model's own code runs forward and backward on shapes alone (torch's fake tensors) while every allocation and
release is counted, so the answer follows the family, the widths that are left, rank, batch, length, dtype, quantisation
and recomputation without a formula for any of them. What runs outside of torch's allocations is a measured allowance:
docs/memory.md has both beside measured peaks.
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
"""Code, threads and workspaces of the libraries that the first steps load on a CPU, as measured on x86-64."""

ONEDNN_ALLOWANCE_BYTES = 16 << 20
"""What comes on top in 16 bits: oneDNN compiles its products for the shapes it meets, and reorders weights for them."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of training in bytes, and what it consists of."""

    weights_bytes: int
    """Frozen base and head, quantised or not, with buffers."""
    adapters_bytes: int
    """Adapters; they and the head are trained."""
    optimizer_bytes: int
    """Adam's two moments of everything trained."""
    step_bytes: int
    """Activations, gradients and temporaries where a step needs most of them."""
    allowance_bytes: int
    """Libraries, not torch's tensors."""
    micro_batch: int
    """Examples at a time that this is for."""

    @property
    def peak_bytes(self) -> int:
        parts = (self.weights_bytes, self.adapters_bytes, self.optimizer_bytes, self.step_bytes, self.allowance_bytes)
        return sum(parts)

    def __str__(self) -> str:
        mib = {name: round(getattr(self, name) / 2**20, 1) for name in self.__dataclass_fields__ if "bytes" in name}
        parts = ", ".join(f"{name.removesuffix('_bytes')} {value}" for name, value in mib.items())
        return f"{self.peak_bytes / 2**20:.1f} MiB at {self.micro_batch} examples at a time: {parts}"


def estimate(
    model: PrunableModel, *, micro_batch: int, tokens: int, r: int | None = None, pack_rows: bool = False
) -> MemoryEstimate:
    """The peak of training steps on `micro_batch` examples of `tokens` tokens each.

    Args:
        model: At the layout to be trained.
        micro_batch: Examples per forward pass.
        tokens: Of every example; with examples of different lengths, of the longest.
        r: Rank of the adapters, if not those that the model has.
        pack_rows: Whether examples share rows.
    """
    if r is not None and r != model.r:
        model = _shared_copy(model)
        model.attach_lora(r, model.scaling, seed=0)
    tokens = _at_most(tokens, model)
    adapters = [p for n, p in model.trainable_parameters().items() if ".lora_" in n]
    trained = list(model.trainable_parameters().values())
    everything = _bytes(*model.module.parameters(), *model.module.buffers())
    stored = [stored_weight(_base(model, name)) for name in module_names(model.spec)]
    widest = max(weight.shape.numel() for weight in stored)
    step = _rehearsed(model, _batch(model, micro_batch, tokens, pack_rows))
    # After backward only the gradients are left, and the scoring of one linear; where this is more, it is the peak.
    quantised = any(isinstance(weight, QuantizedWeight) for weight in stored)
    scoring = 4 * widest * (3 * (not native.available()) + quantised)
    return MemoryEstimate(
        weights_bytes=everything - _bytes(*adapters),
        adapters_bytes=_bytes(*adapters),
        optimizer_bytes=2 * sum(p.numel() * p.element_size() for p in trained),
        step_bytes=max(step, _bytes(*trained) + scoring),
        allowance_bytes=_allowance(model),
        micro_batch=micro_batch,
    )


def rank_costs(model: PrunableModel, *, tokens: int, limit_bytes: int = 0) -> tuple[int, int]:
    """(bytes at rank 0, bytes each rank adds) of a step on one example of `tokens` tokens, at the model's layout.

    The model may have adapters of any rank, or none. Where every rank fits into `limit_bytes` at a wider layout that
    was asked about before, the answer is that layout's, since a rehearsal takes about a second.
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
    """The most examples at a time, out of the batch size halved again and again, with which a step fits; at least 1."""
    known, micro_batch = _known_peaks(*_kind(model)), batch_size
    while micro_batch > 1:
        size = (*_widths(model), model.r or 0, micro_batch, tokens)
        if any(_covers(other, size) and peak <= limit_bytes for other, peak in known):
            break  # a step that is larger in every respect fits
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
"""Rehearsed depths from which that of a deeper model with equal layers follows: the peak is a straight line in it."""

Size = tuple[int, ...]
"""Kept heads and channels of every layer, and other numbers that no peak falls with."""


@lru_cache(maxsize=16)
def _known_costs(*kind: Any) -> deque[tuple[Size, tuple[int, int]]]:
    """`rank_costs` so far for one kind of model, the latest first."""
    return deque(maxlen=64)


@lru_cache(maxsize=16)
def _known_peaks(*kind: Any) -> deque[tuple[Size, int]]:
    """Peaks so far for one kind of model, the latest first."""
    return deque(maxlen=64)


def _kind(model: PrunableModel) -> tuple[Any, ...]:
    return (model.spec, model.task, model.base_dtype, model.gradient_checkpointing, _device(model))


def _widths(model: PrunableModel) -> Size:
    return tuple(count for counts in model.layout.counts for count in counts)


def _covers(larger: Size, smaller: Size) -> bool:
    return all(a >= b for a, b in zip(larger, smaller, strict=True))


def _rehearsed(model: PrunableModel, batch: dict[str, Ints]) -> int:
    """Bytes that one forward and backward pass take at most, besides what was there before."""
    depth = model.spec.num_layers
    if depth <= MORE_LAYERS or len(set(model.layout.counts)) > 1:
        return _peak(model, batch)
    few, more = (_peak(_fewer_layers(model, count), batch) for count in (FEW_LAYERS, MORE_LAYERS))
    return few + (more - few) * (depth - FEW_LAYERS) // (MORE_LAYERS - FEW_LAYERS)


def _fewer_layers(model: PrunableModel, count: int) -> PrunableModel:
    """A shallower model on the same tensors; its last layer is the model's, which may have less to do."""
    shallow = _shared_copy(model)
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
    word = 1 if model.module.config.pad_token_id == 0 else 0
    ids = [word] * tokens
    labels = None if model.task != "token_classification" else [0] * tokens
    kinds = [0] * tokens if getattr(model.module.config, "type_vocab_size", 0) else None
    examples = [Encoded(ids, 0, kinds, labels)] * rows
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
    """Of the storages behind them, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class _Allocations(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of storages that appear while it is active, until they are released."""

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
        """These were there before."""
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


def _shared_copy(model: PrunableModel) -> PrunableModel:
    """A model of its own on the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.module.parameters(), *model.module.buffers())})


def _peak(model: PrunableModel, batch: dict[str, Ints]) -> int:
    """Most bytes that live at a time while a twin of `model`, whose tensors have no contents, takes a step."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        twins: dict[int, Any] = {}
        for parameter in model.module.parameters():
            twins[id(parameter)] = nn.Parameter(fake.from_tensor(parameter.data), parameter.requires_grad)
        for buffer in model.module.buffers():
            twins[id(buffer)] = fake.from_tensor(buffer)
        allocations = _Allocations()
        allocations.ignore(list(twins.values()))
        twin = copy.deepcopy(model, twins)
        with allocations:
            _step(twin, batch)
        return allocations.peak

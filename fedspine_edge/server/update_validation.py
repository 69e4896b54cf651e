"""What the server accepts from a device: pure checks, no I/O, every refusal with its reason.

An update that passes can be folded in without further checks; one that fails harms nobody. Source:
docs/algorithms.md, "Groups" (what a plan's ratio leaves) and docs/protocol.md (the allow-list).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedspine_edge.aggregation.consensus import DeviceScores
from fedspine_edge.aggregation.factored import product_norm
from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import BlobError, LayoutError, UpdateRejected
from fedspine_edge.model.layout import (
    GROUP_KINDS,
    Layout,
    Order,
    channel_parameters,
    head_parameters,
    module_names,
    prunable_parameters,
    target_counts,
)
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.blobs import KEEP, SCORED, SCORES, group_names, head_tensors, is_adapter
from fedspine_edge.protocol.codec import Tensor, check_tensors
from fedspine_edge.protocol.messages import Report, RoundPlan

HeadShapes = Mapping[str, tuple[int, ...]]
Matrix = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Update:
    """A device's checked update.

    Attributes:
        factors: Per module (A, B) in the compact coordinates of `layout`, A (r, kept in), B (kept out, r).
        head: The task head's tensors by name; empty for a task without a head.
        ballots: Scores of heads and of channels, by kind; empty when the device scored nothing.
        norm: Largest L2 norm of B·A over the modules.
    """

    device_id: str
    num_examples: int
    layout: Layout
    factors: dict[str, tuple[Matrix, Matrix]]
    head: dict[str, Tensor]
    ballots: dict[str, DeviceScores]
    norm: float

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the task head's tensors."""
        return {name: tensor.shape for name, tensor in sorted(self.head.items())}


def check_update(
    tensors: Mapping[str, Tensor],
    report: Report,
    plan: RoundPlan,
    *,
    spec: ModelSpec,
    config: FleetConfig,
    previous: Layout,
    order: Order | None = None,
    head_shapes: HeadShapes | None = None,
) -> Update:
    """Check everything that can be wrong with an update.

    Args:
        tensors: The unpacked update blob.
        report: What came with it.
        plan: What the device was asked to do.
        spec: The fleet's model.
        config: For the limits.
        previous: What the device kept before the round.
        order: The order that was sent with the plan; None before there is one.
        head_shapes: The fleet's task head; None while there is no global one.

    Raises `UpdateRejected` with the reason.
    """
    try:
        check_tensors(tensors, "update")
    except BlobError as error:
        raise UpdateRejected(error.message) from error
    _check_report(report, plan)
    layout = _layout(tensors, spec)
    _check_layout(layout, plan, previous, order)
    expected = set(module_names(spec))
    adapters = {name.rpartition(".")[0] for name in tensors if is_adapter(name)}
    if adapters != expected:
        raise UpdateRejected(f"adapter modules missing or unknown: {_few(adapters ^ expected)}.")
    factors, norm = {}, 0.0
    for name in module_names(spec):
        factors[name] = _factors(tensors, name, plan.r, layout)
        norm = max(norm, _check_norm(name, factors[name], config.validation.max_norm))
    head = head_tensors(tensors)
    _check_head(head, head_shapes)
    ballots = _ballots(tensors, report.num_examples, previous)
    return Update(report.device_id, report.num_examples, layout, factors, head, ballots, norm)


def ratio_tolerance(spec: ModelSpec, round_to: int) -> float:
    """How far a kept layout's ratio may lie from the plan's: one head and one step of channels in every layer.

    A ratio is met in whole groups, and groups that an earlier plan removed stay removed.
    """
    per_layer = head_parameters(spec) + round_to * channel_parameters(spec)
    return spec.num_layers * per_layer / prunable_parameters(spec)


def max_update_bytes(spec: ModelSpec, plan: RoundPlan, num_labels: int) -> int:
    """Upper bound of an honest update at full width, checked before a single chunk is taken."""
    elements = 4 * (spec.num_heads * spec.head_dim + spec.num_kv_heads * spec.head_dim)
    elements += 3 * spec.intermediate_size + 7 * spec.hidden_size
    adapter = 4 * plan.r * spec.num_layers * elements
    indices = 12 * spec.num_layers * (spec.num_kv_heads + spec.intermediate_size)
    head = 16 * spec.hidden_size * (spec.hidden_size + num_labels + 2)
    return adapter + indices + head + 1024 * 1024


def _check_report(report: Report, plan: RoundPlan) -> None:
    if report.r != plan.r:
        raise UpdateRejected(f"rank {report.r} instead of the plan's {plan.r}.")
    if report.num_examples < 1:
        raise UpdateRejected("trained on no examples.")


def _layout(tensors: Mapping[str, Tensor], spec: ModelSpec) -> Layout:
    extra = {n for n in tensors if n.startswith(f"{KEEP}.") and int(n.split(".")[1]) >= spec.num_layers}
    if extra:
        raise UpdateRejected(f"kept indices of layers that the model does not have: {_few(extra)}.")
    try:
        return Layout.from_tensors(spec, tensors, KEEP)
    except LayoutError as error:
        raise UpdateRejected(f"kept indices: {error.message}") from error


def _check_layout(layout: Layout, plan: RoundPlan, previous: Layout, order: Order | None) -> None:
    if not layout.is_within(previous):
        raise UpdateRejected("kept indices contain groups that the device had removed earlier.")
    if plan.layout == "consensus" and order is None:
        wanted = previous.pruning_ratio
    else:
        wanted = _planned_ratio(layout.spec, plan, previous)
    tolerance = ratio_tolerance(layout.spec, plan.round_to)
    if abs(layout.pruning_ratio - wanted) > tolerance + 1e-9:
        raise UpdateRejected(
            f"pruned to {layout.pruning_ratio:.4f}, the plan leaves {wanted:.4f} (tolerance {tolerance:.4f})."
        )
    if plan.layout == "consensus" and order is not None:
        for kind, mine, ranked in (("heads", layout.heads, order.heads), ("channels", layout.channels, order.channels)):
            for layer, (kept, rank) in enumerate(zip(mine, ranked, strict=True)):
                if not np.array_equal(kept, np.sort(rank[: kept.size])):
                    raise UpdateRejected(f"layer {layer} {kind}: not a prefix of the fleet's order.")


def _planned_ratio(spec: ModelSpec, plan: RoundPlan, previous: Layout) -> float:
    if plan.scope == "global":  # met over all layers together, whatever each of them keeps
        smallest = head_parameters(spec) + min(plan.round_to, spec.intermediate_size) * channel_parameters(spec)
        reachable = 1.0 - spec.num_layers * smallest / prunable_parameters(spec)
        return max(previous.pruning_ratio, min(plan.pruning_ratio, reachable))
    counts = [target_counts(spec, plan.pruning_ratio, round_to=plan.round_to, at_most=kept) for kept in previous.counts]
    kept = sum(heads * head_parameters(spec) + channels * channel_parameters(spec) for heads, channels in counts)
    return 1.0 - kept / prunable_parameters(spec)


def _factors(tensors: Mapping[str, Tensor], name: str, r: int, layout: Layout) -> tuple[Matrix, Matrix]:
    expected = {"lora_A": (r, layout.cols(name).size), "lora_B": (layout.rows(name).size, r)}
    for side, shape in expected.items():
        tensor = tensors.get(f"{name}.{side}")
        if tensor is None:
            raise UpdateRejected(f"{name}.{side} is missing.")
        if tensor.shape != shape:
            raise UpdateRejected(f"{name}.{side} is {tensor.shape}; the kept indices make it {shape}.")
        if not np.isfinite(tensor).all():
            raise UpdateRejected(f"{name}.{side} contains NaN or infinity.")
    return tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]


def _check_norm(name: str, factors: tuple[Matrix, Matrix], limit: float) -> float:
    norm = product_norm(*factors)
    if not norm <= limit:  # also refuses the NaN of an overflow
        raise UpdateRejected(f"{name}: the L2 norm of B·A is {norm:.4g}, above validation.max_norm = {limit:g}.")
    return norm


def _check_head(head: Mapping[str, Tensor], head_shapes: HeadShapes | None) -> None:
    for name, tensor in head.items():
        if not np.isfinite(tensor).all():
            raise UpdateRejected(f"{name} contains NaN or infinity.")
    if head_shapes is None:
        return
    if head.keys() != head_shapes.keys():
        raise UpdateRejected(f"task head differs from the fleet's in {_few(head.keys() ^ head_shapes.keys())}.")
    for name, shape in head_shapes.items():
        if head[name].shape != tuple(shape):
            raise UpdateRejected(f"{name} is {head[name].shape}; the fleet's is {tuple(shape)}.")


def _ballots(tensors: Mapping[str, Tensor], num_examples: int, previous: Layout) -> dict[str, DeviceScores]:
    names = {name for name in tensors if name.startswith((f"{SCORES}.", f"{SCORED}."))}
    if not names:
        return {}
    layers = range(previous.spec.num_layers)
    wanted = {name for prefix in (SCORES, SCORED) for name in group_names(prefix, len(layers))}
    if names != wanted:
        raise UpdateRejected(f"scores missing or unknown: {_few(names ^ wanted)}.")
    ballots = {}
    for kind, kept in zip(GROUP_KINDS, (previous.heads, previous.channels)):
        votes = []
        for layer in layers:
            index, values = tensors[f"{SCORED}.{layer}.{kind}"], tensors[f"{SCORES}.{layer}.{kind}"]
            if index.ndim != 1 or index.shape != values.shape:
                raise UpdateRejected(f"layer {layer} {kind}: {values.shape} scores for {index.shape} groups.")
            if not np.isin(index, kept[layer]).all() or np.unique(index).size != index.size:
                raise UpdateRejected(f"layer {layer} {kind}: scored groups repeat or were removed earlier.")
            if not np.isfinite(values).all():
                raise UpdateRejected(f"layer {layer} {kind}: scores contain NaN or infinity.")
            votes.append((index, values))
        ballots[kind] = DeviceScores(float(num_examples), tuple(votes))
    return ballots


def _few(names: set[str]) -> str:
    """The first three of `names`, for a message."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

"""Validates the updates that devices send: pure checks without I/O, every rejection with its reason.

An update is validated once, when its upload is complete. What passes is an `AcceptedUpdate`, which is aggregated
without further checks; a rejected update changes nothing. Sources: docs/concepts/pruning.md, "Groups" (the ratio that
a plan leaves) and docs/reference/protocol.md (the allow-list).
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
from fedspine_edge.protocol.chunks import BlobStore
from fedspine_edge.protocol.codec import Tensor, check_tensors, unpack
from fedspine_edge.protocol.messages import Report, RoundPlan

HeadShapes = tuple[tuple[str, tuple[int, ...]], ...]
"""(name, shape) of every tensor of a task head, sorted by name."""
Matrix = npt.NDArray[np.floating]


@dataclass(frozen=True)
class ValidationRules:
    """Reference against which the updates of one round are validated.

    Attributes:
        spec: Model of the fleet.
        config: Settings of the fleet, for the limits.
        order: The order that was sent with the plans; None before there is one.
        head_shapes: The task head of the fleet; None in the first round, in which no global head exists yet.
    """

    spec: ModelSpec
    config: FleetConfig
    order: Order | None = None
    head_shapes: HeadShapes | None = None


@dataclass(frozen=True)
class AcceptedUpdate:
    """A device's update that has passed validation. Only `validate_update` and `load_accepted_update` create it.

    Attributes:
        device_id: The device.
        num_examples: Number of training examples of the device.
        layout: What the device keeps now.
        factors: Per module (A, B) in the compact coordinates of `layout`, A (r, kept in), B (kept out, r).
        head: Tensors of the task head by name; empty for a task without a head.
        scores: Scores of heads and of channels, by kind; empty when the device scored nothing.
    """

    device_id: str
    num_examples: int
    layout: Layout
    factors: dict[str, tuple[Matrix, Matrix]]
    head: dict[str, Tensor]
    scores: dict[str, DeviceScores]

    @property
    def head_shapes(self) -> HeadShapes:
        """(name, shape) of the tensors of the task head."""
        return head_shapes(self.head)


def head_shapes(tensors: Mapping[str, Tensor]) -> HeadShapes:
    """Return (name, shape) of the tensors of the task head among `tensors`."""
    return tuple((name, tensor.shape) for name, tensor in sorted(head_tensors(tensors).items()))


def validate_update(
    tensors: Mapping[str, Tensor], report: Report, plan: RoundPlan, *, previous: Layout, rules: ValidationRules
) -> AcceptedUpdate:
    """Check everything that can be wrong with an update, and return it.

    Args:
        tensors: The unpacked update blob.
        report: The report that announced it.
        plan: The device's plan.
        previous: What the device kept before the round.
        rules: What the round's updates are validated against.

    Raises `UpdateRejected` with the reason.
    """
    spec = rules.spec
    try:
        check_tensors(tensors, "update")
    except BlobError as error:
        raise UpdateRejected(error.message) from error
    _check_report(report, plan)
    layout = _read_layout(tensors, spec)
    _check_layout(layout, plan, previous, rules.order)
    expected = set(module_names(spec))
    modules = {name.rpartition(".")[0] for name in tensors if is_adapter(name)}
    if modules != expected:
        raise UpdateRejected(f"adapter modules missing or unknown: {_first_three(modules ^ expected)}.")
    for name in module_names(spec):
        A, B = _check_factors(tensors, name, plan.r, layout)
        _check_norm(name, A, B, rules.config.validation.max_norm)
    _check_head(head_tensors(tensors), rules.head_shapes, rules.config.validation.max_norm)
    _check_scores(tensors, previous)
    return _parse(tensors, report, layout)


def load_accepted_update(blobs: BlobStore, report: Report, spec: ModelSpec) -> AcceptedUpdate:
    """Return an update that was accepted earlier.

    It is parsed without being validated again: the report was journaled as accepted only after its update had passed,
    it names the update by the SHA-256 of its content, and the store checks that hash, so these are the same bytes.

    Args:
        blobs: The store of accepted updates.
        report: A report that was recorded as accepted.
        spec: Model of the fleet.
    """
    assert report.update is not None  # reports without an update are refused
    tensors = unpack(blobs.get(report.update.sha256))
    return _parse(tensors, report, Layout.from_tensors(spec, tensors, KEEP))


def _parse(tensors: Mapping[str, Tensor], report: Report, layout: Layout) -> AcceptedUpdate:
    names, num_layers = module_names(layout.spec), layout.spec.num_layers
    scores = {}
    if f"{SCORES}.0.{GROUP_KINDS[0]}" in tensors:
        for kind in GROUP_KINDS:
            layers = [(tensors[f"{SCORED}.{i}.{kind}"], tensors[f"{SCORES}.{i}.{kind}"]) for i in range(num_layers)]
            scores[kind] = DeviceScores(float(report.num_examples), tuple(layers))
    return AcceptedUpdate(
        device_id=report.device_id,
        num_examples=report.num_examples,
        layout=layout,
        factors={name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names},
        head=head_tensors(tensors),
        scores=scores,
    )


def ratio_tolerance(spec: ModelSpec, round_to: int) -> float:
    """Return how far a kept layout's ratio may be from the plan's: one head and one step of channels in every layer.

    Only whole groups can be removed, and groups that an earlier plan removed stay removed.
    """
    per_layer = head_parameters(spec) + round_to * channel_parameters(spec)
    return spec.num_layers * per_layer / prunable_parameters(spec)


def max_update_bytes(spec: ModelSpec, plan: RoundPlan, num_labels: int) -> int:
    """Return an upper bound of a valid update at full width, checked before the first chunk is accepted."""
    elements = 4 * (spec.num_heads * spec.head_dim + spec.num_kv_heads * spec.head_dim)
    elements += 3 * spec.intermediate_size + 7 * spec.hidden_size
    adapter = 4 * plan.r * spec.num_layers * elements
    indices = 12 * spec.num_layers * (spec.num_kv_heads + spec.intermediate_size)
    head = 16 * spec.hidden_size * (spec.hidden_size + num_labels + 2)
    return adapter + indices + head + 1024 * 1024


def _check_report(report: Report, plan: RoundPlan) -> None:
    if report.r != plan.r:
        raise UpdateRejected(f"its rank is {report.r} instead of the plan's {plan.r}.")
    if report.num_examples < 1:
        raise UpdateRejected("it was trained on no examples.")


def _read_layout(tensors: Mapping[str, Tensor], spec: ModelSpec) -> Layout:
    extra = {n for n in tensors if n.startswith(f"{KEEP}.") and int(n.split(".")[1]) >= spec.num_layers}
    if extra:
        raise UpdateRejected(f"kept indices of layers that the model does not have: {_first_three(extra)}.")
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
        for kind in GROUP_KINDS:
            for layer, (kept, rank) in enumerate(zip(getattr(layout, kind), getattr(order, kind), strict=True)):
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


def _check_factors(tensors: Mapping[str, Tensor], name: str, r: int, layout: Layout) -> tuple[Matrix, Matrix]:
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


def _check_norm(name: str, A: Matrix, B: Matrix, limit: float) -> None:
    norm = product_norm(A, B)
    if not norm <= limit:  # also rejects the NaN of an overflow
        raise UpdateRejected(f"{name}: the L2 norm of B·A is {norm:.4g}, above validation.max_norm = {limit:g}.")


def _check_head(head: Mapping[str, Tensor], expected: HeadShapes | None, limit: float) -> None:
    for name, tensor in head.items():
        if not np.isfinite(tensor).all():
            raise UpdateRejected(f"{name} contains NaN or infinity.")
        norm = float(np.linalg.norm(tensor.astype(np.float64)))
        if norm > limit:
            raise UpdateRejected(f"{name}: its L2 norm is {norm:.4g}, above validation.max_norm = {limit:g}.")
    if expected is None:
        return
    names = {name for name, _ in expected}
    if head.keys() != names:
        raise UpdateRejected(f"task head differs from the fleet's in {_first_three(head.keys() ^ names)}.")
    for name, shape in expected:
        if head[name].shape != shape:
            raise UpdateRejected(f"{name} is {head[name].shape}; the fleet's is {shape}.")


def _check_scores(tensors: Mapping[str, Tensor], previous: Layout) -> None:
    names = {name for name in tensors if name.startswith((f"{SCORES}.", f"{SCORED}."))}
    if not names:
        return
    num_layers = previous.spec.num_layers
    expected = {name for prefix in (SCORES, SCORED) for name in group_names(prefix, num_layers)}
    if names != expected:
        raise UpdateRejected(f"scores missing or unknown: {_first_three(names ^ expected)}.")
    for kind, kept in zip(GROUP_KINDS, (previous.heads, previous.channels)):
        for layer in range(num_layers):
            index, values = tensors[f"{SCORED}.{layer}.{kind}"], tensors[f"{SCORES}.{layer}.{kind}"]
            if index.ndim != 1 or index.shape != values.shape:
                raise UpdateRejected(f"layer {layer} {kind}: {values.shape} scores for {index.shape} groups.")
            if not np.isin(index, kept[layer]).all() or np.unique(index).size != index.size:
                raise UpdateRejected(f"layer {layer} {kind}: scored groups repeat or were removed earlier.")
            if not np.isfinite(values).all():
                raise UpdateRejected(f"layer {layer} {kind}: scores contain NaN or infinity.")


def _first_three(names: set[str]) -> str:
    """Return the first three of `names`, for a message."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

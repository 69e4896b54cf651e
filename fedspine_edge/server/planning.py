"""Conversions between device status, strategy assignments and plan messages."""

from __future__ import annotations

from collections.abc import Sequence

from fedspine_edge.config import FleetConfig, OptimizerSettings
from fedspine_edge.protocol.messages import BlobRef, FinishedPlan, RoundPlan, Status, WaitPlan
from fedspine_edge.server.adapter_store import slices_for_rank
from fedspine_edge.server.journal.schema import RunState
from fedspine_edge.strategies import Assignment, DeviceInfo


def device_info(status: Status, reported: bool, ranks: Sequence[int]) -> DeviceInfo:
    """Return what a strategy needs to know of a device.

    Args:
        status: The device's newest status.
        reported: Whether the device has reported in this run. Until then its status may describe an earlier run, so
            nothing counts as pruned.
        ranks: Ranks of the fleet.
    """
    memory_by_rank = {r: status.memory_base_bytes + r * status.memory_per_rank_bytes for r in ranks}
    return DeviceInfo(
        status.device_id,
        status.device_class,
        status.num_examples,
        status.memory_bytes,
        status.pruning_ratio if reported else 0.0,
        memory_by_rank=memory_by_rank if status.memory_base_bytes else None,
    )


def build_round_plan(
    config: FleetConfig,
    run_id: str,
    state: RunState,
    device_id: str,
    assignment: Assignment,
    slices: Sequence[BlobRef],
) -> RoundPlan:
    """Return the plan of one device for the round of `state`.

    Args:
        config: Settings of the fleet.
        run_id: The run.
        state: State of the run; its round and attempt are planned.
        device_id: The device.
        assignment: The strategy's decision.
        slices: Slices of the round's adapter, lowest components first.

    The cosine of the learning rate spans all rounds as configured, so the position of a round depends on its number
    alone. Raises `ConfigError` for a rank that the adapter does not have.
    """
    training = config.training
    steps_per_round = training.tau + training.recovery_steps
    return RoundPlan(
        run_id=run_id,
        device_id=device_id,
        server_round=state.server_round,
        attempt=state.attempt,
        num_rounds=config.num_rounds,
        pruning_ratio=assignment.pruning_ratio,
        r=assignment.r,
        scaling=training.lora_scaling,
        tau=training.tau if assignment.tau is None else assignment.tau,
        recovery_steps=training.recovery_steps if assignment.recovery_steps is None else assignment.recovery_steps,
        layout=config.layout,
        criterion=config.criterion,
        importance_metric=config.importance_metric,
        scope=config.scope,
        round_to=config.round_to,
        deadline_s=config.deadline_s,
        seed=config.seed,
        adapter=slices_for_rank(slices, config, assignment.r),
        training=OptimizerSettings(
            learning_rate=training.learning_rate,
            batch_size=training.batch_size,
            max_length_tokens=training.max_length_tokens,
            warmup_ratio=training.warmup_ratio,
            max_grad_norm=training.max_grad_norm,
            weight_decay=training.weight_decay,
            first_step=(state.server_round - 1) * steps_per_round,
            total_steps=config.num_rounds * steps_per_round,
            decay_from_step=_decay_from_step(config),
        ),
    )


def _decay_from_step(config: FleetConfig) -> int:
    """Return the first step of the cosine; with `constant_then_cosine` the recovery from the last pruning step."""
    training = config.training
    if training.schedule == "cosine" or config.num_rounds < 3:
        return 0
    return (config.num_rounds - 2) * (training.tau + training.recovery_steps) - training.recovery_steps


def build_rejection_plan(run_id: str, device_id: str, reason: str) -> WaitPlan:
    """Return the plan of a device that may not take part; the device logs the reason."""
    return WaitPlan(run_id=run_id, device_id=device_id, reason=reason)


def build_wait_plan(config: FleetConfig, run_id: str, server_round: int, device_id: str) -> WaitPlan:
    """Return the plan of a device that has no part in `server_round`."""
    server_round = min(server_round, config.num_rounds)
    return WaitPlan(run_id=run_id, device_id=device_id, server_round=server_round, num_rounds=config.num_rounds)


def build_finished_plan(config: FleetConfig, run_id: str, device_id: str) -> FinishedPlan:
    """Return the plan of every device at the end of the run."""
    last = config.num_rounds
    return FinishedPlan(run_id=run_id, device_id=device_id, server_round=last, num_rounds=last)

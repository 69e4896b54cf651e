"""What a strategy is told of a device, and its assignment as a plan; and the plans that ask for nothing."""

from __future__ import annotations

from collections.abc import Sequence

from fedspine_edge.config import FleetConfig, OptimizerSettings
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import BlobRef, FinishedPlan, RoundPlan, Status, WaitPlan
from fedspine_edge.server.adapter_store import slices_for_rank
from fedspine_edge.server.journal.schema import RunState
from fedspine_edge.strategies import Assignment, DeviceInfo


def device_info(status: Status, reported: bool, ranks: Sequence[int]) -> DeviceInfo:
    """A device as its status describes it.

    Before its first report in this run (`reported`) it may still speak of an earlier run, so nothing counts as pruned.
    """
    needs = {r: status.memory_base_bytes + r * status.memory_per_rank_bytes for r in ranks}
    return DeviceInfo(
        status.device_id,
        status.device_class,
        status.num_examples,
        status.memory_bytes,
        status.pruning_ratio if reported else 0.0,
        memory_by_rank=needs if status.memory_base_bytes else None,
    )


def build_round_plan(
    config: FleetConfig,
    run_id: str,
    state: RunState,
    device_id: str,
    assignment: Assignment,
    bands: Sequence[BlobRef],
) -> bytes:
    """The encoded plan of one device for the round of `state`, whose adapter is in `bands`.

    The learning rate's cosine runs over all rounds as configured, so a round's place on it depends on its number
    alone. Raises `ConfigError` for a rank that the adapter does not have.
    """
    training = config.training
    steps = training.tau + training.recovery_steps
    plan = RoundPlan(
        run_id=run_id,
        device_id=device_id,
        server_round=state.server_round,
        attempt=state.attempt,
        num_rounds=config.num_rounds,
        pruning_ratio=assignment.pruning_ratio,
        r=assignment.r,
        scaling=training.lora_scaling,
        tau=assignment.tau,
        recovery_steps=assignment.recovery_steps,
        layout=config.layout,
        criterion=config.criterion,
        importance_metric=config.importance_metric,
        scope=config.scope,
        round_to=config.round_to,
        deadline_s=config.deadline_s,
        seed=config.seed,
        adapter=slices_for_rank(bands, config, assignment.r),
        training=OptimizerSettings(
            learning_rate=training.learning_rate,
            batch_size=training.batch_size,
            max_length_tokens=training.max_length_tokens,
            warmup_ratio=training.warmup_ratio,
            max_grad_norm=training.max_grad_norm,
            weight_decay=training.weight_decay,
            first_step=(state.server_round - 1) * steps,
            total_steps=config.num_rounds * steps,
            decay_from_step=_decay_from_step(config),
        ),
    )
    return codec.encode(plan)


def _decay_from_step(config: FleetConfig) -> int:
    """Where the cosine begins: with `schedule="constant_then_cosine"` at the recovery from the last prune."""
    training = config.training
    if training.schedule == "cosine" or config.num_rounds < 3:
        return 0
    return (config.num_rounds - 2) * (training.tau + training.recovery_steps) - training.recovery_steps


def build_rejection_plan(run_id: str, device_id: str, reason: str) -> bytes:
    """The encoded plan of a device that may not take part: it waits, and its operator reads why."""
    return codec.encode(WaitPlan(run_id=run_id, device_id=device_id, reason=reason))


def build_idle_plan(
    config: FleetConfig, run_id: str, server_round: int, device_id: str, kind: type[WaitPlan | FinishedPlan]
) -> bytes:
    """The encoded plan of a device that has nothing to do now, or nothing any more."""
    plan = kind(
        run_id=run_id,
        device_id=device_id,
        server_round=min(server_round, config.num_rounds),
        num_rounds=config.num_rounds,
    )
    return codec.encode(plan)

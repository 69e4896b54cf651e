"""The report of a round that failed."""

from __future__ import annotations

import traceback
from pathlib import Path

from fedspine_edge.device.cost_meter import CostMeter, TimeKind
from fedspine_edge.errors import FedspineError, OutOfMemory
from fedspine_edge.protocol.messages import Report, RoundPlan


def reason_of(error: Exception) -> str:
    """Our own message and remedy, or the kind and place of a foreign error: never data."""
    if isinstance(error, FedspineError):
        return f"{error.message} {error.remedy}".rstrip()
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"


def failure_report(
    plan: RoundPlan,
    plan_sha256: str,
    error: Exception,
    *,
    num_examples: int,
    pruning_ratio: float,
    time_kind: TimeKind,
    meter: CostMeter | None,
) -> Report:
    """What the server is told of `plan`, which ended with `error`."""
    return Report(
        run_id=plan.run_id,
        device_id=plan.device_id,
        server_round=plan.server_round,
        plan_sha256=plan_sha256,
        status="out_of_memory" if isinstance(error, OutOfMemory) else "failed",
        reason=reason_of(error)[:500],
        num_examples=num_examples,
        pruning_ratio=pruning_ratio,
        r=plan.r,
        completion_time_s=0.0 if meter is None else meter.completion_s(),
        time_kind=time_kind,
        bytes_down=0 if meter is None else meter.bytes_down,
    )

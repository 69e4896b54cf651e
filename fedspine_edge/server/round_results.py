"""Results of a round and of the run: outcomes, means, traffic and the final layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from statistics import fmean

import numpy as np
import numpy.typing as npt

from fedspine_edge.config import FleetConfig
from fedspine_edge.model.layout import Layout, intersection
from fedspine_edge.protocol.messages import Report
from fedspine_edge.server.aggregate_round import coverage_layout, example_weights
from fedspine_edge.server.journal.reader import JournalReader
from fedspine_edge.server.report_collector import ReportCollector
from fedspine_edge.strategies import RoundOutcome

LOST = "connection or power was lost"
LATE = "no report before the deadline"


def build_outcomes(collector: ReportCollector, online: AbstractSet[str]) -> list[RoundOutcome]:
    """Return the outcome of every plan of the round, by device id.

    A device without a report is `late` if it was connected all the time, so that its arm was too slow. It is `lost` if
    it was disconnected at any time of the round or is now, which carries no information about the arm.
    """
    outcomes = []
    for device_id in sorted(collector.round.plans):
        recorded = collector.recorded.get(device_id)
        if recorded is None:
            lost = device_id in collector.disconnected or device_id not in online
            outcomes.append(RoundOutcome(device_id, "lost" if lost else "late", reason=LOST if lost else LATE))
            continue
        report = recorded.report
        outcomes.append(
            RoundOutcome(
                device_id,
                "ok" if recorded.status == "accepted" else recorded.status,  # type: ignore[arg-type]
                report.completion_time_s,
                report.loss_before,
                report.loss_after,
                report.lora_importance,
                report.pruning_ratio,
                reason=recorded.reason,
            )
        )
    return outcomes


def means(reports: Iterable[Report]) -> tuple[float | None, float | None]:
    """Return mean loss and mean accuracy after the round, each over the devices that measured it."""
    reports = list(reports)
    losses = [report.loss_after for report in reports if report.loss_after is not None]
    accuracies = [report.accuracy_after for report in reports if report.accuracy_after is not None]
    return (fmean(losses) if losses else None, fmean(accuracies) if accuracies else None)


def accepted_reports(journal: JournalReader, attempts: Mapping[int, int]) -> dict[int, dict[str, Report]]:
    """Return by round and device id the reports that were aggregated; `attempts` gives the last attempt per round."""
    return {
        number: {
            recorded.report.device_id: recorded.report
            for recorded in journal.reports(number, attempt)
            if recorded.status == "accepted"
        }
        for number, attempt in attempts.items()
    }


def trained_amounts(reports: Mapping[int, Mapping[str, Report]]) -> tuple[int, int]:
    """Return (examples of the last round's devices, steps over all rounds, each of the device that took most)."""
    examples = sum(report.num_examples for report in reports[max(reports)].values())
    return examples, sum(max(report.steps for report in of_round.values()) for of_round in reports.values())


def final_layout(
    config: FleetConfig,
    layouts: Mapping[str, Layout],
    reports: Mapping[str, Report],
    scores: Mapping[str, Sequence[npt.NDArray[np.float64]]],
) -> Layout:
    """Return the layout of the finished model.

    With layout `consensus` it is what all devices of the last round keep: a prefix of the order. Devices that ranked
    alone have too little in common; then each layer keeps the groups that were trained on most examples, at the mean
    ratio of the devices, and run.json has the layout of every device.
    """
    if config.layout == "consensus":
        return intersection([layouts[device_id] for device_id in sorted(layouts)])
    weights = example_weights([reports[device_id] for device_id in layouts], config)
    mean = sum(weights[i] * layouts[i].pruning_ratio for i in sorted(layouts)) / sum(weights.values())
    return coverage_layout(layouts, weights, scores, pruning_ratio=mean, round_to=config.round_to, scope=config.scope)

"""How a round ends for each device, and how the run ends for the fleet. Reads the journal, changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

import msgspec
import numpy as np
import numpy.typing as npt

from fedspine_edge.bandit.reward import RewardTerms
from fedspine_edge.config import FleetConfig
from fedspine_edge.model.layout import Layout, intersection
from fedspine_edge.protocol.messages import Report
from fedspine_edge.server.aggregate_round import coverage_layout
from fedspine_edge.server.journal.schema import OutcomeRow
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.server.report_collector import ReportCollector
from fedspine_edge.strategies import RoundOutcome

LOST = "connection or power was lost"
LATE = "no report before the deadline"


def outcomes(journal: Journal, collector: ReportCollector, online: set[str]) -> list[tuple[OutcomeRow, RoundOutcome]]:
    """What became of every plan of the round, for the journal and for the strategy, by device id.

    A device that was silent at the deadline is `late` if it was connected all the time, which says something of its
    arm, and `lost` if it was cut off at any time of the round or is now, which says nothing.
    """
    answers = {row.device_id: row for row in journal.reports(collector.server_round, collector.attempt)}
    result = []
    for plan in journal.plans(collector.server_round, collector.attempt):
        device_id = plan.device_id
        answer = answers.get(device_id)
        if answer is None:
            lost = plan.disconnects > 0 or device_id not in online
            row = OutcomeRow(device_id, "lost" if lost else "late", LOST if lost else LATE)
            result.append((row, RoundOutcome(device_id, "lost" if lost else "late", reason=row.reason)))
            continue
        report = msgspec.json.decode(answer.report, type=Report)
        row = OutcomeRow(device_id, "ok" if answer.status == "accepted" else answer.status, answer.reason)
        outcome = RoundOutcome(
            device_id,
            "failed" if row.status == "refused" else row.status,  # type: ignore[arg-type]  # ok, failed, out_of_memory
            report.completion_time_s,
            report.loss_before,
            report.loss_after,
            report.lora_importance,
            report.pruning_ratio,
            "" if row.status == "ok" else row.reason,
        )
        result.append((row, outcome))
    return result


def rows(ended: Sequence[tuple[OutcomeRow, RoundOutcome]], terms: Mapping[str, RewardTerms | None]) -> list[OutcomeRow]:
    """The journal's rows of `outcomes`, with the strategy's rewards."""
    return [_rewarded(row, terms.get(row.device_id)) for row, _ in ended]


def means(reports: Iterable[Report]) -> tuple[float | None, float | None]:
    """Mean loss and accuracy after the round of those that measured them."""
    reports = list(reports)
    losses = [report.loss_after for report in reports if report.loss_after is not None]
    accuracies = [report.accuracy_after for report in reports if report.accuracy_after is not None]
    return (fmean(losses) if losses else None, fmean(accuracies) if accuracies else None)


def traffic(journal: Journal, collector: ReportCollector) -> tuple[int, int]:
    """Bytes up and down that the round's devices counted."""
    answers = [
        msgspec.json.decode(row.report, type=Report)
        for row in journal.reports(collector.server_round, collector.attempt)
    ]
    return sum(report.bytes_up for report in answers), sum(report.bytes_down for report in answers)


def accepted(journal: Journal, attempts: Mapping[int, int]) -> dict[int, dict[str, Report]]:
    """By round and device id the reports that were aggregated; `attempts` names each round's last."""
    return {
        number: {
            row.device_id: msgspec.json.decode(row.report, type=Report)
            for row in journal.reports(number, attempt)
            if row.status == "accepted"
        }
        for number, attempt in attempts.items()
    }


def trained(answers: Mapping[int, Mapping[str, Report]]) -> tuple[int, int]:
    """(examples of the last round's devices, steps of all rounds by the device that took most in each)."""
    examples = sum(report.num_examples for report in answers[max(answers)].values())
    return examples, sum(max(report.steps for report in reports.values()) for reports in answers.values())


def majority(values: Mapping[str, str]) -> str:
    """The most common value; among equals that of the smallest device id."""
    counts = Counter(values.values())
    return values[min(values, key=lambda device_id: (-counts[values[device_id]], device_id))]


def final_layout(
    config: FleetConfig,
    kept: Mapping[str, Layout],
    reports: Mapping[str, Report],
    scores: Mapping[str, Sequence[npt.NDArray[np.float64]]],
) -> Layout:
    """The fleet's layout after the last round.

    With one order for all it is what all of the last round's devices keep: a prefix of the order. Devices that
    ranked alone have too little in common; theirs is what most training examples speak for, at the devices' mean
    ratio, and every device's own layout is in run.json.
    """
    if config.layout == "consensus":
        return intersection([kept[device_id] for device_id in sorted(kept)])
    weights = {device_id: float(reports[device_id].num_examples) for device_id in kept}
    mean = sum(weights[i] * kept[i].pruning_ratio for i in sorted(kept)) / sum(weights.values())
    return coverage_layout(kept, weights, scores, pruning_ratio=mean, round_to=config.round_to, scope=config.scope)


def _rewarded(row: OutcomeRow, terms: RewardTerms | None) -> OutcomeRow:
    if terms is None:
        return row
    parts = {name: value for name, value in asdict(terms).items() if name not in ("total", "reason")}
    return OutcomeRow(row.device_id, row.status, row.reason, terms.total, parts)

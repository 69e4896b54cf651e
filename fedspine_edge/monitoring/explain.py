"""Explanation of a device's plan, read from the server's journal.

It shows the leaves of the device's tree with their pulls and upper confidence bounds, the arm that was selected, and
the outcome.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import pvariance
from typing import Any

from fedspine_edge.errors import ConfigError
from fedspine_edge.monitoring.run_view import printable
from fedspine_edge.server.journal.writer import Journal


def explain(run_dir: Path, device_id: str, *, server_round: int | None = None) -> dict[str, Any]:
    """Return the plan of `device_id` in a round, the strategy's reasons for it, and its outcome as plain JSON data.

    Args:
        run_dir: The server's run folder.
        device_id: The device.
        server_round: The round; None for the newest round of the device.

    Returns:
        `plan` is the arm. `decision` holds the strategy's reasons as they were when it selected the arm; for FedSpine
        they include the leaves of the device's tree. `outcome` holds status, reward and reward terms, and is None
        while the round runs. Its `decided_by` gives each reward term's share of the variance of the round's rewards
        between devices, which is what the bandit could learn from the round.

    Raises:
        ConfigError: The journal, the device or the round does not exist.
    """
    with Journal.open_readonly(run_dir) as journal:
        rows = journal.device_rounds(server_round, device_id=device_id)
        if not rows:
            raise _not_found_error(journal.devices(), run_dir, device_id, server_round)
        row = printable(rows[-1])
        plan = journal.plans(row.server_round, row.attempt, device_id=device_id)[0]
        same_attempt = [other for other in journal.device_rounds(row.server_round) if other.attempt == row.attempt]
        weights = json.loads(journal.meta("config") or "{}").get("reward", {})
    outcome = None
    if row.status != "running":
        terms = [other.reward_terms for other in same_attempt if other.reward_terms]
        outcome = {
            "status": row.status,
            "reason": row.reason,
            "completion_time_s": row.completion_time_s,
            "time_kind": row.time_kind,
            "reward": row.reward,
            "reward_terms": row.reward_terms,
            "decided_by": _variance_shares(terms, weights),
        }
    return {
        "device_id": device_id,
        "device_class": row.device_class,
        "server_round": row.server_round,
        "attempt": row.attempt,
        "plan": {"u": row.u, "r": row.r, "pruning_ratio": row.pruning_ratio},
        "decision": plan.explain,
        "outcome": outcome,
    }


def _variance_shares(terms: Sequence[Mapping[str, float]], weights: Mapping[str, Any]) -> dict[str, float]:
    """Return each term's share of the summed variances of weight × term over the devices, largest first."""
    names = terms[0] if terms else {}
    variances = {name: (weights.get(name, 0.0) ** 2) * pvariance([t[name] for t in terms]) for name in names}
    total = sum(variances.values())
    shares = {name: round(value / total, 4) for name, value in variances.items()} if total > 0 else {}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def describe(explanation: dict[str, Any]) -> str:
    """Format the result of `explain` as text for a terminal."""
    plan, decision, outcome = explanation["plan"], explanation["decision"], explanation["outcome"]
    lines = [
        f"{explanation['device_id']} ({explanation['device_class']}), round {explanation['server_round']}",
        f"plan      ratio {plan['pruning_ratio']:.4f}, rank {plan['r']}"
        + ("" if plan["u"] is None else f", u {plan['u']:.4f}"),
    ]
    last = decision.get("last") or {}
    if last.get("why"):
        lines.append(f"reason    {last['why']}")
    elif "leaves" not in decision:
        lines.append(f"reason    strategy {decision.get('strategy', 'unknown')!r} does not learn from rewards")
    if decision.get("pace"):
        lines.append(_describe_time(decision["pace"]))
    if outcome:
        lines.append(_describe_outcome(outcome))
        if outcome["decided_by"]:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in outcome["decided_by"].items() if share >= 0.005)
            lines.append(f"rewards   variance between devices by term: {shares}")
    if decision.get("leaves"):
        lines += ["", "u              ranks          pulls  weight   mean    bound"]
        lines += [_describe_leaf(leaf, plan) for leaf in decision["leaves"]]
    return "\n".join(lines)


def _describe_leaf(leaf: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    lo, hi = leaf["u"]
    selected = plan["u"] is not None and lo <= plan["u"] < hi and plan["r"] in leaf["ranks"]
    mark = "  <- selected" if selected else "" if leaf.get("open", True) else "  not feasible"
    bound = "inf" if leaf["bound"] is None else f"{leaf['bound']:.3f}"
    ranks = "/".join(map(str, leaf["ranks"]))
    return (
        f"{f'{lo:g}..{hi:g}':<14} {ranks:<14} {leaf['pulls']:>5}  {leaf['weight']:>6.3f}  {leaf['mean']:>5.3f}"
        f"  {bound:>6}{mark}"
    )


def _describe_time(prediction: Mapping[str, Any]) -> str:
    text = (
        f"time      {prediction['predicted_s']:.1f} s predicted; target for the round {prediction['expected_s']:.1f} s"
    )
    if prediction["sets_the_pace"]:
        return f"{text}, the shortest possible for this device, which is the slowest"
    return f"{text}; shortest possible for this device {prediction['shortest_s']:.1f} s"


def _describe_outcome(outcome: dict[str, Any]) -> str:
    text = f"outcome   {outcome['status']}"
    if outcome["reason"]:
        text += f" ({outcome['reason']})"
    if outcome["completion_time_s"]:
        text += f", {outcome['completion_time_s']:.1f} s {outcome['time_kind']}"
    if outcome["reward"] is not None:
        terms = ", ".join(f"{name} {value:.3f}" for name, value in (outcome["reward_terms"] or {}).items())
        text += f", reward {outcome['reward']:.3f} ({terms})"
    return text


def _not_found_error(devices: list[Any], run_dir: Path, device_id: str, server_round: int | None) -> ConfigError:
    names = [status.device_id for status, _, _ in devices]
    if device_id in names:
        when = "in any round" if server_round is None else f"in round {server_round}"
        return ConfigError(f"{run_dir} has no plan for {device_id!r} {when}.", remedy="Give another --round.")
    close = difflib.get_close_matches(device_id, names, n=1)
    remedy = f"Did you mean {close[0]!r}?" if close else f"Known devices: {', '.join(names[:8]) or 'none yet'}."
    return ConfigError(f"{run_dir} has no device {device_id!r}.", remedy=remedy)

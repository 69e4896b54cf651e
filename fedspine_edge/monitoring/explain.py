"""Why a device got its plan, read from the server's journal: its leaves, counts and bounds, and what came of it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import pvariance
from typing import Any

from fedspine_edge.errors import ConfigError
from fedspine_edge.server.journal.writer import Journal


def explain(run_dir: Path, device_id: str, *, server_round: int | None = None) -> dict[str, Any]:
    """The newest decision for `device_id`, or that of `server_round`, as plain JSON data.

    The keys `plan`, `decision` and `outcome` hold what was asked, the strategy's reasons as they were when it asked
    (for FedSpine the leaves of the device's tree), and status, reward and reward terms; `outcome` is None while the
    round runs. Its `decided_by` are the reward terms' shares in how much the round's rewards differed between devices:
    what the bandit could learn from it.

    Raises:
        ConfigError: no such journal, device or round.
    """
    with Journal.open_readonly(run_dir) as journal:
        rows = journal.device_rounds(server_round, device_id=device_id)
        if not rows:
            raise _unknown(journal.devices(), run_dir, device_id, server_round)
        row = rows[-1]
        plan = journal.plans(row.server_round, row.attempt, device_id=device_id)[0]
        together = [other for other in journal.device_rounds(row.server_round) if other.attempt == row.attempt]
        weights = json.loads(journal.meta("config") or "{}").get("reward", {})
    decided = row.status != "running"
    return {
        "device_id": device_id,
        "device_class": row.device_class,
        "server_round": row.server_round,
        "attempt": row.attempt,
        "plan": {"u": row.u, "r": row.r, "pruning_ratio": row.pruning_ratio},
        "decision": plan.explain,
        "outcome": {
            "status": row.status,
            "reason": row.reason,
            "completion_time_s": row.completion_time_s,
            "time_kind": row.time_kind,
            "reward": row.reward,
            "reward_terms": row.reward_terms,
            "decided_by": _decided_by([other.reward_terms for other in together if other.reward_terms], weights),
        }
        if decided
        else None,
    }


def _decided_by(terms: Sequence[Mapping[str, float]], weights: Mapping[str, Any]) -> dict[str, float]:
    """Each term's share of the summed variances of weight × term over the devices, largest first."""
    say = {name: (weights.get(name, 0.0) ** 2) * pvariance([t[name] for t in terms]) for name in (terms or [{}])[0]}
    total = sum(say.values())
    shares = {name: round(value / total, 4) for name, value in say.items()} if total > 0 else {}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def describe(explained: dict[str, Any]) -> str:
    """`explain`'s answer as text for a terminal."""
    plan, decision, outcome = explained["plan"], explained["decision"], explained["outcome"]
    lines = [
        f"{explained['device_id']} ({explained['device_class']}), round {explained['server_round']}",
        f"asked     ratio {plan['pruning_ratio']:.4f}, rank {plan['r']}"
        + ("" if plan["u"] is None else f", u {plan['u']:.4f}"),
    ]
    last = decision.get("last") or {}
    if last.get("why"):
        lines.append(f"because   {last['why']}")
    elif "leaves" not in decision:
        lines.append(f"because   strategy {decision.get('strategy', 'unknown')!r} learns nothing from rewards")
    if decision.get("pace"):
        lines.append(_pace_line(decision["pace"]))
    if outcome:
        lines.append(_outcome_line(outcome))
        if outcome["decided_by"]:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in outcome["decided_by"].items() if share >= 0.005)
            lines.append(f"rewards   differed between devices by {shares}")
    if decision.get("leaves"):
        lines += ["", "u              ranks          pulls  weight   mean    bound"]
        chosen = (plan["u"], plan["r"])
        for leaf in decision["leaves"]:
            lo, hi = leaf["u"]
            here = chosen[0] is not None and lo <= chosen[0] < hi and chosen[1] in leaf["ranks"]
            bound = "inf" if leaf["bound"] is None else f"{leaf['bound']:.3f}"
            ranks = "/".join(map(str, leaf["ranks"]))
            lines.append(
                f"{f'{lo:g}..{hi:g}':<14} {ranks:<14} {leaf['pulls']:>5}  {leaf['weight']:>6.3f}  {leaf['mean']:>5.3f}"
                f"  {bound:>6}{'  <- played' if here else '' if leaf.get('open', True) else '  not open'}"
            )
    return "\n".join(lines)


def _pace_line(pace: Mapping[str, Any]) -> str:
    text = f"pace      {pace['predicted_s']:.1f} s predicted in a round of {pace['expected_s']:.1f} s"
    if pace["sets_the_pace"]:
        return f"{text}, which is the least this device, the slowest, can do"
    return f"{text}; it could do it in {pace['shortest_s']:.1f} s"


def _outcome_line(outcome: dict[str, Any]) -> str:
    text = f"outcome   {outcome['status']}"
    if outcome["reason"]:
        text += f" ({outcome['reason']})"
    if outcome["completion_time_s"]:
        text += f", {outcome['completion_time_s']:.1f} s {outcome['time_kind']}"
    if outcome["reward"] is not None:
        terms = ", ".join(f"{name} {value:.3f}" for name, value in (outcome["reward_terms"] or {}).items())
        text += f", reward {outcome['reward']:.3f} ({terms})"
    return text


def _unknown(devices: list[Any], run_dir: Path, device_id: str, server_round: int | None) -> ConfigError:
    names = [status.device_id for status, _, _ in devices]
    if device_id in names:
        when = "in any round" if server_round is None else f"in round {server_round}"
        return ConfigError(f"{run_dir} has no plan for {device_id!r} {when}.", remedy="Give another --round.")
    close = difflib.get_close_matches(device_id, names, n=1)
    known = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names[:8]) or 'none yet'}."
    return ConfigError(f"{run_dir} knows no device {device_id!r}.", remedy=known)

"""Self-contained HTML report of a fleet run: results by round, by device, and of the model.

The report shows measured figures only. A number that was not measured is not printed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspine_edge.errors import MissingDependency
from fedspine_edge.files import write_text_atomically
from fedspine_edge.monitoring import charts
from fedspine_edge.monitoring.run_view import by_round
from fedspine_edge.server.journal.schema import DeviceView


def write_report(
    path: Path,
    *,
    title: str,
    rows: Sequence[DeviceView],
    summary: Mapping[str, Any],
    widths: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report atomically and return its path.

    Args:
        path: The HTML file.
        title: Heading of the page.
        rows: One row per device and round.
        summary: Measured figures by name, such as the demo's JSON object.
        widths: Kept widths of each layer, in the form that `charts.widths` takes.

    Raises:
        MissingDependency: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingDependency.of("jinja2", extra="demo", purpose="The HTML report") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = _format_figure
    page = environment.get_template("report.html.j2").render(
        title=title,
        note=_note(rows),
        tiles=_tiles(summary),
        charts=_charts(rows, summary, widths),
        rows=rows,
        figures=sorted(summary.items()),
    )
    write_text_atomically(path, page)
    return path


def _charts(
    rows: Sequence[DeviceView], summary: Mapping[str, Any], widths: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    kind = next((row.time_kind for row in rows if row.completion_time_s), "measured")
    panels = [
        (
            "Held-out accuracy by round",
            "Accuracy of each device on its own held-out examples, and the mean.",
            charts.accuracy(rows),
        ),
        ("Held-out loss by round", "Mean over devices before the first and after the last step.", charts.loss(rows)),
        (
            "Completion time by round",
            f"Completion time in seconds ({kind}), one line per device.",
            charts.completion_times(rows),
        ),
        ("Idle share by device", "Share of the round time spent waiting for the slowest device.", charts.idle(rows)),
        ("Selected arms", "Pruning ratio and LoRA rank of each device in each round.", charts.arms(rows)),
        ("Reward by round", "Total reward of each device.", charts.rewards(rows)),
    ]
    if widths:
        panels.append(
            ("Kept widths by layer", "Share of attention groups and FFN channels kept.", charts.widths(widths))
        )
    if summary.get("latency_ms_before") and summary.get("params_before"):
        size, speed = (
            (summary["params_before"], summary["params_after"]),
            (
                summary["latency_ms_before"],
                summary["latency_ms_after"],
            ),
        )
        pairs = {
            "latency": (*speed, f"{speed[0]:.2f} ms → {speed[1]:.2f} ms"),
            "parameters": (*size, f"{size[0] / 1e6:.1f} M → {size[1] / 1e6:.1f} M"),
        }
        panels.append(
            ("Before and after", "The finished model compared with the unpruned model.", charts.before_after(pairs))
        )
    return panels


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    known: list[tuple[str, str, Callable[[Any], str]]] = [
        ("accuracy_final", "accuracy, finished model", percent),
        ("accuracy_unpruned", "accuracy, unpruned", percent),
        ("accuracy_majority", "accuracy, majority class", percent),
        ("pruning_ratio", "prunable parameters removed", percent),
        ("sparsity", "all parameters removed", percent),
        ("idle_share", "idle share of the fleet", percent),
        ("latency_ms_before", "latency, unpruned", lambda v: f"{v:.2f} ms"),
        ("latency_ms_after", "latency, finished model", lambda v: f"{v:.2f} ms"),
        ("bytes_up", "uploaded by devices", lambda v: f"{v / 1e6:.1f} MB"),
        ("bytes_down", "downloaded by devices", lambda v: f"{v / 1e6:.1f} MB"),
        ("wall_s", "wall time of the run", lambda v: f"{v:.0f} s"),
    ]
    return [(label, show(summary[key])) for key, label, show in known if summary.get(key) is not None]


def _note(rows: Sequence[DeviceView]) -> str:
    kinds = {row.time_kind for row in rows}
    num_rounds = len(by_round(rows))
    note = f"{len({row.device_id for row in rows})} devices, {num_rounds} rounds. "
    if "modelled" in kinds:
        note += (
            "Completion times are modelled: process CPU time × factor of the device class + modelled transfer time. "
        )
    if "simulated" in kinds:
        note += "Completion times are simulated by a cost model. "
    if num_rounds < 20:
        note += "This is too few rounds to judge the benefit of the bandit."
    return note


def _format_figure(value: float | int | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"

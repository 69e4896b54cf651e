"""HTML page of an experiment: the paper's result beside this project's, with seeds and confidence intervals."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.errors import MissingDependency
from fedspine_edge.files import write_text_atomically
from fedspine_edge.monitoring.charts import pdf, svg

_COLOURS = ("#2a6f97", "#e07a1f", "#5b8c3e", "#8a4fa3", "#b5403c", "#4f5d75", "#c9a227", "#3aa6a6", "#777777")

LABELS = {
    "recorded": "Training was replaced by recorded losses. Times, arms, bytes and costs come from the real server and "
    "the cost model. Losses, accuracies and rewards are not those of a trained model.",
    "real": "Training was real. Time is simulated by the cost model, which is not calibrated on boards.",
    "sums": "Sums of synthetic updates of known structure, without training.",
}


@dataclass(frozen=True)
class Figure:
    """One chart of the page.

    Attributes:
        name: Base name of the chart's files.
        caption: Text below the chart.
        draw: Function that draws the chart on matplotlib axes.
        size: Width and height in inches.
    """

    name: str
    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float]


def write_page(summary: Mapping[str, Any], path: Path) -> Path:
    """Write the page atomically and return its path. Each chart is also written as SVG and PDF.

    Args:
        summary: The experiment's summary.
        path: The HTML file. Charts are written to the folder `figures` beside it.

    Raises:
        MissingDependency: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingDependency.of("jinja2", extra="demo", purpose="The page of an experiment") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["interval"] = format_interval
    figures = [_bars(summary, name, text) for name, text in summary["measures"].items() if _known(summary, name)]
    curves = {name: v["curve"] for name, v in summary["variants"].items() if v["curve"]}
    axes = [("accuracy", "mean held-out accuracy")] if "real" in summary["training"] else []
    axes += [("idle_share", "idle share"), ("ratio", "mean pruning ratio")]
    figures += [_lines(curves, key, label) for key, label in axes if curves]
    charts = [(figure.caption, svg(figure.draw, figure.size)) for figure in figures]
    folder = path.parent / "figures"
    folder.mkdir(exist_ok=True)
    for figure, (_, image) in zip(figures, charts):
        (folder / f"{figure.name}.svg").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{image}', encoding="utf-8")
        (folder / f"{figure.name}.pdf").write_bytes(pdf(figure.draw, figure.size))
    page = environment.get_template("experiment.html.j2").render(
        summary=summary, charts=charts, labels=[LABELS[kind] for kind in summary["training"]]
    )
    write_text_atomically(path, page)
    return path


def format_interval(value: Mapping[str, Any]) -> str:
    """Format as `mean ± half width (n)` with a sensible number of digits, or as a dash if nothing was measured."""
    mean, half, n = value["mean"], value["half"], value["n"]
    if mean is None:
        return "-"
    digits = 0 if abs(mean) >= 1000 else 1 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 4
    return f"{mean:,.{digits}f}" + ("" if half is None else f" ± {half:,.{digits}f}") + f" (n={n})"


def _known(summary: Mapping[str, Any], measure: str) -> bool:
    return any(variant[measure]["n"] for variant in summary["variants"].values())


def _bars(summary: Mapping[str, Any], measure: str, meaning: str) -> Figure:
    rows = {name: variant[measure] for name, variant in summary["variants"].items() if variant[measure]["n"]}

    def draw(axes: Any) -> None:
        means = [row["mean"] for row in rows.values()]
        errors = [row["half"] or 0.0 for row in rows.values()]
        axes.barh(list(rows), means, xerr=errors, color=_COLOURS[0], ecolor="#333333", capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel(measure)

    return Figure(_file_name(measure), meaning, draw, (6.4, 0.9 + 0.32 * len(rows)))


def _lines(curves: Mapping[str, list[dict[str, Any]]], key: str, label: str) -> Figure:
    def draw(axes: Any) -> None:
        for position, (name, curve) in enumerate(curves.items()):
            colour = _COLOURS[position % len(_COLOURS)]
            points = [p for p in curve if p[key] is not None]
            times = [p["time_s"] for p in points]
            axes.plot(times, [p[key] for p in points], color=colour, linewidth=1.4, label=name)
            halves = [p.get(f"{key}_half") or 0.0 for p in points]  # absent with one seed and in older summaries
            if any(halves):
                low, high = ([p[key] + sign * half for p, half in zip(points, halves)] for sign in (-1, 1))
                axes.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("simulated time [s]")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=7)

    caption = f"{label} over simulated time: means over the seeds with 95 % intervals"
    return Figure(_file_name(f"{key}-over-time"), caption, draw, (6.4, 3.6))


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")

"""The HTML page of an experiment: the paper's figure beside ours, with seeds and intervals."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.errors import MissingDependency
from fedspine_edge.simulation.charts import svg

_COLOURS = ("#2a6f97", "#e07a1f", "#5b8c3e", "#8a4fa3", "#b5403c", "#4f5d75", "#c9a227", "#3aa6a6", "#777777")

LABELS = {
    "recorded": "Training was replaced by recorded losses (see docs/experiments.md): times, arms, bytes and costs are "
    "those of the real server and cost model; losses, accuracies and rewards say nothing about a model.",
    "real": "Training was real; time is simulated by the cost model of simulation/jetsons.toml, "
    "which is not calibrated.",
    "sums": "Sums of made-up updates of known structure; no training.",
}


def write_page(summary: Mapping[str, Any], path: Path) -> Path:
    """Write the page atomically and return its path. Raises `MissingDependency` without jinja2 or matplotlib."""
    try:
        import jinja2
    except ImportError:
        raise MissingDependency.of("jinja2", extra="demo", purpose="The page of an experiment") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["interval"] = shown
    charts = [(meaning, _bars(summary, name)) for name, meaning in summary["measures"].items() if _known(summary, name)]
    curves = {name: v["curve"] for name, v in summary["variants"].items() if v["curve"]}
    axes = [("accuracy", "mean held-out accuracy")] if "real" in summary["training"] else []
    axes += [("idle_share", "idle share"), ("ratio", "mean pruning ratio")]
    charts += [(f"{label} over simulated time", _lines(curves, key, label)) for key, label in axes if curves]
    page = environment.get_template("experiment.html.j2").render(
        summary=summary, charts=charts, labels=[LABELS[kind] for kind in summary["training"]]
    )
    temp = path.with_name(path.name + ".tmp")
    temp.write_text(page, encoding="utf-8")
    os.replace(temp, path)
    return path


def shown(value: Mapping[str, Any]) -> str:
    """`mean ± half (n)` with as many digits as make sense; a dash where nothing was measured."""
    mean, half, n = value["mean"], value["half"], value["n"]
    if mean is None:
        return "-"
    digits = 0 if abs(mean) >= 1000 else 1 if abs(mean) >= 100 else 2 if abs(mean) >= 10 else 4
    return f"{mean:,.{digits}f}" + ("" if half is None else f" ± {half:,.{digits}f}") + f" (n={n})"


def _known(summary: Mapping[str, Any], measure: str) -> bool:
    return any(variant[measure]["n"] for variant in summary["variants"].values())


def _bars(summary: Mapping[str, Any], measure: str) -> str:
    rows = {name: variant[measure] for name, variant in summary["variants"].items() if variant[measure]["n"]}

    def draw(axes: Any) -> None:
        means = [row["mean"] for row in rows.values()]
        errors = [row["half"] or 0.0 for row in rows.values()]
        axes.barh(list(rows), means, xerr=errors, color=_COLOURS[0], ecolor="#333333", capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel(measure)

    return svg(draw, size=(6.4, 0.9 + 0.32 * len(rows)))


def _lines(curves: Mapping[str, list[dict[str, Any]]], key: str, label: str) -> str:
    def draw(axes: Any) -> None:
        for position, (name, curve) in enumerate(curves.items()):
            points = [(p["time_s"], p[key]) for p in curve if p[key] is not None]
            axes.plot(*zip(*points), color=_COLOURS[position % len(_COLOURS)], linewidth=1.4, label=name)
        axes.set_xlabel("simulated time [s]")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=7)

    return svg(draw, size=(6.4, 3.6))

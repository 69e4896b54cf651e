"""Charts of a fleet run. Each function takes rows of the journal and returns inline SVG."""

from __future__ import annotations

import io
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedspine_edge.errors import MissingDependency
from fedspine_edge.monitoring.run_view import by_round, idle_by_device
from fedspine_edge.server.journal.schema import DeviceView

_CLASS_COLOURS = ("#2a6f97", "#e07a1f", "#5b8c3e", "#8a4fa3", "#b5403c", "#4f5d75")
_GREY = "#8b95a1"


def accuracy(rows: Sequence[DeviceView]) -> str:
    """Draw the held-out accuracy by round: one line per device, and the mean."""

    def draw(axes: Any) -> None:
        _device_lines(axes, rows, "accuracy_after")
        axes.plot(*_mean_by_round(rows, "accuracy_after"), color="black", linewidth=2.2, label="mean")
        axes.set_ylabel("accuracy")
        axes.legend(frameon=False, fontsize=8)

    return svg(draw)


def loss(rows: Sequence[DeviceView]) -> str:
    """Draw the mean held-out loss before and after each round."""

    def draw(axes: Any) -> None:
        before, after = _mean_by_round(rows, "loss_before"), _mean_by_round(rows, "loss_after")
        axes.plot(*before, color=_GREY, linestyle="--", marker="o", markersize=3, label="before")
        axes.plot(*after, color="black", marker="o", markersize=3, linewidth=2, label="after")
        axes.set_ylabel("cross-entropy")
        _round_axis(axes, rows)
        axes.legend(frameon=False, fontsize=8)

    return svg(draw)


def completion_times(rows: Sequence[DeviceView]) -> str:
    """Draw the completion time by round in seconds, one line per device."""

    def draw(axes: Any) -> None:
        _device_lines(axes, rows, "completion_time_s")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("completion time [s]")

    return svg(draw)


def rewards(rows: Sequence[DeviceView]) -> str:
    """Draw the total reward by round, one line per device."""

    def draw(axes: Any) -> None:
        _device_lines(axes, rows, "reward")
        axes.set_ylim(0, 1)
        axes.set_ylabel("reward")

    return svg(draw)


def idle(rows: Sequence[DeviceView]) -> str:
    """Draw the idle share of each device in percent."""

    def draw(axes: Any) -> None:
        shares = idle_by_device(rows)
        classes = {row.device_id: row.device_class for row in rows}
        colours = _colours(rows)
        axes.bar(
            range(len(shares)), [100 * s for s in shares.values()], color=[colours[classes[name]] for name in shares]
        )
        axes.set_xticks(range(len(shares)), list(shares), rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("idle [%]")

    return svg(draw)


def arms(rows: Sequence[DeviceView]) -> str:
    """Draw a grid of devices by rounds. The shade is the pruning ratio, the text gives the ratio and the LoRA rank."""

    def draw(axes: Any) -> None:
        devices = sorted({row.device_id for row in rows})
        rounds = sorted({row.server_round for row in rows})
        chosen = {(row.device_id, row.server_round): row for row in rows if row.r is not None}
        highest = max([row.pruning_ratio or 0.0 for row in rows] + [1e-9])
        shade = [[_ratio(chosen.get((d, t))) for t in rounds] for d in devices]
        axes.imshow(shade, cmap="Blues", vmin=0, vmax=1.6 * highest, aspect="auto")
        for y, device in enumerate(devices):
            for x, number in enumerate(rounds):
                if row := chosen.get((device, number)):
                    axes.text(x, y, f"{_ratio(row):.2f}\nr {row.r}", ha="center", va="center", fontsize=7)
        axes.set_yticks(range(len(devices)), devices, fontsize=8)
        axes.set_xticks(range(len(rounds)), rounds)
        axes.set_xlabel("round")
        axes.grid(visible=False)

    return svg(draw)


def _ratio(row: DeviceView | None) -> float:
    return (row.pruning_ratio or 0.0) if row else 0.0


def widths(kept: Mapping[str, Any]) -> str:
    """Draw the share of attention groups and FFN channels kept in each layer.

    Args:
        kept: Widths: `{"heads": [per layer], "channels": [per layer], "full_heads": int, "full_channels": int}`.
    """

    def draw(axes: Any) -> None:
        layers = range(len(kept["heads"]))
        heads = [h / kept["full_heads"] for h in kept["heads"]]
        channels = [c / kept["full_channels"] for c in kept["channels"]]
        axes.bar([x - 0.2 for x in layers], heads, width=0.38, color=_CLASS_COLOURS[0], label="attention")
        axes.bar([x + 0.2 for x in layers], channels, width=0.38, color=_CLASS_COLOURS[1], label="FFN")
        axes.set_xticks(list(layers), [str(i + 1) for i in layers])
        axes.set_xlabel("layer")
        axes.set_ylabel("share kept")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, fontsize=8)

    return svg(draw)


def before_after(pairs: Mapping[str, tuple[float, float, str]]) -> str:
    """Draw one horizontal bar per name: its value after pruning as a share of its value before.

    Args:
        pairs: By name the value before, the value after, and the text to print on the bar.
    """

    def draw(axes: Any) -> None:
        ratios = [after / before for before, after, _ in pairs.values()]
        axes.barh(list(pairs), [1] * len(pairs), color="#e6e9ed")
        axes.barh(list(pairs), ratios, color=_CLASS_COLOURS[2])
        for y, (ratio, (_, _, text)) in enumerate(zip(ratios, pairs.values())):
            axes.text(0.02, y, f"{text}   ({100 * ratio:.0f} %)", va="center", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the unpruned model")
        axes.grid(visible=False)

    return svg(draw)


def svg(draw: Callable[[Any], None], size: tuple[float, float] = (5.6, 3.1)) -> str:
    """Return what `draw` puts on matplotlib axes as inline SVG.

    Args:
        draw: Function that draws on the axes.
        size: Width and height in inches.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    image = re.sub(r"^.*?(?=<svg)", "", _render(draw, size, "svg").decode(), flags=re.DOTALL)
    return re.sub(r"(\d\.\d{2})\d+", r"\1", image)  # a hundredth of a point is below any screen's resolution


def pdf(draw: Callable[[Any], None], size: tuple[float, float] = (5.6, 3.1)) -> bytes:
    """Return the same as `svg` does, as a PDF of one page. Text stays text."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it logs every glyph that it embeds
    return _render(draw, size, "pdf")


def _render(draw: Callable[[Any], None], size: tuple[float, float], kind: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency.of("matplotlib", extra="demo", purpose="The HTML report") from None
    # A fixed hash salt and no date, so that the same run gives the same file.
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "fedspine"}
    with matplotlib.rc_context({**style, "pdf.fonttype": 42}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color="#e6e9ed", linewidth=0.8)
        axes.set_axisbelow(True)
        draw(axes)
        out = io.BytesIO()
        figure.savefig(out, format=kind, metadata={"Date" if kind == "svg" else "CreationDate": None})
    return out.getvalue()


def _colours(rows: Sequence[DeviceView]) -> dict[str, str]:
    classes = sorted({row.device_class for row in rows})
    return {name: _CLASS_COLOURS[i % len(_CLASS_COLOURS)] for i, name in enumerate(classes)}


def _device_lines(axes: Any, rows: Sequence[DeviceView], value: str) -> None:
    """Draw one thin line per device, coloured by device class."""
    colours = _colours(rows)
    devices: dict[str, list[DeviceView]] = defaultdict(list)
    for row in rows:
        if getattr(row, value) is not None:
            devices[row.device_id].append(row)
    labelled: set[str] = set()
    for own_rows in devices.values():
        name = own_rows[0].device_class
        axes.plot(
            [row.server_round for row in own_rows],
            [getattr(row, value) for row in own_rows],
            color=colours[name],
            linewidth=1.2,
            marker="o",
            markersize=3,
            alpha=0.8,
            label=None if name in labelled else name,
        )
        labelled.add(name)
    _round_axis(axes, rows)
    if labelled:
        axes.legend(frameon=False, fontsize=8)


def _mean_by_round(rows: Sequence[DeviceView], value: str) -> tuple[list[int], list[float]]:
    rounds, means = [], []
    for number, group in by_round(rows).items():
        values = [getattr(row, value) for row in group if getattr(row, value) is not None]
        if values:
            rounds.append(number)
            means.append(sum(values) / len(values))
    return rounds, means


def _round_axis(axes: Any, rows: Sequence[DeviceView]) -> None:
    axes.set_xticks(sorted({row.server_round for row in rows}))
    axes.set_xlabel("round")

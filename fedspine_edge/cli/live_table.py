"""Tables of a round, and the live view of the demo: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fedspine_edge.demo.demo import Progress
    from fedspine_edge.monitoring.run_view import RunView
    from fedspine_edge.server.journal.schema import DeviceView


class LiveTable:
    """Live view of the latest round: arm, time, loss, reward and bytes of every device.

    Args:
        quiet: Whether to print to standard error instead of standard output.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=quiet)
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        self._last_line = ""

    def __enter__(self) -> LiveTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def update(self, progress: Progress) -> None:
        """Show the progress of the run."""
        if self._live:
            table = _table(progress.view) if progress.view else None
            self._live.update(Group(*([table] if table else []), Text(_headline(progress), style="bold")))
        elif (line := _headline(progress)) != self._last_line:
            self._last_line = line
            self._console.print(line, highlight=False)

    def print_summary(self, summary: dict[str, Any]) -> None:
        """Print the measured figures and the path of the report."""
        if self._live:
            self._live.stop()
            self._live = None
        table = Table(title="Finished", show_header=False)
        for name, value in _summary_lines(summary):
            table.add_row(name, value)
        self._console.print(table)
        self._console.print(f"report: {summary['report']}", soft_wrap=True, highlight=False)


def _headline(progress: Progress) -> str:
    parts = [progress.step]
    if progress.view and progress.view.rows:
        newest = progress.view.rows[-1].server_round
        rows = [row for row in progress.view.rows if row.server_round == newest]
        reported = sum(row.status == "ok" for row in rows)
        parts.append(f"round {newest}/{progress.view.num_rounds}, {reported}/{len(rows)} devices reported")
        accuracies = [row.accuracy_after for row in rows if row.accuracy_after is not None]
        if accuracies:
            parts.append(f"mean held-out accuracy {sum(accuracies) / len(accuracies):.3f}")
    if progress.restarts:
        parts.append("restarted " + ", ".join(f"{name} ×{n}" for name, n in progress.restarts.items()))
    return " · ".join(parts)


COLUMNS = ("device", "class", "status", "ratio", "rank", "time, s", "loss", "accuracy", "reward", "up, kB", "down, kB")
"""Columns of the cells that `cells` returns."""


def empty_table(*more: str, without: Collection[str] = (), title: str | None = None, **options: Any) -> Table:
    """Return a table without rows.

    Args:
        *more: Further columns after `COLUMNS`.
        without: Columns to omit.
        title: Title of the table.
        **options: Options of `rich.table.Table`.
    """
    table = Table(title=title, **options)
    for name in (*(name for name in COLUMNS if name not in without), *more):
        table.add_column(
            name,
            no_wrap=name == "last seen",
            justify="left" if name in ("device", "class", "status", *more) else "right",
        )
    return table


def _table(view: RunView) -> Table | None:
    if not view.rows:
        return None
    newest = view.rows[-1].server_round
    table = empty_table(title=f"Round {newest} of {view.num_rounds}")
    previous = {row.device_id: row for row in view.rows if row.server_round == newest - 1}
    for row in view.rows:
        if row.server_round == newest:
            table.add_row(*cells(row, previous.get(row.device_id)))
    return table


def cells(row: DeviceView, previous: DeviceView | None = None) -> list[str]:
    """Return the cells of one device, in the order of `COLUMNS`.

    Args:
        row: Part of the device in the round.
        previous: Part of the device in the previous round.
    """

    def show(value: float | int | None, form: str) -> str:
        return "" if value is None else format(value, form)

    answered = row.time_kind is not None
    # rewards are known after a round, so a running round shows those of the previous one
    reward = row.reward if row.reward is not None else (previous.reward if previous else None)
    return [
        row.device_id,
        row.device_class,
        row.status,
        show(row.pruning_ratio, ".3f"),
        show(row.r, "d"),
        show(row.completion_time_s, ".1f"),
        show(row.loss_after, ".4f"),
        show(row.accuracy_after, ".3f"),
        show(reward, ".3f"),
        show(row.bytes_up / 1000 if answered else None, ".0f"),
        show(row.bytes_down / 1000 if answered else None, ".0f"),
    ]


def _summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    def percent(name: str) -> str:
        return "not measured" if summary.get(name) is None else f"{100 * summary[name]:.1f} %"

    return [
        ("accuracy of the finished model", f"{percent('accuracy_final')} on {summary['test_examples']} held-out texts"),
        ("accuracy without pruning, same number of steps", percent("accuracy_unpruned")),
        ("accuracy of the majority class", percent("accuracy_majority")),
        ("prunable parameters removed", percent("pruning_ratio")),
        ("all parameters removed", percent("sparsity")),
        ("parameters", f"{summary['params_before'] / 1e6:.2f} M → {summary['params_after'] / 1e6:.2f} M"),
        ("latency", f"{summary['latency_ms_before']:.2f} ms → {summary['latency_ms_after']:.2f} ms"),
        ("latency measured with", summary["latency_runtime"]),
        ("idle share (modelled time)", percent("idle_share")),
        ("sent by devices / to devices", f"{summary['bytes_up'] / 1e6:.1f} MB / {summary['bytes_down'] / 1e6:.1f} MB"),
        ("ONNX and torch, largest difference", f"{summary['onnx_max_abs_diff']:.2e}"),
        ("wall time", f"{summary['wall_s']:.0f} s"),
    ]

"""What training shows while it runs: a bar on the terminal, TensorBoard's curves on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedspine_edge.device.trainer import Trainer
from fedspine_edge.errors import MissingDependency


@contextmanager
def bar(what: str, total: int, wanted: bool | None) -> Iterator[Callable[..., None]]:
    """Yields a function to call after each step; `wanted` None shows the bar on a terminal only."""
    console = Console(stderr=True)
    shown = console.is_terminal if wanted is None else wanted
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown or total == 0) as progress:
        task: TaskID = progress.add_task(what, total=total)
        yield lambda steps=1: progress.advance(task, steps)


@contextmanager
def tensorboard(folder: str | Path, first_step: int) -> Iterator[Callable[[Trainer], None]]:
    """Yields a function that writes the trainer's last step to event files in `folder`.

    Args:
        folder: TensorBoard's log folder of this run.
        first_step: Steps taken by earlier fits, so that curves of several go on.

    Raises `MissingDependency`.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependency.of("tensorboard", extra="tensorboard", purpose="Writing TensorBoard curves") from None
    writer = SummaryWriter(str(folder))

    def write(trainer: Trainer) -> None:
        last = trainer.last_step
        if last is None:
            return
        values = {
            "train/loss": last.loss,
            "train/grad_norm": last.grad_norm,
            "train/learning_rate": last.learning_rate,
            "train/skipped_steps": trainer.skipped,
            "train/loss_spikes": trainer.spikes,
            "train/micro_batch": trainer.micro_batch,
        }
        for name, value in values.items():
            writer.add_scalar(name, value, first_step + trainer.step)

    try:
        yield write
    finally:
        writer.close()

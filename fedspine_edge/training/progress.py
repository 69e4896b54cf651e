"""Progress of training: a bar on a terminal, lines in a log, and TensorBoard curves."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedspine_edge.errors import ConfigError, MissingDependency
from fedspine_edge.training.trainer import Trainer

LOG_INTERVAL_S = 15.0
"""Seconds between two lines in a log; a training of an hour gives a few screens."""


class Advance(Protocol):
    """Reports that `steps` more steps are done, with a short note on the last."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress_bar(description: str, total: int, show: bool | None, *, done: int = 0) -> Iterator[Advance]:
    """Yield a function to call after each step.

    Args:
        description: Name of the work.
        total: Number of steps.
        show: Whether to show a bar on a terminal, or lines elsewhere; None shows only the bar.
        done: Steps that were done before and do not count for the speed.
    """
    console = Console(stderr=True)
    shown = console.is_terminal if show is None else show
    if not shown or done >= total:
        yield lambda steps=1, note="": None
    elif not console.is_terminal:
        yield _LineProgress(description, total, done).advance
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as progress:
            task: TaskID = progress.add_task(description, total=total, completed=done, note="")
            yield lambda steps=1, note="": progress.update(task, advance=steps, note=note)


class _LineProgress:
    """Prints the progress and the estimated remaining time to standard error at intervals."""

    def __init__(self, description: str, total: int, done: int) -> None:
        self._description, self._total, self._done, self._first = description, total, done, done
        self._started = self._printed = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if self._done < self._total and now - self._printed < LOG_INTERVAL_S:
            return
        self._printed = now
        elapsed = now - self._started
        per_step = elapsed / (self._done - self._first)
        remaining = per_step * (self._total - self._done)
        when = f"about {_duration(remaining)} left" if self._done < self._total else _duration(elapsed)
        words = [f"{self._description}: {self._done} of {self._total}", *filter(None, [note]), when]
        print(", ".join(words), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """Format a duration with its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def tensorboard_writer(folder: str | Path, first_step: int) -> Iterator[Callable[[Trainer], None]]:
    """Yield a function that writes the last step of a trainer to event files in `folder`.

    Args:
        folder: Log folder of TensorBoard.
        first_step: Steps of earlier fits, after which the curves continue.

    Raises `MissingDependency`, and `ConfigError` for a folder that cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependency.of("tensorboard", extra="tensorboard", purpose="Writing TensorBoard curves") from None
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise ConfigError(f"`log_dir` {folder} cannot be used: {error}.", remedy="Choose a writable folder.") from error

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

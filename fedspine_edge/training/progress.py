"""What training shows while it runs: a bar on the terminal, lines in a log, TensorBoard's curves on request."""

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

LINE_S = 15.0
"""Seconds between two lines of a log: a training of an hour takes a few screens."""


class Advance(Protocol):
    """Says that `steps` more are done, with a word on the last."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def bar(what: str, total: int, wanted: bool | None, *, done: int = 0) -> Iterator[Advance]:
    """Yields a function to call after each step.

    Args:
        what: The work, in a word.
        total: Its steps.
        wanted: Whether to show a bar on a terminal, and lines elsewhere; None shows the bar on a terminal only.
        done: Steps done before, which say nothing of the pace.
    """
    console = Console(stderr=True)
    shown = console.is_terminal if wanted is None else wanted
    if not shown or done >= total:
        yield lambda steps=1, note="": None
    elif not console.is_terminal:
        yield _Lines(what, total, done).advance
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as progress:
            task: TaskID = progress.add_task(what, total=total, completed=done, note="")
            yield lambda steps=1, note="": progress.update(task, advance=steps, note=note)


class _Lines:
    """On standard error, now and then, how far the work is, and the time that is left at the pace so far."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self._what, self._total, self._done, self._first = what, total, done, done
        self._began = self._said = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if self._done < self._total and now - self._said < LINE_S:
            return
        self._said = now
        taken = now - self._began
        pace = taken / (self._done - self._first)
        when = f"about {_span(pace * (self._total - self._done))} left" if self._done < self._total else _span(taken)
        words = [f"{self._what}: {self._done} of {self._total}", *filter(None, [note]), when]
        print(", ".join(words), file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    """A time in the two largest units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def tensorboard(folder: str | Path, first_step: int) -> Iterator[Callable[[Trainer], None]]:
    """Yields a function that writes the trainer's last step to event files in `folder`.

    Args:
        folder: TensorBoard's log folder of this run.
        first_step: Steps taken by earlier fits, so that curves of several go on.

    Raises `MissingDependency`, and `ConfigError` for a folder that cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependency.of("tensorboard", extra="tensorboard", purpose="Writing TensorBoard curves") from None
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise ConfigError(f"`log_dir` {folder} cannot be used: {error}.", remedy="Name one to write to.") from error

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

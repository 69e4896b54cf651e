"""Bundles, and torch, timed against each other: in turns within one run, each in a process of its own.

report = run_benchmark([Subject("pruned", "half.bundle"), Subject("dense", "whole.bundle")], batches=(1, 8), tokens=32)

Turns, so that a busy moment of the machine hits all alike; processes, so that each one's peak memory is its own. The
clock runs around the model alone, in the process that runs it. Where several take turns, ONNX Runtime's threads do not
spin: they would go on for 35 ms after a run, into the turns of the others. Energy is measured afterwards, on runs
without pause, because a board's power sensor is slower than one run.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from fedspine_edge import errors
from fedspine_edge.benchmark.power import PowerMeter, PowerSensor
from fedspine_edge.errors import ConfigError, DeployError, FedspineError
from fedspine_edge.runtime.latency import Result, WallTimes, figures_of

WARMUP = 3
ANSWER_TIMEOUT_S = 600.0
SPIN_S = 5.0
UNSTEADY = 1.3
"""A p99 beyond this multiple of the median says that the machine was busy, or the model is not steady."""

Kind = Literal["bundle", "torch"]
Phase = Literal["run", "prompt", "token"]


class Subject(Result, frozen=True, kw_only=True):
    """What takes part: a name for the table and a bundle, or a model folder for torch."""

    name: str
    path: str
    kind: Kind = "bundle"


class Row(WallTimes, frozen=True, kw_only=True):
    """The wall times of one subject, phase and batch size.

    "run" is a full pass over (batch, tokens). "prompt" is a decoder's pass over the prompt that fills its KV cache,
    "token" one step after it, averaged over the new tokens of a turn.
    """

    subject: str
    phase: Phase
    cpu_p50_ms: float
    """Median CPU time of the process; where it is below the wall time of a one-thread run, others had the core."""
    sequences_per_s: float
    """For "token": sequences advanced by a token."""
    tokens_per_s: float
    ratio: float
    """Median over that of the first subject in the same phase and batch."""
    unsteady: bool
    """p99 beyond 1.3 medians."""


class Contender(Result, frozen=True, kw_only=True):
    """What is known of one subject apart from its times."""

    name: str
    backend: str
    why: str
    task: str
    precision: str
    sparsity: float | None
    num_parameters: int
    size_bytes: int
    load_s: float
    peak_bytes: int
    """Largest resident memory of its process, Python and engine included."""
    watts: float | None = None
    """Mean power of the whole board while it ran; None where the board reports none."""
    joules_per_turn: float | None = None
    """Of one run at the first batch size, or of one prompt with its new tokens."""


class BenchmarkReport(Result, frozen=True, kw_only=True):
    """A benchmark's outcome."""

    threads: int | None
    load_before: float
    load_after: float
    """One-minute load averages of the machine."""
    power_rails: tuple[str, ...]
    """What the watts add up; empty where the board reports no power."""
    contenders: tuple[Contender, ...]
    rows: tuple[Row, ...]


class _Worker:
    """The process of one subject."""

    def __init__(self, subject: Subject, backend: str, threads: int | None, *, spinning: bool = True) -> None:
        self.subject = subject
        environment = dict(os.environ)
        if threads is not None:
            environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedspine_edge.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.peak_bytes = 0
        try:
            self.about = self.ask(
                do="load",
                kind=subject.kind,
                path=str(subject.path),
                backend=backend,
                threads=threads,
                spinning=spinning,
            )
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=ANSWER_TIMEOUT_S)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            raise self._failed(f"did not answer within {ANSWER_TIMEOUT_S:g} s") from None
        if not line:
            raise self._failed(f"ended with code {self._process.wait(timeout=10)}")
        answer: dict[str, Any] = json.loads(line)
        self.peak_bytes = answer.pop("peak_bytes")
        if "error" in answer:
            kind: type[FedspineError] = getattr(errors, answer["error"], DeployError)
            named = self.subject.path in answer["message"]
            raise kind(
                answer["message"] if named else f"{self.subject.name}: {answer['message']}", remedy=answer["remedy"]
            )
        return answer

    def _failed(self, what: str) -> DeployError:
        return DeployError(
            f"The process that runs {self.subject.name} {what}.", remedy="Check free memory; see its output above."
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()  # the worker ends when nothing is left to read
            self._process.wait(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait(timeout=10)
        self._listener.join(timeout=10)
        self._process.stdout.close()


def run_benchmark(
    subjects: Sequence[Subject],
    *,
    batches: Sequence[int] = (1,),
    tokens: int = 32,
    new_tokens: int = 16,
    repeats: int = 100,
    backend: str = "auto",
    threads: int | None = None,
    sysfs: str | Path = "/",
    progress: Callable[[str], None] | None = None,
) -> BenchmarkReport:
    """Times every subject at every batch size.

    Args:
        subjects: The first is what the ratios refer to.
        batches: Sequences at a time.
        tokens: Tokens a sequence, without padding; for decoders the prompt's.
        new_tokens: Steps after the prompt (decoders only).
        repeats: Timed turns per batch size.
        backend: For bundles; see `Session.load`.
        threads: Of ONNX Runtime and torch; None leaves it to them.
        sysfs: Where the file system begins, for the power sensor.

    Raises:
        ConfigError: A number is below 1, no subject, or subjects of different tasks.
        FedspineError: What a subject raised, with its name in front.
    """
    if not subjects:
        raise ConfigError("There is nothing to time.", remedy="Give at least one bundle or model.")
    numbers = {"batches": min(batches, default=0), "tokens": tokens, "new_tokens": new_tokens, "repeats": repeats}
    for name, number in {**numbers, "threads": 1 if threads is None else threads}.items():
        if number < 1:
            raise ConfigError(f"`{name}` is {number}.", remedy="Give at least 1.")
    report = progress or (lambda line: None)
    load_before = os.getloadavg()[0]
    with ExitStack() as stack:
        workers = []
        for subject in subjects:
            report(f"loading {subject.name}")
            workers.append(stack.enter_context(_Worker(subject, backend, threads, spinning=len(subjects) == 1)))
        tasks = {worker.about["task"] for worker in workers}
        if len(tasks) > 1:
            raise ConfigError(
                f"These do not do the same: {', '.join(sorted(tasks))}.", remedy="Compare models of one task."
            )
        steps = new_tokens if tasks == {"causal_lm"} else 0
        rows: list[Row] = []
        for batch in batches:
            report(f"timing batch {batch}")
            rows += _time(workers, batch, tokens, steps, repeats)
        load_after = os.getloadavg()[0]
        sensor = PowerSensor.find(sysfs)
        if sensor is not None:
            report("measuring energy")
        contenders = [_contender(worker, sensor, batches[0], tokens, steps) for worker in workers]
    return BenchmarkReport(
        threads=threads,
        load_before=load_before,
        load_after=load_after,
        power_rails=sensor.rails if sensor is not None else (),
        contenders=tuple(contenders),
        rows=tuple(rows),
    )


def _time(workers: Sequence[_Worker], batch: int, tokens: int, new_tokens: int, repeats: int) -> list[Row]:
    for worker in workers:
        worker.ask(do="prepare", batch=batch, tokens=tokens, new_tokens=new_tokens)
    turns: list[list[dict[str, list[float]]]] = [[] for _ in workers]
    for repeat in range(WARMUP + repeats):
        for worker, taken in zip(workers, turns):
            turn = worker.ask(do="turn")
            if repeat >= WARMUP:
                taken.append(turn)
    rows: list[Row] = []
    phases: tuple[Phase, ...] = ("prompt", "token") if new_tokens else ("run",)
    for phase in phases:
        times = [np.array([turn[phase] for turn in taken]) for taken in turns]
        first = float(np.median(times[0][:, 0]))
        for worker, each in zip(workers, times):
            rows.append(_row(worker.subject.name, phase, batch, tokens, each, first))
    return rows


def _row(subject: str, phase: Phase, batch: int, tokens: int, times: Any, first_ms: float) -> Row:
    """`times` holds (wall, CPU) milliseconds of every turn, (repeats, 2)."""
    wall = times[:, 0]
    figures = figures_of(wall)
    per_s = batch / figures["mean_ms"] * 1e3
    return Row(
        subject=subject,
        phase=phase,
        batch=batch,
        tokens=tokens,
        **figures,
        cpu_p50_ms=float(np.median(times[:, 1])),
        sequences_per_s=per_s,
        tokens_per_s=per_s if phase == "token" else per_s * tokens,
        ratio=figures["p50_ms"] / first_ms,
        unsteady=figures["p99_ms"] > UNSTEADY * figures["p50_ms"],
    )


def _contender(worker: _Worker, sensor: PowerSensor | None, batch: int, tokens: int, new_tokens: int) -> Contender:
    watts = joules = None
    if sensor is not None:
        worker.ask(do="prepare", batch=batch, tokens=tokens, new_tokens=new_tokens)
        with PowerMeter(sensor) as meter:
            spun = worker.ask(do="spin", seconds=SPIN_S)
        watts = meter.mean_w
        joules = watts * spun["seconds"] / spun["turns"]
    return Contender(
        name=worker.subject.name,
        **worker.about,
        peak_bytes=worker.peak_bytes,
        watts=watts,
        joules_per_turn=joules,
    )


def plot(report: BenchmarkReport, out: str | Path) -> None:
    """Draws the medians with their p90 and p99, a panel per phase. Raises `MissingDependency` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise errors.MissingDependency.of("matplotlib", extra="demo", purpose="A plot") from error
    phases = list(dict.fromkeys(row.phase for row in report.rows))
    names = [contender.name for contender in report.contenders]
    batches = list(dict.fromkeys(row.batch for row in report.rows))
    titles = {"run": "one pass", "prompt": "prompt", "token": "each new token"}
    figure = Figure(figsize=(5.2 * len(phases), 0.45 * len(names) * len(batches) + 1.6), layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases):
        labels = []
        for place, (batch, name) in enumerate((batch, name) for batch in batches for name in names):
            row = next(r for r in report.rows if (r.phase, r.batch, r.subject) == (phase, batch, name))
            axes.barh(place, row.p50_ms, color=f"C{names.index(name)}", height=0.7)
            axes.plot([row.p50_ms, row.p90_ms], [place, place], color="0.25", linewidth=2)
            axes.plot([row.p90_ms, row.p99_ms], [place, place], color="0.25", linewidth=0.8)
            axes.text(row.p99_ms, place, f"  {row.p50_ms:.3g} ms, {row.ratio:.0%}", va="center", fontsize=8)
            labels.append(f"{name}, batch {batch}" if len(batches) > 1 else name)
        axes.margins(x=0.25)  # room for the figures
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("ms: median, lines to p90 and p99")
        axes.set_title(f"{titles[phase]} ({report.rows[0].tokens} tokens)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)

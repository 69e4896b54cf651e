"""Benchmarks of bundles and torch models against each other, in interleaved runs and separate processes.

    report = run_benchmark([Candidate(name="pruned", path="half.bundle"), Candidate(name="dense", path="whole.bundle")])

Runs are interleaved so that load on the machine affects all candidates equally. Each candidate has its own process, so
that its peak memory can be measured. Only the model's run is timed, in the process that runs it. With several
candidates, ONNX Runtime's threads do not spin: they would spin for 35 ms after a run and disturb the runs of the
others. Energy is measured afterwards on continuous runs, because the power sensor of a board is slower than one run.
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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from fedspine_edge import errors
from fedspine_edge.benchmark.power import PowerMeter, PowerSensor
from fedspine_edge.errors import ConfigError, DeployError, FedspineError
from fedspine_edge.runtime.latency import wall_time_statistics
from fedspine_edge.runtime.results import Result, WallTimes

WARMUP_RUNS = 3
ANSWER_TIMEOUT_S = 600.0
ENERGY_RUN_S = 5.0
UNSTEADY_RATIO = 1.3
"""A p99 above this multiple of the median means that the machine was busy or that the model is not steady."""

Kind = Literal["bundle", "torch"]
Phase = Literal["run", "prompt", "token"]


class Candidate(Result, frozen=True, kw_only=True):
    """A model that takes part in a benchmark: its name, and its bundle or, for torch, its model folder."""

    name: str
    path: str
    kind: Kind = "bundle"


class CandidateTimes(WallTimes, frozen=True, kw_only=True):
    """Wall times of one candidate in one phase and at one batch size.

    The phase "run" is a full pass over (batch, tokens). For decoders, "prompt" is the pass over the prompt that fills
    the KV cache, and "token" is one step after it, averaged over the new tokens of a run.
    """

    candidate: str
    phase: Phase
    cpu_p50_ms: float
    """Median CPU time of the process. If it is below the wall time of one thread, other programs used the core."""
    sequences_per_s: float
    """Sequences per second; in the phase "token", sequences that advanced by one token."""
    tokens_per_s: float
    ratio: float
    """Median relative to that of the first candidate in the same phase and batch size."""
    unsteady: bool
    """Whether p99 exceeds 1.3 × the median."""


class CandidateResult(Result, frozen=True, kw_only=True):
    """Properties and measurements of one candidate, except its times."""

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
    """Peak resident memory of its process, including Python and the engine."""
    watts: float | None = None
    """Mean power of the whole board during its runs; None if the board has no power sensor."""
    joules_per_run: float | None = None
    """Energy of one run at the first batch size; for decoders, of one prompt with its new tokens."""


class BenchmarkReport(Result, frozen=True, kw_only=True):
    """Results of a benchmark."""

    threads: int | None
    load_before: float
    load_after: float
    """One-minute load averages of the machine before and after the timed runs."""
    power_rails: tuple[str, ...]
    """Power rails that the watts are summed over; empty if the board has no power sensor."""
    candidates: tuple[CandidateResult, ...]
    rows: tuple[CandidateTimes, ...]


@dataclass(frozen=True)
class _Workload:
    batch: int
    tokens: int
    new_tokens: int

    def command(self) -> dict[str, Any]:
        return {"do": "prepare", "batch": self.batch, "tokens": self.tokens, "new_tokens": self.new_tokens}


class _CandidateProcess:
    """The process that runs one candidate; see `worker.py` for its commands."""

    def __init__(self, candidate: Candidate, backend: str, threads: int | None, *, spin_wait: bool = True) -> None:
        self.candidate = candidate
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
        self._reader = threading.Thread(target=self._read_answers, daemon=True)
        self._reader.start()
        self.peak_bytes = 0
        try:
            self.properties = self.request(
                do="load",
                kind=candidate.kind,
                path=str(candidate.path),
                backend=backend,
                threads=threads,
                spin_wait=spin_wait,
            )
        except BaseException:
            self.close()
            raise

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def request(self, **command: Any) -> dict[str, Any]:
        """Send a command and return the answer. Raises the error that the process reports."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=ANSWER_TIMEOUT_S)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            raise self._failure(f"did not answer within {ANSWER_TIMEOUT_S:g} s") from None
        if not line:
            raise self._failure(f"exited with code {self._process.wait(timeout=10)}")
        answer: dict[str, Any] = json.loads(line)
        self.peak_bytes = answer.pop("peak_bytes")
        if "error" in answer:
            error: type[FedspineError] = getattr(errors, answer["error"], DeployError)
            names_candidate = self.candidate.path in answer["message"]
            message = answer["message"] if names_candidate else f"{self.candidate.name}: {answer['message']}"
            raise error(message, remedy=answer["remedy"])
        return answer

    def _failure(self, problem: str) -> DeployError:
        return DeployError(
            f"The process of the candidate {self.candidate.name} {problem}.",
            remedy="Check free memory, and the output of the process above.",
        )

    def __enter__(self) -> _CandidateProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, which exits at the end of its input."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait(timeout=10)
        self._reader.join(timeout=10)
        self._process.stdout.close()


def run_benchmark(
    candidates: Sequence[Candidate],
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
    """Time every candidate at every batch size.

    Args:
        candidates: Models to time. Ratios are relative to the first.
        batches: Batch sizes in sequences.
        tokens: Tokens per sequence without padding; for decoders, tokens of the prompt.
        new_tokens: Steps after the prompt (decoders only).
        repeats: Timed runs per batch size.
        backend: Backend for bundles; see `Session.load`.
        threads: Number of threads for ONNX Runtime and torch; None selects each library's default.
        sysfs: Root of the file system in which the power sensor is looked up.
        progress: Called with one line per step.

    Raises:
        ConfigError: A number is below 1, there is no candidate, or candidates have different tasks.
        FedspineError: A candidate failed; the message begins with its name.
    """
    if not candidates:
        raise ConfigError("There is nothing to time.", remedy="Give at least one bundle or model.")
    numbers = {"batches": min(batches, default=0), "tokens": tokens, "new_tokens": new_tokens, "repeats": repeats}
    for name, number in {**numbers, "threads": 1 if threads is None else threads}.items():
        if number < 1:
            raise ConfigError(f"`{name}` is {number}.", remedy="Give at least 1.")
    report = progress or (lambda line: None)
    load_before = os.getloadavg()[0]
    with ExitStack() as stack:
        processes = []
        for candidate in candidates:
            report(f"loading {candidate.name}")
            process = _CandidateProcess(candidate, backend, threads, spin_wait=len(candidates) == 1)
            processes.append(stack.enter_context(process))
        tasks = {process.properties["task"] for process in processes}
        if len(tasks) > 1:
            raise ConfigError(
                f"The candidates have different tasks: {', '.join(sorted(tasks))}.",
                remedy="Compare models of one task.",
            )
        steps = new_tokens if tasks == {"causal_lm"} else 0
        rows: list[CandidateTimes] = []
        for batch in batches:
            report(f"timing batch {batch}")
            rows += _time_interleaved(processes, _Workload(batch, tokens, steps), repeats)
        load_after = os.getloadavg()[0]
        sensor = PowerSensor.find(sysfs)
        if sensor is not None:
            report("measuring energy")
        results = [_result(process, sensor, _Workload(batches[0], tokens, steps)) for process in processes]
    return BenchmarkReport(
        threads=threads,
        load_before=load_before,
        load_after=load_after,
        power_rails=sensor.rails if sensor is not None else (),
        candidates=tuple(results),
        rows=tuple(rows),
    )


def _time_interleaved(
    processes: Sequence[_CandidateProcess], workload: _Workload, repeats: int
) -> list[CandidateTimes]:
    """Time runs of all candidates in alternation, and return one row per phase and candidate."""
    for process in processes:
        process.request(**workload.command())
    runs: list[list[dict[str, list[float]]]] = [[] for _ in processes]
    for repeat in range(WARMUP_RUNS + repeats):
        for process, process_runs in zip(processes, runs):
            times = process.request(do="run")
            if repeat >= WARMUP_RUNS:
                process_runs.append(times)
    rows: list[CandidateTimes] = []
    phases: tuple[Phase, ...] = ("prompt", "token") if workload.new_tokens else ("run",)
    for phase in phases:
        phase_times = [np.array([times[phase] for times in process_runs]) for process_runs in runs]
        baseline_ms = float(np.median(phase_times[0][:, 0]))
        for process, times_ms in zip(processes, phase_times):
            rows.append(_row(process.candidate.name, phase, workload, times_ms, baseline_ms))
    return rows


def _row(candidate: str, phase: Phase, workload: _Workload, times_ms: Any, baseline_ms: float) -> CandidateTimes:
    """Return the statistics of one candidate; `times_ms` contains (wall, CPU) times of every run, (repeats, 2)."""
    wall = times_ms[:, 0]
    statistics = wall_time_statistics(wall)
    per_s = workload.batch / statistics["mean_ms"] * 1e3
    return CandidateTimes(
        candidate=candidate,
        phase=phase,
        batch=workload.batch,
        tokens=workload.tokens,
        **statistics,
        cpu_p50_ms=float(np.median(times_ms[:, 1])),
        sequences_per_s=per_s,
        tokens_per_s=per_s if phase == "token" else per_s * workload.tokens,
        ratio=statistics["p50_ms"] / baseline_ms,
        unsteady=statistics["p99_ms"] > UNSTEADY_RATIO * statistics["p50_ms"],
    )


def _result(process: _CandidateProcess, sensor: PowerSensor | None, workload: _Workload) -> CandidateResult:
    """Measure the energy of a candidate, if there is a sensor, and return its result."""
    watts = joules = None
    if sensor is not None:
        process.request(**workload.command())
        with PowerMeter(sensor) as meter:
            answer = process.request(do="run_for", seconds=ENERGY_RUN_S)
        watts = meter.mean_w
        joules = watts * answer["seconds"] / answer["runs"]
    return CandidateResult(
        name=process.candidate.name,
        **process.properties,
        peak_bytes=process.peak_bytes,
        watts=watts,
        joules_per_run=joules,
    )


def plot(report: BenchmarkReport, out: str | Path) -> None:
    """Draw the medians with their p90 and p99, one panel per phase. Raises `MissingDependency` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise errors.MissingDependency.of("matplotlib", extra="demo", purpose="A plot") from error
    phases = list(dict.fromkeys(row.phase for row in report.rows))
    names = [candidate.name for candidate in report.candidates]
    batches = list(dict.fromkeys(row.batch for row in report.rows))
    titles = {"run": "full pass", "prompt": "prompt", "token": "each new token"}
    figure = Figure(figsize=(5.2 * len(phases), 0.45 * len(names) * len(batches) + 1.6), layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases):
        labels = []
        for place, (batch, name) in enumerate((batch, name) for batch in batches for name in names):
            row = next(r for r in report.rows if (r.phase, r.batch, r.candidate) == (phase, batch, name))
            axes.barh(place, row.p50_ms, color=f"C{names.index(name)}", height=0.7)
            axes.plot([row.p50_ms, row.p90_ms], [place, place], color="0.25", linewidth=2)
            axes.plot([row.p90_ms, row.p99_ms], [place, place], color="0.25", linewidth=0.8)
            axes.text(row.p99_ms, place, f"  {row.p50_ms:.3g} ms, {row.ratio:.0%}", va="center", fontsize=8)
            labels.append(f"{name}, batch {batch}" if len(batches) > 1 else name)
        axes.margins(x=0.25)  # space for the numbers
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("ms: median, lines to p90 and p99")
        axes.set_title(f"{titles[phase]} ({report.rows[0].tokens} tokens)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)

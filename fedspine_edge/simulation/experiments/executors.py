"""Where an experiment's jobs run: in processes of this machine, or spread over a Ray cluster."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from fedspine_edge.errors import MissingDependency
from fedspine_edge.simulation.experiments.jobs import pin, run_job

Engine = Literal["processes", "ray"]
Jobs = Mapping[str, Mapping[str, Any]]


def run_all(jobs: Jobs, work: Path, *, engine: Engine, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every job's name and measures as it ends; begun in the order of `jobs`.

    Args:
        work: Folder for the jobs' files on this machine.
        engine: `ray` uses the cluster at RAY_ADDRESS, or one on this machine with `workers` cores.
        workers: Processes, each kept on a core of its own.

    Raises whatever a job raises, and `MissingDependency` for `ray` where it is not installed.
    """
    return _on_ray(jobs, workers) if engine == "ray" else _in_processes(jobs, work, workers)


def _in_processes(jobs: Jobs, work: Path, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    # Started afresh: a forked child would inherit torch's threads, and each job's memory peak should be its own.
    context = get_context("spawn")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    own = context.SimpleQueue()
    for _, core in zip(range(workers := max(1, workers)), itertools.cycle(cores)):
        own.put(core)
    with ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=pin, initargs=(own,)) as pool:
        running = {pool.submit(run_job, job, work / name): name for name, job in jobs.items()}
        for done in as_completed(running):
            yield running[done], done.result()


def _on_ray(jobs: Jobs, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import, which reads it
    try:
        import ray
    except ImportError:
        raise MissingDependency.of("ray", extra="ray", purpose="Running jobs on a Ray cluster") from None
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(num_cpus=max(1, workers), include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=1, max_retries=2)(_far_away)
        running = {remote.remote(dict(job)): name for name, job in jobs.items()}
        while running:
            for done in ray.wait(list(running), num_returns=1)[0]:
                yield running.pop(done), ray.get(done)
    finally:
        ray.shutdown()


def _far_away(job: dict[str, Any]) -> dict[str, Any]:
    """A job on a machine that shares no files with this one; its package must be of the same version."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="fedspine-job-") as folder:
        return run_job(job, Path(folder) / "job")

"""Executors of an experiment's jobs: worker processes on this machine, or a Ray cluster."""

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
from fedspine_edge.simulation.experiments.jobs import initialize_worker, run_job

Engine = Literal["processes", "ray"]
Jobs = Mapping[str, Mapping[str, Any]]


def run_jobs(jobs: Jobs, work: Path, *, engine: Engine, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the jobs and yield the name and the measures of each as it finishes. Jobs start in the order of `jobs`.

    Args:
        jobs: Jobs by name.
        work: Folder for the jobs' temporary files on this machine.
        engine: "processes", or "ray" for the cluster at RAY_ADDRESS. Without that variable Ray starts a local cluster
            of `workers` cores.
        workers: Number of processes. Each is pinned to one core.

    Raises whatever a job raises, and `MissingDependency` if Ray is selected but not installed.
    """
    return _on_ray(jobs, workers) if engine == "ray" else _in_processes(jobs, work, workers)


def _in_processes(jobs: Jobs, work: Path, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    # Spawned, not forked: a forked child would inherit torch's threads and the parent's peak memory.
    context = get_context("spawn")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    free_cores = context.SimpleQueue()
    for _, core in zip(range(workers := max(1, workers)), itertools.cycle(cores)):
        free_cores.put(core)
    with ProcessPoolExecutor(
        max_workers=workers, mp_context=context, initializer=initialize_worker, initargs=(free_cores,)
    ) as pool:
        running = {pool.submit(run_job, job, work / name): name for name, job in jobs.items()}
        for future in as_completed(running):
            yield running[future], future.result()


def _on_ray(jobs: Jobs, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Read by the import below.
    try:
        import ray
    except ImportError:
        raise MissingDependency.of("ray", extra="ray", purpose="Running jobs on a Ray cluster") from None
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(num_cpus=max(1, workers), include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=1, max_retries=2)(_run_remotely)
        running = {remote.remote(dict(job)): name for name, job in jobs.items()}
        while running:
            for reference in ray.wait(list(running), num_returns=1)[0]:
                yield running.pop(reference), ray.get(reference)
    finally:
        ray.shutdown()


def _run_remotely(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job on a machine that shares no files with this one. Both must have the same version of the package."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="fedspine-job-") as folder:
        return run_job(job, Path(folder) / "job")

"""The jobs of an experiment: one variant with one seed each, every one a fleet run or a calculation of its own."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.aggregation.rules import Aggregator
from fedspine_edge.config import DataSettings
from fedspine_edge.errors import ConfigError
from fedspine_edge.monitoring.csv_export import flatten
from fedspine_edge.monitoring.run_view import read_run
from fedspine_edge.server.journal.writer import Journal
from fedspine_edge.simulation.cost_model import MINILM, spec_of
from fedspine_edge.simulation.device_classes import BUILT_IN as PROFILES
from fedspine_edge.simulation.device_classes import load_device_classes, parse_mix, scaled
from fedspine_edge.simulation.experiments.run_metrics import measure
from fedspine_edge.simulation.oracle import oracle
from fedspine_edge.simulation.replay import BUILT_IN, LossRecord, ReplayContext

LISTED_DEVICES = 200
"""Larger fleets have no rows by device in their results."""


def run_job(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Carry out one job below `folder`, which is emptied first; returns its measures.

    Raises `ConfigError` for a job that names what does not exist.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if "beside" in job and job["beside"] not in sys.path:  # where strategies of the user's own lie
        sys.path.insert(0, job["beside"])
    kinds = {"recorded": _recorded, "real": _real, "sums": _sums}
    if job["training"] not in kinds:
        raise ConfigError(f"training is {job['training']!r}.", remedy=f"One of: {', '.join(kinds)}.")
    began, cpu = time.perf_counter(), time.process_time()
    measures = kinds[job["training"]](job, folder)
    measures["wall_s"] = round(time.perf_counter() - began, 2)
    measures["cpu_s"] = round(time.process_time() - cpu, 2)
    return measures


def pin(core: Any) -> None:
    """Keep this worker process on a core of its own, its libraries on one thread, and alive while its parent is.

    Args:
        core: A queue of multiprocessing with a core for every worker.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core.get()})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers, which would go on for hours with what was queued."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _fleet(job: Mapping[str, Any], folder: Path, **inputs: Any) -> Any:
    from fedspine_edge.simulation.fleet_files import write_simulated_fleet

    profiles = load_device_classes(Path(job.get("profiles", PROFILES)))
    mix = scaled(parse_mix(job["mix"], profiles), job["num_devices"])
    return write_simulated_fleet(
        folder, mix=mix, profiles=profiles, holdout=job["holdout"], seed=job["seed"], **inputs, **job["settings"]
    )


def _recorded(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A fleet whose training is recorded; the oracle's figures and what the server spent beside its own."""
    from fedspine_edge.simulation.virtual_fleet import simulate_recorded

    spec = spec_of(job.get("wire", "small"))
    shared = ReplayContext(LossRecord.load(BUILT_IN), spec=spec)
    fleet, devices = _fleet(job, folder, model="none", shares=[Path("none.csv")])
    stamps: list[tuple[str, float]] = []
    simulate_recorded(fleet, devices, shared, on_event=lambda name, _: stamps.append((name, time.process_time())))
    run_dir = Path(fleet.run_dir)
    measures = _measured(run_dir)
    if fleet.pruning_ratio > 0 and len(devices) <= 200:
        best = oracle(fleet, devices, MINILM, shared.tokens)
        measures |= {
            "oracle_idle_share": round(best.idle_share, 6),
            "oracle_work_time_s": round(best.work_time_s, 3),
            "noisy_oracle_idle_share": round(best.noisy_idle_share, 6),
            "noisy_oracle_work_time_s": round(best.noisy_work_time_s, 3),
        }
    if job.get("server_costs"):
        measures |= _server_costs(run_dir, stamps)
    shutil.rmtree(folder)
    return measures


def _measured(run_dir: Path) -> dict[str, Any]:
    """The run's measures, and for a fleet that a person could look at what every device did in every round."""
    measures = measure(run_dir)
    if measures["num_devices"] <= LISTED_DEVICES:
        measures["devices"] = flatten(read_run(run_dir).rows)
    return measures


def _server_costs(run_dir: Path, stamps: list[tuple[str, float]]) -> dict[str, Any]:
    """CPU seconds and bytes of the server: deciding, ending a round, journal, memory of the whole process."""
    from fedspine_edge.config import FleetConfig, convert
    from fedspine_edge.strategies import DeviceInfo, create

    ending = [
        after - before
        for (name, before), (following, after) in itertools.pairwise(stamps)
        if (name, following) == ("report", "round_closed")
    ]
    with Journal.open_readonly(run_dir) as journal:
        strategy = create(convert(json.loads(journal.meta("config") or "{}"), FleetConfig))
        state = journal.state().strategy or {}
        strategy.load_dict(state)
        infos = [
            DeviceInfo(status.device_id, status.device_class, status.num_examples, 0, status.pruning_ratio)
            for status, _, _ in journal.devices()
        ]
        last_round = journal.rounds()[-1].server_round
    began = time.process_time()
    strategy.assign(infos, last_round)
    decide_s = time.process_time() - began
    return {
        "decide_s": round(decide_s, 4),
        "end_round_s": round(sum(ending) / len(ending), 3) if ending else None,
        "strategy_state_bytes": len(json.dumps(state)),
        "journal_bytes": sum(path.stat().st_size for path in run_dir.glob("journal.sqlite*")),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _real(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A fleet that really trains, and the accuracy of its finished model on sentences no device has seen."""
    from fedspine_edge.simulation.evaluation import finished_accuracy
    from fedspine_edge.simulation.fleet_files import demo_model, own_shares, prepare_data
    from fedspine_edge.simulation.virtual_fleet import simulate

    model = Path(job["model"]) if "model" in job else demo_model()
    num_labels = job.get("num_labels", 2)
    data = Path(job["data"]) if "data" in job else None
    if data is not None and data.is_dir():
        shares, test_csv = own_shares(data, job["num_devices"])
    else:
        shares, test_csv = prepare_data(
            folder / "data",
            num_devices=job["num_devices"],
            data=data,
            num_labels=num_labels,
            test_examples=job["test_examples"],
            dirichlet=job.get("dirichlet"),
            seed=job["seed"],
        )
    fleet, devices = _fleet(job, folder, model=str(model), shares=shares, num_labels=num_labels, torch_device="auto")
    simulate(fleet, devices)
    measures = _measured(Path(fleet.run_dir))
    test = finished_accuracy(
        Path(fleet.run_dir) / "final",
        model,
        DataSettings(path=str(test_csv), num_labels=num_labels),
        max_length_tokens=fleet.training.max_length_tokens,
    )
    measures |= {"test_accuracy": test.accuracy, "test_loss": test.loss, "test_examples": test.num_examples}
    shutil.rmtree(folder)
    return measures


def _sums(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """How far a rule's adapter lies from the exact weighted mean of the products, for updates of known structure.

    Devices share a signal of rank 8 and add noise of their own; ranks and kept rows differ as `settings` says.
    Relative Frobenius errors: `error` of the adapter as it is sent (cut to the largest rank), `error_of_best` of the
    best matrix of that rank, which no rule can undercut.
    """
    rng = np.random.default_rng(job["seed"])
    out_features, in_features, devices = 384, 384, job["num_devices"]
    ranks, kept_share, rule = job["settings"]["ranks"], job["settings"]["kept_share"], job["settings"]["rule"]
    r_max = max(ranks)
    signal_B, signal_A = rng.standard_normal((out_features, 8)), rng.standard_normal((8, in_features))
    aggregator = Aggregator(rule, {"layers.0.q": (out_features, in_features)}, r_max, 2.0, job["seed"])
    total, held = np.zeros((out_features, in_features)), np.zeros(out_features)
    for number in range(devices):
        r = int(rng.choice(ranks))
        rows = np.sort(rng.permutation(out_features)[: int(kept_share * out_features)])
        weight = float(rng.integers(50, 500))
        local = signal_B @ signal_A + 0.5 * rng.standard_normal((out_features, in_features))
        U, S, Vt = np.linalg.svd(local[rows], full_matrices=False)
        B, A = U[:, :r] * np.sqrt(S[:r]), np.sqrt(S[:r])[:, None] * Vt[:r]
        B, A = B.astype(np.float32), A.astype(np.float32)
        name = "layers.0.q"
        aggregator.add(f"d{number}", weight, {name: (A, B)}, {name: rows}, {name: np.arange(in_features)})
        total[rows] += weight * (B.astype(np.float64) @ A.astype(np.float64))
        held[rows] += weight
    exact = total / np.where(held > 0, held, 1.0)[:, None]
    A_sent, B_sent = aggregator.finish().factors["layers.0.q"]
    sent = B_sent.astype(np.float64) @ A_sent.astype(np.float64)
    S = np.linalg.svd(exact, compute_uv=False)
    norm = float(np.linalg.norm(exact))
    small = B_sent[:, :4].astype(np.float64) @ A_sent[:4].astype(np.float64)
    return {
        "error": float(np.linalg.norm(sent - exact)) / norm,
        "error_rank_4": float(np.linalg.norm(small - exact)) / norm,
        "error_of_best": float(np.sqrt((S[r_max:] ** 2).sum())) / norm,
        "norm_kept": float(np.linalg.norm(sent)) / norm,
    }

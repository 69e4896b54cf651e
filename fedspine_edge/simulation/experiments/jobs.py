"""Jobs of an experiment. A job is one variant with one seed: a simulated fleet run, or a calculation."""

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
from fedspine_edge.simulation.cost_model import MINILM, find_spec
from fedspine_edge.simulation.device_classes import BUILT_IN as BUILT_IN_CLASSES
from fedspine_edge.simulation.device_classes import load_device_classes, parse_mix, scale_mix
from fedspine_edge.simulation.experiments.run_metrics import measure
from fedspine_edge.simulation.oracle import oracle
from fedspine_edge.simulation.replay import BUILT_IN, LossRecord, ReplayContext

LISTED_DEVICES = 200
"""Fleets of more devices have no per-device rows in their results."""


def run_job(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run one job in `folder`, which is emptied first, and return its measures.

    Raises `ConfigError` if the job names something that does not exist.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if "beside" in job and job["beside"] not in sys.path:  # the folder of the user's own strategies
        sys.path.insert(0, job["beside"])
    kinds = {"recorded": _run_recorded, "real": _run_real, "sums": _run_sums}
    if job["training"] not in kinds:
        raise ConfigError(f"training is {job['training']!r}.", remedy=f"One of: {', '.join(kinds)}.")
    started, cpu_started = time.perf_counter(), time.process_time()
    measures = kinds[job["training"]](job, folder)
    measures["wall_s"] = round(time.perf_counter() - started, 2)
    measures["cpu_s"] = round(time.process_time() - cpu_started, 2)
    return measures


def initialize_worker(free_cores: Any) -> None:
    """Pin this worker process to a core, limit its libraries to one thread, and end it with its parent.

    Args:
        free_cores: Multiprocessing queue that holds one core number for every worker.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {free_cores.get()})
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit as soon as the parent has ended. A killed parent cannot stop its workers, which would run on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _fleet(job: Mapping[str, Any], folder: Path, **inputs: Any) -> Any:
    from fedspine_edge.simulation.fleet_settings import DeviceInputs, simulated_fleet

    classes = load_device_classes(Path(job.get("device_classes", BUILT_IN_CLASSES)))
    mix = scale_mix(parse_mix(job["mix"], classes), job["num_devices"])
    return simulated_fleet(
        folder, mix, classes, DeviceInputs(holdout=job["holdout"], **inputs), seed=job["seed"], **job["settings"]
    )


def _run_recorded(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a fleet with recorded losses; add the oracle's figures and, if requested, the server's costs."""
    from fedspine_edge.simulation.virtual_fleet import simulate_recorded

    spec = find_spec(job.get("wire", "small"))
    context = ReplayContext(LossRecord.load(BUILT_IN), spec=spec)
    fleet, devices = _fleet(job, folder, model="none", shares=[Path("none.csv")])
    stamps: list[tuple[str, float]] = []
    simulate_recorded(fleet, devices, context, on_event=lambda name, _: stamps.append((name, time.process_time())))
    run_dir = Path(fleet.run_dir)
    measures = _measure_run(run_dir)
    if fleet.pruning_ratio > 0 and len(devices) <= 200:
        best = oracle(fleet, devices, MINILM, context.tokens)
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


def _measure_run(run_dir: Path) -> dict[str, Any]:
    """Return the run's metrics and, for fleets of at most `LISTED_DEVICES`, the rows of all devices and rounds."""
    measures = measure(run_dir)
    if measures["num_devices"] <= LISTED_DEVICES:
        measures["devices"] = flatten(read_run(run_dir).rows)
    return measures


def _server_costs(run_dir: Path, stamps: list[tuple[str, float]]) -> dict[str, Any]:
    """Return the server's costs: CPU time to select arms and to end a round, journal size, peak memory."""
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
    started = time.process_time()
    strategy.assign(infos, last_round)
    decide_s = time.process_time() - started
    return {
        "decide_s": round(decide_s, 4),
        "end_round_s": round(sum(ending) / len(ending), 3) if ending else None,
        "strategy_state_bytes": len(json.dumps(state)),
        "journal_bytes": sum(path.stat().st_size for path in run_dir.glob("journal.sqlite*")),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _run_real(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a fleet with real training, and evaluate its finished model on sentences that no device has seen."""
    from fedspine_edge.simulation.data_shares import find_shares, prepare_data
    from fedspine_edge.simulation.evaluation import evaluate_finished_model
    from fedspine_edge.simulation.fleet_settings import default_model
    from fedspine_edge.simulation.virtual_fleet import simulate

    model = Path(job["model"]) if "model" in job else default_model()
    num_labels = job.get("num_labels", 2)
    data = Path(job["data"]) if "data" in job else None
    if data is not None and data.is_dir():
        shares, test_csv = find_shares(data, job["num_devices"])
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
    measures = _measure_run(Path(fleet.run_dir))
    test = evaluate_finished_model(
        Path(fleet.run_dir) / "final",
        model,
        DataSettings(path=str(test_csv), num_labels=num_labels),
        max_length_tokens=fleet.training.max_length_tokens,
    )
    measures |= {"test_accuracy": test.accuracy, "test_loss": test.loss, "test_examples": test.num_examples}
    shutil.rmtree(folder)
    return measures


def _run_sums(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Measure the distance between a rule's aggregate and the exact weighted mean of the products B·A.

    The updates are synthetic: devices share a signal of rank 8 and add independent noise. Their ranks and kept rows
    follow `settings`. The measures are relative Frobenius errors: `error` of the adapter as it is sent (truncated to
    the largest rank), and `error_of_best` of the best matrix of that rank, which is a lower bound for every rule.
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

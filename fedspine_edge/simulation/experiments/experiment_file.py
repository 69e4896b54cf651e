"""Experiment files of the user: a TOML file, with data, device classes and strategies beside it."""

from __future__ import annotations

import hashlib
import importlib.machinery
import logging
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

log = logging.getLogger(__name__)

PATHS = ("data", "model", "device_classes", "profiles", "beside")
"""Keys of a job that name files. A result depends on the content of the files, not on their location."""

RENAMED_KEYS = {"profiles": "device_classes"}
"""Keys by their name before version 0.2, which is still accepted with a warning."""

COMMON: Mapping[str, Any] = {
    "training": "real",
    "holdout": 64,
    "test_examples": 1200,
    "num_labels": 2,
    "settings": {},
}
MEASURES: Mapping[str, str] = {
    "test_accuracy": "accuracy of the finished model on the test set (real training only)",
    "test_loss": "cross-entropy of the finished model on the test set",
    "total_time_s": "simulated time in seconds from the start of the first round to the end of the last one",
    "work_time_s": "Σ over rounds of the slowest device's time",
    "idle_share": "mean over devices and rounds of 1 − T_i / max T",
    "mean_ratio": "mean pruning ratio after the last round",
    "bytes_up": "bytes sent by all devices",
    "bytes_down": "bytes received by all devices",
}
"""Measures to show if a file names none."""


class Variant(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Keys of a job. `common`, the form and the variant are merged in this order."""

    training: Literal["real", "recorded"] = "real"
    mix: str
    num_devices: int | None = None
    holdout: int = 64
    test_examples: int = 1200
    num_labels: int = 2
    dirichlet: float | None = None
    data: str | None = None
    model: str | None = None
    device_classes: str | None = None
    wire: str = "small"
    settings: dict[str, Any] = msgspec.field(default_factory=dict)


def read(path: Path) -> dict[str, Any]:
    """Read the file's tables and fill in `title` and other defaults. Raises `ConfigError` for an invalid file."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"experiment {path} cannot be used: {error}.",
            remedy="See examples/experiment.toml for a complete file with explanations.",
        ) from error
    known = {"title", "question", "paper", "measures", "target", "common", "quick", "full", "variant"}
    if unknown := sorted(set(data) - known):
        raise ConfigError(
            f"experiment {path}: unknown key {unknown[0]!r}.", remedy=f"Known: {', '.join(sorted(known))}."
        )
    for form in ("common", "quick", "full"):
        if isinstance(data.get(form), dict):
            data[form] = _rename_keys(data[form], path)
    data["variant"] = [_rename_keys(variant, path) for variant in data.get("variant", [])]
    names = [variant.get("name") for variant in data.get("variant", [])]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"experiment {path} has no [[variant]] sections, or one without a name.")
    if (of := data.get("target", {}).get("of")) is not None and of not in names:
        raise ConfigError(
            f"experiment {path}: [target] names {of!r}, which is not a variant.", remedy=f"One of: {', '.join(names)}."
        )
    for form in ("quick", "full"):
        seeds = {**data.get("common", {}), **data.get(form, {})}.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
            raise ConfigError(
                f"experiment {path}: seeds is {seeds!r}.", remedy="Give a list of integers such as seeds = [0, 1, 2]."
            )
    texts = {"title": path.stem, "question": "", "paper": "", "measures": dict(MEASURES), "full": {}}
    return {**texts, **data, "common": {"seeds": [0], **data.get("common", {})}}


def complete(job: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a job of the file with absolute paths, and the digests of the files as `inputs`.

    Raises `ConfigError` naming the variant for an invalid key, setting, device class or file.
    """
    where = f"experiment {path}, variant {job['variant']!r}"
    job = {**COMMON, **job}
    try:
        msgspec.convert({k: v for k, v in job.items() if k not in ("variant", "seed")}, Variant)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{where}: {error}.", remedy="docs/guides/run-an-experiment.md lists the keys of a variant."
        ) from None
    fleet = convert({**job["settings"], "seed": job["seed"]}, FleetConfig, where=where)
    if fleet.task != "classification":
        raise ConfigError(
            f"{where}: experiments support the task classification only.",
            remedy="Use fedspine-edge simulate for other tasks.",
        )
    if job["training"] == "recorded" and (useless := [key for key in ("data", "model", "dirichlet") if key in job]):
        raise ConfigError(
            f"{where}: {useless[0]} has no effect on recorded losses.",
            remedy=f'Set training = "real", or remove {useless[0]}.',
        )
    job = {**job, "beside": str(path.parent.resolve())}
    for key in ("data", "model", "device_classes"):
        if key in job:
            job[key] = str((path.parent / job[key]).resolve())
    classes = load_device_classes(Path(job.get("device_classes", BUILT_IN)))
    job.setdefault("num_devices", sum(parse_mix(job["mix"], classes).values()))
    files: dict[str, Path] = {key: Path(job[key]) for key in ("data", "model", "device_classes") if key in job}
    if ":" in fleet.strategy:
        files["strategy"] = _module_file(fleet.strategy.partition(":")[0], path.parent, where)
    _check_strategy(fleet, path.parent, where)
    return {**job, "inputs": {key: _digest(location, where) for key, location in files.items()}}


def with_current_keys(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return `table` with renamed keys under their current names."""
    return {RENAMED_KEYS.get(key, key): value for key, value in table.items()}


def _rename_keys(table: dict[str, Any], path: Path) -> dict[str, Any]:
    for old, new in RENAMED_KEYS.items():
        if old in table and new not in table:
            log.warning("experiment %s: `%s` is now called `%s`.", path, old, new)
            return with_current_keys(table)
    return table


def _check_strategy(fleet: FleetConfig, beside: Path, where: str) -> None:
    """Create the strategy once, as the server will, so that an invalid one is reported before the first job."""
    sys.path.insert(0, str(beside.resolve()))
    try:
        create(fleet)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", remedy=error.remedy) from None
    finally:
        sys.path.remove(str(beside.resolve()))


def _module_file(module: str, beside: Path, where: str) -> Path:
    """Find the file of a strategy's module beside the experiment or on Python's path, without importing it."""
    spec = importlib.machinery.PathFinder.find_spec(module.partition(".")[0], [str(beside.resolve()), *sys.path])
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{where}: the strategy's module {module!r} was not found.",
            remedy=f"Put the module into {beside.resolve()}, or add its folder to PYTHONPATH.",
        )
    return Path(spec.origin)


def _digest(path: Path, where: str) -> str:
    """Return the SHA-256 of a file, or of the names and hashes of a folder's files. Raises `ConfigError` if absent."""
    if not path.exists():
        raise ConfigError(f"{where}: {path} does not exist.")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    lines = [f"{_sha256(file, file.stat().st_mtime_ns)}  {file.name if path.is_dir() else ''}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _sha256(file: Path, _: int) -> str:
    """Hash a file, once for each modification time, because every job names the same model."""
    return sha256_of_file(file)

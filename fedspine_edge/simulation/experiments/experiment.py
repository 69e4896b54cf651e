"""Experiments: read a config, run the jobs whose results are missing, and summarise them with confidence intervals.

A config is a TOML file in `configs/` or of the user. Every (variant, seed) is one job with its own result file. It
holds the job's settings and a digest of everything that the result depends on, so the same command after an
interruption runs only the missing jobs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedspine_edge.config import with_current_names
from fedspine_edge.errors import ConfigError
from fedspine_edge.files import write_text_atomically
from fedspine_edge.monitoring.csv_export import COLUMNS, write_csv
from fedspine_edge.simulation.experiments import experiment_file
from fedspine_edge.simulation.experiments.executors import Engine, run_jobs
from fedspine_edge.simulation.experiments.run_metrics import CURVE, time_to
from fedspine_edge.version import __version__

FOLDER = Path(__file__).with_name("configs")
_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantiles of Student's t distribution by degrees of freedom."""

_CODE_VERSION = 3
"""Part of every digest. Increase it if results of an older version must not be mixed with new ones."""


@dataclass(frozen=True)
class Experiment:
    """A config in one of its forms.

    Attributes:
        form: "quick" or "full".
        paper: The paper's result.
        measures: Meaning of each measure to show, by name.
        jobs: By "variant-seed" the job, as `run_job` takes it.
        target: Reference variant and margin of the target accuracy; empty without one.
    """

    name: str
    form: str
    title: str
    question: str
    paper: str
    measures: dict[str, str]
    jobs: dict[str, dict[str, Any]]
    target: dict[str, Any]

    @property
    def variants(self) -> list[str]:
        """Names of the variants in the order of the config."""
        return list(dict.fromkeys(job["variant"] for job in self.jobs.values()))


def names() -> list[str]:
    """Return the names of the package's experiments."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_experiment(name: str, *, quick: bool) -> Experiment:
    """Load one of the package's experiments by name, or the user's own by its path, which ends in `.toml`.

    Raises `ConfigError` for an unknown name, and for a file of the user that cannot be run, before any job starts.
    """
    own = name.endswith(".toml")
    path = Path(name) if own else FOLDER / f"{name}.toml"
    if not own and not path.is_file():
        raise ConfigError(
            f"there is no experiment {name!r}.", remedy=f"One of: {', '.join(names())}; or the path of a .toml file."
        )
    data = experiment_file.read(path)
    if quick and "quick" not in data:
        raise ConfigError(f"experiment {path} has no [quick] section.", remedy="Add one, or leave out --quick.")
    form = "quick" if quick else "full"
    common = _merged(data["common"], data[form])
    jobs: dict[str, dict[str, Any]] = {}
    for variant in data["variant"]:
        if form not in variant.get("forms", ["quick", "full"]):
            continue
        settings = {k: v for k, v in variant.items() if k not in ("name", "forms")}
        job = _merged({k: v for k, v in common.items() if k != "seeds"}, settings)
        for seed in common["seeds"]:
            full = {**job, "variant": variant["name"], "seed": seed}
            jobs[job_name(variant["name"], seed)] = experiment_file.complete(full, path) if own else full
    return Experiment(
        path.stem, form, data["title"], data["question"], data["paper"], data["measures"], jobs, data.get("target", {})
    )


def job_name(variant: str, seed: int) -> str:
    """Return the file name of a job. Greek letters are spelled out."""
    for letter, word in (("λ", "discount"), ("δ", "min-side"), ("τ", "tau")):
        variant = variant.replace(letter, word)
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', variant).strip('-')}-{seed}"


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    workers: int = 1,
    engine: Engine = "processes",
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the missing jobs, write `summary.json` and `jobs.csv` to `out`, and return the summary.

    Args:
        experiment: The experiment.
        out: Folder of the results.
        workers: Number of processes. Each is pinned to one core.
        engine: Executor of the jobs, see `executors.run_jobs`.
        on_progress: Called with a line of text when a job has finished.

    Raises whatever a job raises. The results of finished jobs are kept.
    """
    results = out / "jobs"
    results.mkdir(parents=True, exist_ok=True)
    _adopt_results(experiment, out)
    missing = {name: job for name, job in experiment.jobs.items() if _read(results, name, job) is None}
    on_progress(f"{experiment.name} ({experiment.form}): {len(experiment.jobs)} jobs, {len(missing)} to run")
    # Ordered by seed, so that an interrupted run leaves complete comparisons.
    in_order = dict(sorted(missing.items(), key=lambda item: item[1]["seed"]))
    for name, measures in run_jobs(in_order, out / "work", engine=engine, workers=workers):
        _write(results, name, experiment.jobs[name], measures)
        write_summary(experiment, out)
        on_progress(f"{name} done")
    return write_summary(experiment, out)


def write_summary(experiment: Experiment, out: Path) -> dict[str, Any]:
    """Write `summary.json` and the CSV tables of the jobs that have finished, and return the summary."""
    read = {name: _read(out / "jobs", name, job) for name, job in experiment.jobs.items()}
    found = {name: measures for name, measures in read.items() if measures is not None}
    summary = summarise(experiment, found)
    write_text_atomically(out / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
    _write_tables(out, experiment, found)
    return summary


def summarise(experiment: Experiment, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean, 95 % interval and number of seeds of every measure of every variant."""
    with_target = {name: {**measures, **_target(experiment, found, name)} for name, measures in found.items()}
    table: dict[str, dict[str, Any]] = {}
    for variant in experiment.variants:
        runs = [m for name, m in with_target.items() if experiment.jobs[name]["variant"] == variant]
        table[variant] = {measure: interval([m.get(measure) for m in runs]) for measure in experiment.measures}
        table[variant]["curve"] = _mean_curve([m["curve"] for m in runs if "curve" in m])
    table = {name: {**row, **_mean_target(experiment, found, table, name)} for name, row in table.items()}
    kinds = sorted({str(job["training"]) for job in experiment.jobs.values()})
    return {
        "experiment": experiment.name,
        "form": experiment.form,
        "title": experiment.title,
        "question": experiment.question,
        "paper": experiment.paper,
        "measures": experiment.measures,
        "training": kinds,
        "seeds": sorted({job["seed"] for job in experiment.jobs.values()}),
        "variants": table,
        "version": __version__,
    }


def interval(values: Sequence[float | None]) -> dict[str, Any]:
    """Return the mean, the half width of the 95 % interval (Student's t; None for one value) and their number."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "half": None, "n": 0}
    half = None
    if len(known) > 1:
        half = _T_975.get(len(known) - 1, 2.0 if len(known) > 29 else 2.2) * stdev(known) / math.sqrt(len(known))
    return {"mean": fmean(known), "half": half, "n": len(known)}


def _target(experiment: Experiment, found: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return the time to the target accuracy, which the reference variant of the same seed sets on validation."""
    target, job = experiment.target, experiment.jobs[name]
    if not target or "curve" not in found[name]:
        return {}
    reference = found.get(job_name(target["of"], job["seed"]))
    if reference is None:
        return {}
    accuracy = reference["curve"][-1]["accuracy"] - target["minus"]
    return {"target_accuracy": accuracy, "time_to_target_s": time_to(found[name]["curve"], accuracy)}


def _mean_target(
    experiment: Experiment, done: Mapping[str, Any], table: Mapping[str, Mapping[str, Any]], variant: str
) -> dict[str, Any]:
    """Return the same as `_target` for curves averaged over the seeds, which cross the target by chance less often."""
    target, curve = experiment.target, table[variant]["curve"]
    if not target or not curve or not table[target["of"]]["curve"]:
        return {}
    accuracy = table[target["of"]]["curve"][-1]["accuracy"] - target["minus"]
    values = {"target_accuracy_of_mean": accuracy, "time_to_target_of_mean_s": time_to(curve, accuracy)}
    seeds = sum(experiment.jobs[name]["variant"] == variant for name in done)
    return {name: {"mean": x, "half": None, "n": 0 if x is None else seeds} for name, x in values.items()}


def _mean_curve(curves: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    points = []
    for same_round in zip(*curves):
        point: dict[str, Any] = {"round": same_round[0]["round"]}
        for key in CURVE:
            if key != "round":
                found = interval([one[key] for one in same_round])
                point[key] = None if found["mean"] is None else round(found["mean"], 6)
                point[f"{key}_half"] = None if found["half"] is None else round(found["half"], 6)
        points.append(point)
    return points


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `over`, recursively for nested tables."""
    result = dict(base)
    for key, value in over.items():
        known = result.get(key)
        result[key] = _merged(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    return result


def _inputs(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that a job's result depends on. The variant's name and the location of files are not part."""
    return {key: value for key, value in job.items() if key not in ("variant", *experiment_file.PATHS)}


def _digest(job: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([_CODE_VERSION, _inputs(job)], sort_keys=True).encode()).hexdigest()[:16]


def _identity(job: Mapping[str, Any]) -> str:
    """Return a canonical text of a job's inputs, the same before and after a setting was renamed."""
    inputs = {**_inputs(job), "settings": with_current_names(job.get("settings", {}))[0]}
    if "inputs" in inputs:
        inputs["inputs"] = experiment_file.with_current_keys(inputs["inputs"])
    return json.dumps(inputs, sort_keys=True)


def _load_result(path: Path) -> tuple[str, dict[str, Any]] | None:
    """Return identity and measures of a result file; None if another version of the code wrote it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["digest"] != _digest(data["job"]):
        return None
    return _identity(data["job"]), data["measures"]


def _adopt_results(experiment: Experiment, out: Path) -> None:
    """Copy results that another experiment beside `out` has for the same settings and seed."""
    known = {}
    for path in out.parent.glob("*/jobs/*.json"):
        if (path.parent.parent / "summary.json").is_file() and (result := _load_result(path)):
            known[result[0]] = result[1]
    for name, job in experiment.jobs.items():
        if _read(out / "jobs", name, job) is None and (measures := known.get(_identity(job))):
            _write(out / "jobs", name, job, measures)


def _read(results: Path, name: str, job: Mapping[str, Any]) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    result = _load_result(path) if path.is_file() else None
    return result[1] if result is not None and result[0] == _identity(job) else None


def _write(results: Path, name: str, job: Mapping[str, Any], measures: Mapping[str, Any]) -> None:
    text = json.dumps({"digest": _digest(job), "job": job, "measures": measures}, indent=1) + "\n"
    write_text_atomically(results / f"{name}.json", text)


def _write_tables(out: Path, experiment: Experiment, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `jobs.csv`, `rounds.csv` and `devices.csv`: one row per job, per round, and per device and round."""

    def rows(part: str) -> list[dict[str, Any]]:
        names = {name: {key: experiment.jobs[name][key] for key in ("variant", "seed")} for name in found}
        return [{**names[name], **row} for name, measures in found.items() for row in measures.get(part, [])]

    plain = sorted({key for measures in found.values() for key, v in measures.items() if not isinstance(v, list)})
    jobs = [{**measures, **{k: experiment.jobs[n][k] for k in ("variant", "seed")}} for n, measures in found.items()]
    write_csv(out / "jobs.csv", ["variant", "seed", *plain], jobs)
    for name, part, columns in (("rounds", "curve", CURVE), ("devices", "devices", COLUMNS)):
        if table := rows(part):
            write_csv(out / f"{name}.csv", ["variant", "seed", *columns], table)

"""Named experiments: read a committed config, run what has not been run, summarise with intervals.

A config is a TOML file in `experiments/` or of the user's own. Every (variant, seed) is one job with a result file of
its own, named by the job and holding a digest of everything it depends on: the same command after an interruption runs
only what is missing.
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

from fedspine_edge.errors import ConfigError
from fedspine_edge.files import write_text_atomically
from fedspine_edge.monitoring.csv_export import COLUMNS, write_csv
from fedspine_edge.simulation.experiments import experiment_file
from fedspine_edge.simulation.experiments.executors import Engine, run_all
from fedspine_edge.simulation.experiments.run_metrics import CURVE, time_to
from fedspine_edge.version import __version__

FOLDER = Path(__file__).with_name("configs")
_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % points of Student's t by degrees of freedom."""

_CODE_VERSION = 3
"""Raise it when results of an older version must not be mixed with new ones."""


@dataclass(frozen=True)
class Experiment:
    """A config, in one of its forms.

    Attributes:
        jobs: By "variant-seed" what `run_job` takes.
        measures: Names to show, with what they mean.
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
        """Names of the variants, in the config's order."""
        return list(dict.fromkeys(job["variant"] for job in self.jobs.values()))


def names() -> list[str]:
    """The experiments that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_experiment(name: str, *, quick: bool) -> Experiment:
    """Read a config, of the package by its name or the user's own by its path, which ends in `.toml`.

    Raises `ConfigError` for an unknown name, and for a file of one's own that cannot be run, before anything is.
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
    """A file name for a job; Greek letters of settings are spelled out."""
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
    """Run what is missing below `out` and write `summary.json` and `jobs.csv`; returns the summary.

    Args:
        workers: Processes, each kept on a core of its own.
        engine: Where the jobs run, see `engines.run_all`.

    Raises whatever a job raises; finished jobs stay.
    """
    results = out / "jobs"
    results.mkdir(parents=True, exist_ok=True)
    _adopt(experiment, out)
    missing = {name: job for name, job in experiment.jobs.items() if _read(results, name, job) is None}
    on_progress(f"{experiment.name} ({experiment.form}): {len(experiment.jobs)} jobs, {len(missing)} to run")
    # Seed by seed, so that an interrupted run leaves whole comparisons.
    in_order = dict(sorted(missing.items(), key=lambda item: item[1]["seed"]))
    for name, measures in run_all(in_order, out / "work", engine=engine, workers=workers):
        _write(results, name, experiment.jobs[name], measures)
        conclude(experiment, out)
        on_progress(f"{name} done")
    return conclude(experiment, out)


def conclude(experiment: Experiment, out: Path) -> dict[str, Any]:
    """Write `summary.json` and `jobs.csv` of the jobs that are done, and return the summary."""
    read = {name: _read(out / "jobs", name, job) for name, job in experiment.jobs.items()}
    found = {name: measures for name, measures in read.items() if measures is not None}
    summary = summarise(experiment, found)
    write_text_atomically(out / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
    _write_tables(out, experiment, found)
    return summary


def summarise(experiment: Experiment, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, 95 % interval and number of seeds of every measure of every variant."""
    with_target = {name: {**measures, **_target(experiment, found, name)} for name, measures in found.items()}
    table: dict[str, dict[str, Any]] = {}
    for variant in experiment.variants:
        mine = [m for name, m in with_target.items() if experiment.jobs[name]["variant"] == variant]
        table[variant] = {measure: interval([m.get(measure) for m in mine]) for measure in experiment.measures}
        table[variant]["curve"] = _mean_curve([m["curve"] for m in mine if "curve" in m])
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
    """Mean, half width of the 95 % interval (Student's t, None for one value) and how many values there are."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "half": None, "n": 0}
    half = None
    if len(known) > 1:
        half = _T_975.get(len(known) - 1, 2.0 if len(known) > 29 else 2.2) * stdev(known) / math.sqrt(len(known))
    return {"mean": fmean(known), "half": half, "n": len(known)}


def _target(experiment: Experiment, found: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Time to the target accuracy, which the unpruned variant of the same seed sets on validation."""
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
    """Like `_target`, from curves averaged over the seeds, which cross the target less often by luck."""
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
    """`over` laid over `base`, tables within tables."""
    result = dict(base)
    for key, value in over.items():
        known = result.get(key)
        result[key] = _merged(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    return result


def _digest(job: Mapping[str, Any]) -> str:
    """Of everything that a result depends on; what an experiment calls its variant is not among it."""
    what = {key: value for key, value in job.items() if key not in ("variant", *experiment_file.PATHS)}
    return hashlib.sha256(json.dumps([_CODE_VERSION, what], sort_keys=True).encode()).hexdigest()[:16]


def _adopt(experiment: Experiment, out: Path) -> None:
    """Take over results that another experiment beside `out` has for the same settings and seed."""
    done = {}
    for path in out.parent.glob("*/jobs/*.json"):
        if (path.parent.parent / "summary.json").is_file():
            data = json.loads(path.read_text())
            done[data.get("digest")] = data.get("measures")
    for name, job in experiment.jobs.items():
        if _read(out / "jobs", name, job) is None and _digest(job) in done:
            _write(out / "jobs", name, job, done[_digest(job)])


def _read(results: Path, name: str, job: Mapping[str, Any]) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    if not path.is_file():
        return None
    data = json.loads(path.read_text())
    return data["measures"] if data["digest"] == _digest(job) else None


def _write(results: Path, name: str, job: Mapping[str, Any], measures: Mapping[str, Any]) -> None:
    text = json.dumps({"digest": _digest(job), "job": job, "measures": measures}, indent=1) + "\n"
    write_text_atomically(results / f"{name}.json", text)


def _write_tables(out: Path, experiment: Experiment, found: Mapping[str, Mapping[str, Any]]) -> None:
    """`jobs.csv`, `rounds.csv` and `devices.csv`: a row a job, a round and a device's round."""

    def rows(part: str) -> list[dict[str, Any]]:
        names = {name: {key: experiment.jobs[name][key] for key in ("variant", "seed")} for name in found}
        return [{**names[name], **row} for name, measures in found.items() for row in measures.get(part, [])]

    plain = sorted({key for measures in found.values() for key, v in measures.items() if not isinstance(v, list)})
    jobs = [{**measures, **{k: experiment.jobs[n][k] for k in ("variant", "seed")}} for n, measures in found.items()]
    write_csv(out / "jobs.csv", ["variant", "seed", *plain], jobs)
    for name, part, columns in (("rounds", "curve", CURVE), ("devices", "devices", COLUMNS)):
        if table := rows(part):
            write_csv(out / f"{name}.csv", ["variant", "seed", *columns], table)

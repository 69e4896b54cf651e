"""Summary of a run of scripts/gpu_check: one page of text and summary.json.

    python benchmarks/gpu_summary.py DIR     summarizes the JSON files of the steps in DIR again

Needs nothing but Python.
"""

from __future__ import annotations

import datetime
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PAGE_LINES = 66


def summarize(folder: Path, facts: Row) -> Row:
    """Return the summary of the JSON files in `folder`; steps without a file are left out.

    Args:
        folder: Folder with one JSON file per step.
        facts: Facts about the machine, which are copied to the summary.
    """
    steps = {}
    for path in folder.glob("*.json"):
        report = json.loads(path.read_text())
        if "step" in report:
            steps[report["step"]] = {**report, "written": path.stat().st_mtime_ns}
    summary: Row = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **facts}
    ordered = sorted(steps.values(), key=lambda report: report["written"])
    summary["steps"] = {
        report["step"]: {key: report[key] for key in ("status", "seconds", "reason") if key in report}
        for report in ordered
    }
    results = {name: report["results"] for name, report in steps.items() if report.get("results")}
    summary["targets"] = list(targets(results.get("speed", {}).get("results", [])))
    for name in ("smoke", "memcheck", "racecheck", "synccheck", "initcheck"):
        cases = results.get(name, {}).get("results", [])
        if cases:
            summary[name] = {"cases": len(cases), "failed": [case_name(case) for case in cases if not case["passed"]]}
    for name in ("training", "trainer-paths", "tests", "engines"):
        if name in results:
            summary[name] = results[name]
    return summary


def case_name(case: Row) -> str:
    """Return the name of a case of the smoke test."""
    return f"{case['kernel']} {case['dtype']} {case['shape']}"


def count_tests(junit: Path) -> Row | None:
    """Return the numbers of tests in a JUnit file, or None if it is missing or incomplete."""
    try:
        suite = ElementTree.parse(junit).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return None
    return (
        None if suite is None else {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    )


def targets(rows: list[Row]) -> Iterator[Row]:
    """Yield each target with the worst case that it covers. Ratios above 1 mean that fedspine is faster."""
    bfloat16 = [row for row in rows if row["dtype"] == row.get("adapter_dtype", row["dtype"]) == "torch.bfloat16"]
    layers = [row for row in bfloat16 if row["op"] == "lora_linear on the GPU"]
    long = [row for row in layers if row["tokens"] >= 2048]
    short = [row for row in layers if row["tokens"] <= 128]
    yield from worst("lora_linear, 2048 tokens or more, against PEFT", 1.15, long, "peft")
    floor = [row["ratio_to_fedspine"]["base GEMMs alone"] for row in long]
    if floor:
        cost = round(1 / min(floor), 3)
        what = "lora_linear, 2048 tokens or more, time relative to its base GEMMs"
        yield {"target": what, "wanted": "at most 1.12", "measured": cost, "reached": cost <= 1.12}
    yield from worst("lora_linear, 128 tokens or fewer, CUDA graph, against PEFT", 1.5, of(short, "graph"), "peft")
    yield from worst("lora_linear, 128 tokens or fewer, calls, against PEFT", 1.5, of(short, "calls"), "peft")
    importance = [row for row in bfloat16 if row["op"].startswith("importance") and row.get("how") == "graph"]
    large = [row for row in importance if row["case"] == "4096x4096"]
    yield from worst("importance, 4096x4096, against eager torch", 8.0, large, "eager torch")
    shares = [row["share_of_copy_bandwidth"] for row in large if "share_of_copy_bandwidth" in row]
    if shares:
        what = "importance, 4096x4096, share of a copy's bandwidth"
        yield {"target": what, "wanted": "at least 0.6", "measured": min(shares), "reached": min(shares) >= 0.6}
    # No target, but it decides which implementation is the default. Above 1, torch's addmm is faster.
    for what, chosen in (("2048 tokens or more", long), ("128 tokens or fewer, CUDA graph", of(short, "graph"))):
        ratios = [row["ratio_to_fedspine"]["low-rank kernels"] for row in chosen]
        if ratios:
            yield {"target": f"time of low-rank kernels / addmm, {what}", "measured": [min(ratios), max(ratios)]}


def of(rows: list[Row], how: str) -> list[Row]:
    return [row for row in rows if row["how"] == how]


def worst(target: str, wanted: float, rows: list[Row], candidate: str) -> Iterator[Row]:
    """Yield nothing if no row has the candidate, because PEFT is not always installed."""
    ratios = [row["ratio_to_fedspine"][candidate] for row in rows if candidate in row["ratio_to_fedspine"]]
    if ratios:
        reached = min(ratios) >= wanted
        yield {"target": target, "wanted": f"at least {wanted}", "measured": min(ratios), "reached": reached}


def page(summary: Row) -> str:
    """Return the summary as text of one page."""
    lines = [f"gpu_check {summary['date']}"]
    lines += [f"  {key}: {summary[key]}" for key in ("commit", "gpu", "sm", "torch", "nvcc", "peft") if key in summary]
    lines += ["", "Steps"]
    for name, step in summary["steps"].items():
        seconds = f"{step['seconds']:.0f} s" if "seconds" in step else ""
        lines.append(f"  {name:15} {step['status']:8} {seconds:>6}  {step.get('reason', '')}".rstrip())
    if summary["targets"]:
        lines += ["", "Targets (ratios above 1: fedspine is faster)"]
    for row in summary["targets"]:
        mark = {True: "reached", False: "MISSED", None: ""}[row.get("reached")]
        lines.append(f"  {row['target']:68} {row['measured']!s:>14}  {row.get('wanted', ''):13} {mark}".rstrip())
    for name in ("smoke", "memcheck", "racecheck", "synccheck", "initcheck"):
        if name in summary:
            failed = summary[name]["failed"]
            lines += ["", f"{name}: {summary[name]['cases']} cases, {len(failed)} failed"]
            lines += [f"  {case}" for case in failed[:4]]
    if "training" in summary:
        lines += ["", "Training of MiniLM with the kernels on and off"]
        lines += [f"  {key}: {value}" for key, value in summary["training"].get("comparison", {}).items()]
    if "trainer-paths" in summary:
        lines += ["", "Paths of the trainer: path, passed, ms per step, peak MiB"]
        for row in summary["trainer-paths"].get("results", []):
            mark, message = "passed" if row["passed"] else "FAILED", row.get("message", "")[:80].splitlines()
            numbers = f"{row.get('step_ms', '')!s:>8} {row.get('peak_mib', '')!s:>8}"
            lines.append(f"  {row['path']:34} {mark} {numbers}  {' '.join(message)}".rstrip())
    lines += [f"{name}: {summary[name]}" for name in ("tests", "engines") if name in summary]
    if len(lines) > PAGE_LINES:
        lines = [*lines[: PAGE_LINES - 1], f"({len(lines) - PAGE_LINES + 1} more lines: see summary.json)"]
    return "\n".join(lines) + "\n"


def write(folder: Path, summary: Row) -> str:
    """Write summary.json and summary.txt and return the text."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = page(summary)
    (folder / "summary.txt").write_text(text)
    return text


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    old = folder / "summary.json"
    known = json.loads(old.read_text()) if old.exists() else {}
    facts = {key: known[key] for key in ("commit", "gpu", "sm", "torch", "nvcc", "peft", "minutes") if key in known}
    print(write(folder, summarize(folder, facts)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

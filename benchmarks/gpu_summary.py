"""Summary of a run of scripts/gpu_check: exit codes, tests and targets of the kernels, as one summary.json.

    python benchmarks/gpu_summary.py DIR [KEY=VALUE ...]     the pairs are facts of the machine, kept as they are

Reads what is in DIR (NAME.rc, NAME.skipped, tests.xml, gpu-benchmarks.json) and needs nothing but Python.
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


def summarise(folder: Path, facts: dict[str, str]) -> Row:
    """The summary of the files in `folder`; a part that is missing there is missing here."""
    summary: Row = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **facts,
        "exit_codes": {path.stem: int(path.read_text()) for path in sorted(folder.glob("*.rc"))},
        "skipped": {path.stem: path.read_text().strip() for path in sorted(folder.glob("*.skipped"))},
    }
    if (folder / "tests.xml").exists():
        suite = ElementTree.parse(folder / "tests.xml").getroot().find("testsuite")
        if suite is not None:
            summary["tests"] = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    if (folder / "gpu-benchmarks.json").exists():
        rows = json.loads((folder / "gpu-benchmarks.json").read_text())["results"]
        summary["aims"] = list(aims(rows))
    return summary


def aims(rows: list[Row]) -> Iterator[Row]:
    """Each aim with the worst measured case that it covers; ratios above 1: ours is faster."""
    bfloat16 = [row for row in rows if row["dtype"] == row.get("adapter_dtype", row["dtype"]) == "torch.bfloat16"]
    importance = [row for row in bfloat16 if row["op"].startswith("importance") and row.get("how") == "graph"]
    large = [row for row in importance if row["case"] == "4096x4096"]
    yield from worst("importance, 4096x4096, against eager torch", 8.0, large, "eager torch")
    shares = [row["share_of_copy_bandwidth"] for row in large if "share_of_copy_bandwidth" in row]
    if shares:
        what = "importance, 4096x4096, share of a copy's bandwidth"
        yield {"aim": what, "wanted": 0.6, "measured": min(shares), "reached": min(shares) >= 0.6}
    layers = [row for row in bfloat16 if row["op"] == "lora_linear on the GPU"]
    long = [row for row in layers if row["tokens"] >= 2048]
    short = [row for row in layers if row["tokens"] <= 128]
    yield from worst("lora_linear, 2048 tokens or more, against PEFT", 1.15, long, "peft")
    floor = [row["ratio_to_fedspine"]["base GEMMs alone"] for row in long]
    if floor:
        cost = round(1 / min(floor), 3)
        what = "lora_linear, 2048 tokens or more, times its base GEMMs"
        yield {"aim": what, "wanted": 1.12, "measured": cost, "reached": cost <= 1.12}
    yield from worst("lora_linear, 128 tokens or fewer, calls, against PEFT", 1.5, of(short, "calls"), "peft")
    yield from worst("lora_linear, 128 tokens or fewer, CUDA graph, against PEFT", 1.5, of(short, "graph"), "peft")
    # Not aims, but what decides which form runs: above 1, torch's addmm (ours by default) is the faster.
    for what, chosen in (("2048 tokens or more", long), ("128 tokens or fewer, CUDA graph", of(short, "graph"))):
        ratios = [row["ratio_to_fedspine"]["low-rank kernels"] for row in chosen]
        if ratios:
            yield {"aim": f"time of low-rank kernels / addmm, {what}", "measured": [min(ratios), max(ratios)]}


def of(rows: list[Row], how: str) -> list[Row]:
    return [row for row in rows if row["how"] == how]


def worst(aim: str, wanted: float, rows: list[Row], contestant: str) -> Iterator[Row]:
    """Nothing where no row has the contestant (PEFT is not always installed)."""
    ratios = [row["ratio_to_fedspine"][contestant] for row in rows if contestant in row["ratio_to_fedspine"]]
    if ratios:
        yield {"aim": aim, "wanted": wanted, "measured": min(ratios), "reached": min(ratios) >= wanted}


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    summary = summarise(folder, dict(fact.split("=", 1) for fact in arguments[1:]))
    text = json.dumps(summary, indent=1)
    (folder / "summary.json").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

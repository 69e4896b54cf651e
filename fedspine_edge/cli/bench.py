"""`fedspine-edge bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedspine_edge.benchmark.benchmark import BenchmarkReport

EXAMPLE = "fedspine-edge bench pruned.bundle/ --against dense.bundle/ --torch model/ --batch 1 8 --plot bench.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder or .zip written by `compile`")
    parser.add_argument(
        "--against", type=Path, action="append", default=[], metavar="BUNDLE", help="bundle to compare with, may repeat"
    )
    parser.add_argument("--torch", type=Path, metavar="MODEL", help="saved model to compare with, in eager torch")
    parser.add_argument(
        "--batch",
        dest="batches",
        metavar="BATCH",
        type=int,
        nargs="+",
        default=[1],
        help="sequences together; default 1",
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens a sequence, or of a prompt; default 32")
    parser.add_argument("--new-tokens", type=int, default=16, help="steps after a decoder's prompt; default 16")
    parser.add_argument("--repeats", type=int, default=100, help="timed turns per batch size; default 100")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime and torch; default: theirs")
    parser.add_argument(
        "--backend", choices=["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"], default="auto", help="default: auto"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.benchmark.benchmark import Subject, plot, run_benchmark
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.errors import ConfigError

    if arguments.plot is not None and not arguments.plot.absolute().parent.is_dir():
        raise ConfigError(f"{arguments.plot} is in no folder.", remedy="Make the folder of `plot` first.")
    # The first is what the others are measured by: the dense one where there is one.
    paths = [*arguments.against, arguments.bundle]
    names = [path.name.removesuffix(".zip").removesuffix(".bundle") or str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    subjects = [Subject(name=name, path=str(path)) for name, path in zip(names, paths)]
    if arguments.torch is not None:
        subjects.append(Subject(name=f"torch {arguments.torch.name}", path=str(arguments.torch), kind="torch"))
    report = run_benchmark(
        subjects,
        batches=arguments.batches,
        tokens=arguments.tokens,
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
        backend=arguments.backend,
        threads=arguments.threads,
        progress=None if arguments.json else lambda line: print(f"bench: {line}", file=sys.stderr),
    )
    if arguments.plot is not None:
        plot(report, arguments.plot)
    if arguments.json:
        print_json(report.to_dict())
    else:
        _print(report)
    return 0


def _print(report: BenchmarkReport) -> None:
    wide = max(len(contender.name) for contender in report.contenders)
    print(f"{'':{wide}}  phase  batch    p50 ms    p90 ms    p99 ms  sequences/s   tokens/s  ratio")
    for row in report.rows:
        print(
            f"{row.subject:{wide}}  {row.phase:6} {row.batch:5} {row.p50_ms:9.3f} {row.p90_ms:9.3f} {row.p99_ms:9.3f}"
            f" {row.sequences_per_s:12.1f} {row.tokens_per_s:10.1f}  {row.ratio:5.3f}"
        )
    print()
    for contender in report.contenders:
        energy = "energy not reported by this machine"
        if contender.watts is not None and contender.joules_per_turn is not None:
            energy = f"{contender.watts:.1f} W, {contender.joules_per_turn:.3g} J a turn"
        print(f"{contender.name:{wide}}  {contender.backend}, peak {contender.peak_bytes / 2**20:.0f} MiB, {energy}")
    if any(row.unsteady for row in report.rows):
        print(
            f"\np99 is beyond 1.3 medians: the machine was busy (load {report.load_before:.1f} before, "
            f"{report.load_after:.1f} after) or the model is unsteady; the ratios are of medians of alternating turns."
        )

"""Command `fedspine-edge bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedspine_edge.cli.options import add_backend_option, add_json_option

if TYPE_CHECKING:
    from fedspine_edge.benchmark.benchmark import BenchmarkReport

EXAMPLE = "fedspine-edge bench pruned.bundle/ --against dense.bundle/ --torch model/ --batch 1 8 --plot bench.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="bundle folder or .zip file written by `compile`")
    parser.add_argument(
        "--against", type=Path, action="append", default=[], metavar="BUNDLE", help="bundle to compare with; repeatable"
    )
    parser.add_argument("--torch", type=Path, metavar="MODEL", help="model folder to compare with, in eager torch")
    parser.add_argument(
        "--batch", dest="batches", metavar="SIZE", type=int, nargs="+", default=[1], help="batch sizes (default: 1)"
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens per sequence or prompt")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens that a decoder generates after the prompt")
    parser.add_argument("--repeats", type=int, default=100, help="timed runs per batch size")
    parser.add_argument(
        "--threads", type=int, help="number of threads for ONNX Runtime and torch (default: each library's own)"
    )
    add_backend_option(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a plot of the latencies")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.benchmark.benchmark import Candidate, plot, run_benchmark
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.errors import ConfigError

    if arguments.plot is not None and not arguments.plot.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {arguments.plot} does not exist.", remedy="Create it, or change `plot`.")
    # Ratios are relative to the first candidate: the unpruned bundle, where there is one.
    paths = [*arguments.against, arguments.bundle]
    names = [path.name.removesuffix(".zip").removesuffix(".bundle") or str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    candidates = [Candidate(name=name, path=str(path)) for name, path in zip(names, paths)]
    if arguments.torch is not None:
        candidates.append(Candidate(name=f"torch {arguments.torch.name}", path=str(arguments.torch), kind="torch"))
    report = run_benchmark(
        candidates,
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
    width = max(len(candidate.name) for candidate in report.candidates)
    print(f"{'':{width}}  phase  batch    p50 ms    p90 ms    p99 ms  sequences/s   tokens/s  ratio")
    for row in report.rows:
        times = f"{row.p50_ms:9.3f} {row.p90_ms:9.3f} {row.p99_ms:9.3f}"
        rates = f"{row.sequences_per_s:12.1f} {row.tokens_per_s:10.1f}"
        print(f"{row.candidate:{width}}  {row.phase:6} {row.batch:5} {times} {rates}  {row.ratio:5.3f}")
    print()
    for candidate in report.candidates:
        energy = "energy not reported by this machine"
        if candidate.watts is not None and candidate.joules_per_run is not None:
            energy = f"{candidate.watts:.1f} W, {candidate.joules_per_run:.3g} J per run"
        print(f"{candidate.name:{width}}  {candidate.backend}, peak {candidate.peak_bytes / 2**20:.0f} MiB, {energy}")
    if any(row.unsteady for row in report.rows):
        print(
            f"\np99 exceeds 1.3 × the median: the machine was busy (load {report.load_before:.1f} before, "
            f"{report.load_after:.1f} after) or the latency varies. Ratios compare medians of interleaved runs."
        )

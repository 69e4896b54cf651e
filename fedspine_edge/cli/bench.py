"""`fedspine-edge bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "fedspine-edge bench dense.bundle/ pruned.bundle/ --batch 1 --tokens 32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", type=Path, nargs="+", help="one bundle, or two to compare in interleaved runs")
    parser.add_argument("--batch", type=int, default=1, help="texts at once; default 1")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a text; default 32")
    parser.add_argument("--repeats", type=int, default=100, help="timed runs; default 100")
    parser.add_argument(
        "--backend", choices=["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"], default="auto", help="default: auto"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.deploy.session import Session, compare_latency
    from fedspine_edge.errors import ConfigError

    shape = {"batch": arguments.batch, "tokens": arguments.tokens, "repeats": arguments.repeats}
    if len(arguments.bundles) > 2:
        raise ConfigError(f"bench takes one or two bundles, got {len(arguments.bundles)}.")
    with Session.load(arguments.bundles[0], backend=arguments.backend) as first:
        if len(arguments.bundles) == 1:
            figures = first.bench(**shape).to_dict()
        else:
            with Session.load(arguments.bundles[1], backend=arguments.backend) as second:
                figures = compare_latency(first, second, **shape).to_dict()
    if arguments.json:
        print_json(figures)
        return 0
    columns = [figures] if len(arguments.bundles) == 1 else [figures["first"], figures["second"]]
    for name in columns[0]:
        values = (f"{c[name]:.3f}" if isinstance(c[name], float) else str(c[name]) for c in columns)
        print(f"{name:>8}  " + "  ".join(f"{value:>12}" for value in values))
    if len(columns) == 2:
        print(f"{'ratio':>8}  {figures['ratio']:.3f}")
    return 0

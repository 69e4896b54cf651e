"""`fedspine-edge run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLE = "fedspine-edge run bundle/ --text 'what a lovely board'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder written by `compile`")
    parser.add_argument(
        "--text", action="append", help="text to classify, may repeat; default: lines of standard input"
    )
    parser.add_argument(
        "--backend", choices=["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"], default="auto", help="default: auto"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.deploy.session import Session
    from fedspine_edge.errors import ConfigError

    texts = arguments.text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ConfigError("no text to classify.", remedy="Give --text or lines on standard input.")
    with Session.load(arguments.bundle, backend=arguments.backend) as session:
        results = session.classify(texts)
        backend, why = session.backend, session.why
    if arguments.json:
        print_json({"backend": backend, "why": why, "results": [r.to_dict() for r in results]})
    else:
        for result in results:
            print(f"{result.label}\t{result.probability:.3f}")
    return 0

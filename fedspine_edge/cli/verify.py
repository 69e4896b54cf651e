"""`fedspine-edge verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "fedspine-edge verify model.bundle/ --model model/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder or .zip file written by `compile`")
    parser.add_argument("--model", type=Path, help="the model folder: compares ONNX Runtime with torch again")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    import msgspec

    from fedspine_edge.cli.main import print_json
    from fedspine_edge.deploy.archive import opened
    from fedspine_edge.deploy.bundle import load_bundle
    from fedspine_edge.errors import ExportMismatch

    with opened(arguments.bundle) as folder:
        bundle = load_bundle(folder)
        found, problem = [], ""
        if arguments.model is not None:
            from fedspine_edge.deploy.verify import verify_bundle

            try:
                found = verify_bundle(bundle, arguments.model)
            except ExportMismatch as error:
                problem = error.message
    if arguments.json:
        print_json({"files": len(bundle.manifest.files), "mismatch": problem, "compared": msgspec.to_builtins(found)})
        return int(bool(problem))
    print(f"{len(bundle.manifest.files)} files, every size and hash is right")
    for check in found:
        print(f"{check.subject} against {check.reference}: {check.max_abs_diff:.2g} (tolerance {check.tolerance:.2g})")
    if problem:
        print(problem)
    return int(bool(problem))

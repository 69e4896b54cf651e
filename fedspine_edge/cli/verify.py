"""`fedspine-edge verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedspine_edge.cli.column_options import add_columns, with_columns

EXAMPLE = """fedspine-edge verify model.bundle/ --model model/
  fedspine-edge verify model.bundle/ --model model/ --data test.csv   # and accuracy, torch against the bundle"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder or .zip file written by `compile`")
    parser.add_argument("--model", type=Path, help="the model folder: compares ONNX Runtime with torch again")
    parser.add_argument("--data", metavar="DATA", help="with --model: compare on these examples, and measure accuracy")
    add_columns(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    import msgspec

    from fedspine_edge.bundle.archive import opened
    from fedspine_edge.bundle.bundle import load_bundle
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.errors import ConfigError, ExportMismatch

    if arguments.data is not None and arguments.model is None:
        raise ConfigError("--data needs --model, to compare with.", remedy="Add --model MODEL_FOLDER.")
    data = None if arguments.data is None else with_columns(arguments.data, arguments)
    with opened(arguments.bundle) as folder:
        bundle = load_bundle(folder)
        found, problem, accuracy = [], "", None
        if arguments.model is not None:
            from fedspine_edge.export.verification import measure_bundle, verify_bundle

            try:
                found = verify_bundle(bundle, arguments.model, data)
                if data is not None:
                    accuracy = measure_bundle(bundle, arguments.model, data)
            except ExportMismatch as error:
                problem = error.message
    if arguments.json:
        compared, measured = msgspec.to_builtins(found), msgspec.to_builtins(accuracy)
        files = len(bundle.manifest.files)
        print_json({"files": files, "mismatch": problem, "compared": compared, "accuracy": measured})
        return int(bool(problem))
    print(f"{len(bundle.manifest.files)} files, every size and hash is right")
    for check in found:
        print(f"{check.subject} against {check.reference}: {check.summary}")
    if accuracy is not None:
        print(accuracy.summary)
    if problem:
        print(problem)
    return int(bool(problem))

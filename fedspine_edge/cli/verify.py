"""Command `fedspine-edge verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedspine_edge.cli.options import add_column_options, add_json_option, data_settings

EXAMPLE = """fedspine-edge verify model.bundle/ --model model/
  fedspine-edge verify model.bundle/ --model model/ --data test.csv   # also compares accuracy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="bundle folder or .zip file written by `compile`")
    parser.add_argument("--model", type=Path, help="model folder; compare the bundle with it in torch")
    parser.add_argument("--data", metavar="DATA", help="examples to compare and to measure accuracy on; needs --model")
    add_column_options(parser)
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    import msgspec

    from fedspine_edge.bundle.archive import bundle_folder
    from fedspine_edge.bundle.bundle import load_bundle
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.errors import ConfigError, ExportMismatch

    if arguments.data is not None and arguments.model is None:
        raise ConfigError("--data needs --model.", remedy="Add --model MODEL_FOLDER to compare with.")
    data = None if arguments.data is None else data_settings(arguments.data, arguments)
    with bundle_folder(arguments.bundle) as folder:
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
    print(f"{len(bundle.manifest.files)} files, all sizes and hashes are correct")
    for check in found:
        print(f"{check.subject} against {check.reference}: {check.summary}")
    if accuracy is not None:
        print(accuracy.summary)
    if problem:
        print(problem)
    return int(bool(problem))

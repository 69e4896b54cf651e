"""`fedspine-edge compile`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLE = "fedspine-edge compile model/ --out bundle/ --precision fp16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder written by `tune` or `export`")
    parser.add_argument("--out", type=Path, default=None, help="bundle folder, or a .zip file (default: MODEL.bundle)")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default=None, help="weights and matmuls; default fp32")
    parser.add_argument(
        "--lora",
        choices=["merge", "inputs"],
        default=None,
        help="fold the adapter into the weights (default), or keep it exchangeable at run time",
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"],
        default="auto",
        help="engine to build besides the ONNX model; default: what this machine has",
    )
    parser.add_argument(
        "--sm",
        action="append",
        default=[],
        help="build the engine for this SM (such as 86), may repeat; TensorRT-RTX only, which then needs no GPU",
    )
    parser.add_argument("--json", action="store_true", help="print the bundle's description as one JSON object")


def _progress(line: str) -> None:
    print(line, file=sys.stderr)


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.deploy.bundle import read_sidecar
    from fedspine_edge.deploy.compile import compile_engine

    bundle = compile_engine(
        arguments.model,
        arguments.out,
        precision=arguments.precision,
        backend=arguments.backend,
        lora=arguments.lora,
        compute_capabilities=arguments.sm,
        progress=_progress,
    )
    if arguments.json:
        print_json({"bundle": str(bundle), **read_sidecar(bundle)})
    else:
        print(f"{bundle}\nnext: fedspine-edge run {bundle} --text 'some text'")
    return 0

"""`fedspine-edge compile`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedspine_edge.cli.column_options import add_columns, with_columns

if TYPE_CHECKING:
    from fedspine_edge.engine.tensorrt_builder import OnStep
    from fedspine_edge.export.export_bundle import ProgressCallback

EXAMPLE = """fedspine-edge compile model/ --precision fp16
  fedspine-edge compile model/ --precision int8 --calibrate train.csv   # accuracy before and after is printed
  fedspine-edge compile model.bundle                                    # on the device: builds the engine there"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder written by `tune` or `export`, or a bundle to build anew")
    parser.add_argument("--out", type=Path, default=None, help="bundle folder, or a .zip file (default: MODEL.bundle)")
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "bf16", "int8", "fp8", "int4"],
        default=None,
        help="default fp32; int8, fp8 and int4 (weights alone) for the layers' linears with the rest in fp16",
    )
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        default=None,
        help="your examples (CSV, JSON lines or Parquet with text and label columns): int8 and fp8 are calibrated on "
        "them, accuracy is measured before and after, and the engine is built for their lengths",
    )
    add_columns(parser)
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


@contextmanager
def _progress() -> Iterator[tuple[ProgressCallback, OnStep]]:
    """Lines on standard error, and on a terminal a bar under them while TensorRT builds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=1.0, visible=False)

        def step(phase: str, share: float) -> None:
            bar.update(task, description=phase, completed=share, visible=True)

        yield lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True), step


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.bundle.bundle import read_sidecar
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.export.compile import compile_engine

    data = None if arguments.calibrate is None else with_columns(arguments.calibrate, arguments)
    with _progress() as (report, step):
        bundle = compile_engine(
            arguments.model,
            arguments.out,
            precision=arguments.precision,
            calibrate=data,
            backend=arguments.backend,
            lora=arguments.lora,
            compute_capabilities=arguments.sm,
            progress=report,
            on_build_step=step,
        )
    if arguments.json:
        print_json({"bundle": str(bundle), **read_sidecar(bundle)})
    else:
        print(f"{bundle}\nnext: fedspine-edge run {bundle} 'some text'")
    return 0

"""Command `fedspine-edge compile`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedspine_edge.cli.options import add_backend_option, add_column_options, add_json_option, data_settings

if TYPE_CHECKING:
    from fedspine_edge.engine.tensorrt_builder import OnStep
    from fedspine_edge.export.options import ProgressCallback

EXAMPLE = """fedspine-edge compile model/ --precision fp16
  fedspine-edge compile model/ --precision int8 --calibrate train.csv   # also prints the accuracy before and after
  fedspine-edge compile model.bundle                                    # on the device: builds its engine"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model folder written by `tune` or `assemble`, or a bundle to rebuild")
    parser.add_argument("--out", type=Path, default=None, help="bundle folder or .zip file (default: MODEL.bundle)")
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "bf16", "int8", "fp8", "int4"],
        default=None,
        help="precision (default: fp32); int8, fp8 and int4 (weights only) apply to the linears of the layers, fp16 to "
        "everything else",
    )
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        default=None,
        help="examples (CSV, JSON lines or Parquet) to calibrate int8 and fp8 on, to measure accuracy on before and "
        "after, and to choose the sequence lengths of the engine from",
    )
    add_column_options(parser)
    parser.add_argument(
        "--lora",
        choices=["merge", "inputs"],
        default=None,
        help="merge the adapter into the weights, or keep it as inputs so that it can be exchanged at run time "
        "(default: merge)",
    )
    add_backend_option(parser, "engine to build in addition to the ONNX model; auto: what this machine has")
    parser.add_argument(
        "--sm",
        action="append",
        default=[],
        help="compute capability (such as 86) to build for, without a GPU; TensorRT-RTX only; repeatable",
    )
    parser.add_argument(
        "--accept-mismatch",
        action="store_true",
        help="write the bundle even if the ONNX model disagrees with torch, and record the mismatch in it",
    )
    add_json_option(parser, "print the bundle's description as one JSON object")


@contextmanager
def _progress() -> Iterator[tuple[ProgressCallback, OnStep]]:
    """Return callbacks that print lines to standard error, and show a progress bar on a terminal during a build."""
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
    from fedspine_edge.bundle.archive import bundle_folder
    from fedspine_edge.bundle.bundle import read_manifest
    from fedspine_edge.cli.main import print_json
    from fedspine_edge.export.compile import compile_engine

    data = None if arguments.calibrate is None else data_settings(arguments.calibrate, arguments)
    with _progress() as (report, step):
        bundle = compile_engine(
            arguments.model,
            arguments.out,
            precision=arguments.precision,
            calibrate=data,
            backend=arguments.backend,
            lora=arguments.lora,
            accept_mismatch=arguments.accept_mismatch,
            compute_capabilities=arguments.sm,
            progress=report,
            on_build_step=step,
        )
    if arguments.json:
        with bundle_folder(bundle) as folder:
            print_json({"bundle": str(bundle), **read_manifest(folder).to_dict()})
    else:
        print(f"{bundle}\nnext: fedspine-edge run {bundle} 'some text'")
    return 0

"""Build of the CUDA kernels for a CPU: the .cu files compiled by g++ with the headers of tests/kernels/cuda_on_cpu."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedspine_edge.errors import KernelError
from fedspine_edge.kernels import native

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "cuda_on_cpu"
KERNELS = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
# (seed of the order of threads and blocks, whether cp.async lands late): ascending, descending and shuffled orders.
ORDERS = [(0, False), (1, True), (5, True), (6, False)]
OPTIONS = [
    "-std=c++17",
    "-g",
    "-fPIC",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DFEDSPINE_WITH_CUDA",
    f"-I{HERE}",
    f"-I{ROOT}/csrc",
]


def compile_units(sources: Sequence[tuple[Path, Sequence[str]]], folder: Path, flags: Sequence[str]) -> list[Path]:
    """Compile each (source, additional flags) and return the object files. Skips the test without a C++ compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")

    def compile_unit(item: tuple[Path, Sequence[str]]) -> Path:
        source, own = item
        out = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([compiler, *OPTIONS, *flags, *own, "-x", "c++", "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_unit, sources))


class EmulatedCuda:
    """The extension with its CUDA kernels on a CPU. `call` replaces `native._call`."""

    device = "cpu"

    def __init__(self, folder: Path) -> None:
        pybind11 = pytest.importorskip("pybind11")
        quoted = ["FEDSPINE_VERSION", "FEDSPINE_COMPILER", "FEDSPINE_CUDA_ARCHITECTURES"]
        bindings = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        bindings += ["-O0", "-g0", *(f'-D{name}=""' for name in quoted)]
        sources: list[tuple[Path, Sequence[str]]] = [(ROOT / "csrc/bindings.cpp", bindings)]
        sources += [(path, []) for path in (*KERNELS, *sorted(HERE.glob("*.cpp")))]
        objects = compile_units(sources, folder, ["-O1"])
        library = folder / "_C.so"
        subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
        spec = importlib.util.spec_from_file_location("_C", library)
        assert spec is not None
        assert spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(library))

    def order(self, seed: int, late_async: bool) -> None:
        """Set the order of threads and blocks.

        Args:
            seed: 0 for ascending, 1 for descending, any other seed for a shuffled order.
            late_async: Whether cp.async lands as late as it may instead of at once.
        """
        self._library.emulation_order(seed, int(late_async))

    def call(
        self,
        op: str,
        name: str,
        tensor: Tensor,
        *args: Any,
        tensor_core_operands: Sequence[Tensor] = (),
        workspace: Callable[[ModuleType], int] | None = None,
    ) -> None:
        extra: list[Any] = [native.tensor_cores(*tensor_core_operands)] if tensor_core_operands else []
        space = None
        if workspace is not None:
            space = torch.full((workspace(self.module),), torch.nan)
            extra.append(space.data_ptr())
        try:
            getattr(self.module, f"{name}_cuda")(*args, *extra, 0, 0)
        except (RuntimeError, ValueError) as error:
            raise KernelError(f"{op}: {str(error).removeprefix(op + ': ')}") from error

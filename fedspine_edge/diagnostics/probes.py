"""Checks that `doctor` runs in a separate process, because an import may hang or crash.

`python -m fedspine_edge.diagnostics.probes NAME [ARGUMENT]` prints one JSON object per line for each finished check,
so that results before a crash are kept. A CUDA wheel for another platform can be imported and fails at its first
kernel, so the probes launch kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fedspine_edge.diagnostics.check import Check
from fedspine_edge.diagnostics.check import first_line as _first_line
from fedspine_edge.errors import MissingDependency

TEGRA_RELEASE = Path("/etc/nv_tegra_release")


def on_jetson() -> bool:
    """Return whether this is a Jetson with NVIDIA's Linux (L4T)."""
    return TEGRA_RELEASE.exists()


def has_nvidia_gpu() -> bool:
    """Return whether the kernel driver exposes a GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/nvhost-gpu").exists()


def _board_wheel() -> str:
    return "jetson/install.sh --dry-run (it names NVIDIA's torch for this JetPack; the index's wheel cannot run here)"


def _absent(name: str, error: ImportError, remedy: str) -> Check:
    """Return `missing` for a package that is not installed, and `failed` for one that does not load."""
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return Check(name, "missing", "not installed", remedy)
    return Check(name, "failed", f"installed, but the import fails: {_first_line(error)}", remedy)


def _version(module: ModuleType) -> str:
    return str(getattr(module, "__version__", "unknown version"))


def torch_checks(_: str) -> Iterator[Check]:
    """Check torch, CUDA with torch, and the native extension on the CPU and on CUDA."""
    install = _board_wheel() if on_jetson() else "pip install 'fedspine-edge[device]'"
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        yield _absent("torch", error, install)
        yield Check("cuda", "missing", "needs torch to launch a kernel", install)
        yield Check("native", "missing", "needs torch to run an op", install)
        return
    yield Check("torch", "ok", f"{_version(torch)}, {torch.get_num_threads()} CPU threads")
    cuda = _cuda(torch)
    yield cuda
    yield _native(torch, with_cuda=cuda.state == "ok")


def _cuda(torch: Any) -> Check:
    if not torch.cuda.is_available():
        if on_jetson():
            return Check("cuda", "failed", f"torch {_version(torch)} sees no GPU on this board", _board_wheel())
        if has_nvidia_gpu():
            detail = f"there is an NVIDIA GPU, but torch {_version(torch)} cannot use it; training runs on the CPU"
            return Check("cuda", "warn", detail, "nvidia-smi  # then install the torch wheel for its CUDA version")
        return Check("cuda", "missing", "no NVIDIA GPU; training runs on the CPU", "lspci | grep -i nvidia")
    try:
        major, minor = torch.cuda.get_device_capability(0)
        total = float(torch.arange(1024, device="cuda", dtype=torch.float32).sum().item())
        torch.cuda.synchronize()
    except Exception as error:
        remedy = _board_wheel() if on_jetson() else "nvidia-smi  # then install the torch wheel for its CUDA version"
        return Check("cuda", "failed", f"torch sees a GPU, but a kernel fails: {_first_line(error)}", remedy)
    if total != 1024 * 1023 / 2:
        return Check("cuda", "failed", f"a kernel ran and summed 0..1023 to {total:g}", "nvidia-smi -q | grep -i error")
    name = torch.cuda.get_device_name(0)
    return Check("cuda", "ok", f"{name}, sm_{major}{minor}, CUDA {torch.version.cuda}, a kernel ran")


def _native(torch: Any, *, with_cuda: bool) -> Check:
    build = "pip install --force-reinstall --no-deps .  # in the source folder; needs: sudo apt install g++"
    try:
        from fedspine_edge.kernels import native, reference
    except ImportError as error:
        return Check("native", "failed", _first_line(error), build)
    info = native.build_info()
    if not info["available"]:
        remedy = "unset FEDSPINE_NATIVE" if os.environ.get("FEDSPINE_NATIVE") == "0" else build
        return Check("native", "warn", f"not built ({info['reason']}); plain torch is used, which is slower", remedy)
    try:
        _run_native(torch, native, reference, "cpu")
        if with_cuda and native.cuda_available():
            _run_native(torch, native, reference, "cuda")
    except Exception as error:
        return Check("native", "failed", f"an op fails: {_first_line(error)}", build)
    detail = f"{info['version']}, {info['cpu_isa']} ran"
    if with_cuda and not native.cuda_available():
        return Check("native", "warn", f"{detail}; built without CUDA", f"FEDSPINE_CUDA=ON: {build}")
    if with_cuda:
        detail += f", sm {info['cuda_architectures']} ran"
    return Check("native", "ok", detail)


def _run_native(torch: Any, native: Any, reference: Any, device: str) -> None:
    """Compare an importance op with its reference implementation. Raises when they differ or a launch fails."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b, grad_a, grad_b = (
        torch.randn(shape, generator=generator).to(device) for shape in ((8, 6), (2, 6), (8, 2), (2, 6), (8, 2))
    )
    if not native.supports(weight):
        capability = torch.cuda.get_device_capability(0)
        raise RuntimeError(f"built for sm {sorted(native.build_info_architectures())}, the GPU is sm {capability}")
    group = torch.arange(8, dtype=torch.int32, device=device) // 2
    actual = native.importance_accumulate(weight, a, b, grad_a, grad_b, 2.0, group, True, 4, "abs")
    plain = reference.importance_accumulate(
        weight, a, b, grad_a, grad_b, 2.0, group_of_row=group, num_groups=4, metric="abs"
    )
    torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-4)


def transformers_check(_: str) -> Iterator[Check]:
    """Check transformers, and whether it works with the installed torch."""
    found = next(_installed("transformers", "pip install 'fedspine-edge[device]'"))
    if found.state == "ok":
        with contextlib.suppress(ImportError):  # torch is missing, which another check reports
            from fedspine_edge.model.loading import TRANSFORMERS_FOR_OLD_TORCH, require_transformers

            try:
                require_transformers()
            except MissingDependency as error:
                found = Check("transformers", "failed", error.message, f"pip install '{TRANSFORMERS_FOR_OLD_TORCH}'")
    yield found


def _installed(name: str, remedy: str) -> Iterator[Check]:
    try:
        yield Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        yield Check(name, "missing", "not installed", remedy)


def packages_check(_: str) -> Iterator[Check]:
    """Check the required packages."""
    remedy = "pip install --force-reinstall fedspine-edge"
    found = []
    for package in ("msgspec", "numpy", "paho.mqtt", "rich", "safetensors"):
        try:
            importlib.import_module(package)
            name = {"paho.mqtt": "paho-mqtt"}.get(package, package)
            found.append(f"{name} {importlib.metadata.version(name)}")
        except ImportError as error:
            yield Check("packages", "failed", f"{package}: {_first_line(error)}", remedy)
            return
    yield Check("packages", "ok", ", ".join(found))


def embedded_broker_check(_: str) -> Iterator[Check]:
    """Check the embedded broker, which the demo uses."""
    yield from _renamed("embedded broker", _installed("iotcore", "pip install 'fedspine-edge[broker]'"))


def tokenizers_check(_: str) -> Iterator[Check]:
    """Check tokenizers, which `Session` uses."""
    try:
        yield Check("tokenizers", "ok", _version(importlib.import_module("tokenizers")))
    except ImportError as error:
        yield _absent("tokenizers", error, "pip install 'fedspine-edge[run]'")


def onnxruntime_check(_: str) -> Iterator[Check]:
    """Check ONNX Runtime and list its execution providers."""
    try:
        runtime = importlib.import_module("onnxruntime")
        providers = [name.removesuffix("ExecutionProvider") for name in runtime.get_available_providers()]
        yield Check("onnxruntime", "ok", f"{_version(runtime)}: {', '.join(providers)}")
    except ImportError as error:
        yield _absent("onnxruntime", error, "pip install 'fedspine-edge[run]'")


def tensorrt_check(_: str) -> Iterator[Check]:
    """Check TensorRT. On a Jetson it comes with JetPack and is visible through --system-site-packages."""
    if on_jetson():
        remedy = "sudo apt install nvidia-jetpack  # and a venv made with --system-site-packages (jetson/install.sh)"
    else:
        remedy = "pip install tensorrt 'fedspine-edge[tensorrt]'"  # on aarch64 the extra leaves TensorRT itself out
    yield _engine("tensorrt", remedy)


def tensorrt_rtx_check(_: str) -> Iterator[Check]:
    """Check TensorRT for RTX, whose builder needs no GPU."""
    if platform.machine() != "x86_64":
        yield Check("tensorrt_rtx", "missing", f"not available for {platform.machine()}", "use TensorRT")
        return
    yield _engine("tensorrt_rtx", "pip install tensorrt-rtx-cu13")


def _engine(package: str, remedy: str) -> Check:
    try:
        module: Any = importlib.import_module(package)
        builder = module.Builder(module.Logger(module.Logger.ERROR))
    except ImportError as error:
        return _absent(package, error, remedy)
    except Exception as error:
        builder, reason = None, _first_line(error)
    else:
        reason = "" if builder else "no builder was returned"
    if builder:
        return Check(package, "ok", f"{_version(module)}, a builder was created")
    if not has_nvidia_gpu():
        return Check(package, "warn", f"{_version(module)}; without a GPU it cannot build", "nvidia-smi")
    return Check(package, "failed", f"{_version(module)}: {reason}", remedy)


def _renamed(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    for check in checks:
        yield Check(name, check.state, check.detail, check.remedy)


def _fleet_check(name: str) -> Callable[[str], Iterator[Check]]:
    """Return a function of `diagnostics.fleet`, imported on call because its packages may be missing."""

    def check(argument: str) -> Iterator[Check]:
        yield from getattr(importlib.import_module("fedspine_edge.diagnostics.fleet"), name)(argument)

    return check


PROBES: dict[str, tuple[Callable[[str], Iterator[Check]], tuple[str, ...]]] = {
    "packages": (packages_check, ("packages",)),
    "torch": (torch_checks, ("torch", "cuda", "native")),
    "transformers": (transformers_check, ("transformers",)),
    "embedded_broker": (embedded_broker_check, ("embedded broker",)),
    "tokenizers": (tokenizers_check, ("tokenizers",)),
    "onnxruntime": (onnxruntime_check, ("onnxruntime",)),
    "tensorrt": (tensorrt_check, ("tensorrt",)),
    "tensorrt_rtx": (tensorrt_rtx_check, ("tensorrt_rtx",)),
    "broker": (_fleet_check("broker_check"), ("broker",)),
    "device_file": (_fleet_check("device_checks"), ("broker", "data", "model", "state_dir")),
    "fleet_file": (_fleet_check("fleet_checks"), ("broker", "strategy", "run_dir")),
}
"""Function of each probe, and the names of the checks that it yields in order."""


def main(argv: list[str]) -> int:
    """Run one probe and print each check when it finishes."""
    function, _ = PROBES[argv[0]]
    for check in function(argv[1] if len(argv) > 1 else ""):
        print(json.dumps(check.to_dict()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

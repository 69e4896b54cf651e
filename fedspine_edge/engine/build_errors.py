"""Why TensorRT could not build: its log, translated into a cause and a remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fedspine_edge.errors import EngineBuildError

_REMEDIES: tuple[tuple[str, str, str], ...] = (
    (
        r"opset version|opset \d|IR version",
        "the ONNX file is of a version this release does not read",
        "Export anew without naming an opset.",
    ),
    (
        r"HW-specific datatypes|(?:fp8|float8|fp4|bf16|bfloat16)\S* .{0,60}not supported",
        "the model uses a number format that this GPU lacks",
        "float8 needs SM 89 or newer (Jetson Thor, not Orin), bfloat16 SM 80: compile with `precision` int8 or fp16.",
    ),
    (
        r"no (?:importer|checker) registered for op|unsupported .{0,40}op|UNSUPPORTED_NODE|plugin not found",
        "the ONNX file has an operator this release cannot parse",
        "Export anew without naming an opset: attention and norms are then spelled out in basic operators.",
    ),
    (
        r"could not find any implementation for node|out ?of ?memory|insuff?icient (?:memory|workspace)|MEM_ALLOC|"
        r"cudaError 2\b|memory is insufficient|std::bad_alloc",
        "it ran out of memory (an operator without an implementation is how TensorRT most often reports that)",
        "Close other programs, never train while building, lower the profile's largest batch and tokens, or set "
        "workspace_bytes below the free memory.",
    ),
    (
        r"strongly.?typed|must have (?:the )?same (?:input )?types?|types? mismatch|input types.*differ",
        "the ONNX file mixes types that a strongly typed network does not allow",
        "Export it anew with this release and report the model if it persists.",
    ),
    (
        r"cudaError 35|driver version is insufficient|no CUDA-capable device",
        "it found no usable CUDA driver",
        "Check the GPU with: fedspine-edge doctor",
    ),
    (
        r"no optimization profile has been defined|kM(?:IN|AX|OPT) dimension|optimization profile",
        "the profiles do not fit the model's inputs",
        "Leave profiles out, or give (smallest, most common, largest) sizes within the model's limits.",
    ),
    (
        r"compute capability|target GPU SM|unsupported SM|architecture is not supported",
        "it does not support this GPU",
        "Build on the device that will run the engine, with the TensorRT of that device.",
    ),
)


def explain_build_failure(name: str, version: str, log: Sequence[str], problem: str) -> EngineBuildError:
    """An `EngineBuildError` from TensorRT's log: the likely cause, its last errors, and the remedy.

    Args:
        name: "tensorrt" or "tensorrt_rtx".
        version: Its version.
        log: Lines as `trt.make_logger` keeps them, "error: ..." and "warning: ...".
        problem: What was being done, "could not build an engine".
    """
    # Running short of memory is told by warnings, and the error that follows names an innocent operator.
    text = "\n".join(line for line in log if not line.startswith("warning") or "insuf" in line)
    unknown = ("", "for a reason of its own", "Use `backend` onnxruntime, which needs no TensorRT.")
    _, cause, remedy = next((row for row in _REMEDIES if re.search(row[0], text, flags=re.IGNORECASE)), unknown)
    return EngineBuildError(f"{name} {version} {problem}: {cause}. {last_words(log)}", remedy=remedy)


def last_words(log: Sequence[str], count: int = 3) -> str:
    errors = [line for line in log if not line.startswith("warning")]
    return "It said: " + " | ".join(errors[-count:] or log[-count:]) if log else "It gave no reason."


def parser_errors(parser: Any) -> list[str]:
    """What the ONNX parser complains about, with the layer and the operator where it says which."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        kind = str(error.code()).rpartition(".")[2]
        layer, operator = (str(getattr(error, name, lambda: "")()) for name in ("node_name", "node_operator"))
        place = f"{operator} at {layer}: " if operator or layer else ""
        found.append(f"error: {place}{error.desc()} ({kind})")
    return found

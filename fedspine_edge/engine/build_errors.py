"""Translates TensorRT's build log into an error with a cause and a remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fedspine_edge.errors import EngineBuildError

_REMEDIES: tuple[tuple[str, str, str], ...] = (
    (
        r"opset version|opset \d|IR version",
        "the ONNX file has a version that this release does not support",
        "Export the model again without setting an opset.",
    ),
    (
        r"HW-specific datatypes|(?:fp8|float8|fp4|bf16|bfloat16)\S* .{0,60}not supported",
        "the model uses a number format that this GPU does not support",
        "float8 needs SM 89 or newer (Jetson Thor, not Orin) and bfloat16 needs SM 80 or newer. Compile with "
        "`precision` int8 or fp16.",
    ),
    (
        r"no (?:importer|checker) registered for op|unsupported .{0,40}op|UNSUPPORTED_NODE|plugin not found",
        "the ONNX file has an operator that this release cannot parse",
        "Export the model again without setting an opset, so that attention and norms use basic operators.",
    ),
    (
        r"could not find any implementation for node|out ?of ?memory|insuff?icient (?:memory|workspace)|MEM_ALLOC|"
        r"cudaError 2\b|memory is insufficient|std::bad_alloc",
        "it ran out of memory (TensorRT usually reports this as an operator without an implementation)",
        "Close other programs, do not train while building, reduce the profile's maximum batch and tokens, or set "
        "`workspace_bytes` below the free memory.",
    ),
    (
        r"strongly.?typed|must have (?:the )?same (?:input )?types?|types? mismatch|input types.*differ",
        "the ONNX file mixes types in a way that strongly typed networks do not allow",
        "Export the model again with this release, and report it if the error persists.",
    ),
    (
        r"cudaError 35|driver version is insufficient|no CUDA-capable device",
        "it found no usable CUDA driver",
        "Check the GPU with: fedspine-edge doctor",
    ),
    (
        r"no optimization profile has been defined|kM(?:IN|AX|OPT) dimension|optimization profile",
        "the profiles do not fit the model's inputs",
        "Omit `profiles`, or give (minimum, optimum, maximum) sizes within the model's limits.",
    ),
    (
        r"compute capability|target GPU SM|unsupported SM|architecture is not supported",
        "it does not support this GPU",
        "Build on the device that will run the engine, with that device's TensorRT.",
    ),
)


def explain_build_failure(name: str, version: str, log: Sequence[str], problem: str) -> EngineBuildError:
    """Return an `EngineBuildError` with the likely cause, TensorRT's last errors, and a remedy.

    Args:
        name: "tensorrt" or "tensorrt_rtx".
        version: Version of TensorRT.
        log: Lines as collected by `tensorrt_api.make_logger`: "error: ..." and "warning: ...".
        problem: Failed action, such as "could not build an engine".
    """
    # TensorRT reports low memory only in warnings; the error that follows names an unrelated operator.
    text = "\n".join(line for line in log if not line.startswith("warning") or "insuf" in line)
    unknown = ("", "the cause is unknown", "Use `backend` onnxruntime, which does not need TensorRT.")
    _, cause, remedy = next((row for row in _REMEDIES if re.search(row[0], text, flags=re.IGNORECASE)), unknown)
    return EngineBuildError(f"{name} {version} {problem}: {cause}. {last_messages(log)}", remedy=remedy)


def last_messages(log: Sequence[str], count: int = 3) -> str:
    """Return a sentence that quotes the last errors of TensorRT's log, or its last lines if it has no errors."""
    errors = [line for line in log if not line.startswith("warning")]
    return "TensorRT reported: " + " | ".join(errors[-count:] or log[-count:]) if log else "TensorRT gave no reason."


def parser_errors(parser: Any) -> list[str]:
    """Return the errors of the ONNX parser, with the layer and the operator if it names them."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        kind = str(error.code()).rpartition(".")[2]
        layer, operator = (str(getattr(error, name, lambda: "")()) for name in ("node_name", "node_operator"))
        place = f"{operator} at {layer}: " if operator or layer else ""
        found.append(f"error: {place}{error.desc()} ({kind})")
    return found

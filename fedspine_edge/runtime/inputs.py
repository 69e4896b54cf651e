"""Validation of a model's token inputs, and random tokens for timing."""

from __future__ import annotations

import numbers
from collections.abc import Mapping

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import BundleManifest, TensorInfo
from fedspine_edge.errors import ConfigError, DataError


def validate_tokens(manifest: BundleManifest, given: Mapping[str, Array]) -> dict[str, Array]:
    """Return every token input of the model as a contiguous array of its type; optional inputs get their default.

    Raises `DataError` if an input is missing, unknown, out of range, too long, or of the wrong type or shape.
    """
    known = {tensor.name: tensor for tensor in manifest.inputs if tensor.kind == "tokens"}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise DataError(f"The model has no input {unknown[0]!r}.", remedy=f"Its inputs are: {', '.join(known)}")
    shape: tuple[int, ...] | None = None
    for name, array in given.items():
        _validate_array(known[name], array, manifest.max_tokens)
        if shape is not None and array.shape != shape:
            raise DataError(
                f"{name} has shape {array.shape}, but another input has shape {shape}.",
                remedy="Give all inputs the same shape (batch, tokens).",
            )
        shape = array.shape
    checked = {}
    for name, tensor in known.items():
        if name in given:
            checked[name] = np.ascontiguousarray(given[name], dtype=tensor.dtype)
        elif tensor.default is not None and shape is not None:
            checked[name] = np.full(shape, tensor.default, dtype=tensor.dtype)
        else:
            raise DataError(
                f"The input {name!r} is missing.",
                remedy=f"Pass an integer numpy array of shape (batch, tokens) as {name}=...",
            )
    return checked


def _validate_array(tensor: TensorInfo, array: object, max_tokens: int) -> None:
    """Raise `DataError` unless `array` is a valid value of the integer input `tensor`."""
    name = tensor.name
    if not isinstance(array, np.ndarray):
        raise DataError(f"{name} is a {type(array).__name__}.", remedy="Pass a numpy array, np.array(...).")
    if array.dtype.kind not in "iu":
        raise DataError(f"{name} has dtype {array.dtype}.", remedy=f"Pass {tensor.dtype} or another integer type.")
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{name} has shape {array.shape}.", remedy="Pass a non-empty array of shape (batch, tokens).")
    if array.shape[1] > max_tokens:
        raise DataError(
            f"{name} has {array.shape[1]} tokens; the model allows {max_tokens}.",
            remedy="Shorten the text. classify() truncates texts automatically.",
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or (tensor.limit is not None and high >= tensor.limit):
        raise DataError(
            f"{name} contains {low if low < 0 else high}; it must be within 0..{(tensor.limit or 2**63) - 1}.",
            remedy="Use the tokenizer of this bundle.",
        )


def require_number(name: str, value: object, kind: type) -> None:
    """Raise `ConfigError` unless the argument `name` is a number of `kind`, `numbers.Integral` or `numbers.Real`."""
    if isinstance(value, bool) or not isinstance(value, kind):
        expected = "an integer" if kind is numbers.Integral else "a number"
        raise ConfigError(f"`{name}` is {value!r}.", remedy=f"Give {expected}.")


def check_length(tokens: int, max_tokens: int, new_tokens: int = 0) -> None:
    """Raise `DataError` if sequences of `tokens` tokens, followed by `new_tokens`, exceed the model's limit."""
    if tokens + new_tokens > max_tokens:
        requested = f"{tokens} `tokens` and {new_tokens} `new_tokens`" if new_tokens else f"{tokens} `tokens`"
        raise DataError(f"{requested} were requested; the model allows {max_tokens}.", remedy="Time shorter sequences.")


def random_tokens(manifest: BundleManifest, batch: int, tokens: int) -> dict[str, Array]:
    """Return random tokens of shape (batch, tokens) without padding; they are the same in every call.

    Raises `DataError` if the sequences are too long.
    """
    check_length(tokens, manifest.max_tokens)
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for tensor in manifest.inputs:
        if tensor.kind != "tokens":
            continue
        # Padding tokens would shorten the sequence, so the mask is full and the padding token is not drawn.
        if tensor.name == "input_ids":
            allowed = np.setdiff1d(np.arange(tensor.limit or 2), [manifest.pad_token_id])
            inputs[tensor.name] = rng.choice(allowed, size=(batch, tokens)).astype(np.int64)
        else:
            inputs[tensor.name] = np.full((batch, tokens), int(tensor.name == "attention_mask"), dtype=np.int64)
    return inputs

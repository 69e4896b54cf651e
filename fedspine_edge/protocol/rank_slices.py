"""Slices the global adapter by rank for the devices: half precision, without rows and columns that no device keeps.

A device that trains rank r downloads the slices with its first r components and nothing else. numpy only, since the
server slices and the devices merge. Original to this project; docs/decisions/0053.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedspine_edge.arrays import Tensors
from fedspine_edge.errors import BlobError, LayoutError
from fedspine_edge.model.layout import Layout, module_names
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.blobs import HELD, is_adapter, is_head


def slice_starts(ranks: Sequence[int], r_max: int) -> list[int]:
    """Return the first component of every slice of an adapter of rank `r_max`; a slice ends at each of `ranks`."""
    return [0, *(r for r in sorted(set(ranks)) if r < r_max)]


def slice_by_rank(
    tensors: Mapping[str, npt.NDArray[Any]], ranks: Sequence[int], held: Layout, dtype: str = "float16"
) -> list[Tensors]:
    """Return the round's tensors in slices, lowest components first; the first slice also has all other tensors.

    Args:
        tensors: What the round starts from, the adapter in full coordinates: A (r_max, in) and B (out, r_max).
        ranks: Ranks at which slices end.
        held: What any device that will merge the slices keeps.
        dtype: Element type of adapter and head in the slices. A tensor with values that it cannot represent is float32.
    """
    names = module_names(held.spec)
    r_max = tensors[f"{names[0]}.lora_A"].shape[0]
    begins = slice_starts(ranks, r_max)
    slices: list[Tensors] = []
    for begin, end in zip(begins, [*begins[1:], r_max]):
        one: Tensors = {}
        for name in names:
            A, B = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
            A, B = held.gather(name, A[begin:end], B[:, begin:end])
            one[f"{name}.lora_A"], one[f"{name}.lora_B"] = _narrow(A, dtype), _narrow(B, dtype)
        slices.append(one)
    for name, value in tensors.items():
        if not is_adapter(name):
            slices[0][name] = _narrow(value, dtype) if is_head(name) else value
    slices[0].update(held.to_tensors(HELD))
    return slices


def merge_slices(slices: Sequence[Mapping[str, npt.NDArray[Any]]], spec: ModelSpec) -> tuple[Tensors, Layout]:
    """Return the tensors of `slice_by_rank` in full coordinates and float32, and the layout that the slices hold.

    Rows and columns outside that layout are zero. Raises `BlobError` for slices that do not belong to one adapter.
    """
    first = slices[0]
    try:
        held = Layout.from_tensors(spec, first, HELD)
        found = {n: value for n, value in first.items() if not is_adapter(n) and not n.startswith(f"{HELD}.")}
        for name in module_names(spec):
            A = np.concatenate([one[f"{name}.lora_A"] for one in slices], dtype=np.float32)
            B = np.concatenate([one[f"{name}.lora_B"] for one in slices], axis=1, dtype=np.float32)
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = held.scatter(name, A, B)
    except (KeyError, ValueError, IndexError, LayoutError) as error:
        raise BlobError(
            f"the round's adapter does not fit the model: {error}.",
            remedy="Install the same version of fedspine_edge on server and device.",
        ) from error
    return found, held


def _narrow(value: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):  # checked in the next line
        narrow = value.astype(dtype)
    return narrow if np.isfinite(narrow).all() else value.astype(np.float32)

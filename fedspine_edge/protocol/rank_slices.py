"""How the fleet's adapter travels to its devices: in bands of ranks, in half precision, without what nobody keeps.

A device that trains rank r fetches the bands that hold its first r components and nothing else. numpy only, since the
server cuts and the devices merge. Source: ours; docs/decisions/0053.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedspine_edge.errors import BlobError, LayoutError
from fedspine_edge.model.layout import Layout, module_names
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.blobs import HELD, is_adapter, is_head

Tensors = dict[str, npt.NDArray[Any]]


def slice_starts(ranks: Sequence[int], r_max: int) -> list[int]:
    """The first component of every band of an adapter of rank `r_max`; a band ends with each of `ranks`."""
    return [0, *(r for r in sorted(set(ranks)) if r < r_max)]


def slice_by_rank(
    tensors: Mapping[str, npt.NDArray[Any]], ranks: Sequence[int], held: Layout, dtype: str = "float16"
) -> list[Tensors]:
    """The round's tensors as bands, the lowest components first; the first band also has all that is no adapter.

    Args:
        tensors: Adapter in full coordinates, A (r_max, in) and B (out, r_max), and all else a round starts from.
        ranks: Where bands end.
        held: What is left of the model on any device that will merge the slices.
        dtype: Of adapter and head on the way. A tensor with values that it cannot hold stays float32.
    """
    names = module_names(held.spec)
    r_max = tensors[f"{names[0]}.lora_A"].shape[0]
    begins = slice_starts(ranks, r_max)
    bands: list[Tensors] = []
    for begin, end in zip(begins, [*begins[1:], r_max]):
        band: Tensors = {}
        for name in names:
            A, B = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
            A, B = held.gather(name, A[begin:end], B[:, begin:end])
            band[f"{name}.lora_A"], band[f"{name}.lora_B"] = _narrow(A, dtype), _narrow(B, dtype)
        bands.append(band)
    for name, value in tensors.items():
        if not is_adapter(name):
            bands[0][name] = _narrow(value, dtype) if is_head(name) else value
    bands[0].update(held.to_tensors(HELD))
    return bands


def merge_slices(bands: Sequence[Mapping[str, npt.NDArray[Any]]], spec: ModelSpec) -> tuple[Tensors, Layout]:
    """The tensors of `slice_by_rank` in full coordinates and float32, as far as `bands` hold them, and what they hold.

    Rows and columns outside that layout are zero. Raises `BlobError` for bands that are not those of one adapter.
    """
    first = bands[0]
    try:
        held = Layout.from_tensors(spec, first, HELD)
        found = {n: value for n, value in first.items() if not is_adapter(n) and not n.startswith(f"{HELD}.")}
        for name in module_names(spec):
            A = np.concatenate([band[f"{name}.lora_A"] for band in bands], dtype=np.float32)
            B = np.concatenate([band[f"{name}.lora_B"] for band in bands], axis=1, dtype=np.float32)
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = held.scatter(name, A, B)
    except (KeyError, ValueError, IndexError, LayoutError) as error:
        raise BlobError(
            f"the round's adapter does not fit the model: {error}.", remedy="Server and device have other versions."
        ) from error
    return found, held


def _narrow(value: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):  # seen right below
        narrow = value.astype(dtype)
    return narrow if np.isfinite(narrow).all() else value.astype(np.float32)

"""What an adapter must be before it replaces another: complete, of this model's shapes, of one rank, finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedspine_edge.errors import CheckpointError
from fedspine_edge.model.layout import full_shape, module_names, split_name

if TYPE_CHECKING:
    from fedspine_edge.model.prunable import PrunableModel

Arrays = Mapping[str, npt.NDArray[Any]]
_OTHER_BASE = "The adapter belongs to another base model, task or layout."


def checked_adapter(
    model: PrunableModel, state: Arrays, r: int | None
) -> tuple[dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]]:
    """(lora_A, lora_B) per linear in the model's present coordinates, and the head ("head.*"), which may be absent.

    Args:
        state: As `PrunableModel.load_adapter` takes it.
        r: Use the first `r` components; None for all.

    Raises `CheckpointError`.
    """
    adapters: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
    for name in module_names(model.spec):
        adapters[name] = _checked_pair(model, name, state, r)
    ranks = {pair[0].shape[0] for pair in adapters.values()}
    if len(ranks) != 1:
        raise CheckpointError(
            f"the adapter mixes ranks {sorted(ranks)}; one rank for all modules is needed.",
            remedy="Read a PEFT folder with peft_format.load_adapter, which evens ranks out.",
        )
    head = _checked_head(model, state)
    known = {f"{n}.{side}" for n in adapters for side in ("lora_A", "lora_B")} | set(head)
    unknown = [n for n in state if n.startswith(("layers.", "head.")) and n not in known]
    if unknown:
        raise CheckpointError(f"the adapter has {unknown[0]!r}, which this model lacks.", remedy=_OTHER_BASE)
    return adapters, head


def _checked_pair(
    model: PrunableModel, name: str, state: Arrays, r: int | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    try:
        lora_A, lora_B = np.asarray(state[f"{name}.lora_A"]), np.asarray(state[f"{name}.lora_B"])
    except KeyError as error:
        raise CheckpointError(f"the adapter has no {error.args[0]!r}.", remedy=_OTHER_BASE) from None
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1] or lora_A.shape[0] < 1:
        raise CheckpointError(
            f"{name}: lora_A {lora_A.shape} and lora_B {lora_B.shape} are not (r, in), (out, r).",
            remedy=_OTHER_BASE,
        )
    rank = lora_A.shape[0] if r is None else r
    if not 1 <= rank <= lora_A.shape[0]:
        raise CheckpointError(
            f"{name}: rank {rank} was asked of an adapter of rank {lora_A.shape[0]}.",
            remedy="Ask for at most that.",
        )
    rows, cols = model.layout.rows(name), model.layout.cols(name)
    out_full, in_full = full_shape(model.spec, split_name(name)[1])
    if (lora_B.shape[0], lora_A.shape[1]) == (out_full, in_full):
        lora_A, lora_B = model.layout.gather(name, lora_A, lora_B)
    elif (lora_B.shape[0], lora_A.shape[1]) != (rows.size, cols.size):
        raise CheckpointError(
            f"{name}: an adapter for ({lora_B.shape[0]}, {lora_A.shape[1]}) fits neither the full linear "
            f"({out_full}, {in_full}) nor the kept one ({rows.size}, {cols.size}).",
            remedy=_OTHER_BASE,
        )
    lora_A, lora_B = lora_A[:rank], lora_B[:, :rank]
    if not (np.isfinite(lora_A).all() and np.isfinite(lora_B).all()):
        raise CheckpointError(
            f"{name}: the adapter has non-finite values.", remedy="Its training diverged, or the file is damaged."
        )
    return lora_A, lora_B


def _checked_head(model: PrunableModel, state: Arrays) -> dict[str, npt.NDArray[Any]]:
    head = {name: np.asarray(value) for name, value in state.items() if name.startswith("head.")}
    if not head:
        return {}
    for name in model.head_names:
        value = head.get(f"head.{name}")
        if value is None:
            raise CheckpointError(f"the adapter's task head lacks {name!r}.", remedy=_OTHER_BASE)
        if value.shape != tuple(model.module.get_parameter(name).shape) or not np.isfinite(value).all():
            raise CheckpointError(
                f"head.{name}: got shape {value.shape} or non-finite values, need finite "
                f"{tuple(model.module.get_parameter(name).shape)}.",
                remedy="Was the adapter trained with another number of labels?",
            )
    return {name: value for name, value in head.items() if name.removeprefix("head.") in model.head_names}

"""How much each head and channel matters, estimated from the adapter's gradients while it trains.

Removing W[i, j] equals setting the adapter so that (B·A)[i, j] = -W[i, j]; a first-order Taylor term in the
gradients that training computes anyway estimates the damage. Biases do not count: they are frozen, carry no
adapter, and so have no gradient here. Source: docs/algorithms.md, "LoRA-guided importance"; LoRAPrune.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedspine_edge.errors import CheckpointError, ModelError
from fedspine_edge.kernels import ops
from fedspine_edge.model.deterministic_init import uniform
from fedspine_edge.model.layout import (
    ROW_PARTS,
    Layout,
    keep_positions,
    module_names,
    split_name,
)
from fedspine_edge.pruning.saliency import InputSaliency
from fedspine_edge.pruning.selection import GroupScores, Scope

if TYPE_CHECKING:
    from fedspine_edge.model.prunable import PrunableModel

Criterion = Literal["lora", "apt", "magnitude", "random"]
CRITERIA: tuple[Criterion, ...] = ("lora", "apt", "magnitude", "random")
Metric = Literal["auto", "abs", "square", "signed", "group"]
METRICS: tuple[Metric, ...] = ("auto", "abs", "square", "signed", "group")
KINDS = ("heads", "channels")


class ImportanceTracker:
    """Accumulates group scores over local iterations.

    Per iteration each module gives one number per group (the sum of I over the group's elements). With scope
    "layer" that vector is divided by its L2 norm, so that every module of the group has the same say; with
    "global" it stays a plain sum, since the norm would erase the differences between layers; `plan_local` then
    divides by a group's parameters. The modules of a group are summed and smoothed:
    ema = decay·ema + (1 - decay)·score.

    Args:
        model: A model with adapters.
        criterion: "lora" as above; "apt" puts |x·dL/dx| on the inputs of o and down in place of the Taylor term;
            "magnitude" uses the current weights alone; "random" is seeded.
        metric: "abs" (LoRAPrune's), "square" or "signed": the sum of the elements' absolute values, squares or the
            terms themselves. "group": the absolute value of the sum of a group's terms. "auto": "group" for language
            models, else "abs".
        decay: Of the moving averages.
        scope: "layer" or "global", as in `pruning.plan_local`.
        seed: For criterion "random".
    """

    def __init__(
        self,
        model: PrunableModel,
        criterion: Criterion = "lora",
        metric: Metric = "auto",
        decay: float = 0.9,
        seed: int = 0,
        *,
        scope: Scope = "layer",
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ModelError(f"importance decay is {decay}; it must be at least 0 and below 1.")
        self.model = model
        self.criterion: Criterion = criterion
        automatic: Metric = "group" if model.task == "causal_lm" else "abs"
        self.metric: Metric = automatic if metric == "auto" else metric
        self.decay = decay
        self.scope: Scope = scope
        self.seed = seed
        self.steps = 0
        """Iterations that were scored."""
        self.skipped = 0
        """Iterations with non-finite gradients, which were not."""
        self._ema: dict[str, list[Tensor]] = {kind: self._zeros(kind) for kind in KINDS}
        self._lora: Tensor | float = 0.0
        self._groups: dict[str, Tensor] = {}
        self._saliency = InputSaliency() if criterion == "apt" else None
        self.begin(True)

    @property
    def ready(self) -> bool:
        """Whether there are scores: for "lora" and "apt" after the first scored iteration."""
        return self.criterion in ("magnitude", "random") or self.steps > 0

    def begin(self, scored: bool) -> None:
        """Say before an iteration's forward pass whether it will be scored.

        Only "apt" needs to know, and only where some iterations are not scored or adapters were loaded anew.
        """
        if self._saliency is not None:
            if scored:
                names = [name for name in module_names(self.model.spec) if split_name(name)[1] not in ROW_PARTS]
                self._saliency.watch({name: self.model.linear(name) for name in names})
            else:
                self._saliency.stop()

    def update(self, *, loss_scale: float = 1.0) -> bool:
        """Score one iteration; call after backward (gradients unscaled) and before the optimizer's step.

        Args:
            loss_scale: What the loss was multiplied by before backward, for criterion "apt", which saw it.

        Returns False, changing nothing but `skipped`, if a gradient is not finite. Raises `ModelError` if there
        are no gradients.
        """
        linears = {name: self.model.linear(name) for name in module_names(self.model.spec)}
        gradients = [
            p.grad
            for x in linears.values()
            for p in (getattr(x, "lora_A", None), getattr(x, "lora_B", None))
            if p is not None
        ]
        if len(gradients) != 2 * len(linears) or any(g is None for g in gradients):
            raise ModelError("importance needs gradients of every adapter: call update() after loss.backward().")
        # one reduction and one synchronisation for all of them; an overflowing norm counts as non-finite too
        if not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()):
            self.skipped += 1
            return False
        with torch.no_grad():
            if self.criterion in ("lora", "apt"):
                if self._saliency is None:
                    fresh = self._iteration(linears)
                else:
                    fresh = self._salient(self._saliency, loss_scale)
                for kind in KINDS:
                    for ema, score in zip(self._ema[kind], fresh[kind]):
                        ema.mul_(self.decay).add_(score, alpha=1.0 - self.decay)
            value = sum((x.lora_B * x.lora_B.grad).abs().mean(dtype=torch.float32) for x in linears.values())
            self._lora = self.decay * self._lora + (1.0 - self.decay) * value
        self.steps += 1
        return True

    def scores(self) -> GroupScores:
        """Scores aligned with the model's current layout, higher = keep.

        The averages are corrected for their start at zero, so devices with few iterations and with many
        report on one scale. Raises `ModelError` for "lora" and "apt" before the first scored iteration.
        """
        layout = self.model.layout
        if self.criterion == "random":
            return GroupScores(*(self._random(kind, getattr(layout, kind)) for kind in KINDS))
        if self.criterion == "magnitude":
            values = self._magnitude()
        elif self.steps == 0:
            raise ModelError("no iteration was scored yet; importance comes from training steps.")
        else:
            correction = 1.0 - self.decay**self.steps
            values = {kind: [ema / correction for ema in self._ema[kind]] for kind in KINDS}
        return GroupScores(*([v.to("cpu", torch.float32).numpy().copy() for v in values[kind]] for kind in KINDS))

    def lora_importance(self) -> float:
        """I(B_total): Σ over modules of mean |B·gB|, smoothed over iterations; 0 before the first."""
        return float(self._lora) / (1.0 - self.decay**self.steps) if self.steps else 0.0

    def compact(self, old: Layout, new: Layout) -> None:
        """Follow a model from `old` to `new`; `PrunableModel.compact` calls it."""
        self._groups.clear()
        self.begin(True)
        for kind in KINDS:
            for layer, (before, after) in enumerate(zip(getattr(old, kind), getattr(new, kind))):
                index = torch.from_numpy(keep_positions(before, after))
                ema = self._ema[kind][layer]
                self._ema[kind][layer] = ema.index_select(0, index.to(ema.device))

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that `load_state_dict` needs, aligned with the current layout."""
        state: dict[str, npt.NDArray[Any]] = {
            "steps": np.array(self.steps, dtype=np.int64),
            "skipped": np.array(self.skipped, dtype=np.int64),
            "lora": np.array(float(self._lora), dtype=np.float32),
        }
        for kind in KINDS:
            for layer, ema in enumerate(self._ema[kind]):
                state[f"ema.{layer}.{kind}"] = ema.to("cpu", copy=True).numpy()
        return state

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Inverse of `state_dict`. Raises `CheckpointError`, changing nothing, if it does not fit the layout."""
        fresh = {kind: self._zeros(kind) for kind in KINDS}
        expected = {"steps", "skipped", "lora"} | {f"ema.{i}.{k}" for k in KINDS for i in range(len(fresh[k]))}
        if set(state) != expected:
            raise CheckpointError(f"importance state: wrong entries {sorted(set(state) ^ expected)[:3]}.")
        for kind in KINDS:
            for layer, ema in enumerate(fresh[kind]):
                value = np.asarray(state[f"ema.{layer}.{kind}"], dtype=np.float32)
                if value.shape != tuple(ema.shape) or not np.isfinite(value).all():
                    raise CheckpointError(
                        f"importance state, layer {layer} {kind}: shape {value.shape} or non-finite values, "
                        f"the layout keeps {tuple(ema.shape)}."
                    )
                ema.copy_(torch.from_numpy(value.copy()))
        self._ema = fresh
        self.steps, self.skipped = int(state["steps"]), int(state["skipped"])
        self._lora = float(state["lora"])

    def _iteration(self, linears: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Group scores of this iteration, before smoothing."""
        total = {kind: self._zeros(kind) for kind in KINDS}
        for name, linear in linears.items():
            layer, part = split_name(name)
            kind = "channels" if part in ("up", "gate", "down") else "heads"
            group = {"group_of_row" if part in ROW_PARTS else "group_of_col": self._group_of(name)}
            sums = ops.importance_accumulate(
                linear.weight,
                linear.lora_A,
                linear.lora_B,
                linear.lora_A.grad,
                linear.lora_B.grad,
                linear.scaling,
                num_groups=total[kind][layer].numel(),
                metric="signed" if self.metric == "group" else self.metric,  # type: ignore[arg-type]  # never "auto"
                **group,
            )
            if self.metric == "group":
                sums = sums.abs()
            total[kind][layer] += self._normalised(sums)
        return total

    def _salient(self, saliency: InputSaliency, loss_scale: float) -> dict[str, list[Tensor]]:
        total = {kind: self._zeros(kind) for kind in KINDS}
        for name, per_input in saliency.take().items():
            layer, part = split_name(name)
            kind = "channels" if part == "down" else "heads"
            sums = torch.zeros_like(total[kind][layer])
            sums.index_add_(0, self._group_of(name).long(), per_input / loss_scale)
            total[kind][layer] += self._normalised(sums)
        return total

    def _magnitude(self) -> dict[str, list[Tensor]]:
        """The same sums with |W + scaling·B·A| (or its square) in place of the Taylor term."""
        total = {kind: self._zeros(kind) for kind in KINDS}
        for name in module_names(self.model.spec):
            layer, part = split_name(name)
            kind = "channels" if part in ("up", "gate", "down") else "heads"
            linear = self.model.linear(name)
            weight = (linear.merged_weight() if hasattr(linear, "merged_weight") else linear.weight.detach()).float()
            per_unit = (weight.square() if self.metric == "square" else weight.abs()).sum(1 if part in ROW_PARTS else 0)
            sums = torch.zeros_like(total[kind][layer]).index_add_(0, self._group_of(name).long(), per_unit)
            total[kind][layer] += self._normalised(sums)
        return total

    def _normalised(self, sums: Tensor) -> Tensor:
        if self.scope == "global":
            return sums
        return sums / sums.norm().clamp_min(torch.finfo(torch.float32).tiny)

    def _group_of(self, name: str) -> Tensor:
        if name not in self._groups:
            index = self.model.layout.group_of(name, by_position=True)
            self._groups[name] = torch.from_numpy(index).to(next(self.model.module.parameters()).device)
        return self._groups[name]

    def _random(self, kind: str, kept: tuple[npt.NDArray[np.int64], ...]) -> list[npt.NDArray[np.float32]]:
        spec = self.model.spec
        size = spec.num_kv_heads if kind == "heads" else spec.intermediate_size
        return [uniform(self.seed, f"random.{i}.{kind}", (size,), 0.5)[index] for i, index in enumerate(kept)]

    def _zeros(self, kind: str) -> list[Tensor]:
        device = next(self.model.module.parameters()).device
        kept = getattr(self.model.layout, kind)
        return [torch.zeros(index.size, dtype=torch.float32, device=device) for index in kept]

"""Importance of heads and channels, estimated from the gradients of the adapters during training.

Removing W[i, j] is the same as an adapter with (B·A)[i, j] = -W[i, j]. A first-order Taylor term in the gradients that
training computes anyway estimates the loss of doing so. Biases are frozen and have no adapter, so they do not count.
Source: docs/concepts/pruning.md, "Importance"; LoRAPrune.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedspine_edge.errors import CheckpointError, ModelError
from fedspine_edge.kernels import ops
from fedspine_edge.model.deterministic_init import uniform
from fedspine_edge.model.layout import GROUP_KINDS, ROW_PARTS, Layout, keep_positions, module_names, split_name
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.pruning.saliency import InputSaliency
from fedspine_edge.pruning.selection import Criterion, GroupScores, ImportanceMetric, Scope


class ImportanceTracker:
    """Accumulates the scores of groups over training iterations.

    In each iteration every module gives one number per group, the sum of I over the elements of the group. With scope
    "layer" that vector is divided by its L2 norm, so that all modules of a group have the same weight. With "global" it
    stays a sum, because the norm would remove the differences between layers, and `select_layout` divides by the
    parameters of a group. The modules of a group are summed and smoothed: ema = decay·ema + (1 - decay)·score.

    Args:
        model: Model with adapters.
        criterion: "lora" uses the Taylor term above; "apt" uses |x·dL/dx| at the inputs of o and down instead;
            "magnitude" uses the current weights; "random" is seeded.
        importance_metric: How "lora" sums the terms of a group: "abs" (as in LoRAPrune), "square" and "signed" sum the
            absolute values, the squares or the terms; "group" is the absolute value of their sum; "auto" is "group" for
            language models and "abs" for others.
        decay: Decay of the moving averages.
        seed: Seed for criterion "random".
        scope: "layer" or "global", as in `select_layout`.
    """

    def __init__(
        self,
        model: PrunableModel,
        criterion: Criterion = "lora",
        importance_metric: ImportanceMetric = "auto",
        decay: float = 0.9,
        seed: int = 0,
        *,
        scope: Scope = "layer",
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ModelError(f"importance decay is {decay}; it must be at least 0 and below 1.")
        self.model = model
        self.criterion: Criterion = criterion
        automatic: ImportanceMetric = "group" if model.task == "causal_lm" else "abs"
        self.importance_metric: ImportanceMetric = automatic if importance_metric == "auto" else importance_metric
        self.decay = decay
        self.scope: Scope = scope
        self.seed = seed
        self.steps = 0
        """Iterations that were scored."""
        self.skipped = 0
        """Iterations that were not scored because a gradient was not finite."""
        self._ema: dict[str, list[Tensor]] = {kind: self._zeros(kind) for kind in GROUP_KINDS}
        self._lora: Tensor | float = 0.0
        self._groups: dict[str, Tensor] = {}
        self._saliency = InputSaliency() if criterion == "apt" else None
        self.begin(True)

    @property
    def ready(self) -> bool:
        """Whether there are scores: for "lora" and "apt" after the first scored iteration."""
        return self.criterion in ("magnitude", "random") or self.steps > 0

    def begin(self, scored: bool) -> None:
        """Start an iteration before its forward pass; `scored` is whether `update` will be called.

        Only "apt" needs this call, and only if some iterations are not scored or after adapters were loaded.
        """
        if self._saliency is not None:
            if scored:
                names = [name for name in module_names(self.model.spec) if split_name(name)[1] not in ROW_PARTS]
                self._saliency.watch({name: self.model.linear(name) for name in names})
            else:
                self._saliency.stop()

    def update(self, *, loss_scale: float = 1.0) -> bool:
        """Score one iteration. Call it after backward, with unscaled gradients, and before the optimizer's step.

        Args:
            loss_scale: Factor of the loss in the backward pass, which criterion "apt" divides by.

        Returns False and only counts `skipped` if a gradient is not finite. Raises `ModelError` if there are no
        gradients.
        """
        linears = {name: self.model.linear(name) for name in module_names(self.model.spec)}
        gradients = [
            p.grad
            for x in linears.values()
            for p in (getattr(x, "lora_A", None), getattr(x, "lora_B", None))
            if p is not None
        ]
        if len(gradients) != 2 * len(linears) or any(g is None for g in gradients):
            raise ModelError("importance needs the gradients of every adapter: call update() after loss.backward().")
        # One reduction and one synchronization for all gradients. An overflowing norm counts as non-finite too.
        if not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()):
            self.skipped += 1
            return False
        with torch.no_grad():
            if self.criterion in ("lora", "apt"):
                if self._saliency is None:
                    current = self._taylor_scores(linears)
                else:
                    current = self._saliency_scores(self._saliency, loss_scale)
                for kind in GROUP_KINDS:
                    for ema, score in zip(self._ema[kind], current[kind]):
                        ema.mul_(self.decay).add_(score, alpha=1.0 - self.decay)
            value = sum((x.lora_B * x.lora_B.grad).abs().mean(dtype=torch.float32) for x in linears.values())
            self._lora = self.decay * self._lora + (1.0 - self.decay) * value
        self.steps += 1
        return True

    def scores(self) -> GroupScores:
        """Return the scores (higher = keep), aligned with the current layout of the model.

        The averages are corrected for their start at zero, so that scores do not depend on the number of iterations.
        Raises `ModelError` for "lora" and "apt" before the first scored iteration.
        """
        layout = self.model.layout
        if self.criterion == "random":
            return GroupScores(*(self._random(kind, getattr(layout, kind)) for kind in GROUP_KINDS))
        if self.criterion == "magnitude":
            values = self._magnitude_scores()
        elif self.steps == 0:
            raise ModelError("no training step was scored yet, and importance is computed from training steps.")
        else:
            correction = 1.0 - self.decay**self.steps
            values = {kind: [ema / correction for ema in self._ema[kind]] for kind in GROUP_KINDS}
        return GroupScores(*([v.to("cpu", torch.float32).numpy().copy() for v in values[kind]] for kind in GROUP_KINDS))

    def lora_importance(self) -> float:
        """Return I(B_total), the smoothed sum over modules of mean |B·gB|; 0 before the first scored iteration."""
        return float(self._lora) / (1.0 - self.decay**self.steps) if self.steps else 0.0

    def compact(self, old: Layout, new: Layout) -> None:
        """Keep the state of the groups in `new`. `PrunableModel.compact` calls this."""
        self._groups.clear()
        self.begin(True)
        for kind in GROUP_KINDS:
            for layer, (before, after) in enumerate(zip(getattr(old, kind), getattr(new, kind))):
                index = torch.from_numpy(keep_positions(before, after))
                ema = self._ema[kind][layer]
                self._ema[kind][layer] = ema.index_select(0, index.to(ema.device))

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return the state for `load_state_dict`, aligned with the current layout."""
        state: dict[str, npt.NDArray[Any]] = {
            "steps": np.array(self.steps, dtype=np.int64),
            "skipped": np.array(self.skipped, dtype=np.int64),
            "lora": np.array(float(self._lora), dtype=np.float32),
        }
        for kind in GROUP_KINDS:
            for layer, ema in enumerate(self._ema[kind]):
                state[f"ema.{layer}.{kind}"] = ema.to("cpu", copy=True).numpy()
        return state

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `state_dict` returned. Raises `CheckpointError`, without changes, if it does not fit the
        layout."""
        restored = {kind: self._zeros(kind) for kind in GROUP_KINDS}
        expected = {f"ema.{i}.{kind}" for kind in GROUP_KINDS for i in range(len(restored[kind]))}
        expected |= {"steps", "skipped", "lora"}
        if set(state) != expected:
            raise CheckpointError(f"importance state: missing or unknown entries {sorted(set(state) ^ expected)[:3]}.")
        for kind in GROUP_KINDS:
            for layer, ema in enumerate(restored[kind]):
                value = np.asarray(state[f"ema.{layer}.{kind}"], dtype=np.float32)
                if value.shape != tuple(ema.shape) or not np.isfinite(value).all():
                    raise CheckpointError(
                        f"importance state, layer {layer}, {kind}: shape {value.shape} or non-finite values; "
                        f"the layout needs finite values of shape {tuple(ema.shape)}."
                    )
                ema.copy_(torch.from_numpy(value.copy()))
        self._ema = restored
        self.steps, self.skipped = int(state["steps"]), int(state["skipped"])
        self._lora = float(state["lora"])

    def _taylor_scores(self, linears: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return the scores of this iteration, before smoothing."""
        total = {kind: self._zeros(kind) for kind in GROUP_KINDS}
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
                metric="signed" if self.importance_metric == "group" else self.importance_metric,  # type: ignore[arg-type]  # never "auto"
                **group,
            )
            if self.importance_metric == "group":
                sums = sums.abs()
            total[kind][layer] += self._normalize(sums)
        return total

    def _saliency_scores(self, saliency: InputSaliency, loss_scale: float) -> dict[str, list[Tensor]]:
        total = {kind: self._zeros(kind) for kind in GROUP_KINDS}
        for name, per_input in saliency.take().items():
            layer, part = split_name(name)
            kind = "channels" if part == "down" else "heads"
            sums = torch.zeros_like(total[kind][layer])
            sums.index_add_(0, self._group_of(name).long(), per_input / loss_scale)
            total[kind][layer] += self._normalize(sums)
        return total

    def _magnitude_scores(self) -> dict[str, list[Tensor]]:
        """Return the same sums with |W + scaling·B·A|, or its square, instead of the Taylor term."""
        total = {kind: self._zeros(kind) for kind in GROUP_KINDS}
        for name in module_names(self.model.spec):
            layer, part = split_name(name)
            kind = "channels" if part in ("up", "gate", "down") else "heads"
            linear = self.model.linear(name)
            weight = (linear.merged_weight() if hasattr(linear, "merged_weight") else linear.weight.detach()).float()
            per_unit = (weight.square() if self.importance_metric == "square" else weight.abs()).sum(
                1 if part in ROW_PARTS else 0
            )
            sums = torch.zeros_like(total[kind][layer]).index_add_(0, self._group_of(name).long(), per_unit)
            total[kind][layer] += self._normalize(sums)
        return total

    def _normalize(self, sums: Tensor) -> Tensor:
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

"""Least-squares repair of a model at the moment it is pruned.

Removing heads and channels takes away what they contributed to the outputs of the attention and feed-forward blocks.
Part of it can be computed from what stays. Layer by layer, from the input on, the weights of `o` and `down` are
refitted by ridge regression, so that the pruned layer gives the outputs of the unpruned layer on the inputs that it
sees after the earlier layers were pruned. No gradients are needed, and one layer's second moments are in memory.

For the kept inputs x (K,) of one linear and the outputs y (out,) of the unpruned one, with token weights w:

    W_K ← argmin Σ w ‖(y - m_y) - W (x - m_x)‖² + λ ‖W - W_K‖²,      b ← m_y - W_K m_x

The weighted means m_x and m_y are zero where the linear has no bias. w is the inverse of the mean square of the
residual stream and of y at a token: the normalization that follows divides by about that size, so without w a few
tokens of huge activations would decide everything. In the last layer of a classifier the token that is read counts
as much as all others of its text together. λ is a multiple of the mean of the diagonal of Σ w x xᵀ, chosen on
texts held out of the fit. Related: FLAP (arXiv 2312.11983), which compensates biases only; docs/decisions/0090.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedspine_edge.errors import DataError, LayoutError
from fedspine_edge.model.layout import Layout, keep_positions
from fedspine_edge.model.lora import LoraLinear, QuantizedLinear, plain_linear, stored_weight
from fedspine_edge.model.pooled_token import pooled_positions
from fedspine_edge.model.prunable import PrunableModel

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Candidates for λ, as multiples of the mean of the diagonal of the inputs' second moments."""

HELD_OUT_SHARE = 0.25
"""Share of the batches on which λ is chosen; the weights are then fitted on all of them."""


@dataclass(frozen=True)
class LinearRepair:
    """The repair of one linear.

    Attributes:
        name: Canonical name, such as "layers.3.down".
        ridge: The chosen multiple of the mean diagonal.
        error_before: Squared error of the pruned linear on held-out texts, relative to the variance of its outputs.
        error_after: The same after the fit.
    """

    name: str
    ridge: float
    error_before: float
    error_after: float


def repair_for(model: PrunableModel, layout: Layout, batches: Sequence[Mapping[str, Tensor]]) -> list[LinearRepair]:
    """Refit `o` and `down` of `model` so that pruning it to `layout` changes its outputs as little as possible.

    Call it right before `model.compact(layout)`: afterwards the inputs that `layout` removes have zero weights, so that
    the model already computes what the pruned one will. If it is interrupted, the model is as it was.

    Args:
        model: The model before pruning, with or without adapters.
        layout: What will be kept; within the model's own layout.
        batches: Model inputs without labels, each tensor (batch, tokens); at least two batches, 256 texts in all are
            plenty. Padding does not count.

    Returns what was done to each linear, in the order of the layers.

    Raises `DataError` for fewer than two batches and `LayoutError` for a layout that keeps what is gone.
    """
    if len(batches) < 2:
        raise DataError(
            f"repair needs at least two batches of texts; there are {len(batches)}.", remedy="Give more examples."
        )
    if not layout.is_within(model.layout):
        raise LayoutError("the layout keeps heads or channels that were removed earlier; models only shrink.")
    done: list[LinearRepair] = []
    with torch.no_grad(), _evaluation_mode(model.module), _undone_on_failure(model) as replace:
        calls, unpruned = _layer_calls(model, batches)
        pruned = [hidden.clone() for hidden in unpruned]
        masks = [batch["attention_mask"].bool() for batch in batches]
        read = _shares_of_reading(model, batches, masks)
        for layer in range(model.spec.num_layers):
            module = model.module.get_submodule(model.architecture.layer_path(layer))
            stream = _Stream(module, calls[layer], masks)
            names = {part: f"layers.{layer}.{part}" for part in ("o", "down")}
            sizes = [state.square().mean(-1)[mask] for state, mask in zip(unpruned, masks)]
            wanted, unpruned = stream.outputs_of({p: model.linear(n) for p, n in names.items()}, unpruned)
            for part, name in names.items():
                kept = torch.from_numpy(keep_positions(model.layout.cols(name), layout.cols(name)))
                linear = model.linear(name)
                if kept.numel() < stored_weight(_base(linear)).shape[1] or done:
                    inputs = stream.inputs_of(linear, pruned)
                    weights = [1.0 / (size + y.square().mean(-1)) for size, y in zip(sizes, wanted[part])]
                    if layer == model.spec.num_layers - 1 and read is not None:
                        weights = [weight * share for weight, share in zip(weights, read)]
                    done.append(_refit(model, name, kept, inputs, wanted[part], weights, replace))
            pruned = stream.advance(pruned)
    return done


class _Stop(Exception):
    """Ends a layer's forward pass once the inputs of a linear are known."""


class _Stream:
    """Runs one layer by itself on hidden states (batch, tokens, hidden_size), batch after batch."""

    def __init__(self, module: nn.Module, calls: Sequence[tuple[Any, Any]], masks: Sequence[Tensor]) -> None:
        self._module, self._calls, self._masks = module, calls, masks

    def advance(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Return the layer's outputs."""
        return [self._run(state, call) for state, call in zip(hidden, self._calls)]

    def outputs_of(
        self, linears: Mapping[str, nn.Module], hidden: Sequence[Tensor]
    ) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Return the outputs (tokens, out) of some linears by their key, padding left out, and the layer's own."""
        found: dict[str, list[Tensor]] = {key: [] for key in linears}
        seen: dict[str, Tensor] = {}
        hooks = [
            linear.register_forward_hook(lambda _, __, output, key=key: seen.__setitem__(key, output))
            for key, linear in linears.items()
        ]
        outputs = []
        try:
            for state, call, mask in zip(hidden, self._calls, self._masks):
                outputs.append(self._run(state, call))
                for key in linears:
                    found[key].append(seen.pop(key).reshape(-1, _width(linears[key]))[mask.flatten()])
        finally:
            for hook in hooks:
                hook.remove()
        return found, outputs

    def inputs_of(self, linear: nn.Module, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield per batch the inputs (tokens, in) of a linear, padding left out."""

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        for state, call, mask in zip(hidden, self._calls, self._masks):
            seen: list[Tensor] = []
            hook = linear.register_forward_pre_hook(stop)
            try:
                self._run(state, call)
            except _Stop:
                pass
            finally:
                hook.remove()
            yield seen[0].reshape(-1, seen[0].shape[-1])[mask.flatten()]

    def _run(self, state: Tensor, call: tuple[Any, Any]) -> Tensor:
        args, kwargs = call
        output = self._module(state, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Moments:
    """Sums over tokens from which every ridge regression and its error follow, in float64."""

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0.0
        self.xx, self.xy = zeros(in_features, in_features), zeros(in_features, out_features)
        self.yy, self.x, self.y = zeros(), zeros(in_features), zeros(out_features)

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add tokens x (tokens, in), y (tokens, out), each with its weight (tokens,)."""
        x, y, weight = x.double(), y.double(), weight.double()[:, None]
        weighted_x, weighted_y = weight * x, weight * y
        self.count += float(weight.sum())
        self.xx += weighted_x.T @ x
        self.xy += weighted_x.T @ y
        self.yy += (weighted_y * y).sum()
        self.x += weighted_x.sum(0)
        self.y += weighted_y.sum(0)

    def plus(self, other: _Moments) -> _Moments:
        """Return the moments of both."""
        result = copy.copy(self)
        for name in ("count", "xx", "xy", "yy", "x", "y"):
            setattr(result, name, getattr(self, name) + getattr(other, name))
        return result

    def centred(self, with_bias: bool) -> tuple[Tensor, Tensor]:
        """Return Σ x xᵀ and Σ x yᵀ, about the means where the linear has a bias."""
        if not with_bias:
            return self.xx, self.xy
        return (
            self.xx - torch.outer(self.x, self.x) / self.count,
            self.xy - torch.outer(self.x, self.y) / self.count,
        )

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return Σ ‖y - W x - b‖² per unit of Σ ‖y - m_y‖² for a weight (in, out)."""
        total = self.yy - 2 * (weight * self.xy).sum() + (weight * (self.xx @ weight)).sum()
        if bias is not None:
            total = total + self.count * bias.square().sum() - 2 * bias @ self.y + 2 * self.x @ weight @ bias
        variance = self.yy - self.y.square().sum() / self.count
        return float(total / variance.clamp_min(1e-30))


def _refit(
    model: PrunableModel,
    name: str,
    kept: Tensor,
    inputs: Iterator[Tensor],
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    replace: Any,
) -> LinearRepair:
    """Fit the weight columns `kept` of one linear, choose λ, and put the result into the model."""
    linear = model.linear(name)
    base = _base(linear)
    weight = linear.merged_weight(torch.float64) if isinstance(linear, LoraLinear) else base.weight.double()
    device = weight.device
    kept = kept.to(device)
    start = weight[:, kept].T
    old_bias = None if base.bias is None else base.bias.double()
    held_out = max(1, round(HELD_OUT_SHARE * len(outputs)))
    parts = [_Moments(kept.numel(), weight.shape[0], device) for _ in range(2)]
    for index, (x, y) in enumerate(zip(inputs, outputs)):
        parts[index >= len(outputs) - held_out].add(x[:, kept], y, weights[index])
    fitting, checking = parts
    best = min((checking.error(*_solve(fitting, start, old_bias, ridge)), ridge) for ridge in RIDGES)
    before = checking.error(start, old_bias)
    if best[0] >= before:  # nothing to gain: leave the weights, drop the removed inputs
        return _put(replace, linear, name, kept, start, old_bias, LinearRepair(name, 0.0, before, before))
    fitted, bias = _solve(fitting.plus(checking), start, old_bias, best[1])
    return _put(replace, linear, name, kept, fitted, bias, LinearRepair(name, best[1], before, best[0]))


def _solve(moments: _Moments, start: Tensor, old_bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
    xx, xy = moments.centred(old_bias is not None)
    strength = ridge * xx.diagonal().mean().clamp_min(1e-12)
    system = xx + strength * torch.eye(xx.shape[0], dtype=xx.dtype, device=xx.device)
    weight = torch.cholesky_solve(xy + strength * start, torch.linalg.cholesky(system))
    if old_bias is None:
        return weight, None
    return weight, (moments.y - moments.x @ weight) / moments.count


def _put(
    replace: Any, linear: nn.Module, name: str, kept: Tensor, fitted: Tensor, bias: Tensor | None, done: LinearRepair
) -> LinearRepair:
    """Give the linear the fitted columns (kept, out), and zeros for the others."""
    base = _base(linear)
    wide = torch.float64
    weight = torch.zeros(stored_weight(base).shape, dtype=wide, device=fitted.device)
    weight[:, kept] = fitted.T
    lora_A = None
    if isinstance(linear, LoraLinear):  # the adapter stays, so the base becomes what is missing to the sum
        lora_A = torch.zeros_like(linear.lora_A)
        lora_A[:, kept] = linear.lora_A[:, kept]
        weight[:, kept] -= linear.scaling * (linear.lora_B.double() @ lora_A.double()[:, kept])
    dtype = stored_weight(base).dtype
    new = plain_linear(weight.to(dtype), None if bias is None else bias.to(base.bias.dtype))
    if isinstance(base, QuantizedLinear):
        new = QuantizedLinear.from_linear(new, base.stored.bits)
    replace(linear, name, new, lora_A)
    return done


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation mode, and back to its own mode afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def _undone_on_failure(model: PrunableModel) -> Iterator[Any]:
    """Give a function that puts weights into the model, and take all of them back if anything goes wrong."""
    before: list[tuple[nn.Module, str, Any, Tensor | None]] = []

    def replace(linear: nn.Module, name: str, new: nn.Module, lora_A: Tensor | None) -> None:
        base = _base(linear)
        before.append((linear, name, _content(base), None if lora_A is None else linear.lora_A.data))
        _set_content(base, _content(new))
        if lora_A is not None:
            linear.lora_A.data = lora_A

    try:
        yield replace
    except BaseException:
        for linear, _, content, lora_A in reversed(before):
            _set_content(_base(linear), content)
            if lora_A is not None:
                linear.lora_A.data = lora_A
        raise


def _content(base: nn.Module) -> dict[str, Any]:
    found = {name: parameter.data for name, parameter in base.named_parameters(recurse=False)}
    return found | dict(base.named_buffers(recurse=False))


def _set_content(base: nn.Module, content: Mapping[str, Tensor]) -> None:
    for name, value in content.items():
        if name in base._parameters:
            base._parameters[name].data = value
        else:
            base._buffers[name] = value


def _shares_of_reading(
    model: PrunableModel, batches: Sequence[Mapping[str, Tensor]], masks: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return by batch how much each token (tokens,) counts in the last layer; None if all count alike.

    A classifier reads one token of a text there, which counts as much as all others of its text together.
    """
    if model.task != "classification":
        return None
    shares = []
    for batch, mask in zip(batches, masks):
        positions = pooled_positions(model.architecture, model.module.config, batch["input_ids"])
        if positions is None:
            return None
        share = (1.0 / (mask.sum(1, keepdim=True) - 1).clamp_min(1)).expand(mask.shape).clone()
        share[torch.arange(mask.shape[0], device=mask.device), positions] = 1.0
        shares.append(share[mask])
    return shares


def _base(linear: nn.Module) -> nn.Module:
    return getattr(linear, "base_layer", linear)


def _width(linear: nn.Module) -> int:
    """Return the number of outputs of a linear."""
    return int(stored_weight(_base(linear)).shape[0])


def _layer_calls(
    model: PrunableModel, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[list[list[tuple[Any, Any]]], list[Tensor]]:
    """Return by layer and batch the arguments beside the hidden states, and the first layer's hidden states."""
    layers = [
        model.module.get_submodule(model.architecture.layer_path(layer)) for layer in range(model.spec.num_layers)
    ]
    calls: list[list[tuple[Any, Any]]] = [[] for _ in layers]
    first: list[Tensor] = []

    def note(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            if layer == 0:
                first.append(hidden)
            calls[layer].append((args[1:], rest))

        return hook

    hooks = [module.register_forward_pre_hook(note(i), with_kwargs=True) for i, module in enumerate(layers)]
    try:
        backbone = model.module.get_submodule(model.architecture.backbone)
        cache = {"use_cache": False} if model.task == "causal_lm" else {}
        for batch in batches:
            backbone(**batch, **cache)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, first

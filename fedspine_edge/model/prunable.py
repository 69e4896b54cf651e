"""A transformers model with LoRA adapters on its prunable linears, which can be made physically smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedspine_edge.arrays import Array
from fedspine_edge.config import Task
from fedspine_edge.errors import CheckpointError, LayoutError, ModelError
from fedspine_edge.kernels import ops
from fedspine_edge.model.derive_spec import check_shapes, model_spec, spec_of_config
from fedspine_edge.model.deterministic_init import kaiming_uniform
from fedspine_edge.model.families import architecture_of
from fedspine_edge.model.fused_ops import disable_fused_ops, enable_fused_ops
from fedspine_edge.model.fused_projections import merge_fused
from fedspine_edge.model.layout import Indices, Layout, full_shape, keep_positions, module_names, split_name
from fedspine_edge.model.lora import FusedProjection, LoraLinear, QuantizedLinear, plain_linear, stored_weight
from fedspine_edge.model.pooled_token import POOLED_PARTS, PooledToken, checkpoint_contexts, pooled_positions
from fedspine_edge.model.precision import (
    QUANTIZED_BITS,
    BaseDtype,
    compute_dtype,
    to_one_dtype,
    upcast_head_inputs,
)
from fedspine_edge.model.spec import ModelSpec

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]

QUANTIZED_SUFFIXES = (".codes", ".scales", ".group_of_col")
"""Suffixes of the tensor names of a quantized weight."""

LOGITS_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "labels"}
"""Arguments of a call that asks for loss and logits only."""

_OTHER_BASE = "The adapter belongs to another base model, task or layout."


class FollowsCompaction(Protocol):
    """State aligned with the kept groups, such as an importance tracker, which is compacted with the model."""

    def compact(self, old: Layout, new: Layout) -> None:
        """Keep the state of the groups in `new`, which is within `old`."""


class PrunableModel:
    """A model for one task: frozen base, adapters, task head, and the layout that is left.

    Args:
        module: Task model of transformers without adapters, with the widths of `layout`.
        spec: Prunable shape of the unpruned model.
        layout: Heads and channels that the module has.
        task: "classification", "token_classification" or "causal_lm".
        num_labels: Number of classes; 0 for causal_lm.
        head_names: Names of the module's parameters that are trained besides the adapters.
        folder: Folder of the weights, from which the tokenizer files are copied when the model is saved.
        gguf_file: File within `folder` that holds GGUF weights.

    Raises `ModelError` if the module does not have the widths of `layout`.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: ModelSpec,
        layout: Layout,
        *,
        task: Task,
        num_labels: int,
        head_names: tuple[str, ...],
        folder: Path | None = None,
        gguf_file: str | None = None,
    ) -> None:
        check_shapes(module, layout)
        self.module = module
        self.spec = spec
        self.layout = layout
        self.task: Task = task
        self.num_labels = num_labels
        self.head_names = head_names
        self.folder = folder
        self.gguf_file = gguf_file
        self.r: int | None = None
        """Rank of the adapters; None before `attach_lora`."""
        self.scaling = 1.0
        self.gradient_checkpointing = False
        self.base = "" if folder is None else gguf_file or folder.name
        """Name of the base model, for the model card."""
        self.trained_examples, self.trained_steps = 0, 0
        """Size of the largest data set that the model was trained on, and training steps so far, for the model card."""
        self.architecture = architecture_of(spec.family)
        self.architecture.set_widths(module, layout)
        self.architecture.disable_dropout(module)
        enable_fused_ops(module, self.architecture)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in head_names)
        upcast_head_inputs(module, head_names)

    @classmethod
    def from_module(cls, module: nn.Module, *, task: Task, base_sha256: str = "0" * 64) -> PrunableModel:
        """Wrap an unpruned task model of transformers that is already in memory."""
        spec = model_spec(module, base_sha256)
        head = tuple(f"{prefix}." for prefix in architecture_of(spec.family).head_modules(task))
        return cls(
            module,
            spec,
            Layout.full(spec),
            task=task,
            num_labels=0 if task == "causal_lm" else int(module.config.num_labels),
            head_names=tuple(name for name, _ in module.named_parameters() if name.startswith(head)),
        )

    def __call__(self, **inputs: Any) -> Any:
        """Run the transformers model; a classifier's last layer computes the pooled tokens only.

        `module(**inputs)` computes every token there and gives the same logits.
        """
        with self._pooled_token(inputs):
            return self.module(**inputs)

    def _pooled_token(self, inputs: Mapping[str, Any]) -> PooledToken:
        ids = inputs.get("input_ids")
        logits_only = inputs.keys() <= LOGITS_INPUTS and not self.module.config.output_hidden_states
        # Checkpointing that was enabled on the module itself does not restore the context when it recomputes a layer.
        layer = self.module.get_submodule(self.architecture.layer_path(0))
        foreign_checkpointing = getattr(layer, "gradient_checkpointing", False) and not self.gradient_checkpointing
        if ids is None or self.task != "classification" or not logits_only or foreign_checkpointing:
            return PooledToken(None, 0)
        return PooledToken(pooled_positions(self.architecture, self.module.config, ids), ids.shape[1])

    def linear(self, name: str) -> nn.Module:
        """Return the linear, with or without adapter, of a canonical name such as "layers.0.q"."""
        return self.module.get_submodule(self.architecture.path(name))

    def num_parameters(self) -> int:
        """Return the number of parameters of base and head, without the adapters."""
        quantized = (m for m in self.module.modules() if isinstance(m, QuantizedLinear))
        plain: int = sum(p.numel() for n, p in self.module.named_parameters() if not n.endswith((".lora_A", ".lora_B")))
        return plain + sum(int(m.stored.shape.numel()) for m in quantized)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Data type of activations and of every frozen parameter that is not quantized."""
        frozen = (p.dtype for n, p in self.module.named_parameters() if n not in self.head_names and ".lora_" not in n)
        return next(frozen)

    @property
    def base_dtype(self) -> BaseDtype:
        """Data type of the frozen weights."""
        bits = [m.stored.bits for m in self.module.modules() if isinstance(m, QuantizedLinear)]
        return "int8" if 8 in bits else "int4" if bits else str(self.compute_dtype).removeprefix("torch.")  # type: ignore[return-value]

    def set_base_dtype(self, base_dtype: BaseDtype) -> None:
        """Store the frozen weights in another data type; adapters, head and optimizer state stay float32.

        "bfloat16" and "float16" round every frozen parameter and compute in that dtype. "int8" and "int4" round to
        bfloat16 and then quantize the prunable linears, one at a time. A wider dtype does not restore what was rounded.
        Raises `ConfigError` for an unknown name and `ModelError` for a base that is already quantized.
        """
        dtype = compute_dtype(base_dtype)
        if self.base_dtype == base_dtype:
            return
        if self.base_dtype in QUANTIZED_BITS:
            raise ModelError(
                f"the base is already quantized to {self.base_dtype}; its original weights are not kept.",
                remedy=f"Load the model again with base_dtype={base_dtype!r}.",
            )
        for name, parameter in self.module.named_parameters():
            if name in self.head_names:
                parameter.data = parameter.data.clone()  # a view of the mapped file would keep all of it in memory
            elif not name.endswith((".lora_A", ".lora_B")):
                parameter.data = parameter.data.to(dtype)
        if base_dtype in QUANTIZED_BITS:
            for name in module_names(self.spec):
                linear = self.linear(name)
                if isinstance(linear, LoraLinear):
                    linear.base_layer = QuantizedLinear.from_linear(linear.base_layer, QUANTIZED_BITS[base_dtype])
                else:
                    self._replace(name, QuantizedLinear.from_linear(linear, QUANTIZED_BITS[base_dtype]))
        upcast_head_inputs(self.module, self.head_names)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only the inputs of each layer for the backward pass and recompute the rest, or stop doing so.

        Raises `ModelError` if the transformers model does not support it.
        """
        if enabled == self.gradient_checkpointing:
            return
        if enabled:
            if not self.module.supports_gradient_checkpointing:
                raise ModelError(f"{self.spec.family} models do not support gradient checkpointing.")
            self.module.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
            )
        else:
            self.module.gradient_checkpointing_disable()
        self.gradient_checkpointing = enabled

    # Adapters

    def attach_lora(self, r: int, scaling: float, seed: int) -> None:
        """Put a new adapter on every prunable linear, with A uniform from (seed, name) and B zero.

        A is drawn in full coordinates and gathered, so that every layout starts from the same adapter.
        """
        if r < 1:
            raise ModelError(f"LoRA rank is {r}; it must be at least 1.")
        self.scaling = float(scaling)
        for name in module_names(self.spec):
            _, in_features = full_shape(self.spec, split_name(name)[1])
            lora_A = kaiming_uniform(seed, name, r, in_features)[:, self.layout.cols(name)]
            self._adapt(name, lora_A, np.zeros((self.layout.rows(name).size, r), dtype=np.float32))
        self._fuse_projections()
        self.r = r

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return adapters ("layers.0.q.lora_A") and head ("head.classifier.weight") in a fixed order.

        `compact` and `load_adapter` replace parameters; call this again after them.
        """
        found: dict[str, nn.Parameter] = {}
        if self.r is not None:
            for name in module_names(self.spec):
                linear = self.linear(name)
                found[f"{name}.lora_A"] = linear.lora_A
                found[f"{name}.lora_B"] = linear.lora_B
        for name in self.head_names:
            found[f"head.{name}"] = self.module.get_parameter(name)
        return found

    def adapter_state(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return float32 copies of the trainable tensors in compact coordinates."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, parameter in self.trainable_parameters().items()
        }

    def load_adapter(self, state: Arrays, *, r: int | None = None, scaling: float | None = None) -> None:
        """Replace adapters and head by `state`.

        Args:
            state: Tensors named as in `adapter_state`, in full coordinates (the fleet's adapter) or in those of the
                current layout. Without any "head." tensor, the head stays as it is. Names outside "layers." and
                "head." are ignored, so that a round blob can be passed unchanged.
            r: Number of leading components to use (default: all).
            scaling: New lora_alpha / r (default: the current one).

        Raises `CheckpointError`, before anything has changed, for missing or unknown names, shapes that fit
        neither coordinates, a rank above that of the state, and non-finite values.
        """
        adapters, head = self._validate_adapter(state, r)
        if scaling is not None:
            self.scaling = float(scaling)
        for name, (lora_A, lora_B) in adapters.items():
            self._adapt(name, lora_A, lora_B)
        self._fuse_projections()
        self.r = next(iter(adapters.values()))[0].shape[0]
        with torch.no_grad():
            for name, value in head.items():
                parameter = self.module.get_parameter(name.removeprefix("head."))
                parameter.copy_(torch.from_numpy(np.array(value, dtype=np.float32)))

    def _validate_adapter(
        self, state: Arrays, r: int | None
    ) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
        """Return (lora_A, lora_B) by linear in the current coordinates, and the head, which may be empty."""
        adapters = {name: self._validate_factors(name, state, r) for name in module_names(self.spec)}
        ranks = {pair[0].shape[0] for pair in adapters.values()}
        if len(ranks) != 1:
            raise CheckpointError(
                f"the adapter mixes the ranks {sorted(ranks)}; all modules need the same rank.",
                remedy="Read a PEFT folder with peft_format.load_adapter, which pads all modules to the largest rank.",
            )
        head = self._validate_head(state)
        known = {f"{n}.{side}" for n in adapters for side in ("lora_A", "lora_B")} | set(head)
        unknown = [n for n in state if n.startswith(("layers.", "head.")) and n not in known]
        if unknown:
            raise CheckpointError(
                f"the adapter has {unknown[0]!r}, which this model does not have.", remedy=_OTHER_BASE
            )
        return adapters, head

    def _validate_factors(self, name: str, state: Arrays, r: int | None) -> tuple[Array, Array]:
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
                f"{name}: rank {rank} was requested from an adapter of rank {lora_A.shape[0]}.",
                remedy="Request at most the rank of the adapter.",
            )
        rows, cols = self.layout.rows(name), self.layout.cols(name)
        out_full, in_full = full_shape(self.spec, split_name(name)[1])
        if (lora_B.shape[0], lora_A.shape[1]) == (out_full, in_full):
            lora_A, lora_B = self.layout.gather(name, lora_A, lora_B)
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

    def _validate_head(self, state: Arrays) -> dict[str, Array]:
        head = {name: np.asarray(value) for name, value in state.items() if name.startswith("head.")}
        if not head:
            return {}
        for name in self.head_names:
            value = head.get(f"head.{name}")
            if value is None:
                raise CheckpointError(f"the adapter's task head has no {name!r}.", remedy=_OTHER_BASE)
            expected = tuple(self.module.get_parameter(name).shape)
            if value.shape != expected or not np.isfinite(value).all():
                raise CheckpointError(
                    f"head.{name} has shape {value.shape} or non-finite values; it must be finite, of shape "
                    f"{expected}.",
                    remedy="Check whether the adapter was trained with another number of labels.",
                )
        return {name: value for name, value in head.items() if name.removeprefix("head.") in self.head_names}

    def _adapt(self, name: str, lora_A: Array, lora_B: Array) -> None:
        base = getattr(self.linear(name), "base_layer", self.linear(name))
        first, second = (torch.from_numpy(np.array(x, dtype=np.float32, order="C")) for x in (lora_A, lora_B))
        linear = LoraLinear(base, first, second, self.scaling)
        layer, part = split_name(name)
        linear.pooled_only = layer == self.spec.num_layers - 1 and part in POOLED_PARTS
        self._replace(name, linear)

    def _fuse_projections(self) -> None:
        """Let the linears of a layer that have the same input be computed together."""
        parts = self.architecture.linears
        attention = [("q", "k", "v")] if self.architecture.shared_attention_input else []
        for layer in range(self.spec.num_layers):
            for group in (*attention, ("gate", "up")):
                if all(part in parts for part in group):
                    FusedProjection(*(self.linear(f"layers.{layer}.{part}") for part in group))

    def _replace(self, name: str, linear: nn.Module) -> None:
        parent, _, attribute = self.architecture.path(name).rpartition(".")
        linear.train(self.module.training)
        setattr(self.module.get_submodule(parent), attribute, linear)

    # Pruning

    def compact(
        self,
        layout: Layout,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        importance: FollowsCompaction | None = None,
    ) -> None:
        """Shrink weights, biases, adapters, gradients, optimizer moments and importance to `layout`.

        Parameters whose shape changes are replaced, in the model and in `optimizer`: a parameter cannot change
        its shape while the loss of an earlier step still holds its graph. Raises `LayoutError`, before anything has
        changed, if `layout` belongs to another model or keeps groups that were removed before.
        """
        old = self.layout
        if layout.spec != self.spec:
            raise LayoutError("the layout belongs to another model.")
        if not layout.is_within(old):
            raise LayoutError("the layout keeps heads or channels that were removed earlier; models only shrink.")
        for name in module_names(self.spec):
            rows = _positions(old.rows(name), layout.rows(name))
            cols = _positions(old.cols(name), layout.cols(name))
            if rows is not None or cols is not None:
                self._shrink(name, rows, cols, optimizer)
        self.layout = layout
        self.architecture.set_widths(self.module, layout)
        if importance is not None:
            importance.compact(old, layout)

    def _shrink(
        self, name: str, rows: Indices | None, cols: Indices | None, optimizer: torch.optim.Optimizer | None
    ) -> None:
        linear = self.linear(name)
        base = getattr(linear, "base_layer", linear)
        device = stored_weight(base).device
        row_index = None if rows is None else torch.from_numpy(rows).to(device)
        col_index = None if cols is None else torch.from_numpy(cols).to(device)

        def take(tensor: Tensor) -> Tensor:
            if row_index is not None:
                tensor = ops.gather_rows(tensor, row_index)
            return tensor if col_index is None else ops.gather_cols(tensor, col_index)

        with torch.no_grad():
            bias = base.bias
            if bias is not None and row_index is not None:
                bias = bias.index_select(0, row_index)
            bias = None if bias is None else bias.detach()
            if isinstance(base, QuantizedLinear):
                compact = QuantizedLinear(base.stored.take(row_index, col_index), bias)
            else:
                compact = plain_linear(take(base.weight.detach()), bias)
            if not isinstance(linear, LoraLinear):
                self._replace(name, compact)
                return
            linear.base_layer = compact
            if row_index is not None:
                linear.lora_B = _replaced(linear.lora_B, lambda t: ops.gather_rows(t, row_index), optimizer)
            if col_index is not None:
                linear.lora_A = _replaced(linear.lora_A, lambda t: ops.gather_cols(t, col_index), optimizer)

    # Results

    def merge(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a copy of the transformers model with the adapters merged and without code of this package.

        Args:
            dtype: Data type of all its parameters (default: that of the frozen ones).

        Raises `ModelError` if a merged weight is not finite.
        """
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        replaced = {
            id(t): t for n, t in tensors if n.endswith(QUANTIZED_SUFFIXES) or ".base_layer." in n or ".lora_" in n
        }
        module = copy.deepcopy(self.module, replaced)  # tensors that are replaced below are shared, not copied
        for name in module_names(self.spec):
            parent, _, attribute = self.architecture.path(name).rpartition(".")
            linear = self.linear(name)
            if isinstance(linear, QuantizedLinear):
                merged = plain_linear(linear.weight, None if linear.bias is None else linear.bias.detach().clone())
            elif isinstance(linear, LoraLinear):
                try:
                    merged = linear.merge(dtype)
                except ModelError as error:
                    raise ModelError(f"{name}: {error.message}", remedy=error.remedy) from None
            else:
                continue
            merged.train(self.module.training)
            setattr(module.get_submodule(parent), attribute, merged)
        disable_fused_ops(module)
        merge_fused(module, self.architecture)
        to_one_dtype(module, dtype or self.compute_dtype)
        return module


def layout_of(model: PrunableModel | nn.Module) -> Layout:
    """Return the layout of a model: its own, or, for a plain transformers module, the widths that its config states.

    `Layout.counts` then holds the KV heads and channels of each layer, and `Layout.spec` the head dimension. A module
    that `PrunableModel.merge` returned may have other widths than its config; pass the `PrunableModel` instead.
    """
    if isinstance(model, PrunableModel):
        return model.layout
    return Layout.full(spec_of_config(model.config, sum(parameter.numel() for parameter in model.parameters())))


def _positions(old: Indices, new: Indices) -> Indices | None:
    """Return the positions of `new` within `old`, or None if nothing changes."""
    return None if old.size == new.size else keep_positions(old, new)


def _replaced(
    old: nn.Parameter, take: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None
) -> nn.Parameter:
    """Return a new parameter, with `take` applied to value, gradient and every optimizer tensor of the same shape."""
    new = nn.Parameter(take(old.detach()), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = take(old.grad)
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {
                key: take(value) if isinstance(value, Tensor) and value.shape == old.shape else value
                for key, value in state.items()
            }
    return new

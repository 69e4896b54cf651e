"""A transformers model with adapters on its prunable linears, and the means to make it physically smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedspine_edge.config import Task
from fedspine_edge.errors import LayoutError, ModelError
from fedspine_edge.kernels import ops
from fedspine_edge.model.adapter_validation import Arrays, checked_adapter
from fedspine_edge.model.derive_spec import check_shapes, model_spec, spec_of_config
from fedspine_edge.model.deterministic_init import kaiming_uniform
from fedspine_edge.model.families import architecture_of
from fedspine_edge.model.fused_ops import disable_fused_ops, enable_fused_ops
from fedspine_edge.model.fused_projections import merge_fused
from fedspine_edge.model.layout import Indices, Layout, full_shape, keep_positions, module_names, split_name
from fedspine_edge.model.lora import FusedProjection, LoraLinear, QuantizedLinear, plain_linear, stored_weight
from fedspine_edge.model.pooled_token import READING_PARTS, PooledToken, read_positions, recomputation
from fedspine_edge.model.precision import BaseDtype, cast_base, to_one_dtype, upcast_head_inputs
from fedspine_edge.model.spec import ModelSpec

PACKED = (".codes", ".scales", ".group_of_col")
"""Ends of the names of a quantised weight's tensors."""


LOGITS_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "labels"}
"""Arguments of a call that ask for nothing but loss and logits."""


class FollowsCompaction(Protocol):
    """State aligned with the kept groups, such as an importance tracker, that shrinks with the model."""

    def compact(self, old: Layout, new: Layout) -> None:
        """Keep what belongs to the groups of `new`, which is within `old`."""


class PrunableModel:
    """One model of one task: the frozen base, its adapters, its head and the layout it still has.

    Args:
        module: The transformers task model, without adapters, with the widths of `layout`.
        spec: The unpruned model's numbers.
        layout: What is kept.
        task: "classification", "token_classification" or "causal_lm".
        num_labels: Classes; 0 for causal_lm.
        head_names: Names of the module's parameters that are trained besides the adapters.
        folder: Where the weights came from; its tokenizer files are copied by `save`.
        gguf_file: The file within `folder` if that holds GGUF weights.

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
        self.scaling = 1.0
        self.recomputes = False
        self.base = "" if folder is None else gguf_file or folder.name
        """Name of the base model, for the card of a saved one."""
        self.trained_examples, self.trained_steps = 0, 0
        """What it was trained on so far, for the card likewise."""
        self.architecture = architecture_of(spec.family)
        self.architecture.set_widths(module, layout)
        self.architecture.disable_dropout(module)
        enable_fused_ops(module, self.architecture)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in head_names)
        upcast_head_inputs(module, head_names)

    @classmethod
    def from_module(cls, module: nn.Module, *, task: Task, base_sha256: str = "0" * 64) -> PrunableModel:
        """Wrap an unpruned transformers task model that already exists in memory."""
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
        """Forward of the transformers model, in a classifier's last layer for the tokens that it reads.

        Called as `module(**inputs)` it computes every token there, for the same logits.
        """
        with self._reading(inputs):
            return self.module(**inputs)

    def _reading(self, inputs: Mapping[str, Any]) -> PooledToken:
        ids = inputs.get("input_ids")
        logits_alone = inputs.keys() <= LOGITS_INPUTS and not self.module.config.output_hidden_states
        # checkpointing that others have turned on knows nothing of what was read when it repeats a layer
        layer = self.module.get_submodule(self.architecture.layer_path(0))
        repeats_all = getattr(layer, "gradient_checkpointing", False) and not self.recomputes
        if ids is None or self.task != "classification" or not logits_alone or repeats_all:
            return PooledToken(None, 0)
        return PooledToken(read_positions(self.architecture, self.module.config, ids), ids.shape[1])

    def linear(self, name: str) -> nn.Module:
        """The (possibly adapted) linear of a canonical name such as "layers.0.q"."""
        return self.module.get_submodule(self.architecture.path(name))

    def num_parameters(self) -> int:
        """Parameters of base and head, adapters excluded."""
        quantised = (m for m in self.module.modules() if isinstance(m, QuantizedLinear))
        plain: int = sum(p.numel() for n, p in self.module.named_parameters() if not n.endswith((".lora_A", ".lora_B")))
        return plain + sum(int(m.stored.shape.numel()) for m in quantised)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations and of every frozen parameter that is not quantised."""
        frozen = (p.dtype for n, p in self.module.named_parameters() if n not in self.head_names and ".lora_" not in n)
        return next(frozen)

    @property
    def base_dtype(self) -> BaseDtype:
        """How the frozen weights are kept."""
        bits = [m.stored.bits for m in self.module.modules() if isinstance(m, QuantizedLinear)]
        return "int8" if 8 in bits else "int4" if bits else str(self.compute_dtype).removeprefix("torch.")  # type: ignore[return-value]

    def keep_base_in(self, base_dtype: BaseDtype) -> None:
        """Keep the frozen weights in fewer bits from now on; adapters, head and optimizer stay float32.

        "bfloat16" and "float16" round every frozen parameter and compute in that dtype. "int8" and "int4" do the
        same with bfloat16 and then quantise the prunable linears, one at a time. What was lost does not come back:
        widening only changes the dtype. Raises `ConfigError` for an unknown name, `ModelError` for a quantised base.
        """
        cast_base(self, base_dtype)

    def recompute_layers(self, on: bool) -> None:
        """Gradient checkpointing: keep the layers' inputs alone and compute the rest again in the backward pass.

        Raises `ModelError` where the transformers model cannot.
        """
        if on == self.recomputes:
            return
        if on:
            if not self.module.supports_gradient_checkpointing:
                raise ModelError(f"{self.spec.family} models cannot recompute their layers.")
            self.module.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": recomputation}
            )
        else:
            self.module.gradient_checkpointing_disable()
        self.recomputes = on

    # Adapters

    def attach_lora(self, r: int, scaling: float, seed: int) -> None:
        """Put a fresh adapter on every prunable linear: A uniform from (seed, name), B zero.

        A is drawn in full coordinates and gathered, so every layout starts from the same adapter.
        """
        if r < 1:
            raise ModelError(f"LoRA rank is {r}; it must be at least 1.")
        self.scaling = float(scaling)
        for name in module_names(self.spec):
            _, in_features = full_shape(self.spec, split_name(name)[1])
            lora_A = kaiming_uniform(seed, name, r, in_features)[:, self.layout.cols(name)]
            self._adapt(name, lora_A, np.zeros((self.layout.rows(name).size, r), dtype=np.float32))
        self._share_inputs()
        self.r = r

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Adapters ("layers.0.q.lora_A") and head ("head.classifier.weight"), in a fixed order.

        `compact` and `load_adapter` replace parameters: ask again after them.
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
        """Copies of the trainable tensors in compact coordinates, float32."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, parameter in self.trainable_parameters().items()
        }

    def load_adapter(self, state: Arrays, *, r: int | None = None, scaling: float | None = None) -> None:
        """Replace adapters and head by `state`.

        Args:
            state: Names as in `adapter_state`, in full coordinates (the fleet's adapter) or in those of the
                current layout. The head may be absent as a whole and is then left alone. Names outside
                "layers." and "head." are ignored, so a round blob can be passed as it is.
            r: Use the first `r` components; default all.
            scaling: New lora_alpha / r; default the current one.

        Raises `CheckpointError`, before anything has changed, for missing or unknown names, shapes that fit
        neither coordinates, a rank above the state's and non-finite values.
        """
        adapters, head = checked_adapter(self, state, r)
        if scaling is not None:
            self.scaling = float(scaling)
        for name, (lora_A, lora_B) in adapters.items():
            self._adapt(name, lora_A, lora_B)
        self._share_inputs()
        self.r = next(iter(adapters.values()))[0].shape[0]
        with torch.no_grad():
            for name, value in head.items():
                parameter = self.module.get_parameter(name.removeprefix("head."))
                parameter.copy_(torch.from_numpy(np.array(value, dtype=np.float32)))

    def _adapt(self, name: str, lora_A: npt.NDArray[Any], lora_B: npt.NDArray[Any]) -> None:
        base = getattr(self.linear(name), "base_layer", self.linear(name))
        first, second = (torch.from_numpy(np.array(x, dtype=np.float32, order="C")) for x in (lora_A, lora_B))
        linear = LoraLinear(base, first, second, self.scaling)
        layer, part = split_name(name)
        linear.reads_token = layer == self.spec.num_layers - 1 and part in READING_PARTS
        self._replace(name, linear)

    def _share_inputs(self) -> None:
        """Let the linears of a layer that read one tensor compute together."""
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
        shape while a loss of an earlier step still holds its graph. Raises `LayoutError`, before anything has
        changed, if `layout` is for another model or keeps what is already gone.
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

    def merged(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A copy of the transformers model with adapters folded in and nothing of this package left in it.

        Args:
            dtype: Of all its parameters; default that of the frozen ones.

        Raises `ModelError` if a merged weight is not finite.
        """
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        shared = {id(t): t for n, t in tensors if n.endswith(PACKED) or ".base_layer." in n or ".lora_" in n}
        module = copy.deepcopy(self.module, shared)  # what is replaced below is not copied
        for name in module_names(self.spec):
            parent, _, attribute = self.architecture.path(name).rpartition(".")
            linear = self.linear(name)
            if isinstance(linear, QuantizedLinear):
                merged = plain_linear(linear.weight, None if linear.bias is None else linear.bias.detach().clone())
            elif isinstance(linear, LoraLinear):
                try:
                    merged = linear.merged(dtype)
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

    def save(self, folder: str | Path, *, metrics: Mapping[str, float] | None = None) -> Path:
        """Write base, adapter, head, layout and tokenizer to `folder`; see `checkpoint.save`."""
        from fedspine_edge.model import checkpoint

        return checkpoint.save(self, folder, metrics=metrics)

    def save_merged(self, folder: str | Path, *, metrics: Mapping[str, float] | None = None) -> Path:
        """Like `save`, with the adapter folded into the weights."""
        from fedspine_edge.model import checkpoint

        return checkpoint.save(self, folder, merged=True, metrics=metrics)


def layout_of(model: PrunableModel | nn.Module) -> Layout:
    """Return the layout of a model: its own, or, for a plain transformers module, the widths that its config states.

    `Layout.counts` then holds the KV heads and channels of each layer, and `Layout.spec` the head dimension. A module
    that `PrunableModel.merged` returned may have other widths than its config; ask the `PrunableModel` instead.
    """
    if isinstance(model, PrunableModel):
        return model.layout
    return Layout.full(spec_of_config(model.config, sum(parameter.numel() for parameter in model.parameters())))


def _positions(old: Indices, new: Indices) -> Indices | None:
    """Where `new` is within `old`; None if nothing changes."""
    return None if old.size == new.size else keep_positions(old, new)


def _replaced(
    old: nn.Parameter, take: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None
) -> nn.Parameter:
    """A new parameter with `take` applied to value, gradient and every optimizer tensor of the same shape."""
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

"""Does the exported file compute what torch computes? Whole passes, and decoders step by step with their KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import AdapterSpec, Bundle, TensorInfo
from fedspine_edge.bundle.metrics import Accuracy, Verification
from fedspine_edge.data.loading import Data
from fedspine_edge.errors import ExportMismatch
from fedspine_edge.export.calibration import UserData, measure, read_data
from fedspine_edge.export.divergence import first_divergent_layer
from fedspine_edge.export.onnx_export import Exported, merged_module
from fedspine_edge.model.architecture import task_of
from fedspine_edge.runtime.adapters import bundled_adapter
from fedspine_edge.runtime.comparison import TOLERANCE, Inputs, compare, logits_of, random_inputs
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "SHAPES",
    "TOLERANCE",
    "compare",
    "random_inputs",
    "verify_adapters",
    "verify_bundle",
    "verify_cache",
    "verify_onnx",
]

SHAPES: tuple[tuple[int, int], ...] = ((1, 1), (1, 7), (2, 16), (3, 33))
"""(batch, tokens) compared unless others are given; lengths beyond the model's limit are cut to it."""


def verify_onnx(
    exported: Exported,
    module: nn.Module,
    *,
    inputs: Sequence[Inputs] | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    adapter: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> Verification:
    """Runs an exported file on ONNX Runtime and the module in torch, and compares.

    Args:
        exported: What `export_onnx` returned.
        module: The float32 transformers module it was made from, in eval mode.
        inputs: Inputs to compare on; default random ones with padding.
        shapes: (batch, tokens) of the random inputs.
        adapter: Values of the adapter's inputs, where the file has them.
        seed: Of the random inputs.

    Raises `ExportMismatch`, naming the worst output, the numbers, and the first layer that differs.
    """
    runner = OnnxRuntimeRunner(exported.path, threads=1)
    if inputs is None:
        inputs = random_inputs(
            exported.inputs, shapes, exported.max_tokens, seed, pad=exported.pad_token_id, adapter=adapter
        )
    try:
        return compare(
            runner,
            lambda batch: run_torch(module, batch, exported.inputs),
            inputs,
            logits_of(exported.outputs),
            precision=exported.precision,
            subject=f"{exported.path.name} on ONNX Runtime",
            reference="torch",
        )
    except ExportMismatch as error:
        where = _first_layer(exported, module, inputs)
        raise ExportMismatch(f"{error.message} {where}", remedy=error.remedy) from error
    finally:
        runner.close()


def _first_layer(exported: Exported, module: nn.Module, inputs: Sequence[Inputs]) -> str:
    """A sentence on the first layer that differs, on the first inputs where one does."""
    for batch in inputs:
        found = first_divergent_layer(
            exported.path,
            module,
            batch,
            lambda batch=batch: run_torch(module, batch, exported.inputs, as_exported=True),  # type: ignore[misc]
            tolerance=TOLERANCE[exported.precision],
        )
        if found is not None:
            return f"The first layer that differs is {found}."
    return "Every layer by itself agrees: the outputs are put together differently."


def verify_cache(
    exported: Exported,
    module: nn.Module,
    *,
    prompt: int = 5,
    steps: int = 6,
    adapter: Mapping[str, Array] | None = None,
    seed: int = 1,
) -> Verification:
    """Runs a decoder as generating does, a prompt and then token by token with its cache, against torch without one.

    The logits of every step are compared with torch's full pass over all tokens: one row alone, and three rows
    with padding on the right and then on the left. Raises `ExportMismatch`.
    """
    runner = OnnxRuntimeRunner(exported.path, threads=1)
    shapes = [(1, prompt + steps), (3, prompt + steps)]
    inputs = random_inputs(
        exported.inputs, shapes, exported.max_tokens, seed, pad=exported.pad_token_id, adapter=adapter
    )
    inputs.append(inputs[-1] | {"attention_mask": np.ascontiguousarray(inputs[-1]["attention_mask"][:, ::-1])})
    try:
        return compare(
            _StepByStep(runner, exported.inputs, prompt),
            lambda batch: run_torch(module, batch, exported.inputs),
            inputs,
            logits_of(exported.outputs),
            precision=exported.precision,
            subject=f"{exported.path.name} token by token with its KV cache",
            reference="torch without a cache",
        )
    finally:
        runner.close()


def verify_adapters(
    exported: Exported, module: nn.Module, adapter: AdapterSpec, *, ranks: Sequence[int] = (0, 1, 64), seed: int = 2
) -> Verification:
    """Compares random adapters of several ranks in the exported file with the same ones in torch.

    `module` is what `with_runtime_lora` returned: its linears take the factors that the file takes as inputs.
    Raises `ExportMismatch`.
    """
    import torch

    from fedspine_edge.export.tracing import RuntimeLora, get_attribute

    rng = np.random.default_rng(seed)
    linears = {path: child for path, child in module.named_modules() if isinstance(child, RuntimeLora)}
    head = {f"head.{name}": get_attribute(module, name).numpy() for name in adapter.head}
    inputs = []
    for rank in ranks:
        values = dict(head)
        for entry in adapter.modules:
            for side, shape in (("A", (entry.in_features, rank)), ("B", (rank, entry.out_features))):
                values[f"lora.{entry.path}.{side}"] = rng.normal(0, 0.02, shape).astype(np.float32)
        inputs += random_inputs(
            exported.inputs, [(2, 9)], exported.max_tokens, seed, pad=exported.pad_token_id, adapter=values
        )

    def reference(batch: Inputs) -> Inputs:
        for path, linear in linears.items():
            linear.factors = tuple(torch.from_numpy(batch[f"lora.{path}.{side}"]) for side in "AB")
        try:
            return run_torch(module, batch, exported.inputs)
        finally:
            for linear in linears.values():
                linear.factors = None

    runner = OnnxRuntimeRunner(exported.path, threads=1)
    try:
        return compare(
            runner,
            reference,
            inputs,
            logits_of(exported.outputs),
            precision=exported.precision,
            subject=f"{exported.path.name} with adapters of rank {', '.join(map(str, ranks))}",
            reference="torch",
        )
    finally:
        runner.close()


def verify_bundle(bundle: Bundle, model: str | Path, examples: Data | None = None) -> list[Verification]:
    """Compares a bundle's model.onnx with the model folder it was made from, decoders step by step too.

    Whole passes are compared on `examples` where they are given, else on random tokens, which are harder for 8 and 4
    bits than what a model was calibrated on.

    Raises `ExportMismatch`: the bundle was made from another model, or computes something else.
    """
    manifest = bundle.manifest
    module = merged_module(model)
    exported = Exported(
        bundle.model_path,
        manifest.inputs,
        manifest.outputs,
        manifest.task,
        manifest.precision,
        manifest.opset,
        manifest.max_tokens,
        manifest.pad_token_id,
    )
    adapter = bundled_adapter(bundle.folder, manifest)
    if task_of(module) != manifest.task or module.config.vocab_size != manifest.inputs[0].limit:
        raise ExportMismatch(f"{model} is another kind of model than the one in {bundle.folder}.")
    # Where some rows may differ, a few are too few to tell how many do.
    shapes = ((64, 16), (64, 33)) if manifest.quantization is not None else SHAPES
    batches = _examples_of(bundle, examples).measured[:8] if examples is not None else ()
    inputs = [batch.inputs(manifest.inputs, adapter) for batch in batches] or None
    found = [verify_onnx(exported, module, inputs=inputs, shapes=shapes, adapter=adapter)]
    if manifest.cache_verification is not None and manifest.quantization is None:
        found.append(verify_cache(exported, module, adapter=adapter))
    return found


def measure_bundle(bundle: Bundle, model: str | Path, examples: Data) -> Accuracy:
    """Accuracy of the model folder in torch and of the bundle on ONNX Runtime, on the user's examples."""
    manifest, module = bundle.manifest, merged_module(model)
    data = _examples_of(bundle, examples)
    runner = OnnxRuntimeRunner(bundle.model_path)
    try:
        return measure(
            data,
            manifest.task,
            lambda batch: run_torch(module, batch, manifest.inputs),
            runner.run,
            inputs=manifest.inputs,
            adapter=bundled_adapter(bundle.folder, manifest),
        )
    finally:
        runner.close()


def _examples_of(bundle: Bundle, examples: Data) -> UserData:
    manifest = bundle.manifest
    return read_data(
        examples,
        bundle.folder,
        task=manifest.task,
        num_labels=max(2, len(manifest.labels)),
        inputs=manifest.inputs,
        max_tokens=manifest.max_tokens,
        pad_token_id=manifest.pad_token_id,
        calibrate=False,
    )


class _StepByStep:
    """Computes all positions' logits by a prompt and single steps."""

    def __init__(self, runner: OnnxRuntimeRunner, tensors: Sequence[TensorInfo], prompt: int) -> None:
        self._runner, self._prompt = runner, prompt
        self._adapter = [tensor.name for tensor in tensors if tensor.kind == "adapter"]

    def run(self, inputs: Inputs) -> Inputs:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        adapter = {name: inputs[name] for name in self._adapter}
        found, state, start = [], None, 0
        for end in (*range(self._prompt, ids.shape[1]), ids.shape[1]):
            step = {"input_ids": np.ascontiguousarray(ids[:, start:end]), "attention_mask": mask[:, :end].copy()}
            logits, state = self._runner.step(step | adapter, state)
            found.append(logits)
            start = end
        return {"logits": np.concatenate(found, axis=1)}


def run_torch(module: nn.Module, inputs: Inputs, tensors: Sequence[TensorInfo], *, as_exported: bool = False) -> Inputs:
    """Logits of a task model for the inputs that are tokens; `as_exported` leaves out what its graph leaves out."""
    import torch

    from fedspine_edge.export.tracing import reading

    device = next(module.parameters()).device
    given: dict[str, Any] = {
        tensor.name: torch.from_numpy(inputs[tensor.name]).to(device) for tensor in tensors if tensor.kind == "tokens"
    }
    if task_of(module) == "causal_lm":
        # As transformers' own generate counts them: GPT-2 alone would number padding on the left as well.
        positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        given |= {"use_cache": False, "position_ids": positions}
    with torch.inference_mode(), reading(module, given) if as_exported else contextlib.nullcontext():
        result = module(**given)
    return {"logits": result.logits.float().cpu().numpy()}

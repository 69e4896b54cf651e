"""Compares an exported file with torch: full passes, and decoders step by step on their KV cache."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import AdapterSpec, Bundle, TensorInfo
from fedspine_edge.bundle.metrics import Accuracy, Verification
from fedspine_edge.data.loading import Data
from fedspine_edge.errors import ExportMismatch
from fedspine_edge.export.calibration import UserData, measure_accuracy, read_user_data
from fedspine_edge.export.divergence import first_divergent_layer
from fedspine_edge.export.onnx_export import ExportedModel, merged_module
from fedspine_edge.export.tracing import RuntimeLora, get_attribute, pooled_token_only
from fedspine_edge.model.architecture import task_of
from fedspine_edge.runtime.adapters import bundled_adapter
from fedspine_edge.runtime.comparison import (
    NOISE_FACTOR,
    TOLERANCE,
    Inputs,
    PreciseReference,
    compare,
    logits_of,
    random_inputs,
)
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner

SHAPES: tuple[tuple[int, int], ...] = ((1, 1), (1, 7), (2, 16), (3, 33))
"""Default (batch, tokens) of the random inputs. Lengths above the model's limit are reduced to it."""


def verify_onnx(
    exported: ExportedModel,
    module: nn.Module,
    *,
    inputs: Sequence[Inputs] | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    adapter: Mapping[str, Array] | None = None,
    seed: int = 0,
    accept_mismatch: bool = False,
) -> Verification:
    """Compare an exported file on ONNX Runtime with its module in torch.

    Args:
        exported: Result of `export_onnx`.
        module: The float32 transformers module that was exported, in eval mode.
        inputs: Inputs to compare on (default: random inputs with padding).
        shapes: (batch, tokens) of the random inputs.
        adapter: Values of the adapter's inputs, if the file has them.
        seed: Seed of the random inputs.
        accept_mismatch: Whether to record a mismatch instead of raising it.

    Raises `ExportMismatch`, which names the worst output, its difference, and the first layer that differs.
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
            precise=_precise_reference(module, exported),
            accept_mismatch=accept_mismatch,
        )
    except ExportMismatch as error:
        where = _describe_divergence(exported, module, inputs)
        raise ExportMismatch(f"{error.message} {where}", remedy=error.remedy) from error
    finally:
        runner.close()


def _describe_divergence(exported: ExportedModel, module: nn.Module, inputs: Sequence[Inputs]) -> str:
    """Return a sentence that names the first layer whose output differs on any of the inputs."""
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
    return "Every layer matches on its own; the difference is in how the outputs are assembled."


def verify_cache(
    exported: ExportedModel,
    module: nn.Module,
    *,
    prompt: int = 5,
    steps: int = 6,
    adapter: Mapping[str, Array] | None = None,
    seed: int = 1,
    accept_mismatch: bool = False,
) -> Verification:
    """Compare a decoder that runs as in generation, a prompt and then single tokens on its cache, with torch.

    The logits of every step are compared with torch's full pass over all tokens, which uses no cache: first for a
    single row, then for three rows with padding on the right, and then on the left.

    Args:
        exported: Result of `export_onnx`.
        module: The float32 transformers module that was exported, in eval mode.
        prompt: Number of tokens in the prompt.
        steps: Number of single tokens after the prompt.
        adapter: Values of the adapter's inputs, if the file has them.
        seed: Seed of the random tokens.
        accept_mismatch: Whether to record a mismatch instead of raising it.

    Raises `ExportMismatch`.
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
            precise=_precise_reference(module, exported),
            accept_mismatch=accept_mismatch,
        )
    finally:
        runner.close()


def _precise_reference(module: nn.Module, exported: ExportedModel) -> PreciseReference | None:
    """Return the measurement of a model's own rounding error in the precision of its export.

    For float32 this is the difference between torch in float32 and in float64, which then is the reference. For 16 bits
    it is derived from the error of torch in that type, of which twice the amount is accepted.
    """
    dtypes = {"fp32": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
    if exported.precision not in dtypes:
        return None
    dtype = dtypes[exported.precision]

    @functools.cache
    def converted() -> nn.Module:
        return copy.deepcopy(module).to(dtype)

    def measure(inputs: Inputs, expected: Inputs) -> tuple[Inputs, float]:
        try:
            outputs = run_torch(converted(), inputs, exported.inputs)
        except RuntimeError:  # the CPU lacks an operator in this type, or the memory for the copy
            return expected, 0.0
        counted = inputs["attention_mask"] > 0 if outputs["logits"].ndim == 3 else slice(None)
        error = float(np.abs(outputs["logits"][counted] - expected["logits"][counted]).max())
        if not np.isfinite(error):
            return expected, 0.0
        return (outputs, error) if dtype is torch.float64 else (expected, 2 * error / NOISE_FACTOR)

    return measure


def verify_adapters(
    exported: ExportedModel,
    module: nn.Module,
    adapter: AdapterSpec,
    *,
    ranks: Sequence[int] = (0, 1, 64),
    seed: int = 2,
) -> Verification:
    """Compare random adapters of several ranks in the exported file with the same adapters in torch.

    Args:
        exported: Result of `export_onnx`.
        module: Result of `with_runtime_lora`, whose linears take the factors that are inputs of the file.
        adapter: Description of the adapters.
        ranks: Ranks to compare.
        seed: Seed of the random adapters and tokens.

    Raises `ExportMismatch`.
    """
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
    """Compare a bundle's model.onnx with the model folder that it was made from; decoders also step by step.

    Full passes are compared on `examples` if they are given, or else on random tokens. Random tokens are harder for 8
    and 4 bits than the examples that a model was calibrated on.

    Raises `ExportMismatch` if the bundle was made from another model or computes different outputs.
    """
    manifest = bundle.manifest
    module = merged_module(model)
    exported = ExportedModel.from_bundle(bundle)
    adapter = bundled_adapter(bundle.folder, manifest)
    if task_of(module) != manifest.task or module.config.vocab_size != manifest.inputs[0].limit:
        raise ExportMismatch(
            f"{model} has another task or vocabulary than the model in {bundle.folder}.",
            remedy="Give the model folder that the bundle was made from.",
        )
    # Quantized models may differ in some rows, and a few rows are not enough to measure how many.
    shapes = ((64, 16), (64, 33)) if manifest.quantization is not None else SHAPES
    batches = _read_examples(bundle, examples).measured[:8] if examples is not None else ()
    inputs = [batch.inputs(manifest.inputs, adapter) for batch in batches] or None
    results = [verify_onnx(exported, module, inputs=inputs, shapes=shapes, adapter=adapter)]
    if manifest.cache_verification is not None and manifest.quantization is None:
        results.append(verify_cache(exported, module, adapter=adapter))
    return results


def measure_bundle(bundle: Bundle, model: str | Path, examples: Data) -> Accuracy:
    """Return the accuracy of the model folder in torch and of the bundle on ONNX Runtime, on the user's examples."""
    manifest, module = bundle.manifest, merged_module(model)
    data = _read_examples(bundle, examples)
    runner = OnnxRuntimeRunner(bundle.model_path)
    try:
        return measure_accuracy(
            data,
            manifest.task,
            lambda batch: run_torch(module, batch, manifest.inputs),
            runner.run,
            inputs=manifest.inputs,
            adapter=bundled_adapter(bundle.folder, manifest),
        )
    finally:
        runner.close()


def _read_examples(bundle: Bundle, examples: Data) -> UserData:
    return read_user_data(examples, bundle.folder, bundle.manifest, calibrate=False)


class _StepByStep:
    """Computes the logits of all positions with a pass over the prompt and single steps."""

    def __init__(self, runner: OnnxRuntimeRunner, tensors: Sequence[TensorInfo], prompt: int) -> None:
        self._runner, self._prompt = runner, prompt
        self._adapter = [tensor.name for tensor in tensors if tensor.kind == "adapter"]

    def run(self, inputs: Inputs) -> Inputs:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        adapter = {name: inputs[name] for name in self._adapter}
        logits, state, start = [], None, 0
        for end in (*range(self._prompt, ids.shape[1]), ids.shape[1]):
            step = {"input_ids": np.ascontiguousarray(ids[:, start:end]), "attention_mask": mask[:, :end].copy()}
            step_logits, state = self._runner.step(step | adapter, state)
            logits.append(step_logits)
            start = end
        return {"logits": np.concatenate(logits, axis=1)}


def run_torch(module: nn.Module, inputs: Inputs, tensors: Sequence[TensorInfo], *, as_exported: bool = False) -> Inputs:
    """Return the logits of a task model.

    Args:
        module: A transformers task model.
        inputs: Inputs; only tokens are used.
        tensors: Descriptions of the inputs.
        as_exported: Whether to skip the computations that the ONNX graph of a classifier skips.
    """
    device = next(module.parameters()).device
    tokens: dict[str, Any] = {
        tensor.name: torch.from_numpy(inputs[tensor.name]).to(device) for tensor in tensors if tensor.kind == "tokens"
    }
    if task_of(module) == "causal_lm":
        # Positions as in transformers' generate. By default, GPT-2 would also count padding on the left.
        positions = (tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        tokens |= {"use_cache": False, "position_ids": positions}
    with torch.inference_mode(), pooled_token_only(module, tokens) if as_exported else contextlib.nullcontext():
        result = module(**tokens)
    return {"logits": result.logits.float().cpu().numpy()}

"""A model folder becomes what a bundle holds but its engine: exported, compared with torch, quantised, measured."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspine_edge.bundle.bundle import ADAPTER, MODEL, BundleManifest, LayerWidths, Precision, producer_versions
from fedspine_edge.bundle.metrics import Accuracy, Quantization, Verification
from fedspine_edge.config import DataSettings
from fedspine_edge.data.loading import Data, read_examples
from fedspine_edge.engine.tensorrt_api import opset_for
from fedspine_edge.errors import ConfigError
from fedspine_edge.export.calibration import UserData, measure, profile_of, read_data, require_tokenizer
from fedspine_edge.export.onnx_export import Exported, export_onnx, load_folder, merged_module, quantized
from fedspine_edge.export.quantization import QUANTIZED
from fedspine_edge.export.verification import run_torch, verify_adapters, verify_cache, verify_onnx
from fedspine_edge.files import TOKENIZER, TOKENIZER_FILES
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner

if TYPE_CHECKING:
    from torch import nn

    from fedspine_edge.model.prunable import PrunableModel

ProgressCallback = Callable[[str], None]
Arrays = Mapping[str, Any]


def export_model_to_bundle(
    folder: Path,
    draft: Path,
    *,
    precision: Precision,
    opset: int | None,
    runtime_adapter: bool,
    labels: Sequence[str] | None,
    examples: Data | None,
    report: ProgressCallback,
) -> BundleManifest:
    """Writes model.onnx, the tokenizer and the adapter into `draft` and describes them.

    Args:
        folder: What `save` or `save_pretrained` wrote.
        draft: An empty folder.
        precision: Of the model; int8 and fp8 need `examples`.
        opset: None takes the one that suits the precision and every TensorRT that can read it.
        runtime_adapter: Keep the adapter apart, as inputs of the model.
        labels: Class names; None takes the model's.
        examples: The user's own, to calibrate and measure on and to size profiles by.
        report: Called with a line per step.
    """
    if precision in ("int8", "fp8") and examples is None:
        raise ConfigError(
            f"{precision} needs examples to take the ranges of activations from.",
            remedy="Give examples of your own with `calibrate`, a hundred rows or more.",
        )
    report(f"loading {folder}")
    model = load_folder(folder)
    names = _label_names(model, labels)
    module = merged_module(model)
    _copy_tokenizer(folder, draft)
    if examples is not None:  # an export takes minutes: what is wrong with the user's data is said before it
        examples = read_examples(examples, DataSettings(path="", num_labels=max(2, model.num_labels)), model.task)
        require_tokenizer(draft)
    opset = opset if opset is not None else opset_for(precision)
    adapter, values, runtime = None, None, module
    if runtime_adapter:
        from safetensors.torch import save_file

        from fedspine_edge.export.tracing import with_runtime_lora

        runtime, adapter, factors = with_runtime_lora(model)
        save_file(factors, draft / ADAPTER)
        values = {name: tensor.numpy() for name, tensor in factors.items()}

    coarse = precision in QUANTIZED
    with tempfile.TemporaryDirectory(prefix="fedspine-draft-") as scratch:
        first = "fp32" if coarse else precision
        path = Path(scratch) / MODEL if coarse else draft / MODEL
        report(f"exporting to ONNX ({first}, opset {min(opset, 20)})")
        exported = export_onnx(runtime, path, opset=min(opset, 20), precision=first, adapter=adapter)
        data = None
        if examples is not None:
            data = _read(examples, draft, exported, model)
            report(f"read {len(data.lengths)} examples of {data.lengths[0]} to {data.lengths[-1]} tokens")
        report("comparing ONNX Runtime with torch")
        verification = verify_onnx(exported, module, adapter=values)
        report(f"whole passes: {verification.summary}")
        steps = None
        if exported.task == "causal_lm" and exported.max_tokens >= 11:
            steps = verify_cache(exported, module, adapter=values)
            report(f"token by token: {steps.summary}")
        if adapter is not None:
            report(f"other adapters: {verify_adapters(exported, runtime, adapter).summary}")
        quantization = None
        if coarse:
            exported, quantization, verification = _quantize(
                exported, draft / MODEL, precision, module, data, values, report
            )
    accuracy = _measure(exported, module, data, values, report) if data is not None else None
    return BundleManifest(
        producer=producer_versions("torch", "transformers", "onnx", "onnxruntime"),
        task=exported.task,
        family=model.spec.family,
        precision=precision,
        opset=exported.opset,
        inputs=exported.inputs,
        outputs=exported.outputs,
        max_tokens=exported.max_tokens,
        pad_token_id=exported.pad_token_id,
        labels=names,
        end_token_ids=_end_tokens(module),
        adapter=adapter,
        widths=tuple(LayerWidths(heads=heads, channels=channels) for heads, channels in model.layout.counts),
        sparsity=model.layout.sparsity,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        verification=verification,
        cache_verification=steps,
        quantization=quantization,
        accuracy=accuracy,
        default_profile=profile_of(data.lengths, exported.max_tokens) if data is not None else None,
    )


def _read(examples: Data, draft: Path, exported: Exported, model: PrunableModel) -> UserData:
    return read_data(
        examples,
        draft,
        task=exported.task,
        num_labels=max(2, model.num_labels),
        inputs=exported.inputs,
        max_tokens=exported.max_tokens,
        pad_token_id=exported.pad_token_id,
    )


def _quantize(
    exported: Exported,
    path: Path,
    precision: Precision,
    module: nn.Module,
    data: UserData | None,
    adapter: Arrays | None,
    report: ProgressCallback,
) -> tuple[Exported, Quantization, Verification]:
    """The verified float32 file with narrower linears, compared with torch again, on the user's examples if given."""
    batches = [batch.inputs(exported.inputs, adapter) for batch in data.calibration] if data is not None else []
    report(f"quantising to {precision}" + (f", calibrating on {_count(data.calibration)} examples" if data else ""))
    finished, quantization = quantized(exported, path, precision, module, batches)
    left_out = f", {quantization.left_out} left in float16" if quantization.left_out else ""
    report(f"{quantization.linears} linears in {precision} by {quantization.tool}{left_out}")
    inputs = [batch.inputs(finished.inputs, adapter) for batch in data.measured[:8]] if data is not None else None
    verification = verify_onnx(finished, module, inputs=inputs, adapter=adapter)
    report(f"whole passes: {verification.summary}")
    return finished, quantization, verification


def _measure(
    exported: Exported, module: nn.Module, data: UserData, adapter: Arrays | None, report: ProgressCallback
) -> Accuracy:
    report(f"measuring on {_count(data.measured)} examples")
    runner = OnnxRuntimeRunner(exported.path)
    try:
        accuracy = measure(
            data,
            exported.task,
            lambda batch: run_torch(module, batch, exported.inputs),
            runner.run,
            inputs=exported.inputs,
            adapter=adapter,
        )
    finally:
        runner.close()
    report(accuracy.summary)
    return accuracy


def _count(batches: Sequence[Any]) -> int:
    return sum(len(batch.labels) for batch in batches)


def _end_tokens(module: nn.Module) -> tuple[int, ...]:
    """What the generation settings, else the config, call the end of a text."""
    for source in (getattr(module, "generation_config", None), module.config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(int(token) for token in (found if isinstance(found, (list, tuple)) else (found,)))
    return ()


def _label_names(model: PrunableModel, labels: Sequence[str] | None) -> tuple[str, ...]:
    if model.task == "causal_lm":
        if labels is not None:
            raise ConfigError("labels were given for a causal language model, which has none.")
        return ()
    if labels is None:
        own = model.module.config.id2label
        return tuple(str(own[index]) for index in range(model.num_labels))
    if len(labels) != model.num_labels:
        raise ConfigError(f"{len(labels)} labels were given for a model with {model.num_labels} classes.")
    return tuple(labels)


def _copy_tokenizer(folder: Path, draft: Path) -> None:
    """The tokenizer's files. The runtime reads tokenizer.json alone, so that becomes what transformers trained with."""
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in present:
        shutil.copyfile(folder / name, draft / name)
    if present:  # transformers lets tokenizer_config.json overrule it, in how a text begins (add_prefix_space) for one
        from fedspine_edge.model.loading import load_tokenizer

        load_tokenizer(folder, padding=False).backend_tokenizer.save(str(draft / TOKENIZER))

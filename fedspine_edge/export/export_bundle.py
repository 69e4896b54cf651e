"""Exports a model folder to a bundle without an engine: ONNX export, comparison with torch, quantization, accuracy."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from fedspine_edge.bundle.bundle import (
    ADAPTER,
    MODEL,
    AdapterSpec,
    BundleManifest,
    LayerWidths,
    Precision,
    producer_versions,
)
from fedspine_edge.bundle.metrics import Accuracy, Quantization, Verification
from fedspine_edge.config import DataSettings
from fedspine_edge.data.loading import Data, names_for_data, read_examples
from fedspine_edge.engine.tensorrt_api import opset_for
from fedspine_edge.errors import ConfigError
from fedspine_edge.export.calibration import (
    Batch,
    UserData,
    measure_accuracy,
    profile_for_lengths,
    read_user_data,
    require_tokenizer,
)
from fedspine_edge.export.onnx_export import ExportedModel, export_onnx, load_folder, merged_module, quantize_export
from fedspine_edge.export.options import ExportOptions, ProgressCallback
from fedspine_edge.export.quantization import QUANTIZED
from fedspine_edge.export.tracing import with_runtime_lora
from fedspine_edge.export.verification import run_torch, verify_adapters, verify_cache, verify_onnx
from fedspine_edge.files import TOKENIZER, TOKENIZER_FILES
from fedspine_edge.model.loading import load_tokenizer
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.runtime.onnxruntime_runner import OnnxRuntimeRunner


def export_model_to_bundle(
    source: Path, folder: Path, options: ExportOptions, report: ProgressCallback
) -> BundleManifest:
    """Write model.onnx, the tokenizer and the adapter of a model to `folder`, and return the manifest.

    Args:
        source: Folder that `save` or `save_pretrained` wrote.
        folder: Empty folder.
        options: Settings of the export.
        report: Called with one line per step.
    """
    precision = options.precision or "fp32"
    if precision in ("int8", "fp8") and options.calibrate is None:
        raise ConfigError(
            f"The precision {precision} needs examples to determine the ranges of activations.",
            remedy="Give a hundred or more of your own examples with `calibrate`.",
        )
    report(f"loading {source}")
    model = load_folder(source)
    labels = _label_names(model, options.labels)
    module = merged_module(model)
    _copy_tokenizer(source, folder)
    examples = options.calibrate
    if examples is not None:  # report errors in the user's data before the export, which takes minutes
        examples = read_examples(
            examples,
            DataSettings(path="", num_labels=max(2, model.num_labels), labels=names_for_data(labels)),
            model.task,
        )
        require_tokenizer(folder)
    export = _Export(model, module, folder, report, accept_mismatch=options.accept_mismatch)
    if options.lora == "inputs":
        export.separate_adapter()
    data = export.run(precision, options.opset, examples)
    accuracy = export.measure(data) if data is not None else None
    exported = export.exported
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
        labels=labels,
        end_token_ids=_end_tokens(module),
        adapter=export.adapter,
        widths=tuple(LayerWidths(heads=heads, channels=channels) for heads, channels in model.layout.counts),
        sparsity=model.layout.sparsity,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        verification=export.verification,
        cache_verification=export.cache_verification,
        quantization=export.quantization,
        accuracy=accuracy,
        default_profile=profile_for_lengths(data.lengths, exported.max_tokens) if data is not None else None,
    )


class _Export:
    """One export of a model: writes the ONNX file and collects the measurements for the manifest."""

    exported: ExportedModel
    verification: Verification

    def __init__(
        self,
        model: PrunableModel,
        module: nn.Module,
        folder: Path,
        report: ProgressCallback,
        *,
        accept_mismatch: bool = False,
    ) -> None:
        self._model, self._module, self._folder, self._report = model, module, folder, report
        self._traced, self._accept_mismatch = module, accept_mismatch
        self._adapter_values: dict[str, Any] | None = None
        self.adapter: AdapterSpec | None = None
        self.cache_verification: Verification | None = None
        self.quantization: Quantization | None = None

    def separate_adapter(self) -> None:
        """Make the adapter an input of the ONNX model, and write its values to the bundle."""
        self._traced, self.adapter, factors = with_runtime_lora(self._model)
        save_file(factors, self._folder / ADAPTER)
        self._adapter_values = {name: tensor.numpy() for name, tensor in factors.items()}

    def run(self, precision: Precision, opset: int | None, examples: Data | None) -> UserData | None:
        """Export, compare with torch and quantize. Return the user's examples as inputs of the model."""
        opset = opset if opset is not None else opset_for(precision)
        is_quantized = precision in QUANTIZED
        with tempfile.TemporaryDirectory(prefix="fedspine-export-") as scratch:
            export_precision: Precision = "fp32" if is_quantized else precision
            path = Path(scratch) / MODEL if is_quantized else self._folder / MODEL
            self._report(f"exporting to ONNX ({export_precision}, opset {min(opset, 20)})")
            self.exported = export_onnx(
                self._traced,
                path,
                opset=min(opset, 20),
                precision=export_precision,
                adapter=self.adapter,
                layout=self._model.layout,
            )
            data = None
            if examples is not None:
                data = read_user_data(examples, self._folder, self.exported)
                self._report(f"read {len(data.lengths)} examples of {data.lengths[0]} to {data.lengths[-1]} tokens")
            self._verify()
            if is_quantized:
                self._quantize(precision, data)
        return data

    def _verify(self) -> None:
        self._report("comparing ONNX Runtime with torch")
        self.verification = verify_onnx(
            self.exported, self._module, adapter=self._adapter_values, accept_mismatch=self._accept_mismatch
        )
        self._report(f"full passes: {self.verification.summary}")
        if self.exported.task == "causal_lm" and self.exported.max_tokens >= 11:
            self.cache_verification = verify_cache(
                self.exported, self._module, adapter=self._adapter_values, accept_mismatch=self._accept_mismatch
            )
            self._report(f"token by token: {self.cache_verification.summary}")
        if self.adapter is not None:
            self._report(f"other adapters: {verify_adapters(self.exported, self._traced, self.adapter).summary}")

    def _quantize(self, precision: Precision, data: UserData | None) -> None:
        """Quantize the verified float32 file and compare it with torch again, on the user's examples if given."""
        calibration, inputs = [], None
        if data is not None:
            calibration = [batch.inputs(self.exported.inputs, self._adapter_values) for batch in data.calibration]
        calibrated_on = f", calibrating on {_count(data.calibration)} examples" if data is not None else ""
        self._report(f"quantizing to {precision}{calibrated_on}")
        self.exported, quantization = quantize_export(
            self.exported, self._folder / MODEL, precision, self._module, calibration
        )
        self.quantization = quantization
        left_out = f", {quantization.left_out} left in float16" if quantization.left_out else ""
        self._report(f"{quantization.linears} linears in {precision} by {quantization.tool}{left_out}")
        if data is not None:
            inputs = [batch.inputs(self.exported.inputs, self._adapter_values) for batch in data.measured[:8]]
        self.verification = verify_onnx(
            self.exported,
            self._module,
            inputs=inputs,
            adapter=self._adapter_values,
            accept_mismatch=self._accept_mismatch,
        )
        self._report(f"full passes: {self.verification.summary}")

    def measure(self, data: UserData) -> Accuracy:
        """Measure the accuracy of the torch model and of the exported file on the user's examples."""
        self._report(f"measuring accuracy on {_count(data.measured)} examples")
        runner = OnnxRuntimeRunner(self.exported.path)
        try:
            accuracy = measure_accuracy(
                data,
                self.exported.task,
                lambda batch: run_torch(self._module, batch, self.exported.inputs),
                runner.run,
                inputs=self.exported.inputs,
                adapter=self._adapter_values,
            )
        finally:
            runner.close()
        self._report(accuracy.summary)
        return accuracy


def _count(batches: Sequence[Batch]) -> int:
    return sum(len(batch.labels) for batch in batches)


def _end_tokens(module: nn.Module) -> tuple[int, ...]:
    """Return the end-of-sequence tokens of the generation config, or else of the model config."""
    for source in (getattr(module, "generation_config", None), module.config):
        tokens = getattr(source, "eos_token_id", None)
        if tokens is not None:
            return tuple(int(token) for token in (tokens if isinstance(tokens, (list, tuple)) else (tokens,)))
    return ()


def _label_names(model: PrunableModel, labels: Sequence[str] | None) -> tuple[str, ...]:
    if model.task == "causal_lm":
        if labels is not None:
            raise ConfigError("`labels` were given, but a causal language model has none.", remedy="Omit them.")
        return ()
    if labels is None:
        id2label = model.module.config.id2label
        return tuple(str(id2label[index]) for index in range(model.num_labels))
    if len(labels) != model.num_labels:
        raise ConfigError(
            f"{len(labels)} labels were given for a model with {model.num_labels} classes.",
            remedy="Give one label per class, in the order of the logits.",
        )
    return tuple(labels)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files. tokenizer.json is rewritten so that it matches the tokenizer used for training."""
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in present:
        shutil.copyfile(source / name, folder / name)
    if present:
        # The runtime reads only tokenizer.json, but transformers lets tokenizer_config.json override parts of it, such
        # as add_prefix_space.
        load_tokenizer(source, padding=False).backend_tokenizer.save(str(folder / TOKENIZER))

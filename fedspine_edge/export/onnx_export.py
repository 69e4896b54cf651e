"""Exports a model from torch to ONNX, with dynamic batch and sequence axes, for TensorRT 10.3 and all later releases.

Attention and norms consist of basic operators, because the parser of TensorRT 10.3 does not support the fused operators
of opset 23. Widths can differ from layer to layer. Classifiers return (batch, labels), token classifiers (batch,
sequence, labels), and causal models (batch, sequence, vocabulary) and their KV cache; `export.tracing` describes all
inputs and outputs. docs/decisions/0060-torchscript-exporter.md explains the choice of the exporter.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from fedspine_edge.bundle.bundle import AdapterSpec, Bundle, Precision, TensorInfo
from fedspine_edge.bundle.metrics import Quantization
from fedspine_edge.config import Task
from fedspine_edge.errors import CheckpointError, ConfigError, DeployError, MissingDependency
from fedspine_edge.export.mixed_precision import convert_to_16bit
from fedspine_edge.export.quantization import quantize
from fedspine_edge.export.tracing import TaskGraph, task_graph
from fedspine_edge.files import LAYOUT
from fedspine_edge.model.architecture import CAUSAL_CLASSES, task_of
from fedspine_edge.model.checkpoint import load_model
from fedspine_edge.model.families import architecture_of, max_tokens_of
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.loading import LOAD_FAILURES, load_base, require_transformers
from fedspine_edge.model.prunable import PrunableModel, layout_of

OPSETS = range(17, 21)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
"""Precisions of `export_onnx`. `quantize_export` produces the others from a float32 file."""
MAX_INLINE_BYTES = 1_500_000_000
"""Weights above this size go to a separate file, because protobuf files are limited to 2 GiB."""

_FUSED_OPS = frozenset({"Attention", "RotaryEmbedding", "RMSNormalization", "GroupQueryAttention"})


@dataclass(frozen=True)
class ExportedModel:
    """An exported ONNX file with the description of its inputs and outputs."""

    path: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    task: Task
    precision: Precision
    opset: int
    max_tokens: int
    pad_token_id: int
    num_labels: int

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> ExportedModel:
        """Return the description of a bundle's model.onnx."""
        manifest = bundle.manifest
        return cls(
            path=bundle.model_path,
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            task=manifest.task,
            precision=manifest.precision,
            opset=manifest.opset,
            max_tokens=manifest.max_tokens,
            pad_token_id=manifest.pad_token_id,
            num_labels=manifest.num_labels,
        )


def export_onnx(
    model: PrunableModel | nn.Module | str | Path,
    path: str | Path,
    *,
    opset: int = 17,
    precision: Precision = "fp32",
    adapter: AdapterSpec | None = None,
    layout: Layout | None = None,
) -> ExportedModel:
    """Write a model as an ONNX file.

    Args:
        model: A folder that `PrunableModel.save` or `save_pretrained` wrote, a `PrunableModel` (its adapters are merged
            in a copy), or a transformers task model.
        path: File to write. Weights above 1.5 GB are written beside it.
        opset: ONNX opset, 17 to 20.
        precision: "fp32", "fp16" or "bf16". The latter two halve the weights and keep norms, softmax and logits in
            float32.
        adapter: Description of the adapters that become inputs; `model` is then the result of
            `tracing.with_runtime_lora`.
        layout: Kept heads of a pruned transformers module. By default it is the layout of the `PrunableModel`, or the
            widths in the config of any other model.

    Raises:
        ConfigError: The opset or the precision is not supported.
        DeployError: The model cannot be traced, or contains an operator that TensorRT 10.3 cannot parse.
    """
    if opset not in OPSETS:
        raise ConfigError(f"`opset` is {opset}; it must be {OPSETS[0]} to {OPSETS[-1]}.", remedy="Leave it at 17.")
    if precision not in PRECISIONS:
        raise ConfigError(f"`precision` is {precision!r}.", remedy=f"Choose one of: {', '.join(PRECISIONS)}")
    onnx = _import_onnx()
    if isinstance(model, (str, Path)):
        model = load_folder(Path(model))
    module = merged_module(model) if adapter is None else model
    if not isinstance(module, nn.Module):
        raise ConfigError("`adapter` requires the module that with_runtime_lora returned.")
    if layout is None and task_of(module) == "causal_lm":
        layout = layout_of(model)
    path = Path(path)
    graph = task_graph(module, layout, adapter)
    with tempfile.TemporaryDirectory(prefix="fedspine-export-") as scratch:
        raw = Path(scratch) / "raw.onnx"
        _trace(module, graph, raw, opset)
        proto = onnx.load(raw)
    _normalize_names(proto.graph, _transposed_names(module))
    _check_operators(proto.graph)
    exported = ExportedModel(
        path=path,
        inputs=graph.inputs,
        outputs=graph.outputs,
        task=graph.task,
        precision="fp32",
        opset=opset,
        max_tokens=max_tokens_of(module.config),
        pad_token_id=int(module.config.pad_token_id or 0),
        num_labels=max(2, 0 if graph.task == "causal_lm" else int(module.config.num_labels)),
    )
    return _convert_and_save(proto, exported, precision)


def quantize_export(
    exported: ExportedModel,
    path: Path,
    precision: Precision,
    module: nn.Module,
    calibration: Sequence[Mapping[str, Any]] = (),
) -> tuple[ExportedModel, Quantization]:
    """Write a float32 export with the linears of its layers in int8, fp8 or int4 and everything else in float16.

    Args:
        exported: Result of `export_onnx` for "fp32" and opset 19 or later.
        path: File to write.
        precision: Precision of the linears.
        module: Module that was exported, which determines the names of the layers.
        calibration: Inputs for the ranges of activations; int4 needs none.
    """
    onnx = _import_onnx()
    architecture = architecture_of(module.config)
    scope = "/model/" + f"{architecture.backbone}.{architecture.layers}.".replace(".", "/")[:-1] + "."
    with tempfile.TemporaryDirectory(prefix="fedspine-quantize-") as scratch:
        raw = Path(scratch) / "raw.onnx"
        quantization = quantize(exported.path, raw, precision, scope, [dict(batch) for batch in calibration])
        proto = onnx.load(raw)
    opset = int(proto.opset_import[0].version)
    finished = _convert_and_save(proto, dataclasses.replace(exported, path=path, opset=opset), "fp16")
    return dataclasses.replace(finished, precision=precision), quantization


def _convert_and_save(proto: Any, exported: ExportedModel, precision: Precision) -> ExportedModel:
    """Convert the graph to 16 bits if requested, and write it to `exported.path`."""
    if precision == "fp16" or precision == "bf16":
        convert_to_16bit(proto, precision)
    inputs, outputs = exported.inputs, exported.outputs
    if precision == "fp16":
        inputs, outputs = (tuple(map(_cache_in_float16, tensors)) for tensors in (inputs, outputs))
    _save(proto, exported.path)
    return dataclasses.replace(exported, precision=precision, inputs=inputs, outputs=outputs)


def _cache_in_float16(tensor: TensorInfo) -> TensorInfo:
    is_cache = tensor.name.startswith(("past_key_values.", "present."))
    return msgspec.structs.replace(tensor, dtype="float16") if is_cache else tensor


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency.of("onnx", extra="export", purpose="Exporting a model") from error
    return onnx


def merged_module(model: PrunableModel | nn.Module | str | Path) -> nn.Module:
    """Return the float32 transformers module to export, in eval mode and with merged adapters; `model` is unchanged."""
    if isinstance(model, (str, Path)):
        model = load_folder(Path(model))
    if isinstance(model, PrunableModel):
        return model.merge(torch.float32).float().eval()
    if model.training or any(p.dtype != torch.float32 for p in model.parameters()):
        return copy.deepcopy(model).float().eval()
    return model


def load_folder(folder: Path) -> PrunableModel:
    """Load a folder that this package saved (with layout.json), or one that `save_pretrained` wrote with a task head.

    Raises `DeployError` for a backbone without a task head, which would be random.
    """
    if not (folder / "config.json").is_file() or (folder / LAYOUT).is_file():
        return load_model(folder)  # reports missing files if there is no model at all
    transformers = require_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except LOAD_FAILURES as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    classes = " ".join(config.architectures or ())
    tasks: dict[str, Task] = {"ForSequence": "classification", "ForToken": "token_classification"}
    for prefix, task in tasks.items():
        if f"{prefix}Classification" in classes:
            labels = [str(config.id2label[index]) for index in range(config.num_labels)]
            return load_base(folder, task=task, num_labels=config.num_labels, labels=labels)
    if classes.endswith(CAUSAL_CLASSES):
        return load_base(folder, task="causal_lm")
    raise DeployError(
        f"{folder} contains {classes or 'a model without an architecture in its config'}, which has no trained task "
        "head.",
        remedy="Fine-tune it first, with fedspine-edge tune or EdgeTuner.",
    )


def _trace(module: nn.Module, graph: TaskGraph, path: Path, opset: int) -> None:
    """Export with torch's TorchScript exporter."""
    with _traceable(module), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns about branches that are for other cache states
        try:
            graph.module(*graph.example)
            torch.onnx.export(
                graph.module,
                graph.example,
                str(path),
                input_names=[tensor.name for tensor in graph.inputs],
                output_names=[tensor.name for tensor in graph.outputs],
                dynamic_axes=graph.dynamic_axes(),
                opset_version=opset,
                dynamo=False,
            )
        except OSError:  # raised for the output path
            raise
        except Exception as error:  # tracing runs the model's own code, which can raise anything
            raise DeployError(
                f"{type(module).__name__} could not be exported with torch {torch.__version__}: {error}",
                remedy="Check that the model runs in torch on a batch of two sequences with padding.",
            ) from error


@contextlib.contextmanager
def _traceable(module: nn.Module) -> Iterator[None]:
    """Select eager attention and disable the cache while tracing; all configs are restored afterwards."""
    configs = {id(c): c for c in (getattr(child, "config", None) for child in module.modules()) if c is not None}
    original = [(c, c._attn_implementation, getattr(c, "use_cache", None)) for c in configs.values()]
    try:
        for config, _, cache in original:
            config._attn_implementation = "eager"
            if cache is not None:
                config.use_cache = False
        yield
    finally:
        for config, attention, cache in original:
            config._attn_implementation = attention
            if cache is not None:
                config.use_cache = cache


def _transposed_names(module: nn.Module) -> dict[str, str]:
    """Return the names of transposed weights by content, because the exporter names them onnx::MatMul_123."""
    names: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            transposed = parameter.detach().cpu().numpy().T
            names.setdefault(_content_hash(transposed), f"{name.replace('.base.', '.')}.T")
    return names


def _content_hash(array: Any) -> str:
    array = np.ascontiguousarray(array)
    return hashlib.blake2b(array.data, digest_size=16, key=repr(array.shape).encode()).hexdigest()


def _normalize_names(graph: Any, transposed: dict[str, str]) -> None:
    """Name initializers as in the state dict, and remove Identity nodes around shared initializers."""
    from onnx import numpy_helper

    rename = {}
    for tensor in graph.initializer:
        name = tensor.name.removeprefix("model.").replace(".base.", ".")  # added by the wrappers used for tracing
        if tensor.name.startswith("onnx::"):
            name = transposed.pop(_content_hash(numpy_helper.to_array(tensor)), tensor.name)
        rename[tensor.name] = tensor.name = name
    initializers = set(rename.values())
    nodes = []
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = rename.get(name, name)
        if node.op_type == "Identity" and node.input[0] in initializers:
            rename[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _check_operators(graph: Any) -> None:
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type in _FUSED_OPS:
            raise DeployError(
                f"The export contains the operator {node.domain}{node.op_type}, which TensorRT 10.3 cannot parse.",
                remedy="Export with opset 17 and one of the supported model families.",
            )


def _save(proto: Any, path: Path) -> None:
    import onnx

    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if size > MAX_INLINE_BYTES:
        data = path.with_name(f"{path.name}.data")
        data.unlink(missing_ok=True)  # onnx appends to an existing file
        onnx.save(proto, path, save_as_external_data=True, location=data.name, all_tensors_to_one_file=True)
    else:
        onnx.save(proto, path)
    onnx.checker.check_model(str(path))

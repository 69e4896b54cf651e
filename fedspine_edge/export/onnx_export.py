"""torch → ONNX: one graph with dynamic batch and sequence that TensorRT 10.3 and every later release can parse.

Attention and norms are spelled out in basic operators (the fused ONNX operators of opset 23 have no parser in
10.3). Widths may differ by layer. Classification models give (batch, labels), token classification a row of them
per token, causal models (batch, sequence, vocabulary) and their KV cache; `export/tracing.py` lists inputs and outputs.
Why the TorchScript exporter: docs/decisions/0060-torchscript-exporter.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fedspine_edge.bundle.bundle import AdapterSpec, Precision, TensorInfo
from fedspine_edge.bundle.metrics import Quantization
from fedspine_edge.config import Task
from fedspine_edge.errors import CheckpointError, ConfigError, DeployError, MissingDependency

if TYPE_CHECKING:
    from torch import nn

    from fedspine_edge.export.tracing import Graph
    from fedspine_edge.model.prunable import PrunableModel

OPSETS = range(17, 21)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
"""What a model is exported in; narrower linears are put into a float32 file by `quantized`."""
MAX_INLINE_BYTES = 1_500_000_000
"""Above this, weights go to a second file: protobuf ends at 2 GiB."""

_FUSED_OPS = frozenset({"Attention", "RotaryEmbedding", "RMSNormalization", "GroupQueryAttention"})


@dataclass(frozen=True)
class Exported:
    """An exported file and what it computes."""

    path: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    task: Task
    precision: Precision
    opset: int
    max_tokens: int
    pad_token_id: int


def export_onnx(
    model: PrunableModel | nn.Module | str | Path,
    path: str | Path,
    *,
    opset: int = 17,
    precision: Precision = "fp32",
    adapter: AdapterSpec | None = None,
) -> Exported:
    """Writes a model as ONNX.

    Args:
        model: A folder that `PrunableModel.save` or `save_pretrained` wrote, a `PrunableModel` (its adapters are
            merged in a copy), or a transformers task model.
        path: The file to write; weights above 1.5 GB go beside it.
        opset: 17 to 20.
        precision: "fp16" and "bf16" halve the weights and keep norms, softmax and logits in float32.
        adapter: The adapters that become inputs; `model` is then what `graphs.with_runtime_lora` returned.

    Raises:
        ConfigError: An opset or precision outside the range.
        DeployError: The model could not be traced or holds an operator that TensorRT 10.3 cannot parse.
    """
    if opset not in OPSETS:
        raise ConfigError(f"opset is {opset}; it must be {OPSETS[0]} to {OPSETS[-1]}.", remedy="Leave it at 17.")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}.", remedy=f"Choose one of: {', '.join(PRECISIONS)}")
    onnx = _import_onnx()
    from fedspine_edge.export.tracing import task_graph
    from fedspine_edge.model.families import max_tokens_of

    module = merged_module(model) if adapter is None else _as_module(model)
    path = Path(path)
    max_tokens = max_tokens_of(module.config)
    graph = task_graph(module, max_tokens=max_tokens, adapter=adapter)
    with tempfile.TemporaryDirectory(prefix="fedspine-export-") as scratch:
        raw = Path(scratch) / "raw.onnx"
        _trace(module, graph, raw, opset)
        proto = onnx.load(raw)
    _tidy(proto.graph, _transposed_names(module))
    _check_operators(proto.graph)
    pad = module.config.pad_token_id or 0
    exported = Exported(path, graph.inputs, graph.outputs, graph.task, "fp32", opset, max_tokens, int(pad))
    return _finished(proto, exported, precision)


def quantized(
    exported: Exported,
    path: Path,
    precision: Precision,
    module: nn.Module,
    calibration: Sequence[Mapping[str, Any]] = (),
) -> tuple[Exported, Quantization]:
    """A float32 file with the linears of its layers in "int8", "fp8" or "int4", the rest in float16.

    Args:
        exported: What `export_onnx` returned for "fp32" and opset 19 or later.
        path: The file to write.
        precision: Of the linears.
        module: The module it was exported from, which knows where its layers are.
        calibration: Inputs to take activations' ranges from; int4 needs none.
    """
    from fedspine_edge.export.quantization import quantize
    from fedspine_edge.model.families import architecture_of

    onnx = _import_onnx()
    architecture = architecture_of(module.config)
    scope = "/model/" + f"{architecture.backbone}.{architecture.layers}.".replace(".", "/")[:-1] + "."
    with tempfile.TemporaryDirectory(prefix="fedspine-quantize-") as scratch:
        raw = Path(scratch) / "raw.onnx"
        quantization = quantize(exported.path, raw, precision, scope, [dict(batch) for batch in calibration])
        proto = onnx.load(raw)
    opset = int(proto.opset_import[0].version)
    finished = _finished(proto, dataclasses.replace(exported, path=path, opset=opset), "fp16")
    return dataclasses.replace(finished, precision=precision), quantization


def _finished(proto: Any, exported: Exported, precision: Precision) -> Exported:
    """Converts to 16 bits where asked, and saves."""
    if precision == "fp16" or precision == "bf16":
        from fedspine_edge.export.mixed_precision import convert_to_16bit

        convert_to_16bit(proto, precision)
    inputs, outputs = exported.inputs, exported.outputs
    if precision == "fp16":
        inputs, outputs = (tuple(_cache_in_half(tensor) for tensor in each) for each in (inputs, outputs))
    _save(proto, exported.path)
    return dataclasses.replace(exported, precision=precision, inputs=inputs, outputs=outputs)


def _cache_in_half(tensor: TensorInfo) -> TensorInfo:
    cached = tensor.name.startswith(("past_key_values.", "present."))
    return msgspec.structs.replace(tensor, dtype="float16") if cached else tensor


def _as_module(model: object) -> nn.Module:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ConfigError("adapter= goes with the module that with_runtime_lora returned.")
    return model


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency.of("onnx", extra="export", purpose="Exporting a model") from error
    return onnx


def merged_module(model: PrunableModel | nn.Module | str | Path) -> nn.Module:
    """The float32 transformers module to export: adapters folded in, eval mode. The given model is not changed."""
    import copy

    import torch

    from fedspine_edge.model.prunable import PrunableModel

    if isinstance(model, (str, Path)):
        model = load_folder(Path(model))
    module = model.merge(torch.float32) if isinstance(model, PrunableModel) else model
    if module.training or any(p.dtype != torch.float32 for p in module.parameters()):
        module = (module if isinstance(model, PrunableModel) else copy.deepcopy(module)).float().eval()
    return module


def load_folder(folder: Path) -> PrunableModel:
    """A folder of ours (with layout.json) or one that `save_pretrained` wrote with its task head.

    Raises `DeployError` for a bare backbone, whose task head would be random.
    """
    from fedspine_edge.files import LAYOUT
    from fedspine_edge.model.architecture import CAUSAL_CLASSES
    from fedspine_edge.model.checkpoint import load_model
    from fedspine_edge.model.loading import LOAD_FAILURES, load_base, require_transformers

    if not (folder / "config.json").is_file() or (folder / LAYOUT).is_file():
        return load_model(folder)  # also says what is missing where there is no model at all
    transformers = require_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except LOAD_FAILURES as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    kinds = " ".join(config.architectures or ())
    tasks: dict[str, Task] = {"ForSequence": "classification", "ForToken": "token_classification"}
    for kind, task in tasks.items():
        if f"{kind}Classification" in kinds:
            labels = [str(config.id2label[index]) for index in range(config.num_labels)]
            return load_base(folder, task=task, num_labels=config.num_labels, labels=labels)
    if kinds.endswith(CAUSAL_CLASSES):
        return load_base(folder, task="causal_lm")
    raise DeployError(
        f"{folder} holds {kinds or 'a model without a stated class'}, which has no trained task head.",
        remedy="Fine-tune it first, with fedspine-edge tune or EdgeTuner.",
    )


def _trace(module: nn.Module, graph: Graph, path: Path, opset: int) -> None:
    """Exports through TorchScript."""
    import torch

    with _traceable(module), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracer warnings about branches whose other arm is for caches
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
        except OSError:  # of the place that is written to
            raise
        except Exception as error:  # tracing runs the model's own code: anything can come out of it
            raise DeployError(
                f"{type(module).__name__} could not be exported with torch {torch.__version__}: {error}",
                remedy="Check that it runs in torch on a batch of two sequences with padding.",
            ) from error


@contextlib.contextmanager
def _traceable(module: nn.Module) -> Iterator[None]:
    """Eager attention and no cache while tracing; every config is put back as it was."""
    configs = {id(c): c for c in (getattr(child, "config", None) for child in module.modules()) if c is not None}
    before = [(c, c._attn_implementation, getattr(c, "use_cache", None)) for c in configs.values()]
    try:
        for config, _, cache in before:
            config._attn_implementation = "eager"
            if cache is not None:
                config.use_cache = False
        yield
    finally:
        for config, attention, cache in before:
            config._attn_implementation = attention
            if cache is not None:
                config.use_cache = cache


def _transposed_names(module: nn.Module) -> dict[str, str]:
    """Hash of a weight's transpose → its name. The exporter transposes weights and calls them onnx::MatMul_123."""
    names: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            transposed = parameter.detach().cpu().numpy().T
            names.setdefault(_content(transposed), f"{name.replace('.base.', '.')}.T")
    return names


def _content(array: Any) -> str:
    array = np.ascontiguousarray(array)
    return hashlib.blake2b(array.data, digest_size=16, key=repr(array.shape).encode()).hexdigest()


def _tidy(graph: Any, transposed: dict[str, str]) -> None:
    """Stable initialiser names (those of the state dict) and no Identity nodes around shared initialisers."""
    from onnx import numpy_helper

    rename = {}
    for tensor in graph.initializer:
        name = tensor.name.removeprefix("model.").replace(".base.", ".")  # what tracing wraps around the model
        if tensor.name.startswith("onnx::"):
            name = transposed.pop(_content(numpy_helper.to_array(tensor)), tensor.name)
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
                f"The export holds the operator {node.domain}{node.op_type}, which TensorRT 10.3 cannot parse.",
                remedy="Export with opset 17 and the supported model families.",
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

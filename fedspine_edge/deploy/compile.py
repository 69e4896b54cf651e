"""A model folder in, a checked bundle out: export → verify → build → verify → publish.

bundle = compile_engine("out/", precision="fp16")          # where the model was trained
compile_engine("out.bundle", "out.bundle")                 # on the device: a new plan from the bundle's own
                                                           # model.onnx; needs neither torch nor transformers
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from fedspine_edge.deploy import cuda, trt
from fedspine_edge.deploy.bundle import (
    MODEL,
    PLAN,
    TOKENIZER,
    TOKENIZER_FILES,
    EngineInfo,
    LayerWidths,
    Manifest,
    Precision,
    Profile,
    check_target,
    is_bundle,
    load_bundle,
    producer_versions,
    rebuild_command,
    seal,
    staging,
)
from fedspine_edge.errors import ConfigError, DeployError, EngineIncompatible, MissingDependency

if TYPE_CHECKING:
    from fedspine_edge.model.prunable import PrunableModel

BackendChoice = Literal["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"]
BACKENDS: tuple[str, ...] = ("auto", "onnxruntime", "tensorrt", "tensorrt_rtx")
Report = Callable[[str], None]


def compile_engine(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    precision: Precision | None = None,
    profiles: Sequence[Profile] | None = None,
    backend: BackendChoice = "auto",
    labels: Sequence[str] | None = None,
    progress: Report | None = None,
    opset: int = 17,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """Makes a bundle that ONNX Runtime can run and, where TensorRT is at hand, holds an engine as well.

    Args:
        folder: What `PrunableModel.save`, `EdgeTuner.save` or `save_pretrained` wrote; or a bundle, whose plan
            is then built anew from its own model.onnx.
        out: Where the bundle goes; default `<folder>.bundle`, and a bundle itself when it is rebuilt. An existing
            bundle is replaced only when everything succeeded.
        precision: "fp32" (default) or "fp16"; a bundle that is rebuilt keeps its own.
        profiles: Shapes to build the engine for; default batch 1–8 and up to 128 tokens.
        backend: "auto" builds for TensorRT, else TensorRT-RTX, where that is installed and there is a GPU (or
            `compute_capabilities` are given, which TensorRT-RTX can build for without one), else no engine.
            "onnxruntime" never builds one; the other two build or fail.
        labels: Class names in the order of the logits; default the model's own.
        progress: Called with one line per step.
        opset: ONNX opset, 17 to 20.
        compute_capabilities: SM numbers such as ("86", "120"), TensorRT-RTX only.
        workspace_bytes: Scratch memory for the builder; None leaves its default.
        flags: Builder flags by name, such as ("TF32",).

    Returns the bundle's folder.

    Raises:
        ConfigError: An argument is wrong, or `out` holds something that is not a bundle.
        CheckpointError: The model folder cannot be read.
        ExportMismatch: The export disagrees with torch, or the engine with ONNX Runtime.
        EngineBuildError: TensorRT could not build.
        MissingDependency: A package that was asked for is absent.
    """
    folder = Path(folder)
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}.", remedy=f"Choose one of: {', '.join(BACKENDS)}")
    if precision not in (None, "fp32", "fp16"):
        raise ConfigError(f"precision is {precision!r}.", remedy="Choose fp32 or fp16.")
    from_bundle = is_bundle(folder)
    if out is None:
        out = folder if from_bundle else folder.absolute().with_name(f"{folder.absolute().name}.bundle")
    out = Path(out)
    check_target(out)
    report = progress or (lambda line: None)
    request = _EngineRequest(
        backend=backend,
        profiles=tuple(profiles) if profiles is not None else None,
        compute_capabilities=tuple(compute_capabilities),
        workspace_bytes=workspace_bytes,
        flags=tuple(flags),
    )
    chosen = _choose_backend(request)  # before the export, so that a missing package is said at once
    with staging(out) as draft:
        if from_bundle:
            manifest = _copy_bundle(folder, draft, precision, labels)
        else:
            manifest = _export(folder, draft, precision or "fp32", opset, labels, report)
        manifest = _add_engine(draft, manifest, request, chosen, rebuild_command(out), report)
        seal(draft, manifest)
        report(f"writing {out}")
    return out


class _EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    backend: BackendChoice
    profiles: tuple[Profile, ...] | None
    compute_capabilities: tuple[str, ...]
    workspace_bytes: int | None
    flags: tuple[str, ...]


def _choose_backend(request: _EngineRequest) -> trt.Backend | str:
    """The TensorRT to build with, or the reason why there is none."""
    if request.backend == "onnxruntime":
        return "only ONNX Runtime was asked for"
    if request.backend != "auto":
        return trt.find_backend(request.backend)
    if cuda.device_info() is None and not request.compute_capabilities:
        return "this machine has no GPU that CUDA can see, and no compute capability was named"
    reasons = []
    # TensorRT proper builds for the GPU of this machine alone.
    names: tuple[trt.BackendName, ...] = (
        ("tensorrt_rtx",) if request.compute_capabilities else ("tensorrt", "tensorrt_rtx")
    )
    for name in names:
        try:
            return trt.find_backend(name)
        except (MissingDependency, EngineIncompatible) as error:
            reasons.append(error.message)
    return "; ".join(reasons)


def _export(
    folder: Path, draft: Path, precision: Precision, opset: int, labels: Sequence[str] | None, report: Report
) -> Manifest:
    from fedspine_edge.deploy.export import export_onnx, load_folder, merged_module
    from fedspine_edge.deploy.verify import verify_onnx

    report(f"loading {folder}")
    model = load_folder(folder)
    names = _label_names(model, labels)
    module = merged_module(model)
    report(f"exporting to ONNX ({precision}, opset {opset})")
    exported = export_onnx(module, draft / MODEL, opset=opset, precision=precision)
    report("comparing ONNX Runtime with torch")
    verification = verify_onnx(exported, module)
    report(f"largest difference {verification.max_abs_diff:.2g} (tolerance {verification.tolerance:.2g})")
    _copy_tokenizer(folder, draft)
    pad = module.config.pad_token_id
    return Manifest(
        producer=producer_versions("torch", "transformers", "onnx", "onnxruntime"),
        task=exported.task,
        family=model.spec.family,
        precision=precision,
        opset=opset,
        inputs=exported.inputs,
        outputs=exported.outputs,
        max_tokens=exported.max_tokens,
        pad_token_id=int(pad) if pad is not None else 0,
        labels=names,
        widths=tuple(LayerWidths(heads=heads, channels=channels) for heads, channels in model.layout.counts),
        sparsity=model.layout.sparsity,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        verification=verification,
    )


def _label_names(model: PrunableModel, labels: Sequence[str] | None) -> tuple[str, ...]:
    if model.task != "classification":
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
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, draft / name)
    if (draft / TOKENIZER).is_file() or not any((draft / name).is_file() for name in TOKENIZER_FILES):
        return
    # Only the slow tokenizer's files: the runtime reads tokenizer.json alone, so it is made here.
    from fedspine_edge.model.checkpoint import load_tokenizer

    load_tokenizer(folder).backend_tokenizer.save(str(draft / TOKENIZER))


def _copy_bundle(folder: Path, draft: Path, precision: Precision | None, labels: Sequence[str] | None) -> Manifest:
    """The bundle without its plan. A damaged plan does not matter: it is what will be replaced."""
    bundle = load_bundle(folder, ignore=(PLAN,))
    manifest = bundle.manifest
    if precision not in (None, manifest.precision):
        raise ConfigError(
            f"{folder} is a bundle in {manifest.precision}; it cannot become {precision}.",
            remedy="Compile the model folder it was made from.",
        )
    if labels is not None and len(labels) != len(manifest.labels):
        raise ConfigError(f"{len(labels)} labels were given for a model with {len(manifest.labels)} classes.")
    for name in manifest.files:
        if name != PLAN:
            shutil.copyfile(folder / name, draft / name)
    return msgspec.structs.replace(
        manifest, engine=None, engine_absent="", labels=tuple(labels) if labels is not None else manifest.labels
    )


def _add_engine(
    draft: Path, manifest: Manifest, request: _EngineRequest, chosen: trt.Backend | str, rebuild: str, report: Report
) -> Manifest:
    if isinstance(chosen, str):
        report(f"no engine: {chosen}")
        return msgspec.structs.replace(manifest, engine_absent=chosen)
    device = cuda.device_info()
    plan, info = trt.build_plan(
        chosen,
        draft / MODEL,
        manifest.inputs,
        _profiles(request.profiles, manifest.max_tokens),
        device=device,
        compute_capabilities=request.compute_capabilities,
        workspace_bytes=request.workspace_bytes,
        flags=request.flags,
        progress=report,
    )
    (draft / PLAN).write_bytes(plan)
    info = _verify_plan(draft, plan, manifest, info, chosen, device, rebuild, report)
    producer = manifest.producer | {chosen.name: chosen.version}
    return msgspec.structs.replace(manifest, engine=info, producer=producer)


def _profiles(wanted: tuple[Profile, ...] | None, max_tokens: int) -> tuple[Profile, ...]:
    if wanted is None:
        low, common, high = (min(tokens, max_tokens) for tokens in Profile().tokens)
        return (Profile(tokens=(low, common, high)),)
    if not wanted:
        raise ConfigError("profiles is empty.", remedy="Leave it out for the default.")
    for profile in wanted:
        if profile.tokens[2] > max_tokens:
            raise ConfigError(f"A profile asks for {profile.tokens[2]} tokens; the model allows {max_tokens}.")
    return wanted


def _verify_plan(
    draft: Path,
    plan: bytes,
    manifest: Manifest,
    info: EngineInfo,
    backend: trt.Backend,
    device: cuda.DeviceInfo | None,
    rebuild: str,
    report: Report,
) -> EngineInfo:
    """Runs the plan where this machine can, and writes down why where it cannot."""
    from fedspine_edge.deploy.runner import EngineRunner
    from fedspine_edge.deploy.verify import verify_engine

    if device is None or device.sm not in info.compute_capabilities:
        here = f"this machine's GPU is SM {device.sm}" if device is not None else "built on a machine without a GPU"
        return msgspec.structs.replace(
            info, not_verified=f"{here}; it is for SM {', '.join(info.compute_capabilities)}"
        )
    try:
        driver = cuda.open_cuda()
    except MissingDependency as error:
        report(f"the engine was not run: {error.message}")
        return msgspec.structs.replace(info, not_verified=error.message)
    report("comparing the engine with ONNX Runtime")
    try:
        runner = EngineRunner(
            plan, info, manifest.inputs, manifest.outputs, backend=backend, cuda=driver, rebuild=rebuild
        )
    except EngineIncompatible as error:
        raise DeployError(f"The engine that was just built does not load: {error.message}") from error
    try:
        verification = verify_engine(runner, draft / MODEL, manifest, info)
    finally:
        runner.close()
    return msgspec.structs.replace(info, verification=verification, not_verified="")

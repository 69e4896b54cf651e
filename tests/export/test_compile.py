"""`compile_engine`: its output, its errors, and real TensorRT-RTX builds if that package is installed."""

from __future__ import annotations

import msgspec
import onnx
import pytest
from tiny_deploy import tiny_model

from fedspine_edge.bundle.bundle import EngineInfo, OptimizationProfile, TensorInfo, load_bundle
from fedspine_edge.bundle.publish import seal
from fedspine_edge.engine import cuda_driver, tensorrt_api
from fedspine_edge.engine.build_errors import explain_build_failure
from fedspine_edge.engine.tensorrt_builder import EngineOptions, OnnxModel, build_plan
from fedspine_edge.errors import (
    CheckpointError,
    ConfigError,
    EngineBuildError,
    EngineIncompatible,
    ExportMismatch,
    MissingDependency,
)
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.runtime import comparison
from fedspine_edge.runtime.session import Session


def rtx() -> tensorrt_api.Backend:
    """Return TensorRT-RTX, or skip the test."""
    try:
        return tensorrt_api.find_backend("tensorrt_rtx")
    except MissingDependency as error:
        pytest.skip(error.message)


def test_public_names_are_exported():
    import fedspine_edge

    assert fedspine_edge.compile_engine is compile_engine
    assert fedspine_edge.Session is Session


def test_compile_reports_steps_in_order(model_folder, tmp_path):
    lines: list[str] = []
    compile_engine(model_folder, tmp_path / "out", backend="onnxruntime", progress=lines.append)
    starts = ["loading", "exporting", "comparing", "full passes", "no engine", "writing"]
    assert [line.startswith(start) for line, start in zip(lines, starts)] == [True] * 6


def test_compile_labels_default_to_model(model_folder, tmp_path):
    out = compile_engine(model_folder, tmp_path / "out", backend="onnxruntime")
    assert load_bundle(out).manifest.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.raises(ConfigError, match="2 labels were given for a model with 3"):
        compile_engine(model_folder, out, backend="onnxruntime", labels=("a", "b"))
    compile_engine(out, out, backend="onnxruntime", labels=("a", "b", "c"))
    assert load_bundle(out).manifest.labels == ("a", "b", "c")


def test_compile_fp16_halves_weights(tmp_path):
    save_model(tiny_model("bert", layers=8), tmp_path / "model")
    sizes = {}
    for precision in ("fp32", "fp16"):
        out = compile_engine(tmp_path / "model", tmp_path / precision, precision=precision, backend="onnxruntime")
        assert load_bundle(out).manifest.precision == precision
        initializers = onnx.load(out / "model.onnx").graph.initializer
        sizes[precision] = sum(len(tensor.raw_data) for tensor in initializers)
    assert sizes["fp16"] < 0.6 * sizes["fp32"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "onnx"}, "`backend` is 'onnx'"),
        ({"precision": "int3"}, "`precision` is 'int3'"),
        ({"precision": "int8"}, "int8 needs examples"),
        ({"opset": 9}, "`opset` is 9"),
    ],
)
def test_compile_invalid_arguments_raise(model_folder, tmp_path, arguments, words):
    with pytest.raises(ConfigError, match=words):
        compile_engine(model_folder, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_compile_does_not_replace_other_outputs(model_folder, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="not a bundle"):
        compile_engine(model_folder, tmp_path / "file")
    with pytest.raises(ConfigError, match="not a bundle"):
        compile_engine(model_folder, model_folder)
    assert (tmp_path / "file").read_text() == "precious"


def test_compile_names_missing_model(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        compile_engine(tmp_path / "nowhere")


def test_compile_mismatch_keeps_old_bundle(model_folder, bundle, monkeypatch):
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    monkeypatch.setitem(comparison.TOLERANCE, "fp32", 1e-12)
    monkeypatch.setattr(comparison, "NOISE_FACTOR", 0)
    with pytest.raises(ExportMismatch, match="logits"):
        compile_engine(model_folder, bundle, backend="onnxruntime")
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_compile_bundle_without_gpu_keeps_engine(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_driver, "device_info", lambda: None)
    (bundle / "engine.plan").write_bytes(b"plan")
    info = EngineInfo(
        backend="tensorrt", version="10.3.0", compute_capabilities=("87",), profiles=(OptimizationProfile(),)
    )
    seal(bundle, msgspec.structs.replace(load_bundle(bundle).manifest, engine=info, engine_absent=""))
    lines: list[str] = []
    compile_engine(bundle, labels=("a", "b", "c"), progress=lines.append)
    assert load_bundle(bundle).manifest.engine == info
    assert load_bundle(bundle).manifest.labels == ("a", "b", "c")
    assert (bundle / "engine.plan").read_bytes() == b"plan"
    assert any("keeping the tensorrt 10.3.0 engine" in line and "no GPU" in line for line in lines)
    (bundle / "engine.plan").write_bytes(b"damaged")
    compile_engine(bundle)
    assert load_bundle(bundle).manifest.engine is None
    assert "no GPU" in load_bundle(bundle).manifest.engine_absent
    compile_engine(compile_engine(bundle, tmp_path / "copy"), backend="onnxruntime")
    assert load_bundle(tmp_path / "copy").manifest.engine is None


def test_compile_accepted_mismatch_is_recorded(model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(comparison.TOLERANCE, "fp32", 1e-12)
    monkeypatch.setattr(comparison, "NOISE_FACTOR", 0)
    lines: list[str] = []
    out = compile_engine(
        model_folder, tmp_path / "out", backend="onnxruntime", accept_mismatch=True, progress=lines.append
    )
    verification = load_bundle(out).manifest.verification
    assert "disagrees with torch" in verification.mismatch
    assert any("mismatch was accepted" in line for line in lines)
    with Session.load(out) as session:
        assert session.classify("good").label


def test_compile_bundle_rejects_other_precision(bundle):
    with pytest.raises(ConfigError, match="in fp32; it cannot be converted to fp16"):
        compile_engine(bundle, precision="fp16", backend="onnxruntime")


def test_compile_auto_without_gpu_records_reason(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_driver, "device_info", lambda: None)
    out = compile_engine(model_folder, tmp_path / "out")
    assert "no GPU" in load_bundle(out).manifest.engine_absent
    with Session.load(out) as session:
        assert "no GPU" in session.why


def test_compile_reports_missing_tensorrt_first(model_folder, tmp_path, monkeypatch):
    import sys

    lines: list[str] = []
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match="tensorrt cannot be imported"):
        compile_engine(model_folder, tmp_path / "out", backend="tensorrt", progress=lines.append)
    assert lines == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rtx_builds_for_compute_capabilities_without_gpu(model_folder, tmp_path, precision):
    backend = rtx()
    out = compile_engine(
        model_folder,
        tmp_path / "out",
        precision=precision,
        backend="tensorrt_rtx",
        compute_capabilities=("86", "SM120"),
        profiles=[OptimizationProfile(batch=(1, 2, 4), tokens=(1, 16, 32))],
    )
    bundle = load_bundle(out)
    info = bundle.manifest.engine
    assert (info.backend, info.version, info.compute_capabilities) == ("tensorrt_rtx", backend.version, ("86", "120"))
    assert info.profiles == (OptimizationProfile(batch=(1, 2, 4), tokens=(1, 16, 32)),)
    assert "TF32" not in info.flags
    assert bundle.plan_path.stat().st_size > 100_000
    if cuda_driver.device_info() is None:
        assert info.verification is None
        assert "without a GPU" in info.not_verified
        with Session.load(out) as session:
            assert session.backend == "onnxruntime"
            assert "no GPU" in session.why
        with pytest.raises(EngineIncompatible, match="no GPU"):
            Session.load(out, backend="tensorrt_rtx")


def test_compile_replaces_damaged_plan_of_bundle(bundle):
    rtx()
    model = (bundle / "model.onnx").read_bytes()
    compile_engine(bundle, backend="tensorrt_rtx", compute_capabilities=["86"], flags=["TF32"])
    assert load_bundle(bundle).manifest.engine.flags == ("TF32",)
    (bundle / "engine.plan").write_bytes(b"")
    with pytest.raises(EngineIncompatible):
        load_bundle(bundle)
    compile_engine(bundle, bundle, backend="tensorrt_rtx", compute_capabilities=["86"])
    assert load_bundle(bundle).manifest.engine.compute_capabilities == ("86",)
    assert load_bundle(bundle).manifest.engine_absent == ""
    assert (bundle / "model.onnx").read_bytes() == model


def build(backend, path, **options):
    inputs = (TensorInfo(name="x", dtype="float32", shape=("batch", "sequence")),)
    options = EngineOptions(**{"profiles": (OptimizationProfile(),), "compute_capabilities": ("86",)} | options)
    return build_plan(backend, OnnxModel(path=path, inputs=inputs), options, device=None)


def save_graph(path, operator, domain=""):
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "sequence"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", "sequence"])
    node = onnx.helper.make_node(operator, ["x"], ["y"], domain=domain)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("custom", 1)]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=opsets), path)
    return path


def test_build_error_names_unsupported_operator(tmp_path):
    path = save_graph(tmp_path / "odd.onnx", "Frobnicate", "custom")
    with pytest.raises(EngineBuildError, match=r"operator that this release cannot parse.*Frobnicate") as caught:
        build(rtx(), path)
    assert "without setting an opset" in caught.value.remedy


def test_build_without_or_with_unknown_target_raises(tmp_path):
    backend, path = rtx(), save_graph(tmp_path / "ok.onnx", "Tanh")
    with pytest.raises(EngineBuildError, match="needs a GPU to build for"):
        build(backend, path, compute_capabilities=())
    with pytest.raises(EngineBuildError, match="cannot build for SM87") as caught:
        build(backend, path, compute_capabilities=("8.7",))
    assert "SM86" in caught.value.remedy
    with pytest.raises(ConfigError, match="no builder flag 'FP16'") as unknown:
        build(backend, path, flags=("FP16",))
    assert "TF32" in unknown.value.remedy


def test_build_of_invalid_onnx_file_raises(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineBuildError, match="could not parse"):
        build(rtx(), tmp_path / "bad.onnx")


def test_compile_rejects_profile_above_model_limit(bundle):
    rtx()
    with pytest.raises(ConfigError, match="67 tokens; the model allows 66"):
        compile_engine(
            bundle,
            backend="tensorrt_rtx",
            compute_capabilities=["86"],
            profiles=[OptimizationProfile(tokens=(1, 2, 67))],
        )


@pytest.mark.parametrize(
    ("line", "cause", "remedy"),
    [
        ("error: 10: Could not find any implementation for node {ForeignNode[x]}.", "ran out of memory", "workspace"),
        ("error: Cuda Runtime (out of memory)", "ran out of memory", "do not train while building"),
        (
            "error: No importer registered for op: Attention. Attempting to import as plugin.",
            "operator",
            "without setting an opset",
        ),
        ("error: Elementwise inputs must have the same type", "mixes types", "again"),
        ("error: (cudaError 35: CUDA driver version is insufficient)", "no usable CUDA driver", "doctor"),
        ("error: something new", "cause is unknown", "onnxruntime"),
    ],
)
def test_tensorrt_messages_are_explained(line, cause, remedy):
    error = explain_build_failure("tensorrt", "10.3.0", ["warning: harmless", line], "could not build")
    assert cause in error.message
    assert line in error.message
    assert "harmless" not in error.message
    assert remedy in error.remedy

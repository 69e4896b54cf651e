"""Building a plan: progress, Ctrl-C, timing cache, memory, opsets and error messages.

Failures are produced with TensorRT-RTX if it is installed; messages of TensorRT were recorded.
"""

from __future__ import annotations

import _thread
import signal
import threading
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fedspine_edge.bundle.bundle import TIMING_CACHE, OptimizationProfile, TensorInfo, load_bundle
from fedspine_edge.bundle.publish import seal
from fedspine_edge.engine import tensorrt_api
from fedspine_edge.engine.build_errors import explain_build_failure
from fedspine_edge.engine.tensorrt_builder import BuildProgress, EngineOptions, OnnxModel, available_bytes, build_plan
from fedspine_edge.errors import EngineBuildError, EngineIncompatible, MissingDependency
from fedspine_edge.export.compile import compile_engine

INPUTS = (TensorInfo(name="x", dtype="float32", shape=("batch", "sequence")),)


@pytest.fixture(scope="module")
def rtx() -> tensorrt_api.Backend:
    try:
        return tensorrt_api.find_backend("tensorrt_rtx")
    except MissingDependency as error:
        pytest.skip(error.message)


def graph_file(path, nodes, *, opset=17, tensors=()):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence"]) for name in "xy")
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opsets)
    onnx.save(model, path)
    return path


def build(backend, path, *, opset=17, timing_cache=b"", on_step=None, **options):
    options = EngineOptions(**{"profiles": (OptimizationProfile(),), "compute_capabilities": ("86",)} | options)
    model = OnnxModel(path=path, inputs=INPUTS, opset=opset)
    return build_plan(backend, model, options, device=None, timing_cache=timing_cache, on_step=on_step)


@pytest.fixture
def tanh(tmp_path):
    return graph_file(tmp_path / "tanh.onnx", [helper.make_node("Tanh", ["x"], ["y"])])


def test_build_progress_increases_over_phases(rtx, tanh):
    seen: list[tuple[str, float]] = []
    build(rtx, tanh, on_step=lambda phase, share: seen.append((phase, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] > 0.8
    assert len({phase for phase, _ in seen}) > 3


@pytest.fixture
def default_sigint():
    """Restore the default handler, because shells start background programs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_stops_builder_and_keeps_old_bundle(rtx, bundle):
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    steps = []

    def press(phase, share):
        steps.append(phase)
        if len(steps) == 1:
            _thread.interrupt_main()  # what SIGINT does

    with pytest.raises(KeyboardInterrupt):
        compile_engine(bundle, backend="tensorrt_rtx", compute_capabilities=["86"], on_build_step=press)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]
    for thread in threading.enumerate():
        if thread.name == "tensorrt-builder":
            thread.join(5)
            assert not thread.is_alive()


def test_exception_in_on_step_stops_builder(rtx, tanh):
    def broken(phase, share):
        raise ZeroDivisionError(phase)

    with pytest.raises(ZeroDivisionError):
        build(rtx, tanh, on_step=broken)


def test_build_progress_nested_phases_count_as_parts():
    progress = BuildProgress()
    progress.start("build", "", 4)
    assert progress.step("build", 0) == 0.25
    progress.start("time", "build", 2)
    assert progress.step("time", 0) == 0.375
    progress.start("nodes", "time", 10)
    assert progress.step("nodes", 4) == pytest.approx((1 + (1 + 0.5) / 2) / 4)
    progress.finish("nodes")
    assert progress.step("time", 1) == 0.5
    progress.finish("time")
    assert progress.step("build", 1) == 0.5
    assert progress.step("unknown", 3) == 0.5


def test_build_records_workspace_bytes(rtx, tanh):
    assert build(rtx, tanh, workspace_bytes=1 << 28).info.workspace_bytes == 1 << 28
    assert build(rtx, tanh).info.workspace_bytes == 0


def test_available_bytes_reads_meminfo(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:        7802324 kB\nMemFree:          212344 kB\nMemAvailable:    3900000 kB\n")
    assert available_bytes(str(file)) == 3_900_000 * 1024
    assert available_bytes(str(tmp_path / "absent")) == 0


class Config:
    """Imitates TensorRT's builder configuration, which rejects a timing cache of another release or chip."""

    def __init__(self):
        self.content = None

    def create_timing_cache(self, data):
        return None if data == b"damaged" else SimpleNamespace(data=data, serialize=lambda: data + b"!")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.data == b"of another chip":
            return False
        self.content = cache
        return True

    def get_timing_cache(self):
        return self.content


@pytest.mark.parametrize(
    ("timing_cache", "reused"), [(b"", False), (b"valid", True), (b"damaged", False), (b"of another chip", False)]
)
def test_timing_cache_is_reused_if_accepted(timing_cache, reused):
    config = Config()
    assert tensorrt_api.load_timing_cache(config, timing_cache) is reused
    assert tensorrt_api.serialize_timing_cache(config) == (timing_cache if reused else b"") + b"!"


def test_rtx_has_no_timing_cache(rtx, tanh):
    assert not tensorrt_api.has_timing_cache(rtx)
    assert tensorrt_api.has_timing_cache(tensorrt_api.Backend("tensorrt", tensorrt_api, "10.3.0"))
    assert build(rtx, tanh, timing_cache=b"something").timing_cache == b""


def test_compile_copies_timing_cache_unless_damaged(rtx, bundle):
    (bundle / TIMING_CACHE).write_bytes(b"timings")
    seal(bundle, load_bundle(bundle).manifest)
    compile_engine(bundle, backend="tensorrt_rtx", compute_capabilities=["86"])
    assert (bundle / TIMING_CACHE).read_bytes() == b"timings"
    (bundle / TIMING_CACHE).write_bytes(b"changed")
    with pytest.raises(EngineIncompatible, match=r"timing\.cache was altered") as caught:
        load_bundle(bundle)
    assert f"compile {bundle} --out {bundle}" in caught.value.remedy
    compile_engine(bundle, backend="tensorrt_rtx", compute_capabilities=["86"])
    assert not (bundle / TIMING_CACHE).exists()
    load_bundle(bundle)


@pytest.mark.parametrize(
    ("version", "opset"), [("10.3.0.30", 21), ("10.5.0", 21), ("10.6.0", 22), ("10.13.3", 22), ("11.4.1", 25)]
)
def test_newest_opset_covers_all_precisions(version, opset):
    backend = tensorrt_api.Backend("tensorrt", tensorrt_api, version)
    assert tensorrt_api.newest_opset(backend) == opset
    assert max(tensorrt_api.opset_for(precision) for precision in ("fp32", "bf16", "int8", "fp8", "int4")) <= opset


def test_build_rejects_opset_above_parser_limit(rtx, tanh):
    with pytest.raises(EngineBuildError, match=r"supports opsets up to 22; tanh\.onnx has opset 24") as caught:
        build(rtx, tanh, opset=24)
    assert "Export the model again" in caught.value.remedy


def half_of(name):
    return helper.make_node("Cast", ["x"], [name], to=TensorProto.FLOAT16)


@pytest.mark.parametrize(
    ("nodes", "words", "remedy"),
    [
        (
            [helper.make_node("Frobnicate", ["x"], ["y"], name="/model/layer.3/odd", domain="custom")],
            r"could not parse .*operator that this release cannot parse.*Frobnicate at /model/layer\.3/odd",
            "Export the model again",
        ),
        (
            [helper.make_node("Unique", ["x"], ["y"], name="/model/uniq")],
            r"operator that this release cannot parse.*Unique at /model/uniq: .*\(UNSUPPORTED_NODE\)",
            "Export the model again",
        ),
        (
            [half_of("h"), helper.make_node("Add", ["h", "x"], ["y"], name="/model/layer.3/add")],
            r"mixes types.*Add at /model/layer\.3/add",
            "Export the model again",
        ),
    ],
)
def test_parser_errors_name_layer_operator_and_remedy(rtx, tmp_path, nodes, words, remedy):
    with pytest.raises(EngineBuildError, match=words) as caught:
        build(rtx, graph_file(tmp_path / "model.onnx", nodes))
    assert rtx.version in caught.value.message
    assert remedy in caught.value.remedy


def test_build_error_names_unsupported_number_format(rtx, tmp_path):
    zero = TensorProto(name="z", data_type=TensorProto.FLOAT8E4M3FN, raw_data=b"\0")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    scale = onnx.numpy_helper.from_array(np.float32(0.1), "s")
    path = graph_file(tmp_path / "fp8.onnx", nodes, opset=19, tensors=[scale, zero])
    with pytest.raises(EngineBuildError, match="number format that this GPU does not support") as caught:
        build(rtx, path)
    assert "int8" in caught.value.remedy


NO_NODE = (
    "error: 10: [optimizer.cpp::computeCosts::4048] Error Code 10: Internal Error (Could not find any implementation "
    "for node {ForeignNode[/bert/embeddings/Add.../classifier/Gemm]}.)"
)
NO_TACTIC = "warning: Tactic Device request: 4229MB Available: 2658MB. Device memory is insufficient to use tactic."
NO_PROFILE = (
    "error: IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Network has dynamic or shape inputs, but "
    "no optimization profile has been defined. In validate at /_src/optimizer/api/network.cpp:4023)"
)
RECORDED = [
    ([NO_NODE], "ran out of memory", "profile's maximum batch"),
    (
        [NO_TACTIC, "error: Error Code 2: Internal Error (Assertion engine failed.)"],
        "ran out of memory",
        "do not train",
    ),
    (["error: [defaultAllocator.cpp::allocate::31] Cuda Runtime (out of memory)"], "ran out of memory", "free memory"),
    ([NO_PROFILE], "profiles do not fit", "Omit `profiles`"),
    (["error: 9: Target GPU SM 53 is not supported by this TensorRT release."], "not support this GPU", "the device"),
    (
        ["error: Unsupported ONNX opset version: 99"],
        "has a version that this release does not support",
        "without setting",
    ),
]


@pytest.mark.parametrize(("lines", "cause", "remedy"), RECORDED)
def test_recorded_tensorrt_messages_are_explained(lines, cause, remedy):
    error = explain_build_failure("tensorrt", "10.3.0", lines, "could not build an engine")
    assert cause in error.message
    assert lines[-1] in error.message
    assert remedy in error.remedy

"""Building a plan: progress, Ctrl-C, timings, memory, opsets, and what is said when it fails.

Real failures come from TensorRT-RTX, where that is installed; messages of TensorRT itself were recorded.
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

from fedspine_edge.bundle.bundle import TIMINGS, OptimizationProfile, TensorInfo, load_bundle
from fedspine_edge.bundle.publish import seal
from fedspine_edge.engine import tensorrt_api
from fedspine_edge.engine.build_errors import explain_build_failure
from fedspine_edge.engine.tensorrt_builder import Share, available_bytes, build_plan
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


def build(backend, path, **settings):
    settings = {"device": None, "compute_capabilities": ["86"]} | settings
    return build_plan(backend, path, INPUTS, [OptimizationProfile()], **settings)


@pytest.fixture
def tanh(tmp_path):
    return graph_file(tmp_path / "tanh.onnx", [helper.make_node("Tanh", ["x"], ["y"])])


def test_progress_rises_from_phase_to_phase(rtx, tanh):
    seen: list[tuple[str, float]] = []
    build(rtx, tanh, on_step=lambda phase, share: seen.append((phase, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] > 0.8
    assert len({phase for phase, _ in seen}) > 3


@pytest.fixture
def listens_to_ctrl_c():
    """A shell starts programs in the background deaf to SIGINT, pytest among them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens_to_ctrl_c")
def test_ctrl_c_stops_the_builder_and_leaves_the_old_bundle(rtx, bundle):
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


def test_an_error_of_the_progress_bar_stops_the_builder_too(rtx, tanh):
    def broken(phase, share):
        raise ZeroDivisionError(phase)

    with pytest.raises(ZeroDivisionError):
        build(rtx, tanh, on_step=broken)


def test_a_phase_inside_a_step_counts_as_its_part():
    share = Share()
    share.start("build", "", 4)
    assert share.step("build", 0) == 0.25
    share.start("time", "build", 2)
    assert share.step("time", 0) == 0.375
    share.start("nodes", "time", 10)
    assert share.step("nodes", 4) == pytest.approx((1 + (1 + 0.5) / 2) / 4)
    share.finish("nodes")
    assert share.step("time", 1) == 0.5
    share.finish("time")
    assert share.step("build", 1) == 0.5
    assert share.step("unheard of", 3) == 0.5


def test_scratch_memory_is_asked_for_and_written_down(rtx, tanh):
    assert build(rtx, tanh, workspace_bytes=1 << 28).info.workspace_bytes == 1 << 28
    assert build(rtx, tanh).info.workspace_bytes == 0


def test_available_memory_is_linuxs_estimate(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:        7802324 kB\nMemFree:          212344 kB\nMemAvailable:    3900000 kB\n")
    assert available_bytes(str(file)) == 3_900_000 * 1024
    assert available_bytes(str(tmp_path / "absent")) == 0


class Config:
    """What TensorRT does with a timing cache: it refuses one of another release or chip."""

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
    ("timings", "reused"), [(b"", False), (b"mine", True), (b"damaged", False), (b"of another chip", False)]
)
def test_timings_are_reused_where_tensorrt_takes_them(timings, reused):
    config = Config()
    assert tensorrt_api.use_timings(config, timings) is reused
    assert tensorrt_api.timings_of(config) == (timings if reused else b"") + b"!"


def test_tensorrt_rtx_keeps_no_timings(rtx, tanh):
    assert not tensorrt_api.keeps_timings(rtx)
    assert tensorrt_api.keeps_timings(tensorrt_api.Backend("tensorrt", tensorrt_api, "10.3.0"))
    assert build(rtx, tanh, timings=b"something").timings == b""


def test_timings_travel_with_the_bundle_and_damaged_ones_are_left_behind(rtx, bundle):
    (bundle / TIMINGS).write_bytes(b"timings")
    seal(bundle, load_bundle(bundle).manifest)
    compile_engine(bundle, backend="tensorrt_rtx", compute_capabilities=["86"])
    assert (bundle / TIMINGS).read_bytes() == b"timings"
    (bundle / TIMINGS).write_bytes(b"changed")
    with pytest.raises(EngineIncompatible, match=r"timing\.cache was altered") as caught:
        load_bundle(bundle)
    assert f"compile {bundle} --out {bundle}" in caught.value.remedy
    compile_engine(bundle, backend="tensorrt_rtx", compute_capabilities=["86"])
    assert not (bundle / TIMINGS).exists()
    load_bundle(bundle)


@pytest.mark.parametrize(
    ("version", "opset"), [("10.3.0.30", 21), ("10.5.0", 21), ("10.6.0", 22), ("10.13.3", 22), ("11.4.1", 25)]
)
def test_every_release_reads_what_every_precision_needs(version, opset):
    backend = tensorrt_api.Backend("tensorrt", tensorrt_api, version)
    assert tensorrt_api.newest_opset(backend) == opset
    assert max(tensorrt_api.opset_for(precision) for precision in ("fp32", "bf16", "int8", "fp8", "int4")) <= opset


def test_an_opset_beyond_the_parser_is_said_before_parsing(rtx, tanh):
    with pytest.raises(EngineBuildError, match=r"reads opset 22 at most; tanh\.onnx has 24") as caught:
        build(rtx, tanh, opset=24)
    assert "Export anew" in caught.value.remedy


def half_of(name):
    return helper.make_node("Cast", ["x"], [name], to=TensorProto.FLOAT16)


@pytest.mark.parametrize(
    ("nodes", "words", "remedy"),
    [
        (
            [helper.make_node("Frobnicate", ["x"], ["y"], name="/model/layer.3/odd", domain="custom")],
            r"could not parse .*operator this release cannot parse.*Frobnicate at /model/layer\.3/odd",
            "Export anew",
        ),
        (
            [helper.make_node("Unique", ["x"], ["y"], name="/model/uniq")],
            r"operator this release cannot parse.*Unique at /model/uniq: .*\(UNSUPPORTED_NODE\)",
            "Export anew",
        ),
        (
            [half_of("h"), helper.make_node("Add", ["h", "x"], ["y"], name="/model/layer.3/add")],
            r"mixes types.*Add at /model/layer\.3/add",
            "Export it anew",
        ),
    ],
)
def test_real_refusals_name_layer_operator_version_and_remedy(rtx, tmp_path, nodes, words, remedy):
    with pytest.raises(EngineBuildError, match=words) as caught:
        build(rtx, graph_file(tmp_path / "model.onnx", nodes))
    assert rtx.version in caught.value.message
    assert remedy in caught.value.remedy


def test_a_number_format_that_the_chip_lacks(rtx, tmp_path):
    zero = TensorProto(name="z", data_type=TensorProto.FLOAT8E4M3FN, raw_data=b"\0")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    scale = onnx.numpy_helper.from_array(np.float32(0.1), "s")
    path = graph_file(tmp_path / "fp8.onnx", nodes, opset=19, tensors=[scale, zero])
    with pytest.raises(EngineBuildError, match="number format that this GPU lacks") as caught:
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
    ([NO_NODE], "ran out of memory", "profile's largest batch"),
    ([NO_TACTIC, "error: Error Code 2: Internal Error (Assertion engine failed.)"], "ran out of memory", "never train"),
    (["error: [defaultAllocator.cpp::allocate::31] Cuda Runtime (out of memory)"], "ran out of memory", "free memory"),
    ([NO_PROFILE], "profiles do not fit", "Leave profiles out"),
    (["error: 9: Target GPU SM 53 is not supported by this TensorRT release."], "not support this GPU", "the device"),
    (["error: Unsupported ONNX opset version: 99"], "of a version this release does not read", "without naming"),
]


@pytest.mark.parametrize(("lines", "cause", "remedy"), RECORDED)
def test_recorded_messages_are_translated(lines, cause, remedy):
    error = explain_build_failure("tensorrt", "10.3.0", lines, "could not build an engine")
    assert cause in error.message
    assert lines[-1] in error.message
    assert remedy in error.remedy

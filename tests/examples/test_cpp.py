"""examples/cpp: the ONNX Runtime program agrees with Python; the TensorRT program runs on fake libraries."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_deploy import tiny_model, write_byte_tokenizer

from fedspine_edge.bundle.bundle import EngineInfo, OptimizationProfile, load_bundle
from fedspine_edge.bundle.publish import seal
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.runtime.session import Session

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "examples/cpp"
DECLARATIONS = ROOT / "tests/support/declarations"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Build run_onnxruntime with CMake and the library inside the Python package."""
    import onnxruntime

    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    libraries = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1*"))
    if not libraries:
        pytest.skip("this onnxruntime package has no shared library")
    root = tmp_path_factory.mktemp("onnxruntime")
    (root / "include").mkdir()
    shutil.copy(DECLARATIONS / "onnxruntime_c_api.h", root / "include")
    (root / "lib").mkdir()
    (root / "lib/libonnxruntime.so.1").symlink_to(libraries[0])
    build = root / "build"
    for command in (
        ["cmake", "-S", SOURCES, "-B", build, f"-DONNXRUNTIME_ROOT={root}", "-DCMAKE_CXX_FLAGS=-Werror -O0"],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "run_onnxruntime"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp") / "model"
    save_model(tiny_model("bert"), folder)
    return compile_engine(folder, backend="onnxruntime")


def run(program, bundle, text):
    return subprocess.run([program, bundle], input=text, capture_output=True, text=True, timeout=60)


def test_onnxruntime_program_agrees_with_session(program, bundle):
    rows = [np.random.default_rng(n).integers(1, 120, n).tolist() for n in (1, 9, 66)]
    done = run(program, bundle, "".join(" ".join(map(str, ids)) + "\n" for ids in rows))
    assert done.returncode == 0, done.stderr
    found = [[float(value) for value in line.split()] for line in done.stdout.splitlines()]
    with Session.load(bundle, threads=1) as session:
        for ids, logits in zip(rows, found):
            expected = session.run(input_ids=np.array([ids]), attention_mask=np.ones((1, len(ids)), np.int64))
            np.testing.assert_allclose(logits, expected[0], atol=1e-6)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2 film\n", "line 1: expected 1 to 66 token ids"),
        ("1 2\n\n", "line 2: expected"),
        ("1 " * 67, "line 1: expected"),
        ("5000\n", "line 1: the token id 5000 is not within 0..119"),
        ("4 5\n6 -5\n", "line 2: the token id -5 is not within 0..119"),
    ],
)
def test_invalid_token_ids_are_rejected(program, bundle, text, words):
    done = run(program, bundle, text)
    assert done.returncode == 2
    assert words in done.stderr


def test_invalid_bundles_are_rejected(program, bundle, tmp_path):
    assert "cannot read" in run(program, tmp_path / "absent", "1\n").stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    for content, words in (
        ('{"format_version": 1', "JSON, byte 20: it ends too early"),
        ('{"format_version": 99}', "another format version"),
        ('{"format_version": "1"}', "something else where a number belongs"),
        ("[" * 100, "nested too deeply"),
    ):
        (broken / "bundle.json").write_text(content)
        done = run(program, broken, "1\n")
        assert done.returncode == 2
        assert words in done.stderr
    folder = tmp_path / "decoder"
    save_model(tiny_model("llama", "causal_lm"), folder)
    write_byte_tokenizer(folder)
    assert "contains a causal_lm model" in run(program, compile_engine(folder, backend="onnxruntime"), "1\n").stderr


# --- tensorrt.cpp, on a fake TensorRT ---


@pytest.fixture(scope="module")
def on_tensorrt(tmp_path_factory):
    """Build run_tensorrt with declarations/ and fake_nvinfer.cpp."""
    program = tmp_path_factory.mktemp("tensorrt") / "run_tensorrt"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{DECLARATIONS}", "-o", program]
    sources = [SOURCES / "tensorrt.cpp", ROOT / "tests/support/fake_nvinfer.cpp"]
    done = subprocess.run([*command, *sources], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture
def with_engine(bundle, tmp_path):
    """Return a function that copies the bundle and adds a plan, by default for SM 87 and TensorRT 10.3.0."""

    def make(plan=b"plan", **changes):
        folder = Path(shutil.copytree(bundle, tmp_path / "engine.bundle", dirs_exist_ok=True))
        profiles = (
            OptimizationProfile(batch=(2, 4, 8), tokens=(1, 8, 66)),
            OptimizationProfile(tokens=(1, 4, 8)),
            OptimizationProfile(tokens=(9, 16, 32)),
        )
        known = {"backend": "tensorrt", "version": "10.3.0", "compute_capabilities": ("86", "87"), "profiles": profiles}
        (folder / "engine.plan").write_bytes(plan)
        seal(folder, msgspec.structs.replace(load_bundle(bundle).manifest, engine=EngineInfo(**(known | changes))))
        return folder

    return make


def test_tensorrt_program_sets_shapes_and_profiles(on_tensorrt, with_engine):
    rows = [[5, 6, 7], list(range(1, 21)), [9], list(range(1, 10))]
    done = run(on_tensorrt, with_engine(), "".join(" ".join(map(str, ids)) + "\n" for ids in rows))
    assert done.returncode == 0, done.stderr
    found = [[float(value) for value in line.split()] for line in done.stdout.splitlines()]
    assert found == [[sum(ids), len(ids), 1 if len(ids) <= 8 else 2] for ids in rows]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "10.3.1"}, "the engine was built by TensorRT 10.3.1; the library has version 100300"),
        ({"compute_capabilities": ("110",)}, "was not built for this GPU, SM 87"),
        ({"backend": "tensorrt_rtx"}, "is for tensorrt_rtx, not TensorRT"),
    ],
)
def test_tensorrt_program_rejects_plan_of_other_machine(on_tensorrt, with_engine, changes, words):
    folder = with_engine(**changes)
    done = run(on_tensorrt, folder, "1 2\n")
    assert done.returncode == 2
    assert words in done.stderr
    assert f"fedspine-edge compile {folder} --out {folder}" in done.stderr


def test_tensorrt_program_reports_failures(on_tensorrt, with_engine, bundle, monkeypatch):
    assert "the bundle has no engine" in run(on_tensorrt, bundle, "1\n").stderr
    assert "no profile for one sequence of 33 tokens" in run(on_tensorrt, with_engine(), "1 " * 33).stderr
    damaged = run(on_tensorrt, with_engine(plan=b"something"), "1\n").stderr
    assert "magic tag" in damaged
    assert "could not read the plan" in damaged
    monkeypatch.setenv("FAKE_REFUSE", "1")
    assert "could not start the engine" in run(on_tensorrt, with_engine(), "1\n").stderr
    monkeypatch.setenv("FAKE_NO_DEVICE", "1")
    done = run(on_tensorrt, with_engine(), "1\n")
    assert done.returncode == 2
    assert "no CUDA-capable device" in done.stderr

"""Packed bundles, engines that are rebuilt on load, and asynchronous runs."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedspine_edge.bundle.archive import pack
from fedspine_edge.bundle.bundle import EngineInfo, OptimizationProfile, load_bundle
from fedspine_edge.bundle.publish import seal, staging
from fedspine_edge.engine import cuda_driver
from fedspine_edge.errors import CheckpointError, ConfigError, DataError, DeployError, EngineIncompatible
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.runtime import engine_build
from fedspine_edge.runtime.session import Session

INPUTS = {"input_ids": np.arange(2, 9)[None], "attention_mask": np.ones((1, 7), np.int64)}


def test_packed_bundle_runs_and_leaves_no_files(bundle, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    packed = pack(bundle, tmp_path / "model.zip")
    assert pack(bundle, tmp_path / "again.zip").read_bytes() == packed.read_bytes()
    with Session.load(bundle) as folder, Session.load(packed) as file:
        np.testing.assert_array_equal(file.run(**INPUTS), folder.run(**INPUTS))
        assert file.classify("good film") == folder.classify("good film")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_compile_writes_zip_file(model_folder, tmp_path):
    out = compile_engine(model_folder, tmp_path / "model.zip", backend="onnxruntime")
    assert out == tmp_path / "model.zip"
    assert {path.name for path in tmp_path.iterdir()} == {"model.zip"}
    with zipfile.ZipFile(out) as archive:
        assert {m.compress_type for m in archive.infolist()} == {zipfile.ZIP_STORED}
    with Session.load(out) as session:
        assert session.run(**INPUTS).shape == (1, 3)


def test_pack_does_not_replace_other_files(model_folder, bundle, tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"precious")
    for call in (
        lambda: pack(bundle, tmp_path / "photos.zip"),
        lambda: compile_engine(model_folder, tmp_path / "photos.zip"),
    ):
        with pytest.raises(ConfigError, match="not a packed bundle"):
            call()
    assert (tmp_path / "photos.zip").read_bytes() == b"precious"
    with pytest.raises(ConfigError, match=r"\.zip"):
        pack(bundle, tmp_path / "model.tar")


def rewritten(packed, out, name=lambda n: n, data=lambda n, d: d, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(out, "w", compression) as target:
        for member in source.namelist():
            target.writestr(name(member), data(member, source.read(member)))
    return out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p, o: o.write_bytes(p.read_bytes()[:-30]) and o, "not a packed bundle"),
        (lambda p, o: rewritten(p, o, name=lambda n: "../" + n if n == "tokenizer.json" else n), "not a packed bundle"),
        (lambda p, o: rewritten(p, o, compression=zipfile.ZIP_DEFLATED), "not a packed bundle"),
        (lambda p, o: rewritten(p, o, data=lambda n, d: d[::-1] if n == "model.onnx" else d), "was altered"),
        (lambda p, o: o, "does not exist"),
    ],
)
def test_load_rejects_damaged_zip(bundle, tmp_path, damage, words):
    bad = damage(pack(bundle, tmp_path / "good.zip"), tmp_path / "bad.zip")
    with pytest.raises(CheckpointError, match=words):
        Session.load(bad)


def test_full_temporary_folder_is_named(bundle, tmp_path, monkeypatch):
    packed = pack(bundle, tmp_path / "model.zip")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(DeployError, match=f"temporary folder {scratch} is full") as caught:
        Session.load(packed)
    assert "TMPDIR" in caught.value.remedy
    assert list(scratch.iterdir()) == []
    out = tmp_path / "out" / "bundle"
    with pytest.raises(DeployError, match=f"temporary folder {scratch} is full"), staging(out):
        raise OSError(errno.ENOSPC, "No space left on device", str(scratch / "raw.onnx"))
    with pytest.raises(DeployError, match=f"{out} cannot be written"), staging(out):
        raise OSError(errno.ENOSPC, "No space left on device", str(out.parent / ".bundle.new-1" / "model.onnx"))


def with_stale_engine(bundle):
    """Add a plan of another TensorRT-RTX to the bundle."""
    (bundle / "engine.plan").write_bytes(b"plan of long ago")
    info = EngineInfo(
        backend="tensorrt_rtx",
        version="0.9",
        compute_capabilities=("86",),
        profiles=(OptimizationProfile(tokens=(1, 8, 16)),),
    )
    seal(bundle, msgspec.structs.replace(load_bundle(bundle).manifest, engine=info))
    return bundle


@pytest.mark.parametrize("packed", [False, True])
def test_load_rebuild_keeps_profiles_of_old_engine(bundle, tmp_path, monkeypatch, packed):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    if cuda_driver.device_info() is not None:
        pytest.skip("this test needs a machine without a GPU")
    target = pack(with_stale_engine(bundle), tmp_path / "model.zip") if packed else with_stale_engine(bundle)
    real = engine_build.build_plan

    def for_sm86(backend, model, options, **settings):  # as on a machine with such a GPU
        options = msgspec.structs.replace(options, compute_capabilities=("86",))
        return real(backend, model, options, **(settings | {"device": None}))

    monkeypatch.setattr(engine_build, "build_plan", for_sm86)
    monkeypatch.setattr(cuda_driver, "open_cuda", lambda index=0: pytest.fail("no engine can run here"))
    with Session.load(target, backend="auto", rebuild=True) as session:
        assert session.backend == "onnxruntime"
        assert "no GPU" in session.why
    with pytest.raises(EngineIncompatible, match="no GPU"):
        Session.load(target, backend="tensorrt_rtx", rebuild=True)
    folder = bundle
    if packed:
        folder = tmp_path / "out"
        with zipfile.ZipFile(target) as archive:
            archive.extractall(folder)
    info = load_bundle(folder).manifest.engine
    assert info.version != "0.9"
    assert info.profiles == (OptimizationProfile(tokens=(1, 8, 16)),)


def test_load_rebuild_without_tensorrt_falls_back(bundle, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    before = (with_stale_engine(bundle) / "engine.plan").read_bytes()
    with Session.load(bundle, rebuild=True) as session:
        assert session.backend == "onnxruntime"
    assert (bundle / "engine.plan").read_bytes() == before


def test_run_async_works_with_asyncio(bundle):
    async def both(session):
        runs = [asyncio.wrap_future(session.run_async(**INPUTS)) for _ in range(8)]
        return await asyncio.gather(*runs)

    with Session.load(bundle, threads=1) as session:
        expected = session.run(**INPUTS)
        for logits in asyncio.run(both(session)):
            np.testing.assert_allclose(logits, expected, atol=1e-6)
        with pytest.raises(DataError, match="missing"):
            session.run_async(input_ids=INPUTS["input_ids"]).result(timeout=10)
    with pytest.raises(DeployError, match="closed"):
        session.run_async(**INPUTS)


def test_runtime_modules_import_no_torch():
    code = (
        "import sys, fedspine_edge.runtime.session, fedspine_edge.runtime.engine_build\n"
        "import fedspine_edge.runtime.adapters\n"
        "bad = {'torch', 'transformers', 'onnx', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)

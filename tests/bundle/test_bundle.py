"""Bundles on disk: all kinds of damage are detected and named, and a failed build changes nothing."""

from __future__ import annotations

import json
import os
import re

import msgspec
import pytest

from fedspine_edge.bundle.bundle import (
    EngineInfo,
    OptimizationProfile,
    is_bundle,
    load_bundle,
    producer_versions,
    read_manifest,
)
from fedspine_edge.bundle.publish import seal, staging
from fedspine_edge.errors import CheckpointError, ConfigError, EngineIncompatible
from fedspine_edge.export.compile import compile_engine
from fedspine_edge.runtime.session import Session


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_plan(bundle):
    """Add a meaningless plan to the bundle."""
    (bundle / "engine.plan").write_bytes(b"plan" * 100)
    info = EngineInfo(
        backend="tensorrt", version="10.3.0", compute_capabilities=("87",), profiles=(OptimizationProfile(),)
    )
    manifest = msgspec.structs.replace(load_bundle(bundle).manifest, engine=info)
    seal(bundle, manifest)
    return bundle


def test_manifest_describes_model(bundle):
    manifest = load_bundle(bundle).manifest
    assert manifest.task == "classification"
    assert manifest.labels == ("bad", "mixed", "good")
    assert [(width.heads, width.channels) for width in manifest.widths] == [(3, 32), (2, 40)]
    assert manifest.sparsity == pytest.approx(0.36, abs=0.1)
    assert manifest.verification.max_abs_diff < manifest.verification.tolerance
    assert [tensor.name for tensor in manifest.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert manifest.engine is None
    assert manifest.engine_absent
    assert {"python", "torch", "onnx", "onnxruntime"} <= manifest.producer.keys()
    assert set(manifest.files) == {path.name for path in bundle.iterdir()} - {"bundle.json"}
    assert read_manifest(bundle).to_dict()["labels"] == ["bad", "mixed", "good"]


def test_manifest_of_earlier_release_has_same_digest(bundle):
    """Fields that were added later are omitted at their default, because the digest covers the whole manifest."""
    values = json.loads((bundle / "bundle.json").read_text())
    assert "noise" not in values["verification"]
    assert "mismatch" not in values["verification"]


def test_files_of_bundle_are_readable_by_other_users(model_folder, tmp_path, monkeypatch):
    """safetensors and onnx create some files with mode 0600."""
    monkeypatch.setattr("fedspine_edge.export.onnx_export.MAX_INLINE_BYTES", 1000)
    out = compile_engine(model_folder, tmp_path / "out", backend="onnxruntime", lora="inputs")
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert {"adapter.safetensors", "model.onnx.data", "bundle.json"} <= modes.keys()
    assert set(modes.values()) == {0o644}


def test_producer_versions_omits_missing_packages():
    assert "no-such-package" not in producer_versions("no-such-package")


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "bytes instead of"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "was altered"),
        (lambda data: b"", "has 0 bytes"),
    ],
)
def test_load_bundle_names_damaged_file_and_remedy(bundle, name, damage, words):
    (bundle / name).write_bytes(damage((bundle / name).read_bytes()))
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} .*{words}") as caught:
        load_bundle(bundle)
    assert "fedspine-edge compile" in caught.value.remedy


def test_load_bundle_names_missing_file(bundle):
    (bundle / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"model\.onnx is missing"):
        load_bundle(bundle)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[::-1]])
def test_load_bundle_damaged_plan_names_rebuild_command(bundle, damage):
    path = with_plan(bundle) / "engine.plan"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EngineIncompatible, match=r"engine\.plan") as caught:
        load_bundle(bundle)
    assert f"fedspine-edge compile {bundle} --out {bundle}" in caught.value.remedy
    assert load_bundle(bundle, ignore=("engine.plan",)).manifest.engine is not None


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b"damaged"), "was altered"),
        (lambda path: path.write_bytes(b""), "has 0 bytes instead of 7"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_damaged_timing_cache_warns_on_load(bundle, caplog, damage, words, backend):
    timings = bundle / "timing.cache"
    timings.write_bytes(b"timings")
    seal(bundle, load_bundle(bundle).manifest)
    with Session.load(bundle, backend=backend):
        assert not caplog.records
    damage(timings)
    with Session.load(bundle, backend=backend) as session:
        assert session.classify("good").label in ("bad", "mixed", "good")
    [warning] = caplog.records
    assert warning.levelname == "WARNING"
    for part in (f"{timings} {words}", "runs without it", f"fedspine-edge compile {bundle} --out {bundle}"):
        assert part in warning.getMessage()
    with pytest.raises(EngineIncompatible, match=rf"timing\.cache {words}"):
        load_bundle(bundle)
    compile_engine(bundle, bundle, backend="onnxruntime")
    assert "timing.cache" not in load_bundle(bundle).manifest.files


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"max_tokens": 66', '"max_tokens": 6600'),
        ('"good"', '"great"'),
        ('"max_tokens": 66', '"max_tokens": 0'),
        ('"max_tokens": 66', '"max_tokens": 66, "extra": 1'),
        ('"sha256"', '"md5"'),
    ],
)
def test_manifest_edited_is_rejected(bundle, old, new):
    text = (bundle / "bundle.json").read_text()
    assert old in text
    (bundle / "bundle.json").write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=r"bundle\.json"):
        load_bundle(bundle)


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_manifest_truncated_is_rejected(bundle, keep):
    data = (bundle / "bundle.json").read_bytes()
    (bundle / "bundle.json").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"bundle\.json"):
        load_bundle(bundle)


def test_manifest_of_other_version_names_both_versions(bundle):
    values = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(values | {"format_version": 9, "new_field": 1}))
    with pytest.raises(CheckpointError, match="format version 9; this release reads version 2"):
        load_bundle(bundle)


def test_manifest_rejects_paths_outside_folder(bundle):
    values = json.loads((bundle / "bundle.json").read_text())
    values["files"]["../secret"] = values["files"]["model.onnx"]
    (bundle / "bundle.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"bundle\.json cannot be read"):
        load_bundle(bundle)


def test_manifest_above_size_limit_is_not_parsed(bundle):
    with (bundle / "bundle.json").open("ab") as file:
        file.truncate(5 * 1024**2)
    with pytest.raises(CheckpointError, match="larger than"):
        load_bundle(bundle)


def test_load_bundle_rejects_other_folders(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a bundle"):
        load_bundle(tmp_path)
    assert not is_bundle(tmp_path)


def test_staging_error_keeps_old_bundle_and_cleans_up(bundle):
    before = snapshot(bundle)

    def fail():
        with staging(bundle) as draft:
            (draft / "model.onnx").write_bytes(b"half a model")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert snapshot(bundle) == before
    assert os.listdir(bundle.parent) == [bundle.name]


def test_staging_failed_rename_restores_old_bundle(bundle, monkeypatch):
    from pathlib import Path

    before = snapshot(bundle)
    manifest = load_bundle(bundle).manifest
    rename = Path.rename

    def failing(self, target):
        if self.name.startswith(f".{bundle.name}.new-"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"), staging(bundle) as draft:
        seal(draft, manifest)
    assert snapshot(bundle) == before
    assert os.listdir(bundle.parent) == [bundle.name]


def test_staging_replaces_all_files_of_old_bundle(bundle):
    manifest = load_bundle(bundle).manifest
    with staging(bundle) as draft:
        (draft / "model.onnx").write_bytes(b"new")
        seal(draft, manifest)
    assert {*snapshot(bundle)} == {"model.onnx", "bundle.json"}
    assert load_bundle(bundle).size_bytes == 3
    assert os.listdir(bundle.parent) == [bundle.name]


def test_staging_does_not_replace_other_folders(tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("do not delete")
    with pytest.raises(ConfigError, match="not a bundle"), staging(precious):
        pass
    assert (precious / "thesis.txt").read_text() == "do not delete"


@pytest.mark.parametrize("shapes", [{"batch": (2, 1, 4)}, {"tokens": (1, 64, 32)}, {"batch": (0, 1, 1)}])
def test_profile_out_of_order_raises(shapes):
    with pytest.raises(ConfigError, match="not in ascending order"):
        OptimizationProfile(**shapes)


def test_profile_covers_shapes_in_range():
    profile = OptimizationProfile(batch=(2, 2, 4), tokens=(8, 16, 32))
    assert profile.covers(2, 8)
    assert profile.covers(4, 32)
    assert not profile.covers(1, 8)
    assert not profile.covers(4, 33)

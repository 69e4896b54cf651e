"""Fixtures of the deployment tests: one tiny BERT folder and its bundle, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_deploy import tiny_model, write_tokenizer

from fedspine_edge.deploy.compile import compile_engine


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A saved tiny BERT with unequal widths and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    tiny_model("bert").save(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def shared_bundle(model_folder, tmp_path_factory) -> Path:
    """Its bundle for ONNX Runtime; not to be altered."""
    out = tmp_path_factory.mktemp("bundles") / "bert.bundle"
    return compile_engine(model_folder, out, backend="onnxruntime", labels=("bad", "mixed", "good"))


@pytest.fixture
def bundle(shared_bundle, tmp_path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "copy.bundle"))

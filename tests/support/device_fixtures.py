"""Fixtures of the device tests: a tiny model folder, tiny data, one torch thread."""

from pathlib import Path

import pytest
import tiny_bert


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    tiny_bert.write_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_csv(tmp_path_factory.mktemp("data") / "train.csv", tiny_bert.sentences(96))


@pytest.fixture(scope="session")
def tiny_base(tiny_folder):
    """One unpruned model; tests take copies through `ModelSource`."""
    from fedspine_edge.model.loading import load_base

    return load_base(tiny_folder, seed=7)

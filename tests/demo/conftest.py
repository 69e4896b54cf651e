"""Fixtures of the simulation tests: a tiny model and made-up data."""

from pathlib import Path

import pytest
import tiny_bert


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    tiny_bert.write_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.write_csv(tmp_path_factory.mktemp("data") / "all.csv", tiny_bert.sentences(480))

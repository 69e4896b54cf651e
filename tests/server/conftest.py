"""A fresh virtual fleet per test."""

from __future__ import annotations

import pytest
from fleet_fakes import Fleet


@pytest.fixture
def fleet(tmp_path):
    folder = tmp_path / "devices"
    folder.mkdir()
    return Fleet(folder)

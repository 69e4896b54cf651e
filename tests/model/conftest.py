"""Fixtures of the model tests."""

import pytest
import tiny_models as tiny
from one_thread import one_thread  # noqa: F401  a fixture

from fedspine_edge.model.checkpoint import save_model
from fedspine_edge.model.loading import load_base


@pytest.fixture
def base(tmp_path):
    """A plain folder with a tiny BERT encoder: no head, as a pretrained model has none."""
    folder = tmp_path / "base"
    tiny.module("bert").bert.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(base, tmp_path):
    """A folder that `save` wrote: pruned, with adapters."""
    model = load_base(base, num_labels=3)
    model.attach_lora(3, 2.0, 0)
    model.compact(tiny.random_layout(model, 1))
    return save_model(model, tmp_path / "saved")

"""Facts of the family table that several packages rely on."""

from __future__ import annotations

import pytest
import tiny_models as tiny
from transformers import BertConfig, RobertaConfig

from fedspine_edge.model.architecture import task_of
from fedspine_edge.model.families import architecture_of, max_tokens_of
from fedspine_edge.model.prunable import layout_of


def test_max_tokens_of_bert_is_the_size_of_its_table():
    config = BertConfig(max_position_embeddings=512)
    assert max_tokens_of(config) == architecture_of(config).hard_max_tokens(config) == 512


def test_max_tokens_of_roberta_starts_after_padding():
    config = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert max_tokens_of(config) == architecture_of(config).hard_max_tokens(config) == 512


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_hard_max_tokens_exists_only_for_learned_positions(kind):
    config = tiny.module(kind).config
    entry = architecture_of(config)
    assert entry.hard_max_tokens(config) == (entry.max_tokens(config) if entry.learned_positions else None)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_task_of_reads_the_class(kind):
    assert task_of(tiny.module(kind)) == tiny.task_of(kind)[1]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_layout_of_a_plain_module_is_full(kind):
    model = tiny.prunable(kind)
    assert layout_of(tiny.module(kind)).counts == layout_of(model).counts == model.layout.counts

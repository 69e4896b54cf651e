"""Loss and accuracy of a finished fleet's model on examples that no device trained on."""

from __future__ import annotations

from pathlib import Path

from fedspine_edge.config import DataSettings, OptimizerSettings
from fedspine_edge.data.loading import read
from fedspine_edge.export.fleet_model import load_fleet_model
from fedspine_edge.model.checkpoint import load_tokenizer
from fedspine_edge.training.base_model import choose_torch_device
from fedspine_edge.training.loss import can_pack
from fedspine_edge.training.tokenization import TextEncoder
from fedspine_edge.training.trainer import Evaluation, Trainer


def finished_accuracy(final: Path, base: Path, data: DataSettings, *, max_length_tokens: int) -> Evaluation:
    """Evaluate the pruned model of `final` on `data`. Raises as `load_fleet_model` and `load_examples` do."""
    model = load_fleet_model(final, base)
    model.module.to(choose_torch_device("auto"))
    texts = TextEncoder.of(model, load_tokenizer(base))
    examples = texts.encode(read(data.path, data, model.task), max_length_tokens)
    training = OptimizerSettings(max_length_tokens=max_length_tokens)
    packs = can_pack(model, max_length_tokens)
    trainer = Trainer(model, examples[:1], examples, training, round_steps=1, pad_id=texts.pad_id, pack=packs)
    return trainer.evaluate()

"""Loss and accuracy of a finished fleet's model on sentences that no device trained on."""

from __future__ import annotations

from pathlib import Path

from fedspine_edge.config import DataSettings
from fedspine_edge.device.batches import encode
from fedspine_edge.device.data import load_examples
from fedspine_edge.device.source import choose_torch_device
from fedspine_edge.device.trainer import Evaluation, Trainer
from fedspine_edge.model.checkpoint import load_tokenizer
from fedspine_edge.model.fleet_model import load_fleet_model
from fedspine_edge.wire.messages import Training


def finished_accuracy(final: Path, base: Path, data: DataSettings, *, max_length_tokens: int) -> Evaluation:
    """Evaluate the pruned model of `final` on `data`. Raises as `load_fleet_model` and `load_examples` do."""
    model = load_fleet_model(final, base)
    model.module.to(choose_torch_device("auto"))
    tokenizer = load_tokenizer(base)
    examples = encode(load_examples(data), tokenizer, max_length_tokens)
    trainer = Trainer(model, examples[:1], examples, Training(), round_steps=1, pad_id=int(tokenizer.pad_token_id))
    return trainer.evaluate()

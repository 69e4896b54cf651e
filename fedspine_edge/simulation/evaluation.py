"""Evaluation of a fleet's finished model on examples that no device trained on."""

from __future__ import annotations

from pathlib import Path

from fedspine_edge.config import DataSettings, OptimizerSettings
from fedspine_edge.data.loading import read_examples
from fedspine_edge.export.fleet_model import load_fleet_model
from fedspine_edge.model.loading import load_tokenizer
from fedspine_edge.training.base_model import choose_torch_device
from fedspine_edge.training.loss import can_pack
from fedspine_edge.training.tokenization import TextEncoder
from fedspine_edge.training.trainer import BatchSettings, Evaluation, Trainer


def evaluate_finished_model(final: Path, base: Path, data: DataSettings, *, max_length_tokens: int) -> Evaluation:
    """Return loss and accuracy of the pruned model in `final` on `data`.

    Args:
        final: Folder of the fleet's final adapter.
        base: Folder of the base model.
        data: The examples.
        max_length_tokens: Length to which texts are truncated.

    Raises as `load_fleet_model` and `read` do.
    """
    model = load_fleet_model(final, base)
    model.module.to(choose_torch_device("auto"))
    texts = TextEncoder.from_model(model, load_tokenizer(base))
    examples = texts.encode(read_examples(data.path, data, model.task), max_length_tokens)
    training = OptimizerSettings(max_length_tokens=max_length_tokens)
    packs = can_pack(model, max_length_tokens)
    trainer = Trainer(
        model, examples[:1], examples, training, round_steps=1, batches=BatchSettings(pad_id=texts.pad_id, pack=packs)
    )
    return trainer.evaluate()

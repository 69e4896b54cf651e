"""Child process that trains a few steps in a limited address space and prints the result."""

import json
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from fedspine_edge.config import OptimizerSettings
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.training.batching import Encoded
from fedspine_edge.training.trainer import Trainer


def main() -> None:
    spare_mib, out = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    )
    model = PrunableModel.from_module(BertForSequenceClassification(config).eval(), task="classification")
    model.attach_lora(4, 2.0, 0)
    rng = np.random.default_rng(0)
    data = [Encoded(rng.integers(1, 100, 64).tolist(), i % 2, [0] * 64) for i in range(64)]
    training = OptimizerSettings(batch_size=64, max_length_tokens=64, total_steps=4, learning_rate=1e-3)
    trainer = Trainer(model, data, [], training, round_steps=4, tracker=ImportanceTracker(model))
    warm = Trainer(model, data[:2], [], OptimizerSettings(batch_size=2), round_steps=1)
    warm.evaluate(data[:2])  # the libraries' own memory is taken before the limit
    if spare_mib:
        size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
        limit = int(size.split()[1]) * 1024 + spare_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    trainer.run(3, scored=True)
    np.savez(out, **model.adapter_state())
    print(json.dumps({"micro_batch": trainer.micro_batch, "ran_out": trainer.ran_out, "losses": trainer._losses}))


if __name__ == "__main__":
    main()

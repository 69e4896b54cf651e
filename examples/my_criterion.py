"""A custom pruning criterion on one device: one score for every head and channel, higher = keep.

    python examples/my_criterion.py train.csv --model base-model

The score here is the norm of a group's output weights: its columns of `o` or `down`. Widths, rounding, adapters,
optimizer state and checkpoints are handled as for the built-in criteria.
"""

import argparse
from dataclasses import replace

import numpy as np

from fedspine_edge import EdgeTuner, GroupScores, PruningSettings, select_layout


def output_norms(tuner: EdgeTuner) -> GroupScores:
    """Return the scores of the remaining groups, layer by layer, in the order of `tuner.layout`."""
    found = {"o": [], "down": []}
    for layer in range(tuner.layout.spec.num_layers):
        for part, scores in found.items():
            name = f"layers.{layer}.{part}"
            per_column = tuner.model.linear(name).merged_weight().detach().float().square().sum(0).numpy()
            group = tuner.layout.group_of(name, by_position=True)  # the group of each column
            scores.append(np.sqrt(np.bincount(group, per_column)).astype(np.float32))
    return GroupScores(found["o"], found["down"])


def prune(tuner: EdgeTuner, pruning_ratio: float) -> None:
    """Prune by `output_norms`, as `tuner.prune` does by the built-in criteria."""
    preview = tuner.preview(pruning_ratio)
    scores = output_norms(tuner)
    tuner.prune(replace(preview, scores=scores, after=select_layout(scores, tuner.layout, pruning_ratio)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CSV file with the columns text and label")
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--num-labels", type=int, default=2)
    arguments = parser.parse_args()
    pruning = PruningSettings(criterion="magnitude")  # its scores are replaced by those above
    tuner = EdgeTuner.from_pretrained(arguments.model, num_labels=arguments.num_labels, r=8, pruning=pruning)
    tuner.fit(arguments.data, steps=40)
    prune(tuner, 0.5)
    tuner.fit(arguments.data, steps=40)
    print(f"pruning ratio {tuner.layout.pruning_ratio:.3f}, {tuner.evaluate(arguments.data)}")

"""Pruning a part at a time, with scored training in between, so that what is left can take over."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fedspine_edge.model.layout import Layout
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.training.trainer import Trainer

log = logging.getLogger("fedspine_edge.tuner")


def prune_in_stages(
    tracker: ImportanceTracker,
    trainer: Trainer | None,
    layout_at: Callable[[float], Layout],
    pruning_ratio: float,
    *,
    stages: int,
    steps: int,
    advance: Callable[[], None],
) -> None:
    """Shrink the tracker's model from its present ratio to `pruning_ratio`; most goes in the first stage.

    Args:
        tracker: Of the model; where it has no scores yet, `steps` scoring steps come first.
        trainer: Takes the steps; None if none is needed.
        layout_at: The layout that the present scores give at a ratio.
        pruning_ratio: Share of prunable parameters gone afterwards.
        stages: Parts in which to remove.
        steps: Scored training steps between two parts.
        advance: Called after each step.
    """
    start = tracker.model.layout.pruning_ratio
    if not tracker.ready and trainer is not None:
        log.warning("no training step was scored yet: taking %d scoring steps before pruning", steps)
        trainer.run(steps, scored=True, on_step=advance)
    for stage in range(1, stages + 1):
        share = 1.0 - (1.0 - stage / stages) ** 3
        layout = layout_at(max(start, start + (pruning_ratio - start) * share))
        if trainer is None:
            tracker.model.compact(layout, importance=tracker)
        else:
            trainer.compact(layout)
            if stage < stages:
                trainer.run(trainer.step + steps, scored=True, on_step=advance)

"""The training loop of one device: a fit with progress, checkpoints and curves, and pruning in stages."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fedspine_edge.model.layout import Layout
from fedspine_edge.pruning.importance import ImportanceTracker
from fedspine_edge.training.checkpoint import FitCheckpoint
from fedspine_edge.training.progress import progress_bar
from fedspine_edge.training.trainer import Trainer

log = logging.getLogger("fedspine_edge.tuner")

SCORED_STEPS = 40
"""Steps at the end of a fit whose gradients are scored. With a decay of 0.9, earlier steps hardly count."""


def run_fit(
    trainer: Trainer,
    total_steps: int,
    *,
    checkpoint: FitCheckpoint | None,
    write_curves: Callable[[Trainer], None] | None,
    progress: bool | None,
    on_step: Callable[[int, float | None], None] | None,
) -> None:
    """Train until step `total_steps`, from the step in `checkpoint`.

    Args:
        trainer: Trainer at its first step.
        total_steps: Steps of the whole fit.
        checkpoint: Stores the state; None to store nothing.
        write_curves: Called with the trainer after each step.
        progress: As in `EdgeTuner.fit`.
        on_step: Called after each step with its number, from 1, and the last loss.

    Raises as `EdgeTuner.fit` does.
    """
    if checkpoint is not None:
        checkpoint.resume(trainer)
    with progress_bar("fit", total_steps, progress, done=trainer.step) as advance:

        def after_step() -> None:
            loss = trainer.last_loss
            advance(1, "" if loss is None else f"loss {loss:.3f}")
            if checkpoint is not None:
                checkpoint.save(trainer)
            if write_curves is not None:
                write_curves(trainer)
            if on_step is not None:
                on_step(trainer.step, loss)

        trainer.run(max(0, total_steps - SCORED_STEPS), on_step=after_step)
        trainer.run(total_steps, scored=True, on_step=after_step)


def prune_in_stages(
    tracker: ImportanceTracker,
    trainer: Trainer | None,
    layout_at: Callable[[float], Layout],
    pruning_ratio: float,
    *,
    stages: int,
    steps: int,
    advance: Callable[[], None],
    before_cut: Callable[[Layout], None] | None = None,
) -> None:
    """Prune the tracker's model to `pruning_ratio` in stages, with scored training in between.

    The first stage removes most, so that the remaining groups have time to compensate.

    Args:
        tracker: Importance tracker of the model. If it has no scores yet, `steps` scored steps are taken first.
        trainer: Trainer for the steps; None if no step is needed.
        layout_at: Function from a ratio to the layout that the present scores select.
        pruning_ratio: Share of prunable parameters removed afterwards.
        stages: Number of stages.
        steps: Scored training steps between two stages.
        advance: Called after each step.
        before_cut: Called with each stage's layout right before the model is pruned to it.
    """
    start = tracker.model.layout.pruning_ratio
    if not tracker.ready and trainer is not None:
        log.warning("no training step was scored yet: taking %d scored steps before pruning", steps)
        trainer.run(steps, scored=True, on_step=advance)
    for stage in range(1, stages + 1):
        share = 1.0 - (1.0 - stage / stages) ** 3
        layout = layout_at(max(start, start + (pruning_ratio - start) * share))
        if before_cut is not None:
            before_cut(layout)
        if trainer is None:
            tracker.model.compact(layout, importance=tracker)
        else:
            trainer.compact(layout)
            if stage < stages:
                trainer.run(trainer.step + steps, scored=True, on_step=advance)

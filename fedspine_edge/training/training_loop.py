"""One training run of one device: the last steps are scored, every step is shown, kept and told."""

from __future__ import annotations

from collections.abc import Callable

from fedspine_edge.training.checkpoint import FitCheckpoint
from fedspine_edge.training.progress import bar
from fedspine_edge.training.trainer import Trainer

SCORED_STEPS = 40
"""Steps at the end of a fit whose gradients are scored: with a decay of 0.9 the ones before hardly count."""


def run_fit(
    trainer: Trainer,
    total: int,
    *,
    saver: FitCheckpoint | None,
    curves: Callable[[Trainer], None] | None,
    progress: bool | None,
    on_step: Callable[[int, float | None], None] | None,
) -> None:
    """Take `trainer` to step `total`, from where `saver` has it.

    Args:
        trainer: Of the model, at its first step.
        total: Steps of the whole fit.
        saver: Keeps the state; None keeps nothing.
        curves: Called with the trainer after each step.
        progress: As in `EdgeTuner.fit`.
        on_step: Called after each step with its number, from 1, and the last loss.

    Raises as `EdgeTuner.fit` does.
    """
    if saver is not None:
        saver.resume(trainer)
    with bar("fit", total, progress, done=trainer.step) as advance:

        def stepped() -> None:
            loss = trainer.last_loss
            advance(1, "" if loss is None else f"loss {loss:.3f}")
            if saver is not None:
                saver.stepped(trainer)
            if curves is not None:
                curves(trainer)
            if on_step is not None:
                on_step(trainer.step, loss)

        trainer.run(max(0, total - SCORED_STEPS), on_step=stepped)
        trainer.run(total, scored=True, on_step=stepped)

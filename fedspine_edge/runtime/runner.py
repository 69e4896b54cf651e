"""The interface between a session and the backend that runs its model."""

from __future__ import annotations

from typing import Any, Protocol

from fedspine_edge.arrays import Array


class Runner(Protocol):
    """Runs a model on validated inputs. All methods can be called from several threads.

    Attributes:
        max_batch: Largest batch, or None if the runner has no limit.
        max_tokens: Longest sequence, or None if only the model limits it.
    """

    max_batch: int | None
    max_tokens: int | None

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Return all outputs of the model except the KV cache."""

    def step(self, inputs: dict[str, Array], state: Any, *, last: bool = False) -> tuple[Array, Any]:
        """Run the next tokens of a decoder.

        Args:
            inputs: Inputs of the model without the KV cache.
            state: Opaque KV cache that the previous step returned; None for the first step.
            last: Return the logits of the last token only.

        Returns the logits, (batch, tokens, vocabulary) or with `last` (batch, 1, vocabulary), and the new state.
        """

    def release(self, state: Any) -> None:
        """Free the memory of a state that `step` returned."""

    def close(self) -> None:
        """Free the model. Calling it again has no effect."""

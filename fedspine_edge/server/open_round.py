"""One attempt at a round while the server waits for its reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedspine_edge.protocol.codec import Tensor
from fedspine_edge.server.journal.schema import IssuedPlan
from fedspine_edge.server.update_validation import ValidationRules


@dataclass(frozen=True)
class OpenRound:
    """One attempt at a round.

    Attributes:
        server_round: The round, from 1.
        attempt: The attempt, from 1.
        plans: The plan of every participant, by device id.
        tensors: What the round starts from: adapter in full coordinates, task head and order.
        rules: What the participants' updates are validated against.
        resumed: Whether the server was restarted within the round. Devices then repeat their reports without chunks.
    """

    server_round: int
    attempt: int
    plans: Mapping[str, IssuedPlan]
    tensors: Mapping[str, Tensor]
    rules: ValidationRules
    resumed: bool = False

"""What a device says of itself when it connects and after every round."""

from __future__ import annotations

from typing import Literal

from fedspine_edge.config import DeviceConfig
from fedspine_edge.device.device_state import PersistedState
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.protocol.messages import Status
from fedspine_edge.training.memory import rank_costs
from fedspine_edge.version import __version__


def status_of(
    config: DeviceConfig,
    record: PersistedState,
    state: Literal["online", "offline"],
    *,
    num_examples: int,
    model: PrunableModel | None,
    longest_tokens: int,
) -> Status:
    """The device's status.

    Args:
        config: Its settings.
        record: What it has done so far.
        state: Whether it stays.
        num_examples: On which it trains.
        model: To estimate the memory by rank, if a memory limit is set; None leaves the estimate out.
        longest_tokens: Of an example of the fleet's rounds.
    """
    costs = (0, 0)
    if config.memory_limit_mib and model is not None and state == "online":
        costs = rank_costs(model, tokens=longest_tokens, limit_bytes=config.memory_limit_mib * 2**20)
    return Status(
        device_id=config.device_id,
        state=state,
        model=record.standing.layout.spec,
        device_class=config.device_class,
        num_examples=num_examples,
        task=config.task,
        num_labels=config.num_labels,
        memory_bytes=config.memory_limit_mib * 1024 * 1024,
        memory_base_bytes=costs[0],
        memory_per_rank_bytes=costs[1],
        pruning_ratio=record.standing.pruning_ratio,
        version=__version__,
    )

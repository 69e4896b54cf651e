"""Who prunes how much and tunes at which rank: one small file per strategy, over shared parts."""

from fedspine_edge.strategies.base import Assignment, DeviceInfo, RoundOutcome, Strategy
from fedspine_edge.strategies.registry import create

__all__ = ["Assignment", "DeviceInfo", "RoundOutcome", "Strategy", "create"]

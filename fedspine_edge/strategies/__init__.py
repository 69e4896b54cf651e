"""Strategies: which pruning ratio and LoRA rank each device gets in each round. One small file per strategy.

A custom strategy subclasses `BaseStrategy` or implements the protocol `Strategy`; see examples/my_strategy.py.
"""

from fedspine_edge.bandit.reward import RewardTerms, RoundOutcome
from fedspine_edge.strategies.base import Assignment, BaseStrategy, DeviceInfo, Strategy, pruning_schedule
from fedspine_edge.strategies.fedspine import FedSpine
from fedspine_edge.strategies.registry import create

__all__ = [
    "Assignment",
    "BaseStrategy",
    "DeviceInfo",
    "FedSpine",
    "RewardTerms",
    "RoundOutcome",
    "Strategy",
    "create",
    "pruning_schedule",
]

"""Strategies: which pruning ratio and LoRA rank each device gets in each round. One small file per strategy."""

from fedspine_edge.bandit.reward import Outcome, RewardTerms
from fedspine_edge.strategies.base import (
    Assignment,
    BaseStrategy,
    Choice,
    DeviceInfo,
    RoundOutcome,
    Strategy,
    envelope,
)
from fedspine_edge.strategies.fedspine import FedSpine
from fedspine_edge.strategies.registry import create

__all__ = [
    "Assignment",
    "BaseStrategy",
    "Choice",
    "DeviceInfo",
    "FedSpine",
    "Outcome",
    "RewardTerms",
    "RoundOutcome",
    "Strategy",
    "create",
    "envelope",
]

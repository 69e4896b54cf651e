"""Fine-tune, prune and deploy language models on fleets of NVIDIA Jetsons.

This module, `fedspine_edge.strategies` and `fedspine_edge.errors` are the public API. `import fedspine_edge` imports
nothing heavy: each name loads its part of the package, and that part's optional dependencies, on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedspine_edge.errors import FedspineError, MissingDependency
from fedspine_edge.version import __version__

if TYPE_CHECKING:
    from fedspine_edge.bundle.bundle import OptimizationProfile as OptimizationProfile
    from fedspine_edge.config import BrokerSettings as BrokerSettings
    from fedspine_edge.config import DataSettings as DataSettings
    from fedspine_edge.config import DeviceConfig as DeviceConfig
    from fedspine_edge.config import FleetConfig as FleetConfig
    from fedspine_edge.config import load_config as load_config
    from fedspine_edge.data.examples import Example as Example
    from fedspine_edge.device.agent import FleetDevice as FleetDevice
    from fedspine_edge.export.compile import compile_engine as compile_engine
    from fedspine_edge.model.checkpoint import load_model as load_model
    from fedspine_edge.model.checkpoint import save_model as save_model
    from fedspine_edge.model.loading import load_base as load_base
    from fedspine_edge.model.loading import load_tokenizer as load_tokenizer
    from fedspine_edge.pruning.importance import ImportanceTracker as ImportanceTracker
    from fedspine_edge.pruning.selection import GroupScores as GroupScores
    from fedspine_edge.pruning.selection import PruningSettings as PruningSettings
    from fedspine_edge.pruning.selection import select_layout as select_layout
    from fedspine_edge.runtime.session import Session as Session
    from fedspine_edge.server.server import FleetServer as FleetServer
    from fedspine_edge.simulation.device_classes import DeviceClass as DeviceClass
    from fedspine_edge.strategies.base import Assignment as Assignment
    from fedspine_edge.strategies.base import BaseStrategy as BaseStrategy
    from fedspine_edge.transport.broker import EmbeddedBroker as EmbeddedBroker
    from fedspine_edge.transport.mqtt import MqttTransport as MqttTransport
    from fedspine_edge.tuner import ColumnNames as ColumnNames
    from fedspine_edge.tuner import EdgeTuner as EdgeTuner
    from fedspine_edge.tuner import MemorySettings as MemorySettings

_LAZY = {
    # one device
    "EdgeTuner": "fedspine_edge.tuner",
    "ColumnNames": "fedspine_edge.tuner",
    "MemorySettings": "fedspine_edge.tuner",
    "PruningSettings": "fedspine_edge.pruning.selection",
    "DataSettings": "fedspine_edge.config",
    "Example": "fedspine_edge.data.examples",
    "load_base": "fedspine_edge.model.loading",
    "load_model": "fedspine_edge.model.checkpoint",
    "save_model": "fedspine_edge.model.checkpoint",
    "load_tokenizer": "fedspine_edge.model.loading",
    "GroupScores": "fedspine_edge.pruning.selection",
    "ImportanceTracker": "fedspine_edge.pruning.importance",
    "select_layout": "fedspine_edge.pruning.selection",
    # deployment
    "compile_engine": "fedspine_edge.export.compile",
    "OptimizationProfile": "fedspine_edge.bundle.bundle",
    "Session": "fedspine_edge.runtime.session",
    # a fleet
    "FleetServer": "fedspine_edge.server.server",
    "FleetDevice": "fedspine_edge.device.agent",
    "FleetConfig": "fedspine_edge.config",
    "DeviceConfig": "fedspine_edge.config",
    "BrokerSettings": "fedspine_edge.config",
    "load_config": "fedspine_edge.config",
    "MqttTransport": "fedspine_edge.transport.mqtt",
    "EmbeddedBroker": "fedspine_edge.transport.broker",
    # strategies and simulation
    "BaseStrategy": "fedspine_edge.strategies.base",
    "Assignment": "fedspine_edge.strategies.base",
    "DeviceClass": "fedspine_edge.simulation.device_classes",
}
__all__ = [
    "Assignment",
    "BaseStrategy",
    "BrokerSettings",
    "ColumnNames",
    "DataSettings",
    "DeviceClass",
    "DeviceConfig",
    "EdgeTuner",
    "EmbeddedBroker",
    "Example",
    "FedspineError",
    "FleetConfig",
    "FleetDevice",
    "FleetServer",
    "GroupScores",
    "ImportanceTracker",
    "MemorySettings",
    "MqttTransport",
    "OptimizationProfile",
    "PruningSettings",
    "Session",
    "__version__",
    "compile_engine",
    "load_base",
    "load_config",
    "load_model",
    "load_tokenizer",
    "save_model",
    "select_layout",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            module = importlib.import_module(_LAZY[name])
        except ModuleNotFoundError as error:
            raise MissingDependency.from_import(error, purpose=name) from None
        return getattr(module, name)
    raise AttributeError(f"module 'fedspine_edge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""fedspine_edge: fine-tune, prune and deploy language models on fleets of NVIDIA Jetsons.

`import fedspine_edge` is light: the names below load their part of the package, and its optional
dependencies, when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedspine_edge.errors import MissingDependency
from fedspine_edge.version import __version__

if TYPE_CHECKING:
    from fedspine_edge.device.agent import FleetDevice as FleetDevice
    from fedspine_edge.export.compile import compile_engine as compile_engine
    from fedspine_edge.model.checkpoint import load_model as load_model
    from fedspine_edge.runtime.session import Session as Session
    from fedspine_edge.server.server import FleetServer as FleetServer
    from fedspine_edge.tuner import EdgeTuner as EdgeTuner

_LAZY = {
    "EdgeTuner": "fedspine_edge.tuner",
    "FleetDevice": "fedspine_edge.device.agent",
    "FleetServer": "fedspine_edge.server.server",
    "Session": "fedspine_edge.runtime.session",
    "compile_engine": "fedspine_edge.export.compile",
    "load_model": "fedspine_edge.model.checkpoint",
}
__all__ = ["EdgeTuner", "FleetDevice", "FleetServer", "Session", "__version__", "compile_engine", "load_model"]


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

"""Creates the strategy that the setting `strategy` names: a built-in one, or 'module:attribute'."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from fedspine_edge.config import FleetConfig
from fedspine_edge.errors import ConfigError, FedspineError
from fedspine_edge.strategies.base import Strategy, missing_methods

BUILT_IN = {
    "fedspine": "fedspine_edge.strategies.fedspine:FedSpine",
    "fixed": "fedspine_edge.strategies.fixed:Fixed",
    "fedlora": "fedspine_edge.strategies.fedlora:FedLoRA",
    "hetlora": "fedspine_edge.strategies.hetlora:HetLoRA",
    "fedapt": "fedspine_edge.strategies.fedapt:FedAPT",
    "prune_then_tune": "fedspine_edge.strategies.prune_then_tune:PruneThenTune",
    "tune_then_prune": "fedspine_edge.strategies.tune_then_prune:TuneThenPrune",
}
"""Name → module and class, imported when used."""


def create(config: FleetConfig) -> Strategy:
    """Return the strategy that `config.strategy` names.

    'module:attribute' may be anything that can be called with a `FleetConfig` and returns a `Strategy`.

    Raises:
        ConfigError: The name, module or attribute is unknown, what it names is not a strategy, or the strategy does
            not support `config`.
    """
    name = config.strategy
    if ":" not in name and name not in BUILT_IN:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        raise ConfigError(
            f"strategy {name!r} is not known.",
            remedy=f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(BUILT_IN)}, or 'module:attribute'.",
        )
    factory = _load(BUILT_IN.get(name, name))
    try:
        strategy = factory(config)
    except FedspineError:
        raise
    except Exception as error:
        raise ConfigError(
            f"strategy {name!r} could not be created: {type(error).__name__}: {error}.",
            remedy="It is called with one argument, the FleetConfig.",
        ) from error
    if missing := missing_methods(strategy):
        raise ConfigError(
            f"strategy {name!r} is a {type(strategy).__name__}, which lacks: {', '.join(missing)}.",
            remedy="fedspine_edge.strategies.Strategy documents the interface.",
        )
    return strategy  # type: ignore[no-any-return]


def _load(path: str) -> Any:
    """Import the callable at 'module:attribute'."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(
            f"strategy {path!r} is not of the form 'module:attribute'.", remedy="For example 'my_module:MyStrategy'."
        )
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"strategy {path!r}: module {module_name!r} could not be imported: {type(error).__name__}: {error}.",
            remedy="Its folder must be on PYTHONPATH, and importing it must not raise an error.",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                f"strategy {path!r}: {getattr(found, '__name__', found)!r} has no attribute {part!r}.",
                remedy=f"It has: {', '.join(n for n in vars(found) if not n.startswith('_')) or 'nothing'}.",
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"strategy {path!r} is a {type(found).__name__} and cannot be called.", remedy="Name a class."
        )
    return found

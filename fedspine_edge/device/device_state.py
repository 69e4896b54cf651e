"""What a device carries from round to round, and its durable form."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fedspine_edge.config import DeviceConfig
from fedspine_edge.errors import LayoutError
from fedspine_edge.model.layout import Layout, Order
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.messages import Report
from fedspine_edge.training.state_dir import (
    StateDir,
    StateRecord,
    Tensors,
    prefixed,
    unprefixed,
)

DEVICE = "device"


@dataclass(frozen=True)
class PruningState:
    """Where a device stands in its run."""

    layout: Layout
    pruning_ratio: float = 0.0
    """What the plans so far asked for; the layout fulfils it within one group."""
    importance: Tensors | None = None
    """The tracker's state, aligned with `layout`; None before the first round."""

    def starts_at(self, order: Order | None) -> Layout:
        """The layout that the next round starts from, given the fleet's order, if there is one.

        The base is frozen and the adapter comes from the fleet, so a device whose earlier prune step the fleet never
        heard of can return to the common order; what it lacks is read from the base again.
        """
        layout = self.layout
        return layout if order is None else Layout.prefix(layout.spec, order, layout.counts)


@dataclass(frozen=True)
class RoundResult:
    """A finished round."""

    report: Report
    update: bytes
    standing: PruningState


@dataclass
class PersistedState:
    """The content of device.state: which run, how far, and what was last reported."""

    standing: PruningState
    run_id: str = ""
    report: Report | None = None
    acked: bool = True
    """Whether the report had its final ack, or was overtaken by a newer plan."""

    def save(self, state: StateDir, config: DeviceConfig) -> None:
        """Make it durable."""
        info = {
            **_identity(config, self.standing.layout.spec),
            "run_id": self.run_id,
            "pruning_ratio": self.standing.pruning_ratio,
            "report": None if self.report is None else msgspec.to_builtins(self.report),
            "acked": self.acked,
        }
        importance = self.standing.importance or {}
        tensors = {**self.standing.layout.to_tensors(), **prefixed("importance.", importance)}
        state.write(DEVICE, StateRecord(info, tensors))

    @classmethod
    def load(cls, state: StateDir, config: DeviceConfig, spec: ModelSpec) -> PersistedState:
        """What `save` wrote, or that of a new device.

        Raises `CheckpointError` when the folder belongs to another device, fleet or base model, or is damaged.
        """
        saved = state.read(DEVICE)
        if saved is None:
            return cls(PruningState(Layout.full(spec)))
        for key, mine in _identity(config, spec).items():
            if saved.info.get(key) != mine:
                raise state.damaged(DEVICE, f"it was written with another {key}")
        try:
            report = saved.info["report"]
            return cls(
                PruningState(
                    Layout.from_tensors(spec, saved.tensors),
                    float(saved.info["pruning_ratio"]),
                    unprefixed("importance.", saved.tensors) or None,
                ),
                run_id=str(saved.info["run_id"]),
                report=None if report is None else msgspec.convert(report, Report),
                acked=bool(saved.info["acked"]),
            )
        except (KeyError, TypeError, ValueError, LayoutError) as error:
            raise state.damaged(DEVICE, f"it is incomplete ({type(error).__name__})") from error


def _identity(config: DeviceConfig, spec: ModelSpec) -> dict[str, str | int]:
    return {
        "device_id": config.device_id,
        "fleet": config.fleet,
        "base_sha256": spec.base_sha256,
        "task": config.task,
        "num_labels": config.num_labels,
    }

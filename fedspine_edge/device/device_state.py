"""State that a device carries from round to round, and its durable form."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fedspine_edge.arrays import Tensors
from fedspine_edge.config import DeviceConfig
from fedspine_edge.errors import LayoutError
from fedspine_edge.model.layout import Layout, Order
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol.messages import Report
from fedspine_edge.training.state_dir import StateDir, StateRecord, prefixed, unprefixed

DEVICE = "device"


@dataclass(frozen=True)
class PruningState:
    """Result of the pruning so far.

    Attributes:
        layout: Groups that the device keeps.
        pruning_ratio: Pruning ratio of the plans so far. The layout reaches it to within one group.
        importance: State of the importance tracker, aligned with `layout`; None before the first round.
    """

    layout: Layout
    pruning_ratio: float = 0.0
    importance: Tensors | None = None

    def initial_layout(self, order: Order | None) -> Layout:
        """Return the layout from which the next round starts.

        A device whose last pruning step the server never received can return to the common order, because the base is
        frozen and the adapter comes from the server. Groups that it lacks are loaded from the base again.

        Args:
            order: The consensus order; None if there is none, or if layouts are local.
        """
        layout = self.layout
        return layout if order is None else Layout.prefix(layout.spec, order, layout.counts)


@dataclass(frozen=True)
class RoundResult:
    """Result of a round that succeeded."""

    report: Report
    update: bytes
    pruning_state: PruningState


@dataclass
class PersistedState:
    """Content of the state file: the run, the pruning so far, and the last report.

    Attributes:
        acked: Whether the report has a final answer, or a newer plan has replaced it.
    """

    pruning_state: PruningState
    run_id: str = ""
    report: Report | None = None
    acked: bool = True

    def save(self, state: StateDir, config: DeviceConfig) -> None:
        """Write the state file."""
        info = {
            **_identity(config, self.pruning_state.layout.spec),
            "run_id": self.run_id,
            "pruning_ratio": self.pruning_state.pruning_ratio,
            "report": None if self.report is None else msgspec.to_builtins(self.report),
            "acked": self.acked,
        }
        importance = self.pruning_state.importance or {}
        tensors = {**self.pruning_state.layout.to_tensors(), **prefixed("importance.", importance)}
        state.write(DEVICE, StateRecord(info, tensors))

    @classmethod
    def load(cls, state: StateDir, config: DeviceConfig, spec: ModelSpec) -> PersistedState:
        """Read the state file, or return the state of a new device.

        Raises `CheckpointError` if the folder is damaged, or belongs to another device, fleet or base model.
        """
        saved = state.read(DEVICE)
        if saved is None:
            return cls(PruningState(Layout.full(spec)))
        for key, current in _identity(config, spec).items():
            if saved.info.get(key) != current:
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

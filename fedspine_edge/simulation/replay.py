"""Replay devices, whose training is replaced by recorded losses, so that thousands of them run in minutes.

Server, strategy, protocol, update validation and aggregation are the real ones, and a device's completion time comes
from the same cost model as in a run with real training. Losses, accuracies and importances come from a recorded round
of a device, one near in progress, pruning ratio and rank. The update is the received adapter plus seeded noise. The
reason of every report states this, because such a run gives no information about models.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedspine_edge.arrays import Tensors
from fedspine_edge.clock import VirtualClock
from fedspine_edge.config import DeviceConfig
from fedspine_edge.device.adapter_download import AdapterDownload
from fedspine_edge.device.cost_meter import CostMeter, emulated_conditions
from fedspine_edge.device.protocol_session import ProtocolSession, RoundOutcome
from fedspine_edge.errors import BlobError, ConfigError
from fedspine_edge.model.layout import Layout, module_names, target_counts
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.monitoring.run_view import read_run
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.blobs import (
    KEEP,
    adapter_tensors,
    order_from_tensors,
    scores_to_tensors,
)
from fedspine_edge.protocol.chunks import ref_of
from fedspine_edge.protocol.messages import MAX_BLOB_BYTES, Ack, Report, RoundPlan, Status
from fedspine_edge.protocol.rank_slices import merge_slices
from fedspine_edge.protocol.topics import Topics
from fedspine_edge.simulation.cost_model import MINILM, SMALL, factor_elements, record_work, typical_layout
from fedspine_edge.simulation.virtual_network import VirtualTransport
from fedspine_edge.transport.base import Event

REASON = "training replaced by recorded losses"
_NEAREST = 6
"""Number of nearest samples from which one is drawn."""


@dataclass(frozen=True)
class LossSample:
    """One round of a device with real training.

    Attributes:
        progress: Share of the run's rounds that had started before.
    """

    progress: float
    pruning_ratio: float
    r: int
    loss_before: float
    loss_after: float
    accuracy_before: float
    accuracy_after: float
    lora_importance: float


@dataclass(frozen=True)
class LossRecord:
    """Samples of real runs.

    Attributes:
        source: Description of the runs.
        points: The samples.
    """

    source: str
    points: tuple[LossSample, ...]

    def draw(self, progress: float, pruning_ratio: float, r: int, rng: random.Random) -> LossSample:
        """Draw one of the samples nearest to the given progress, pruning ratio and rank."""

        def distance(point: LossSample) -> float:
            return (
                abs(point.progress - progress)
                + abs(point.pruning_ratio - pruning_ratio)
                + 0.1 * abs(math.log2(point.r / r))
            )

        return rng.choice(sorted(self.points, key=distance)[:_NEAREST])

    def save(self, path: Path) -> None:
        """Write as JSON, one sample per line."""
        points = ",\n  ".join(json.dumps(asdict(point)) for point in self.points)
        path.write_text(f'{{"source": {json.dumps(self.source)}, "points": [\n  {points}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> LossRecord:
        """Read a file that `save` wrote. Raises `ConfigError` if it is not one."""
        try:
            data = json.loads(path.read_text())
            return cls(data["source"], tuple(LossSample(**point) for point in data["points"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a loss record: {error}.") from error

    @classmethod
    def of_runs(cls, run_dirs: Sequence[Path], source: str) -> LossRecord:
        """Collect the samples of finished runs. Raises `ConfigError` for a run that was itself a replay."""
        points = []
        for run_dir in run_dirs:
            view = read_run(run_dir)
            for row in view.rows:
                if row.reason == REASON:
                    raise ConfigError(f"{run_dir} is a replay of recorded losses. Record real training only.")
                measured = (row.loss_before, row.loss_after, row.accuracy_before, row.accuracy_after)
                figures = [float(f"{v:.5g}") for v in (*measured, row.lora_importance) if v is not None]
                if row.status == "ok" and len(figures) == 5:
                    progress = (row.server_round - 1) / view.num_rounds
                    points.append(LossSample(progress, round(row.pruning_ratio, 4), row.r, *figures))
        return cls(source, tuple(points))


BUILT_IN = Path(__file__).with_name("recorded_losses.json")


@dataclass
class ReplayContext:
    """State that all replay devices of a process share.

    Attributes:
        record: The recorded losses.
        spec: Model of the messages.
        cost_spec: Model whose steps and bytes determine the cost. It may differ from `spec`.
        tokens: Padded length of a batch.
        merged: Adapter of the current round and the layout that it holds, by the hashes of its blobs.
    """

    record: LossRecord
    spec: ModelSpec = SMALL
    cost_spec: ModelSpec = MINILM
    tokens: int = 32
    merged: dict[tuple[str, ...], tuple[Tensors, Layout]] = field(default_factory=dict)

    def adapter(self, plan: RoundPlan, blobs: Sequence[bytes]) -> tuple[Tensors, Layout]:
        """Return the round's adapter and the layout that it holds, decoded once for all devices of a rank."""
        key = tuple(ref.sha256 for ref in plan.adapter)
        if key not in self.merged:
            if any(other[0] != key[0] for other in self.merged):
                self.merged.clear()
            self.merged[key] = merge_slices([codec.unpack(blob) for blob in blobs], self.spec)
        return self.merged[key]

    def modelled_download_bytes(self, r: int, held: Layout, round_to: int) -> int:
        """Return the size of `r` components of `cost_spec` in half precision, at the pruning ratio of `held`."""
        return 2 * r * factor_elements(typical_layout(self.cost_spec, held.pruning_ratio, round_to))


class _UpdateInMemory:
    """`UpdateStore` of one update, since thousands of devices share a process."""

    def __init__(self) -> None:
        self._updates: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        sha256 = codec.digest(data)
        self._updates[sha256] = data
        return sha256

    def get(self, sha256: str) -> bytes:
        if sha256 not in self._updates:
            raise BlobError(f"the update {sha256[:12]} is not in memory any more.")
        return self._updates[sha256]

    def prune(self, keep: Iterable[str]) -> int:
        kept = set(keep)
        obsolete = [sha256 for sha256 in self._updates if sha256 not in kept]
        for sha256 in obsolete:
            del self._updates[sha256]
        return len(obsolete)


class ReplayDevice:
    """A device that follows the whole protocol without training.

    Args:
        config: Settings of the device.
        transport: Endpoint in the virtual network.
        clock: Virtual time of the device.
        context: Recorded losses and model shapes.
        num_examples: Number of training examples that the device reports.
    """

    def __init__(
        self,
        config: DeviceConfig,
        transport: VirtualTransport,
        clock: VirtualClock,
        context: ReplayContext,
        num_examples: int = 256,
    ) -> None:
        self.config, self._clock, self._context = config, clock, context
        self._num_examples = num_examples
        self._layout, self._ratio = Layout.full(context.spec), 0.0
        self._updates = _UpdateInMemory()
        self._session = ProtocolSession(
            config.fleet,
            config.device_id,
            transport,
            clock,
            self,
            updates=self._updates,
            download=AdapterDownload(transport, Topics(config.fleet), window=None),
        )

    def start(self) -> None:
        """Connect and publish the status."""
        self._session.start(timeout_s=1.0)

    def close(self) -> None:
        """Disconnect."""
        self._session.close()

    def handle(self, event: Event) -> None:
        """Handle one event of the network."""
        self._session.handle(event)

    def tick(self) -> None:
        """Repeat what has not been answered in time."""
        self._session.tick()

    def next_wakeup(self) -> float | None:
        """Return the time in seconds at which `tick` has to run."""
        return self._session.next_wakeup()

    # RoundHandler

    def status(self, state: Literal["online", "offline"]) -> Status:
        """Return the device's status."""
        config = self.config
        return Status(
            device_id=config.device_id,
            state=state,
            model=self._context.spec,
            device_class=config.device_class,
            num_examples=self._num_examples,
            task=config.task,
            num_labels=config.num_labels,
            memory_bytes=config.memory_limit_mib * 2**20,
            pruning_ratio=self._ratio,
        )

    @property
    def max_adapter_bytes(self) -> int:
        """No limit besides that of a blob, since the server is part of the simulation."""
        return MAX_BLOB_BYTES

    def begin_round(self, plan: RoundPlan) -> None:
        """Do nothing; everything happens in `run_round`."""

    def run_round(self, plan: RoundPlan, plan_sha256: str, blobs: list[bytes]) -> RoundOutcome:
        """Prune as the plan asks, and make an update and a report from a recorded sample."""
        context = self._context
        adapter, held = context.adapter(plan, blobs)
        layout_before, ratio_before = self._layout, self._ratio
        rng = np.random.default_rng([self.config.seed, plan.server_round, *self.config.device_id.encode()])
        scores = self._scores(layout_before, rng)
        self._prune(plan, adapter, scores)
        update = codec.pack(self._update(plan, adapter, layout_before, scores, rng))
        ref = ref_of(update)
        bytes_down = sum(blob.size_bytes for blob in plan.adapter)
        if context.cost_spec != context.spec:
            bytes_down = context.modelled_download_bytes(adapter["layers.0.q.lora_A"].shape[0], held, plan.round_to)
        meter = self._meter(plan, ratio_before, ref.size_bytes, bytes_down)
        draw = random.Random(f"{self.config.seed}/{self.config.device_id}/{plan.server_round}")
        sample = context.record.draw((plan.server_round - 1) / plan.num_rounds, self._ratio, plan.r, draw)
        report = Report(
            run_id=plan.run_id,
            device_id=self.config.device_id,
            server_round=plan.server_round,
            plan_sha256=plan_sha256,
            status="ok",
            reason=REASON,
            update=ref,
            num_examples=self._num_examples,
            loss_before=sample.loss_before,
            loss_after=sample.loss_after,
            accuracy_before=sample.accuracy_before,
            accuracy_after=sample.accuracy_after,
            lora_importance=sample.lora_importance,
            pruning_ratio=self._ratio,
            r=plan.r,
            completion_time_s=meter.completion_s(),
            time_kind="simulated",
            bytes_down=meter.bytes_down,
            bytes_up=meter.bytes_up,
        )
        return RoundOutcome(report, update)

    def fail_round(self, plan: RoundPlan, plan_sha256: str, error: BlobError) -> RoundOutcome:
        """Raise the error: the virtual network does not damage blobs."""
        raise error

    def save_outcome(self, report: Report) -> None:
        """Do nothing; a simulated device is not restarted."""

    def report_acknowledged(self, report: Report, ack: Ack) -> None:
        """Free the update."""
        self._updates.prune([])

    def lost_update(self, error: BlobError) -> Exception:
        """Return the error itself."""
        return error

    def finish_run(self, run_id: str) -> None:
        """Do nothing; there are no files."""

    def _prune(self, plan: RoundPlan, blob: dict[str, Any], scores: dict[str, list[Any]]) -> None:
        spec, order = self._context.spec, order_from_tensors(self._context.spec, blob)
        counts = [
            target_counts(spec, plan.pruning_ratio, round_to=plan.round_to, at_most=kept)
            for kept in self._layout.counts
        ]
        if plan.layout == "consensus":
            if order is None:
                return
            self._layout = Layout.prefix(spec, order, counts)
        elif plan.pruning_ratio > self._ratio:
            kept: dict[str, list[Any]] = {"heads": [], "channels": []}
            for kind, position in (("heads", 0), ("channels", 1)):
                for layer, index in enumerate(getattr(self._layout, kind)):
                    best = np.argsort(-scores[kind][layer], kind="stable")[: counts[layer][position]]
                    kept[kind].append(np.sort(index[best]))
            self._layout = Layout(spec, tuple(kept["heads"]), tuple(kept["channels"]))
        self._ratio = max(self._ratio, plan.pruning_ratio)

    def _scores(self, layout: Layout, rng: np.random.Generator) -> dict[str, list[Any]]:
        """Return scores of the groups in `layout`, on which all devices agree up to noise."""
        common = np.random.default_rng(self.config.seed)
        found: dict[str, list[Any]] = {"heads": [], "channels": []}
        for kind, size in (("heads", layout.spec.num_kv_heads), ("channels", layout.spec.intermediate_size)):
            for index in getattr(layout, kind):
                truth = common.random(size)[index]
                found[kind].append((truth * (1.0 + 0.1 * rng.random(index.size))).astype(np.float32))
        return found

    def _update(
        self,
        plan: RoundPlan,
        blob: dict[str, Any],
        scored: Layout,
        scores: dict[str, list[Any]],
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        layout, factors = self._layout, {}
        for name in module_names(layout.spec):
            A, B = layout.gather(name, blob[f"{name}.lora_A"][: plan.r], blob[f"{name}.lora_B"][:, : plan.r])
            noise = 0.01 * rng.standard_normal(B.shape, dtype=np.float32)
            factors[name] = (A.astype(np.float16), (B + noise).astype(np.float16))
        head = 0.01 * rng.standard_normal((self.config.data.num_labels, layout.spec.hidden_size), dtype=np.float32)
        return {
            **adapter_tensors(factors),
            "head.out.weight": head,
            **layout.to_tensors(KEEP),
            **scores_to_tensors(scored, scores["heads"], scores["channels"]),
        }

    def _meter(self, plan: RoundPlan, ratio_before: float, bytes_up: int, bytes_down: int) -> CostMeter:
        """Return the cost of the round by the cost model."""
        config, context = self.config, self._context
        meter = CostMeter(
            "simulated",
            time_factor=config.time_factor,
            up_mbit_s=config.up_mbit_s,
            down_mbit_s=config.down_mbit_s,
            clock=self._clock,
            simulated=config.simulated,
            conditions=emulated_conditions(config, plan.server_round),
        )
        after = record_work(
            meter,
            context.cost_spec,
            context.tokens,
            ratios=(ratio_before, self._ratio),
            r=plan.r,
            steps=(plan.tau, plan.recovery_steps),
            batch_size=plan.training.batch_size,
            round_to=plan.round_to,
            holdout=config.data.holdout,
        )
        if context.cost_spec != context.spec:
            bytes_up = 2 * plan.r * factor_elements(after)
        meter.transfer(down_bytes=bytes_down, up_bytes=bytes_up)
        return meter

"""Devices whose training is replaced by recorded losses, so that thousands of them run in minutes.

Server, strategy, wire codec, gate and aggregation are the real ones, and a device's time comes from the same cost
model as in a run with real training. What is made up is the training: losses, accuracies and importances are those
of a device-round that was really trained and lay near in progress, pruning ratio and rank, and the update is the
fleet's own adapter plus seeded noise. Every report says so in its reason; nothing learned from such a run is a
statement about models.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.clock import VirtualClock
from fedspine_edge.config import DeviceConfig
from fedspine_edge.device.cost_meter import CostMeter, conditions
from fedspine_edge.errors import ConfigError
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
from fedspine_edge.protocol.chunks import Download, split
from fedspine_edge.protocol.messages import MAX_RETRY_S, Ack, Report, RoundPlan, Status, retry_interval_s
from fedspine_edge.protocol.rank_slices import Tensors, merge_slices
from fedspine_edge.protocol.topics import BlobTopic, DeviceTopic, Topics
from fedspine_edge.simulation.cost_model import MINILM, SMALL, factor_elements, record_work, typical_layout
from fedspine_edge.simulation.virtual_network import VirtualTransport
from fedspine_edge.transport.base import Connected, Event, Will

REASON = "training replaced by recorded losses"
_NEAREST = 6
"""Recorded device-rounds among which one is drawn."""


@dataclass(frozen=True)
class LossSample:
    """One really trained device-round."""

    progress: float
    """Share of the run's rounds that had begun."""
    pruning_ratio: float
    r: int
    loss_before: float
    loss_after: float
    accuracy_before: float
    accuracy_after: float
    lora_importance: float


@dataclass(frozen=True)
class LossRecord:
    """Device-rounds of real runs, and where they come from."""

    source: str
    points: tuple[LossSample, ...]

    def draw(self, progress: float, pruning_ratio: float, r: int, rng: random.Random) -> LossSample:
        """One of the recorded device-rounds nearest to the given one."""

        def far(point: LossSample) -> float:
            return (
                abs(point.progress - progress)
                + abs(point.pruning_ratio - pruning_ratio)
                + 0.1 * abs(math.log2(point.r / r))
            )

        return rng.choice(sorted(self.points, key=far)[:_NEAREST])

    def save(self, path: Path) -> None:
        """Write as JSON, one point a line."""
        points = ",\n  ".join(json.dumps(asdict(point)) for point in self.points)
        path.write_text(f'{{"source": {json.dumps(self.source)}, "points": [\n  {points}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> LossRecord:
        """Read what `save` wrote. Raises `ConfigError`."""
        try:
            data = json.loads(path.read_text())
            return cls(data["source"], tuple(LossSample(**point) for point in data["points"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a record of losses: {error}.") from error

    @classmethod
    def of_runs(cls, run_dirs: Sequence[Path], source: str) -> LossRecord:
        """The finished device-rounds of `run_dirs`. Raises `ConfigError` when one is itself made of a record."""
        points = []
        for run_dir in run_dirs:
            view = read_run(run_dir)
            for row in view.rows:
                if row.reason == REASON:
                    raise ConfigError(f"{run_dir} was made of recorded losses; a record is taken from real training.")
                measured = (row.loss_before, row.loss_after, row.accuracy_before, row.accuracy_after)
                figures = [float(f"{v:.5g}") for v in (*measured, row.lora_importance) if v is not None]
                if row.status == "ok" and len(figures) == 5:
                    progress = (row.server_round - 1) / view.num_rounds
                    points.append(LossSample(progress, round(row.pruning_ratio, 4), row.r, *figures))
        return cls(source, tuple(points))


BUILT_IN = Path(__file__).with_name("recorded_losses.json")


@dataclass
class ReplayContext:
    """What all recorded devices of a process have in common.

    Attributes:
        spec: The model on the wire.
        cost_spec: The model whose steps and bytes are paid for; that on the wire where it is the same.
        tokens: Padded length of a batch.
    """

    record: LossRecord
    spec: ModelSpec = SMALL
    cost_spec: ModelSpec = MINILM
    tokens: int = 32
    joined: dict[tuple[str, ...], tuple[Tensors, Layout]] = field(default_factory=dict)
    """The adapters of one round and what they hold, by the blobs that they are made of."""

    def adapter(self, downloads: Mapping[str, Download]) -> tuple[Tensors, Layout]:
        """The round's adapter and what it holds, decoded once for all devices of one rank."""
        key = tuple(downloads)
        if key not in self.joined:
            if any(other[0] != key[0] for other in self.joined):
                self.joined.clear()
            self.joined[key] = merge_slices([codec.unpack(one.data()) for one in downloads.values()], self.spec)
        return self.joined[key]

    def modelled_down(self, r: int, held: Layout, round_to: int) -> int:
        """Bytes of `r` components in half precision for the model that is paid for, cut to as much as `held` is."""
        return 2 * r * factor_elements(typical_layout(self.cost_spec, held.pruning_ratio, round_to))


class ReplayDevice:
    """A device that speaks the whole protocol and trains nothing."""

    def __init__(
        self,
        config: DeviceConfig,
        transport: VirtualTransport,
        clock: VirtualClock,
        shared: ReplayContext,
        num_examples: int = 256,
    ) -> None:
        self.config, self._transport, self._clock, self._shared = config, transport, clock, shared
        self._num_examples = num_examples
        self._topics = Topics(config.fleet)
        self._layout, self._ratio = Layout.full(shared.spec), 0.0
        self._plan: tuple[RoundPlan, str] | None = None
        self._downloads: dict[str, Download] = {}
        self._report: Report | None = None
        self._chunks: list[bytes] = []
        self._retry_s = MAX_RETRY_S
        self._retry_at: float | None = None

    def start(self) -> None:
        """Connect and say hello."""
        device_id = self.config.device_id
        will = Will(self._topics.status(device_id), codec.encode(self._status("offline")))
        self._transport.connect(timeout_s=1.0, will=will)
        self._transport.subscribe(*self._topics.device_filters(device_id))
        self._say_hello()

    def close(self) -> None:
        self._transport.close()

    def handle(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._say_hello()
            return
        topic = self._topics.parse(event.topic)
        if isinstance(topic, BlobTopic):
            download = self._downloads.get(topic.sha256)
            if event.payload and download is not None:
                download.feed(topic.index, event.payload)
                if all(one.complete for one in self._downloads.values()):
                    self._take_part()
        elif isinstance(topic, DeviceTopic) and event.payload and topic.kind == "plan":
            self._on_plan(event.payload)
        elif isinstance(topic, DeviceTopic) and event.payload and topic.kind == "ack":
            self._on_ack(codec.decode(event.payload, Ack))

    def tick(self) -> None:
        if self._retry_at is not None and self._clock.now() >= self._retry_at:
            self._send_report()

    def next_wakeup(self) -> float | None:
        return self._retry_at

    def _on_plan(self, payload: bytes) -> None:
        sha256 = codec.digest(payload)
        if self._plan is not None and self._plan[1] == sha256:
            return
        plan = codec.decode_plan(payload)
        self._retry_at = None
        if not isinstance(plan, RoundPlan):
            return
        self._plan = (plan, sha256)
        self._retry_s = retry_interval_s(plan.deadline_s)
        self._downloads = {ref.sha256: Download(ref) for ref in plan.adapter}
        self._transport.subscribe(*self._chunk_topics(plan))

    def _chunk_topics(self, plan: RoundPlan) -> list[str]:
        return [self._topics.blob(ref.sha256, index) for ref in plan.adapter for index in range(ref.num_chunks)]

    def _take_part(self) -> None:
        assert self._plan is not None  # the downloads came with it
        plan, sha256 = self._plan
        blob, held = self._shared.adapter(self._downloads)
        self._downloads = {}
        self._transport.unsubscribe(*self._chunk_topics(plan))
        before, ratio_before = self._layout, self._ratio
        rng = np.random.default_rng([self.config.seed, plan.server_round, *self.config.device_id.encode()])
        scores = self._scores(before, rng)
        self._prune(plan, blob, scores)
        tensors = self._update(plan, blob, before, scores, rng)
        ref, self._chunks = split(codec.pack(tensors))
        bytes_down = sum(ref.size_bytes for ref in plan.adapter)
        if self._shared.cost_spec != self._shared.spec:
            bytes_down = self._shared.modelled_down(blob["layers.0.q.lora_A"].shape[0], held, plan.round_to)
        meter = self._meter(plan, ratio_before, ref.size_bytes, bytes_down)
        draw = random.Random(f"{self.config.seed}/{self.config.device_id}/{plan.server_round}")
        point = self._shared.record.draw((plan.server_round - 1) / plan.num_rounds, self._ratio, plan.r, draw)
        self._report = Report(
            run_id=plan.run_id,
            device_id=self.config.device_id,
            server_round=plan.server_round,
            plan_sha256=sha256,
            status="ok",
            reason=REASON,
            update=ref,
            num_examples=self._num_examples,
            loss_before=point.loss_before,
            loss_after=point.loss_after,
            accuracy_before=point.accuracy_before,
            accuracy_after=point.accuracy_after,
            lora_importance=point.lora_importance,
            pruning_ratio=self._ratio,
            r=plan.r,
            completion_time_s=meter.completion_s(),
            time_kind="simulated",
            bytes_down=meter.bytes_down,
            bytes_up=meter.bytes_up,
        )
        self._clock.spend(self._report.completion_time_s)
        self._say_hello()
        self._send_report()
        self._send_chunks(range(len(self._chunks)))

    def _prune(self, plan: RoundPlan, blob: dict[str, Any], scores: dict[str, list[Any]]) -> None:
        spec, order = self._shared.spec, order_from_tensors(self._shared.spec, blob)
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
        """Importance that all devices agree on up to noise, for what `layout` holds."""
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
        """What the round costs on the device, by the cost model."""
        config, shared = self.config, self._shared
        meter = CostMeter(
            "simulated",
            time_factor=config.time_factor,
            up_mbit_s=config.up_mbit_s,
            down_mbit_s=config.down_mbit_s,
            clock=self._clock,
            simulated=config.simulated,
            conditions=conditions(config, plan.server_round),
        )
        after = record_work(
            meter,
            shared.cost_spec,
            shared.tokens,
            ratios=(ratio_before, self._ratio),
            r=plan.r,
            steps=(plan.tau, plan.recovery_steps),
            batch_size=plan.training.batch_size,
            round_to=plan.round_to,
            holdout=config.data.holdout,
        )
        if shared.cost_spec != shared.spec:
            bytes_up = 2 * plan.r * factor_elements(after)
        meter.transfer(down_bytes=bytes_down, up_bytes=bytes_up)
        return meter

    def _on_ack(self, ack: Ack) -> None:
        report = self._report
        if report is None or (ack.run_id, ack.server_round) != (report.run_id, report.server_round):
            return
        if ack.status == "incomplete":
            self._send_chunks(ack.missing)
            return
        self._retry_at, self._chunks = None, []

    def _send_report(self) -> None:
        assert self._report is not None  # only with a retry set, or just made
        self._retry_at = self._clock.now() + self._retry_s
        self._transport.publish(self._topics.report(self.config.device_id), codec.encode(self._report))

    def _send_chunks(self, indices: Sequence[int]) -> None:
        assert self._report is not None
        assert self._report.update is not None
        for index in indices:
            topic = self._topics.upload(self.config.device_id, self._report.update.sha256, index)
            self._transport.publish(topic, self._chunks[index])

    def _say_hello(self) -> None:
        payload = codec.encode(self._status("online"))
        self._transport.publish(self._topics.status(self.config.device_id), payload, retain=True)

    def _status(self, state: str) -> Status:
        config = self.config
        return Status(
            device_id=config.device_id,
            state="online" if state == "online" else "offline",
            model=self._shared.spec,
            device_class=config.device_class,
            num_examples=self._num_examples,
            task=config.task,
            num_labels=config.num_labels,
            memory_bytes=config.memory_limit_mib * 1024 * 1024,
            pruning_ratio=self._ratio,
        )

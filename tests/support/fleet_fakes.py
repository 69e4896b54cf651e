"""A fleet for tests: devices that use the real protocol and invented numbers, in virtual time.

A fake device's training is a function of its plan, its blob and its id, so any two runs can be compared bit for
bit. Its state lies in a folder, like a real one's, so it survives the process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from fedspine_edge.clock import VirtualClock
from fedspine_edge.config import FleetConfig, convert
from fedspine_edge.model.layout import Layout, module_names, prunable_parameters, target_counts
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.blobs import KEEP, order_from_tensors, scores_to_tensors
from fedspine_edge.protocol.chunks import Download, split
from fedspine_edge.protocol.messages import Ack, FinishedPlan, Plan, Report, RoundPlan, Status
from fedspine_edge.protocol.rank_slices import merge_slices
from fedspine_edge.protocol.topics import BlobTopic, Topics
from fedspine_edge.server.server import FleetServer
from fedspine_edge.simulation.virtual_network import VirtualNetwork
from fedspine_edge.transport.base import Connected

CHUNK = 4096
RETRY_S = 5.0


def make_spec(base: str = "a" * 64, **changes) -> ModelSpec:
    spec = ModelSpec(
        family="bert",
        num_layers=2,
        hidden_size=8,
        num_heads=4,
        num_kv_heads=4,
        head_dim=2,
        intermediate_size=32,
        gated_ffn=False,
        attention_bias=True,
        ffn_bias=True,
        num_parameters=4000,
        base_sha256=base,
    )
    assert prunable_parameters(spec) < 4000
    return msgspec.structs.replace(spec, **changes)


SPEC = make_spec()


def make_config(run_dir: Path, **changes) -> FleetConfig:
    return convert(
        {
            "run_dir": str(run_dir),
            "num_rounds": 5,
            "pruning_ratio": 0.5,
            "ranks": [2, 4],
            "round_to": 4,
            "min_devices": 3,
            "deadline_s": 100.0,
            "join_timeout_s": 50.0,
            "training": {"tau": 4, "recovery_steps": 2},
            **changes,
        },
        FleetConfig,
    )


def rng_of(*parts) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def make_tensors(layout: Layout, scored: Layout, r: int, blob, *seed, dtype=np.float32):
    """Return an update in compact coordinates: the global adapter plus seeded noise."""
    rng = rng_of(*seed)
    tensors = {}
    for name in module_names(layout.spec):
        rows, cols = layout.rows(name), layout.cols(name)
        A = blob[f"{name}.lora_A"][:r, cols] if blob else np.zeros((r, cols.size))
        B = blob[f"{name}.lora_B"][rows, :r] if blob else np.zeros((rows.size, r))
        tensors[f"{name}.lora_A"] = (A + 0.1 * rng.normal(size=A.shape)).astype(dtype)
        tensors[f"{name}.lora_B"] = (B + 0.1 * rng.normal(size=B.shape)).astype(dtype)
    tensors["head.out.weight"] = rng.normal(size=(2, layout.spec.hidden_size)).astype(dtype)
    tensors |= layout.to_tensors(KEEP)
    scores = [[rng.random(index.size) for index in kept] for kept in (scored.heads, scored.channels)]
    return tensors | scores_to_tensors(scored, *scores)


class FakeDevice:
    """Handles plans as a real device does; `mutate` and `silent` make it misbehave."""

    def __init__(
        self,
        device_id: str,
        transport,
        clock: VirtualClock,
        *,
        folder: Path,
        spec: ModelSpec = SPEC,
        duration_s: float = 10.0,
        num_examples: int = 100,
        num_labels: int = 2,
        task: str = "classification",
        memory: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        self.device_id, self.transport, self.clock, self.spec = device_id, transport, clock, spec
        self.duration_s, self.num_examples, self.num_labels = duration_s, num_examples, num_labels
        self.task, self.memory = task, memory
        self.topics = Topics("fleet")
        self.file = folder / f"{device_id}.json"
        self.plans: list[Plan] = []
        self.acks: list[Ack] = []
        self.mutate: Callable = lambda plan, tensors, report: (tensors, report)
        self.corrupt_chunks = 0
        self.silent: Callable[[RoundPlan], bool] = lambda plan: False
        self.plan: tuple[RoundPlan, str] | None = None
        self.downloads: dict[str, Download] = {}
        self.chunks: list[bytes] = []
        self.report: Report | None = None
        self.retry_at = math.inf
        self.finished = False
        self.layout, self.ratio = Layout.full(spec), 0.0
        if self.file.exists():
            state = msgspec.json.decode(self.file.read_bytes())
            self.layout, self.ratio = Layout.from_dict(spec, state["layout"]), state["ratio"]
            self.report = msgspec.convert(state["report"], Report)
            self.chunks = split(self.file.with_suffix(".update").read_bytes(), chunk_bytes=CHUNK)[1]
            self.retry_at = clock.now() + RETRY_S

    def start(self) -> None:
        self.transport.connect(timeout_s=1)
        self.transport.subscribe(*self.topics.device_filters(self.device_id))
        self.publish_status()

    def publish_status(self, state: str = "online") -> None:
        status = Status(
            device_id=self.device_id,
            state=state,
            model=self.spec,
            device_class="agx",
            num_examples=self.num_examples,
            task=self.task,
            num_labels=self.num_labels,
            memory_bytes=self.memory[0],
            memory_base_bytes=self.memory[1],
            memory_per_rank_bytes=self.memory[2],
            pruning_ratio=self.ratio,
        )
        self.transport.publish(self.topics.status(self.device_id), codec.encode(status), retain=True)

    def handle(self, event) -> None:
        if isinstance(event, Connected):
            self.publish_status()
            return
        topic = self.topics.parse(event.topic)
        if isinstance(topic, BlobTopic):
            if event.payload and topic.sha256 in self.downloads:
                self.downloads[topic.sha256].feed(topic.index, event.payload)
                self._train_if_complete()
        elif event.payload and topic.kind == "plan":
            self._on_plan(event.payload)
        elif event.payload and topic.kind == "ack":
            self._on_ack(codec.decode(event.payload, Ack))

    def tick(self) -> None:
        if self.clock.now() >= self.retry_at and self.report is not None:
            self.send_report()

    def next_wakeup(self) -> float:
        return self.retry_at

    def _on_plan(self, payload: bytes) -> None:
        plan, sha256 = codec.decode_plan(payload), codec.digest(payload)
        if self.plan is not None and self.plan[1] == sha256:
            return
        self.plans.append(plan)
        self.retry_at = math.inf
        if isinstance(plan, FinishedPlan):
            self.finished = True
        if not isinstance(plan, RoundPlan):
            return
        if self.report is not None and self.report.plan_sha256 == sha256:
            self.send_report()
            return
        self.plan = (plan, sha256)
        if self.silent(plan):
            return
        self.downloads = {ref.sha256: Download(ref) for ref in plan.adapter}
        for ref in plan.adapter:
            for index in range(ref.num_chunks):
                self.transport.subscribe(self.topics.blob(ref.sha256, index))

    def _train_if_complete(self) -> None:
        if not all(download.complete for download in self.downloads.values()):
            return
        slices = [codec.unpack(download.data()) for download in self.downloads.values()]
        self.downloads = {}
        plan, sha256 = self.plan
        for one in slices:
            codec.check_tensors(one, "round")
        blob, _ = merge_slices(slices, self.spec)
        order, before = order_from_tensors(self.spec, blob), self.layout
        if order is not None:
            counts = [
                target_counts(self.spec, plan.pruning_ratio, round_to=plan.round_to, at_most=c) for c in before.counts
            ]
            self.layout, self.ratio = Layout.prefix(self.spec, order, counts), max(self.ratio, plan.pruning_ratio)
        elif plan.layout == "local":
            heads, channels = target_counts(
                self.spec, plan.pruning_ratio, round_to=plan.round_to, at_most=before.counts[0]
            )
            rng = rng_of(self.device_id, plan.server_round)
            self.layout = Layout(
                self.spec,
                tuple(np.sort(rng.permutation(h)[:heads]) for h in before.heads),
                tuple(np.sort(rng.permutation(c)[:channels]) for c in before.channels),
            )
            self.ratio = max(self.ratio, plan.pruning_ratio)
        tensors = make_tensors(self.layout, before, plan.r, blob, self.device_id, plan.server_round)
        report = Report(
            run_id=plan.run_id,
            device_id=self.device_id,
            server_round=plan.server_round,
            plan_sha256=sha256,
            status="ok",
            num_examples=self.num_examples,
            loss_before=0.7,
            loss_after=0.7 - 0.05 * plan.server_round,
            accuracy_after=0.5 + 0.05 * plan.server_round,
            lora_importance=1.0 + len(self.device_id),
            pruning_ratio=self.ratio,
            r=plan.r,
            completion_time_s=self.duration_s,
            steps=plan.tau + plan.recovery_steps,
            time_kind="simulated",
            bytes_down=sum(ref.size_bytes for ref in plan.adapter),
        )
        tensors, report = self.mutate(plan, tensors, report)
        data = codec.pack(tensors)
        ref, self.chunks = split(data, chunk_bytes=CHUNK)
        if report.status == "ok":
            report = msgspec.structs.replace(report, update=ref, bytes_up=ref.size_bytes)
        self.report = report
        state = {"layout": self.layout.to_dict(), "ratio": self.ratio, "report": msgspec.to_builtins(report)}
        self.file.with_suffix(".update").write_bytes(data)
        self.file.write_bytes(msgspec.json.encode(state))
        self.clock.spend(self.duration_s)
        self.publish_status()
        self.send_report()
        if report.update is not None:
            self.send_chunks(range(len(self.chunks)))

    def send_report(self) -> None:
        self.retry_at = self.clock.now() + RETRY_S
        self.transport.publish(self.topics.report(self.device_id), codec.encode(self.report))

    def send_chunks(self, indices) -> None:
        for index in indices:
            payload = self.chunks[index]
            if self.corrupt_chunks > 0 and index == 0:
                self.corrupt_chunks -= 1
                payload = bytes(len(payload))
            self.transport.publish(self.topics.upload(self.device_id, self.report.update.sha256, index), payload)

    def _on_ack(self, ack: Ack) -> None:
        self.acks.append(ack)
        if self.report is None or ack.run_id != self.report.run_id or ack.server_round != self.report.server_round:
            return
        if ack.status == "incomplete":
            self.send_chunks(ack.missing)
        else:
            self.retry_at = math.inf


class Fleet:
    """A virtual network with fake devices; `serve` runs a server on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = VirtualNetwork()
        self.devices: dict[str, FakeDevice] = {}
        self.clock = VirtualClock()

    def add(self, device_id: str, *, start: bool = True, **options) -> FakeDevice:
        clock = VirtualClock(self.clock.now())
        transport = self.network.join(device_id, clock)
        device = FakeDevice(device_id, transport, clock, folder=self.folder, **options)
        transport.attach(device)
        self.devices[device_id] = device
        if start:
            device.start()
        return device

    def add_three(self) -> None:
        for index, duration_s in enumerate((10.0, 12.0, 14.3)):
            self.add(f"d{index}", duration_s=duration_s, num_examples=100 + 50 * index)

    def serve(self, config: FleetConfig, *, on_event=None):
        transport = self.network.join("server", self.clock)
        return FleetServer(config, transport, self.clock, on_event=on_event).run()

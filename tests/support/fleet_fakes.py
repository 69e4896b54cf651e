"""Fake fleet for tests: devices with the real protocol and synthetic training, in virtual time.

The result of a fake device's training is a function of its plan, its adapter and its id, so runs can be compared bit
for bit. Its state is in a folder, as that of a real device, so it survives the process.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from fedspine_edge.clock import VirtualClock
from fedspine_edge.config import FleetConfig, convert
from fedspine_edge.device.adapter_download import AdapterDownload
from fedspine_edge.device.protocol_session import ProtocolSession, RoundOutcome
from fedspine_edge.errors import BlobError
from fedspine_edge.model.layout import Layout, Order, module_names, prunable_parameters, target_counts
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.blobs import KEEP, order_from_tensors, scores_to_tensors
from fedspine_edge.protocol.chunks import ref_of
from fedspine_edge.protocol.messages import MAX_BLOB_BYTES, Ack, Plan, Report, RoundPlan, Status
from fedspine_edge.protocol.rank_slices import merge_slices
from fedspine_edge.protocol.topics import Topics, UploadTopic
from fedspine_edge.server.server import FleetServer
from fedspine_edge.simulation.virtual_network import VirtualNetwork
from fedspine_edge.transport.base import Incoming

CHUNK = 4096


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
    """Return an update in compact coordinates: the global adapter plus noise."""
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


class UpdateFile:
    """Stores one update in a file, as `UpdateStore` requires."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, data: bytes) -> str:
        self.path.write_bytes(data)
        return codec.digest(data)

    def get(self, sha256: str) -> bytes:
        return self.path.read_bytes()

    def prune(self, keep) -> int:
        return 0


class LossyTransport:
    """Transport that corrupts or drops chunks of uploads.

    Attributes:
        corrupt: Number of first chunks to replace by zeros.
        drop: Decides whether a chunk is dropped.
        rewrite: Returns the payload to publish instead of one for a topic.
    """

    def __init__(self, transport) -> None:
        self._transport = transport
        self.corrupt = 0
        self.drop: Callable[[UploadTopic], bool] = lambda topic: False
        self.rewrite: Callable[[str, bytes], bytes] = lambda topic, payload: payload

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        parsed = Topics("fleet").parse(topic)
        if isinstance(parsed, UploadTopic):
            if self.drop(parsed):
                return
            if self.corrupt > 0 and parsed.index == 0:
                self.corrupt -= 1
                payload = bytes(len(payload))
        self._transport.publish(topic, self.rewrite(topic, payload), retain=retain)

    def __getattr__(self, name: str):
        return getattr(self._transport, name)


class FakeDevice:
    """A device with the real protocol session and synthetic training; `mutate` and `silent` make it misbehave."""

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
        self.device_id, self.clock, self.spec = device_id, clock, spec
        self.transport = LossyTransport(transport)
        self.duration_s, self.num_examples, self.num_labels = duration_s, num_examples, num_labels
        self.task, self.memory = task, memory
        self.topics = Topics("fleet")
        self.file = folder / f"{device_id}.json"
        self.plans: list[Plan] = []
        self.acks: list[Ack] = []
        self.mutate: Callable = lambda plan, tensors, report: (tensors, report)
        self.silent: Callable[[RoundPlan], bool] = lambda plan: False
        self.layout, self.ratio = Layout.full(spec), 0.0
        self.session = ProtocolSession(
            "fleet",
            device_id,
            self.transport,
            clock,
            self,
            updates=UpdateFile(self.file.with_suffix(".update")),
            download=AdapterDownload(self.transport, self.topics, window=None),
        )
        if self.file.exists():
            state = msgspec.json.decode(self.file.read_bytes())
            self.layout, self.ratio = Layout.from_dict(spec, state["layout"]), state["ratio"]
            self.session.restore(msgspec.convert(state["report"], Report), acked=False)

    @property
    def finished(self) -> bool:
        return self.session.finished

    @property
    def report(self) -> Report | None:
        return self.session.report

    def start(self) -> None:
        self.session.start(timeout_s=1)

    def publish_status(self, state: str = "online") -> None:
        self.transport.publish(self.topics.status(self.device_id), codec.encode(self.status(state)), retain=True)

    def handle(self, event) -> None:
        if isinstance(event, Incoming) and event.payload and event.topic == self.topics.plan(self.device_id):
            plan = codec.decode_plan(event.payload)
            if not self.plans or self.plans[-1] != plan:
                self.plans.append(plan)
            if isinstance(plan, RoundPlan) and self.silent(plan):
                return
        if isinstance(event, Incoming) and event.payload and event.topic == self.topics.ack(self.device_id):
            self.acks.append(codec.decode(event.payload, Ack))
        self.session.handle(event)

    def tick(self) -> None:
        self.session.tick()

    def next_wakeup(self) -> float | None:
        return self.session.next_wakeup()

    # RoundHandler

    def status(self, state: str) -> Status:
        return Status(
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

    @property
    def max_adapter_bytes(self) -> int:
        return MAX_BLOB_BYTES

    def begin_round(self, plan: RoundPlan) -> None:
        pass

    def run_round(self, plan: RoundPlan, plan_sha256: str, blobs: list[bytes]) -> RoundOutcome:
        slices = [codec.unpack(blob) for blob in blobs]
        for tensors in slices:
            codec.check_tensors(tensors, "round")
        adapter, _ = merge_slices(slices, self.spec)
        before = self.layout
        self._prune(plan, order_from_tensors(self.spec, adapter))
        tensors = make_tensors(self.layout, before, plan.r, adapter, self.device_id, plan.server_round)
        report = Report(
            run_id=plan.run_id,
            device_id=self.device_id,
            server_round=plan.server_round,
            plan_sha256=plan_sha256,
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
        if report.status != "ok":
            return RoundOutcome(report)
        update = codec.pack(tensors)
        ref = ref_of(update, chunk_bytes=CHUNK)
        return RoundOutcome(msgspec.structs.replace(report, update=ref, bytes_up=ref.size_bytes), update)

    def _prune(self, plan: RoundPlan, order: Order | None) -> None:
        before = self.layout
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

    def fail_round(self, plan: RoundPlan, plan_sha256: str, error: BlobError) -> RoundOutcome:
        raise error

    def save_outcome(self, report: Report) -> None:
        state = {"layout": self.layout.to_dict(), "ratio": self.ratio, "report": msgspec.to_builtins(report)}
        self.file.write_bytes(msgspec.json.encode(state))

    def report_acknowledged(self, report: Report, ack: Ack) -> None:
        pass

    def lost_update(self, error: BlobError) -> Exception:
        return error

    def finish_run(self, run_id: str) -> None:
        pass


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

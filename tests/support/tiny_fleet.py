"""Manual server for device tests: one broker, one device, the plans to send and the messages received."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from memory_transport import MemoryBroker, MemoryTransport

from fedspine_edge.clock import VirtualClock
from fedspine_edge.config import DeviceConfig, OptimizerSettings, convert
from fedspine_edge.device.agent import FleetDevice
from fedspine_edge.model.deterministic_init import kaiming_uniform
from fedspine_edge.model.layout import full_shape, module_names, split_name
from fedspine_edge.protocol import chunks, codec
from fedspine_edge.protocol.messages import Ack, BlobRef, FinishedPlan, Plan, Report, RoundPlan, Status, WaitPlan
from fedspine_edge.protocol.topics import Topics, UploadTopic
from fedspine_edge.transport.base import Incoming

TOPICS = Topics("tiny")
TRAINING = OptimizerSettings(learning_rate=1e-2, batch_size=8, max_length_tokens=24, total_steps=60)


def config(folder: Path, csv: Path, state: Path, **options: Any) -> DeviceConfig:
    settings = {
        "device_id": "d1",
        "fleet": "tiny",
        "model": str(folder),
        "data": {"path": str(csv), "holdout": 16},
        "state_dir": str(state),
        "time_kind": "simulated",
        "torch_device": "cpu",
        "upload_dtype": "float32",
        **options,
    }
    return convert(settings, DeviceConfig)


def round_tensors(spec: Any, r: int = 8, *, order: bool = False, seed: int = 3) -> dict[str, np.ndarray]:
    """Return a round's adapter as the server sends it: A from the seed, a small B, and optionally an order."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name in module_names(spec):
        rows, cols = full_shape(spec, split_name(name)[1])
        tensors[f"{name}.lora_A"] = kaiming_uniform(seed, name, r, cols)
        tensors[f"{name}.lora_B"] = rng.normal(0, 0.02 * order, (rows, r)).astype(np.float32)
    for i in range(spec.num_layers):
        tensors[f"held.{i}.heads"] = np.arange(spec.num_kv_heads, dtype=np.int32)
        tensors[f"held.{i}.channels"] = np.arange(spec.intermediate_size, dtype=np.int32)
    for i in range(spec.num_layers if order else 0):
        tensors[f"order.{i}.heads"] = rng.permutation(spec.num_kv_heads).astype(np.int32)
        tensors[f"order.{i}.channels"] = rng.permutation(spec.intermediate_size).astype(np.int32)
    return tensors


class Fleet:
    """A broker, and a server that the test controls."""

    def __init__(self, transport: Any = None) -> None:
        self.broker = MemoryBroker()
        self.transport = transport or MemoryTransport(self.broker, "server")
        self.transport.connect(timeout_s=10.0)
        self.transport.subscribe(*TOPICS.server_filters)
        self.reports: list[Report] = []
        self.statuses: list[Status] = []
        self.chunks: dict[str, dict[int, bytes]] = {}
        self.published: list[bytes] = []
        """Topics and payloads of all messages of devices."""

    def offer(self, tensors: dict[str, np.ndarray], *, chunk_bytes: int = 1024, corrupt: bool = False) -> Any:
        ref, parts = chunks.split(codec.pack(tensors), chunk_bytes=chunk_bytes)
        for index, data in enumerate(parts):
            data = bytes(len(data)) if corrupt and index == 1 else data
            self.transport.publish(TOPICS.blob(ref.sha256, index), data, retain=True)
        return ref

    def send(self, **options: Any) -> bytes:
        """Publish the plan of a round."""
        plan = {
            "run_id": "run",
            "device_id": "d1",
            "server_round": 1,
            "num_rounds": 4,
            "r": 4,
            "tau": 6,
            "recovery_steps": 6,
            "training": TRAINING,
            "seed": 3,
            **options,
        }
        if isinstance(plan.get("adapter"), BlobRef):
            plan["adapter"] = (plan["adapter"],)
        return self.publish(RoundPlan(**plan))

    def publish(self, plan: Plan) -> bytes:
        payload = codec.encode(plan)
        self.transport.publish(TOPICS.plan("d1"), payload, retain=True)
        return payload

    def send_wait(self, reason: str = "") -> bytes:
        return self.publish(WaitPlan(run_id="run", device_id="d1", reason=reason))

    def finish(self) -> bytes:
        return self.publish(FinishedPlan(run_id="run", device_id="d1"))

    def ack(self, status: str, server_round: int = 1, **options: Any) -> None:
        message = Ack(run_id="run", device_id="d1", server_round=server_round, status=status, **options)
        self.transport.publish(TOPICS.ack("d1"), codec.encode(message))

    def listen(self, timeout_s: float = 0.0) -> None:
        while (event := self.transport.receive(timeout_s=timeout_s)) is not None:
            if not isinstance(event, Incoming):
                continue
            self.published += [event.topic.encode(), event.payload]
            topic = TOPICS.parse(event.topic)
            if isinstance(topic, UploadTopic):
                self.chunks.setdefault(topic.sha256, {})[topic.index] = event.payload
            elif topic.kind == "report":
                self.reports.append(codec.decode(event.payload, Report))
            elif topic.kind == "status":
                self.statuses.append(codec.decode(event.payload, Status))

    def update(self, report: Report | None = None) -> dict[str, np.ndarray]:
        """Return the tensors that a report announced; None for the last report."""
        report = report or self.reports[-1]
        chunks = self.chunks[report.update.sha256]
        data = b"".join(chunks[i] for i in range(report.update.num_chunks))
        assert codec.digest(data) == report.update.sha256
        return codec.unpack(data)

    def device(self, settings: DeviceConfig, *, model: Any = None, clock: Any = None) -> Driven:
        transport = MemoryTransport(self.broker, settings.device_id)
        return Driven(self, transport, FleetDevice(settings, transport, clock or VirtualClock(), model=model))


class Driven:
    """A device driven step by step, as in a simulation."""

    def __init__(self, fleet: Fleet, transport: MemoryTransport, device: FleetDevice) -> None:
        self.fleet, self.transport, self.device = fleet, transport, device

    def start(self) -> Driven:
        self.device.start()
        return self

    def settle(self) -> None:
        """Handle all pending events, then let the server receive."""
        while (event := self.transport.receive(timeout_s=0.0)) is not None:
            self.device.handle(event)
        self.fleet.listen()


def main() -> None:
    """Run one round in this process, and optionally kill it at a step: `folder csv state out [kill_at]`."""
    import os
    import signal

    import torch

    from fedspine_edge.training.trainer import Trainer

    folder, csv, state, out = map(Path, sys.argv[1:5])
    kill_at = int(sys.argv[5]) if len(sys.argv) > 5 else None
    torch.set_num_threads(1)
    take_step = Trainer._take_step

    def fatal(self: Trainer, *arguments: Any) -> None:
        with (out / "steps.txt").open("a") as file:
            file.write(f"{self.step}\n")
        if self.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        take_step(self, *arguments)

    Trainer._take_step = fatal
    fleet = Fleet()
    driven = fleet.device(config(folder, csv, state)).start()
    fleet.send(**killed_plan(fleet, driven.device.spec))
    driven.settle()
    driven.device.close()
    (out / "report.json").write_bytes(codec.encode(fleet.reports[-1]))
    (out / "update.bin").write_bytes(codec.pack(fleet.update()))


def killed_plan(fleet: Fleet, spec: Any) -> dict[str, Any]:
    return {"adapter": fleet.offer(round_tensors(spec, order=True)), "pruning_ratio": 0.5, "tau": 12, "server_round": 2}


if __name__ == "__main__":
    main()

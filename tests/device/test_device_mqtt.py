"""A device with its real loop over a real broker: one acknowledged round, then the end of the run."""

import threading
import time

import pytest
from tiny_fleet import Fleet, config, round_tensors

from fedspine_edge.config import BrokerSettings
from fedspine_edge.device.agent import FleetDevice

pytestmark = pytest.mark.broker


def test_round_over_mqtt(tiny_folder, tiny_csv, tiny_base, tmp_path):
    pytest.importorskip("iotcore")
    from fedspine_edge.transport.broker import EmbeddedBroker
    from fedspine_edge.transport.mqtt import MqttTransport

    with EmbeddedBroker() as broker:
        address = BrokerSettings(host="127.0.0.1", port=broker.port)
        fleet = Fleet(MqttTransport(address, "server"))
        settings = config(tiny_folder, tiny_csv, tmp_path / "state", time_kind="measured")
        device = FleetDevice(settings, MqttTransport(address, "d1"), model=tiny_base)
        exit_codes = []
        thread = threading.Thread(target=lambda: exit_codes.append(device.run()))
        thread.start()
        ref = fleet.offer(round_tensors(tiny_base.spec, r=16), chunk_bytes=1024)
        fleet.send(adapter=ref, r=16)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            fleet.listen(timeout_s=0.05)
            if fleet.reports and len(fleet.chunks.get(fleet.reports[-1].update.sha256, ())) == (
                fleet.reports[-1].update.num_chunks
            ):
                break
        report, update = fleet.reports[-1], fleet.update()
        assert report.status == "ok"
        assert report.bytes_down == ref.size_bytes
        assert 0 < report.completion_time_s < 60
        assert report.peak_memory_bytes > 50_000_000
        assert update["layers.0.q.lora_A"].shape == (16, 32)
        fleet.ack("accepted")
        fleet.finish()
        thread.join(30)
        assert exit_codes == [0]
        fleet.listen(timeout_s=0.5)
        assert fleet.statuses[-1].state == "offline"
        fleet.transport.close()

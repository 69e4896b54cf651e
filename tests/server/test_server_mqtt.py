"""Server kills and lost broker messages do not change the result; real broker, real time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fleet_fakes import FakeDevice, make_config

from fedspine_edge.clock import RealClock
from fedspine_edge.config import BrokerSettings
from fedspine_edge.server.journal.writer import Journal

pytestmark = pytest.mark.broker
ROOT = Path(__file__).parents[2]


@pytest.fixture
def broker():
    pytest.importorskip("iotcore")
    from fedspine_edge.transport.broker import EmbeddedBroker

    with EmbeddedBroker() as running:
        yield running


def spawn(run_dir, port):
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("serve_child.py")), str(run_dir), str(port)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"},
    )


class Threaded:
    """Fake devices, each driven by a thread over its own MQTT connection."""

    def __init__(self, folder, port):
        from fedspine_edge.transport.mqtt import MqttTransport

        self.stop = threading.Event()
        self.devices, self.threads, self.errors = [], [], []
        for index, duration_s in enumerate((10.0, 12.0, 14.3)):
            name = f"d{index}"
            transport = MqttTransport(BrokerSettings(port=port), name)
            device = FakeDevice(
                name, transport, RealClock(), folder=folder, duration_s=duration_s, num_examples=100 + 50 * index
            )
            self.devices.append(device)
            thread = threading.Thread(target=self._drive, args=(device,))
            self.threads.append(thread)

    def _drive(self, device):
        try:
            device.start()
            while not (device.finished or self.stop.is_set()):
                event = device.transport.receive(timeout_s=0.2)
                if event is not None:
                    device.handle(event)
                device.tick()
            device.transport.close()
        except Exception as error:
            self.errors.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(timeout=20)


def wait_for(condition, timeout_s=60.0):
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.02)


def accepted_in(run_dir, number):
    try:
        with Journal.open_readonly(run_dir) as journal:
            return sum(view.status == "ok" for view in journal.device_rounds(number))
    except Exception:
        return 0


def test_server_kill_and_broker_restart_keep_the_result(tmp_path, broker, fleet):
    folder = tmp_path / "mqtt-devices"
    folder.mkdir()
    run_dir = tmp_path / "mqtt"
    fleet.add_three()
    expected = fleet.serve(make_config(tmp_path / "virtual"))
    with Threaded(folder, broker.port) as real:
        # One device stays silent until the server has been killed, so that the kill falls into a round.
        hold = threading.Event()
        slow = real.devices[2]
        slow.mutate = lambda plan, tensors, report: (
            hold.wait(60) if plan.server_round == 2 else None,
            (tensors, report),
        )[1]
        server = spawn(run_dir, broker.port)
        wait_for(lambda: accepted_in(run_dir, 2) == 2)
        server.kill()
        server.communicate()
        broker.stop()
        broker.start()
        hold.set()
        server = spawn(run_dir, broker.port)
        output, _ = server.communicate(timeout=120)
        assert server.returncode == 0
    assert not real.errors
    assert json.loads(output)["adapter_sha256"] == expected.adapter_sha256
    assert all(device.finished for device in real.devices)

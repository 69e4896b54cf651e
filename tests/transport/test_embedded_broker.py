"""The embedded broker process: start, stop, exit with its parent, and errors."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from fedspine_edge.errors import ConfigError, MissingDependency, TransportError
from fedspine_edge.transport import broker
from fedspine_edge.transport.broker import EmbeddedBroker, accepts_mqtt, free_port, main, run_broker

pytestmark = pytest.mark.broker
pytest.importorskip("iotcore", reason="the embedded broker needs the extra 'broker'")


def _wait_until_dead(port: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not accepts_mqtt("127.0.0.1", port, timeout_s=0.2):
            return True
        time.sleep(0.05)
    return False


def test_broker_listens_on_loopback_only_and_stops() -> None:
    with EmbeddedBroker() as running:
        assert running.running
        assert accepts_mqtt("127.0.0.1", running.port)
        with open("/proc/net/tcp") as table:
            local = [line.split()[1] for line in table if line.split()[3] == "0A"]
        assert [entry for entry in local if entry.endswith(f":{running.port:04X}")] == [f"0100007F:{running.port:04X}"]
    assert not running.running
    assert not accepts_mqtt("127.0.0.1", running.port)


def test_broker_command_logs_only_its_address() -> None:
    port = free_port()
    command = [sys.executable, "-m", "fedspine_edge", "broker", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not accepts_mqtt("127.0.0.1", port, timeout_s=0.5):  # a client that disconnects at once
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        process.terminate()
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == [f"iotcore.broker: broker listening on 127.0.0.1:{port}"]


def test_broker_restarts_on_the_same_port_after_a_crash() -> None:
    with EmbeddedBroker() as running:
        port, first = running.port, running.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert _wait_until_dead(port)
        running.start()
        assert (running.port, running.running) == (port, True)
        assert running.pid != first


def test_broker_exits_when_its_parent_is_killed() -> None:
    program = (
        "import time; from fedspine_edge.transport.broker import EmbeddedBroker\n"
        "with EmbeddedBroker() as b: print(b.port, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        assert accepts_mqtt("127.0.0.1", port)
        parent.kill()
    assert _wait_until_dead(port)


def test_port_in_use_raises_transport_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TransportError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            EmbeddedBroker(port=port).start()
        assert main(["--port", str(port)]) == 2
    assert "Choose another port" in capsys.readouterr().err


def test_free_port_lost_to_another_process_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        offers = iter([taken.getsockname()[1], free_port()])
        monkeypatch.setattr(broker, "free_port", lambda host: next(offers))
        with EmbeddedBroker() as running:
            assert accepts_mqtt("127.0.0.1", running.port)


def test_missing_iotcore_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iotcore", None)
    with pytest.raises(MissingDependency, match=r"fedspine-edge\[broker\]"):
        run_broker()
    with pytest.raises(MissingDependency, match=r"fedspine-edge\[broker\]"):
        EmbeddedBroker().start()


def test_invalid_port_raises() -> None:
    with pytest.raises(ConfigError, match="70000"):
        EmbeddedBroker(port=70000)
    with pytest.raises(SystemExit) as ended:
        main(["--port", "0"])
    assert ended.value.code == 2

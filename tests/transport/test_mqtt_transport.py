"""Behavior specific to real MQTT: explained refusals, TLS, passwords, last wills of killed processes, limits."""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from transport_support import Mosquitto, MqttSetup, collect, needs_mosquitto, quiet, until_connected

from fedspine_edge.config import BrokerSettings
from fedspine_edge.errors import BrokerUnreachable, ConfigError, TransportError
from fedspine_edge.transport.base import Will
from fedspine_edge.transport.broker import free_port
from fedspine_edge.transport.mqtt import MqttTransport

StartMosquitto = Callable[[str], Mosquitto]
CHUNK = bytes(96 * 1024)


def attempt(settings: BrokerSettings, *, timeout_s: float = 0.4) -> BrokerUnreachable:
    """Return the error of a connection that must fail."""
    transport = MqttTransport(settings, "attempt")
    with pytest.raises(BrokerUnreachable) as caught:
        transport.connect(timeout_s=timeout_s)
    transport.close()
    return caught.value


def test_connect_to_closed_port_raises_broker_unreachable() -> None:
    port = free_port()
    started = time.monotonic()
    error = attempt(BrokerSettings(port=port))
    assert f"127.0.0.1:{port}" in error.message
    assert "refused" in error.message
    assert "broker.host" in error.remedy
    assert time.monotonic() - started < 3


def test_connect_to_unknown_host_names_dns() -> None:
    error = attempt(BrokerSettings(host="no-such-host.invalid"))
    assert "no-such-host.invalid:1883" in error.message
    assert "DNS" in error.message


def test_connect_to_silent_port_times_out() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        error = attempt(BrokerSettings(port=silent.getsockname()[1]))
        assert "was not answered in time" in error.message
        assert time.monotonic() - started < 3


@pytest.mark.broker
def test_will_of_killed_process_is_published(mqtt_setup: MqttSetup) -> None:
    watcher = mqtt_setup.transport()
    watcher.connect(timeout_s=5)
    watcher.subscribe("status/+")
    program = f"""
import time
from fedspine_edge.config import BrokerSettings
from fedspine_edge.transport.base import Will
from fedspine_edge.transport.mqtt import MqttTransport
transport = MqttTransport(BrokerSettings(port={mqtt_setup.broker.port}), "victim")
transport.connect(timeout_s=5, will=Will("status/victim", b"offline"))
transport.publish("status/victim", b"online", retain=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as victim:
        assert [message.payload for message in collect(watcher, 1)] == [b"online"]
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert [message.payload for message in collect(watcher, 1)] == [b"offline"]
    late = mqtt_setup.transport()
    late.connect(timeout_s=5)
    late.subscribe("status/victim")
    assert [(message.payload, message.retained) for message in collect(late, 1)] == [(b"offline", True)]


@pytest.mark.broker
def test_publish_while_broker_is_down_arrives_after_restart(mqtt_setup: MqttSetup) -> None:
    transport = mqtt_setup.transport()
    transport.connect(timeout_s=5)
    transport.subscribe("a/#")
    until_connected(transport)
    mqtt_setup.crash()
    for index in range(20):
        transport.publish(f"a/{index}", CHUNK)
    assert quiet(transport)
    mqtt_setup.restart()
    until_connected(transport)
    assert {message.topic for message in collect(transport, 20)} == {f"a/{index}" for index in range(20)}


@pytest.mark.broker
def test_publish_with_full_send_queue_raises_after_timeout(mqtt_setup: MqttSetup) -> None:
    transport = MqttTransport(
        mqtt_setup.settings(), "full", publish_timeout_s=0.3, flush_timeout_s=0.2, send_queue_bytes=300_000
    )
    transport.connect(timeout_s=5)
    mqtt_setup.crash()
    for _ in range(3):
        transport.publish("a", CHUNK)
    with pytest.raises(TransportError, match=r"stayed full for 0\.3 s"):
        transport.publish("a", CHUNK)
    transport.close()


@pytest.mark.broker
def test_reconnect_timeout_raises_broker_unreachable(mqtt_setup: MqttSetup) -> None:
    transport = MqttTransport(mqtt_setup.settings(), "patient", reconnect_timeout_s=1.0)
    transport.connect(timeout_s=5)
    until_connected(transport)
    mqtt_setup.crash()
    with pytest.raises(BrokerUnreachable, match="refused"):
        transport.receive(timeout_s=20)
    with pytest.raises(BrokerUnreachable, match="refused"):
        transport.publish("a", b"")
    transport.close()


@pytest.mark.broker
def test_close_without_broker_returns_in_time(mqtt_setup: MqttSetup) -> None:
    transport = MqttTransport(mqtt_setup.settings(), "leaving", flush_timeout_s=0.5)
    transport.connect(timeout_s=5)
    mqtt_setup.crash()
    transport.publish("a", CHUNK)
    started = time.monotonic()
    transport.close()
    assert time.monotonic() - started < 5


@pytest.mark.broker
def test_slow_receiver_applies_back_pressure_without_loss(mqtt_setup: MqttSetup) -> None:
    receiver = MqttTransport(mqtt_setup.settings(), "slow", receive_queue_bytes=400_000)
    sender = mqtt_setup.transport()
    receiver.connect(timeout_s=5)
    sender.connect(timeout_s=5)
    receiver.subscribe("bulk/#")
    for index in range(200):
        sender.publish(f"bulk/{index}", CHUNK)
    sender.subscribe("flush")
    sender.publish("flush", b"")
    collect(sender, 1)
    time.sleep(0.5)
    # 3 fit; 32 (Receive Maximum) or 100 (rumqttd) more may be in flight.
    assert len(receiver._receive_queue) <= 110
    assert [message.topic for message in collect(receiver, 200)] == [f"bulk/{index}" for index in range(200)]
    receiver.close()


@pytest.mark.broker
def test_publish_with_full_receive_queue_does_not_deadlock(mqtt_setup: MqttSetup) -> None:
    both = MqttTransport(mqtt_setup.settings(), "both", receive_queue_bytes=1000, publish_timeout_s=20)
    both.connect(timeout_s=5)
    both.subscribe("loop/#")
    for index in range(150):
        both.publish(f"loop/{index}", CHUNK)
    assert len(collect(both, 150)) == 150
    both.close()


@pytest.mark.broker
def test_qos_0_messages_beyond_the_receive_queue_are_counted(mqtt_setup: MqttSetup) -> None:
    receiver = MqttTransport(mqtt_setup.settings(), "bounded", receive_queue_bytes=5000)
    receiver.connect(timeout_s=5)
    receiver.subscribe("noise")
    careless = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    careless.connect(mqtt_setup.broker.host, mqtt_setup.broker.port)
    careless.loop_start()
    for _ in range(20):
        careless.publish("noise", bytes(1000), qos=0)
    deadline = time.monotonic() + 10
    while receiver.dropped + len(receiver._receive_queue) < 21 and time.monotonic() < deadline:  # plus Connected
        time.sleep(0.02)
    careless.disconnect()
    careless.loop_stop()
    assert receiver.dropped + len(collect(receiver, 20, timeout_s=0.3)) == 20
    receiver.close()


@pytest.mark.broker
def test_duplicate_client_ids_back_off_and_log_a_hint(mqtt_setup: MqttSetup, caplog: pytest.LogCaptureFixture) -> None:
    clients = [MqttTransport(mqtt_setup.settings(), "same-id", flush_timeout_s=0.5) for _ in range(2)]
    for client in clients:
        client.connect(timeout_s=5)
    deadline = time.monotonic() + 15
    while "does another client use the id 'same-id'" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "does another client use the id 'same-id'" in caplog.text
    assert sum(client.reconnects for client in clients) <= 12
    for client in clients:
        client.close()


def test_session_takeover_ends_the_connection_for_good() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def broker() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK
                time.sleep(0.2)
                connection.sendall(b"\xe0\x02\x8e\x00")  # DISCONNECT, session taken over
                connection.recv(1000)

        threading.Thread(target=broker, daemon=True).start()
        transport = MqttTransport(BrokerSettings(port=listener.getsockname()[1]), "same-id")
        transport.connect(timeout_s=5)
        until_connected(transport)
        with pytest.raises(TransportError, match="another client connected"):
            transport.receive(timeout_s=10)
        transport.close()


@pytest.mark.broker
@needs_mosquitto
def test_password_accepted_or_refused_with_remedy(mosquitto: StartMosquitto, tmp_path: Path) -> None:
    users = tmp_path / "users"
    program = shutil.which("mosquitto_passwd")
    assert program is not None
    subprocess.run([program, "-b", "-c", users, "fleet", "s3cret"], check=True)
    broker = mosquitto(f"allow_anonymous false\npassword_file {users}\n")
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("s3cret\n")
    bad.write_text("wrong\n")
    transport = MqttTransport(BrokerSettings(port=broker.port, username="fleet", password_file=str(good)), "d")
    transport.connect(timeout_s=10)
    until_connected(transport)
    transport.close()
    started = time.monotonic()
    error = attempt(BrokerSettings(port=broker.port, username="fleet", password_file=str(bad)), timeout_s=30)
    assert f"127.0.0.1:{broker.port}" in error.message
    assert "refused the connection" in error.message
    assert "password_file" in error.remedy
    assert "wrong" not in str(error)
    assert time.monotonic() - started < 10  # a wrong password is not retried


@pytest.mark.broker
@needs_mosquitto
def test_publish_above_packet_limit_raises_before_sending(mosquitto: StartMosquitto) -> None:
    broker = mosquitto("allow_anonymous true\nmax_packet_size 50000\n")
    transport = MqttTransport(BrokerSettings(port=broker.port), "large")
    transport.connect(timeout_s=10)
    with pytest.raises(TransportError, match="maximum packet size of 50,000 bytes"):
        transport.publish("a", CHUNK)
    transport.subscribe("a")
    transport.publish("a", bytes(49_000))
    assert len(collect(transport, 1)) == 1
    transport.close()


@pytest.mark.broker
@needs_mosquitto
def test_publish_forbidden_by_access_list_raises(mosquitto: StartMosquitto, tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite mine/#\n")
    broker = mosquitto(f"allow_anonymous true\nacl_file {rules}\n")
    transport, watcher = (MqttTransport(BrokerSettings(port=broker.port), name) for name in ("limited", "watcher"))
    transport.connect(timeout_s=10, will=Will("mine/status", b"offline"))
    watcher.connect(timeout_s=10)
    watcher.subscribe("mine/#")
    until_connected(transport)
    transport.publish("other/a", b"1")
    with pytest.raises(TransportError, match=r"publication to 'other/a'.*Not authorized"):
        transport.receive(timeout_s=10)
    assert [message.payload for message in collect(watcher, 1)] == [b"offline"]
    for client in (transport, watcher):
        client.close()


def _certificates(folder: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
    for authority in ("ca", "stranger"):
        openssl(
            "req", "-x509", *key, "-keyout", f"{authority}.key", "-out", f"{authority}.pem", "-subj", f"/CN={authority}"
        )
    for name, subject in (("server", "localhost"), ("device", "device-1")):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={subject}")
        (folder / "names").write_text(f"subjectAltName=DNS:{subject}\n")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", "names", "-out", f"{name}.pem"),
        )


@pytest.mark.broker
@needs_mosquitto
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_tls_with_client_certificates(mosquitto: StartMosquitto, tmp_path: Path) -> None:
    _certificates(tmp_path)
    files = {name: str(tmp_path / name) for name in ("ca.pem", "stranger.pem", "device.pem", "device.key")}
    broker = mosquitto(
        f"allow_anonymous true\ncafile {tmp_path}/ca.pem\ncertfile {tmp_path}/server.pem\n"
        f"keyfile {tmp_path}/server.key\nrequire_certificate true\n"
    )

    def settings(**changes: str) -> BrokerSettings:
        given = {"host": "localhost", "ca_file": files["ca.pem"]}
        given |= {"cert_file": files["device.pem"], "key_file": files["device.key"]} | changes
        return BrokerSettings(port=broker.port, **given)

    transport = MqttTransport(settings(), "tls")
    transport.connect(timeout_s=10)
    transport.subscribe("a")
    transport.publish("a", CHUNK)
    assert len(collect(transport, 1)) == 1
    transport.close()

    untrusted = attempt(settings(ca_file=files["stranger.pem"]), timeout_s=30)
    assert "TLS: the broker's certificate is not trusted" in untrusted.message
    assert "ca_file" in untrusted.remedy
    assert "not trusted" in attempt(settings(host="127.0.0.1"), timeout_s=30).message
    plain = attempt(BrokerSettings(host="localhost", port=broker.port))
    assert "ca_file" in plain.remedy
    anonymous = attempt(settings(cert_file="", key_file=""))
    assert "client certificate" in anonymous.remedy
    unencrypted = mosquitto("allow_anonymous true\n")
    unencrypted.wait_for_tcp()
    assert "TLS" in attempt(BrokerSettings(host="localhost", port=unencrypted.port, ca_file=files["ca.pem"])).message


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (BrokerSettings(ca_file="/no/ca.pem"), "ca_file"),
        (BrokerSettings(ca_file=__file__), "TLS files"),
        (BrokerSettings(key_file="k.pem"), "key_file"),
        (BrokerSettings(cert_file="c.pem"), "cert_file"),
        (BrokerSettings(username="u", password_file="/no/password"), "password_file"),
        (BrokerSettings(password_file=__file__), "username"),
    ],
)
def test_unusable_credential_files_raise_config_error(settings: BrokerSettings, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        MqttTransport(settings, "d")
    assert caught.value.remedy
    assert "Errno" not in caught.value.message


def test_empty_password_file_raises_config_error(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="is empty") as caught:
        MqttTransport(BrokerSettings(username="u", password_file=str(tmp_path / "empty")), "d")
    assert caught.value.remedy


@pytest.mark.broker
def test_close_ends_all_threads(mqtt_setup: MqttSetup) -> None:
    before = set(threading.enumerate())
    transport = MqttTransport(mqtt_setup.settings(), "tidy")
    transport.connect(timeout_s=5)
    assert set(threading.enumerate()) - before
    with pytest.raises(TransportError, match="already connected"):
        transport.connect(timeout_s=5)
    transport.close()
    assert set(threading.enumerate()) - before == set()


@pytest.mark.broker
def test_log_contains_no_payloads(mqtt_setup: MqttSetup, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    transport = mqtt_setup.transport()
    transport.connect(timeout_s=5)
    transport.subscribe("a")
    transport.publish("a", b"private sentence")
    assert len(collect(transport, 1)) == 1
    mqtt_setup.crash()
    quiet(transport)
    assert caplog.text
    assert "private sentence" not in caplog.text

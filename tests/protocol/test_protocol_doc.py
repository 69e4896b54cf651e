"""docs/reference/protocol.md is complete, and the access list in docs/guides/secure-the-broker.md works."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import msgspec
import paho.mqtt.client as mqtt
import pytest

from fedspine_edge.config import OptimizerSettings
from fedspine_edge.model.spec import ModelSpec
from fedspine_edge.protocol import codec
from fedspine_edge.protocol.messages import Ack, BlobRef, FinishedPlan, Report, RoundPlan, Status, WaitPlan
from fedspine_edge.protocol.topics import Topics

DOC = (Path(__file__).parents[2] / "docs" / "reference" / "protocol.md").read_text(encoding="utf-8")
SHA = "ab" * 32


@pytest.mark.parametrize(
    "kind",
    [Status, ModelSpec, RoundPlan, WaitPlan, FinishedPlan, OptimizerSettings, BlobRef, Report, Ack],
    ids=lambda k: k.__name__,
)
def test_protocol_page_documents_exactly_the_fields(kind):
    section = DOC.split(f"\n### {kind.__name__}\n")[1].split("\n#")[0]
    names = {name for row in re.findall(r"^\| (`.+?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    config = kind.__struct_config__
    assert names == {*kind.__struct_encode_fields__, *([config.tag_field] if config.tag_field else [])}


@pytest.mark.parametrize("kind", [OptimizerSettings, BlobRef], ids=lambda k: k.__name__)
def test_protocol_page_has_the_actual_defaults(kind):
    section = DOC.split(f"\n### {kind.__name__}\n")[1].split("\n#")[0]
    for field in msgspec.structs.fields(kind):
        if field.default is not msgspec.NODEFAULT:
            row = re.search(rf"^\| `{field.encode_name}` \| [^|]+ \| ([^|]+) \|", section, re.M)
            assert row, field.name
            assert float(row.group(1).replace(",", "")) == field.default


def test_protocol_page_has_the_actual_limits():
    assert f"{codec.MAX_TENSORS:,} tensors" in DOC
    assert codec.MAX_MESSAGE_BYTES == 64 * 1024
    assert codec.MAX_HEADER_BYTES == 2 * 1024**2


def acl() -> str:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "secure-the-broker.md"
    return guide.read_text(encoding="utf-8").split("```acl\n")[1].split("```")[0]


class Client:
    """A paho client that remembers what it got."""

    def __init__(self, port: int, username: str) -> None:
        self.got: list[tuple[str, bytes]] = []
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._client.username_pw_set(username, "x")
        self._client.on_message = lambda _c, _u, message: self.got.append((message.topic, message.payload))
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def subscribe(self, topic_filter: str) -> None:
        self._client.subscribe(topic_filter, qos=1)

    def publish(self, topic: str, payload: bytes = b"x") -> int:
        """The reason code's value of the acknowledgement: 135 is "not authorized"."""
        codes: list[int] = []
        self._client.on_publish = lambda _c, _u, _mid, reason, _p: codes.append(reason.value)
        self._client.publish(topic, payload, qos=1)
        wait_for(lambda: codes)
        return codes[0]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def wait_for(condition, *, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


@pytest.fixture
def mosquitto(tmp_path):
    executable = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    password_tool = shutil.which("mosquitto_passwd")
    if executable is None or password_tool is None:
        pytest.skip("mosquitto is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path
    (folder / "acl").write_text(acl())
    (folder / "passwords").touch()
    for name in ("fedspine-server", "agx-0", "nx-1"):
        subprocess.run([password_tool, "-b", str(folder / "passwords"), name, "x"], check=True, capture_output=True)
    # Started as root, mosquitto would turn into a user that cannot read our temporary folder.
    user = "user root\n" if os.geteuid() == 0 else ""
    (folder / "conf").write_text(
        f"{user}listener {port} 127.0.0.1\nallow_anonymous false\n"
        f"password_file {folder}/passwords\nacl_file {folder}/acl\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([executable, "-c", str(folder / "conf")], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.mark.broker
def test_documented_acl_restricts_a_device_to_its_topics(mosquitto):
    topics = Topics("farm")
    server, agx, nx = (Client(mosquitto, name) for name in ("fedspine-server", "agx-0", "nx-1"))
    try:
        for topic_filter in topics.server_filters:
            server.subscribe(topic_filter)
        for client, name in ((agx, "agx-0"), (nx, "nx-1")):
            for topic_filter in (*topics.device_filters(name), topics.blob(SHA, 0)):
                client.subscribe(topic_filter)
        agx.subscribe(topics.plan("nx-1"))

        own = [topics.status("agx-0"), topics.report("agx-0"), topics.upload("agx-0", SHA, 3)]
        foreign = [
            topics.status("nx-1"),
            topics.report("nx-1"),
            topics.upload("nx-1", SHA, 0),
            topics.plan("nx-1"),
            topics.plan("agx-0"),
            topics.ack("agx-0"),
            topics.blob(SHA, 0),
        ]
        assert all(agx.publish(topic) < 128 for topic in own)
        assert [agx.publish(topic) for topic in foreign] == [135] * len(foreign)
        for topic in (topics.plan("agx-0"), topics.plan("nx-1"), topics.ack("agx-0"), topics.blob(SHA, 0)):
            assert server.publish(topic, b"from the server") < 128

        wait_for(lambda: len(server.got) >= 3 and len(agx.got) >= 3 and len(nx.got) >= 2)
        assert [topic for topic, _ in server.got] == own
        assert {topic for topic, _ in agx.got} == {topics.plan("agx-0"), topics.ack("agx-0"), topics.blob(SHA, 0)}
        assert {topic for topic, _ in nx.got} == {topics.plan("nx-1"), topics.blob(SHA, 0)}
    finally:
        for client in (server, agx, nx):
            client.close()

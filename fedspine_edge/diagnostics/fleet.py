"""Checks of a broker, and of everything that a fleet.toml or a device.toml refers to.

The checks do not disturb a running server or device: they use another client id, retain nothing, and publish an empty
message only, which receivers ignore.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedspine_edge.config import BrokerSettings, DeviceConfig, FleetConfig, load_config
from fedspine_edge.diagnostics.check import Check, first_line
from fedspine_edge.errors import BrokerUnreachable, FedspineError
from fedspine_edge.files import TOKENIZER_VOCABULARIES
from fedspine_edge.transport.credentials import explain_connect_error

CONNECT_TIMEOUT_S = 5.0
REFUSAL_TIMEOUT_S = 1.0
"""Time in which a broker must refuse a message. The transport does not report an acceptance."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def broker_check(address: str) -> Iterator[Check]:
    """Connect to HOST:PORT with MQTT, and before with plain TCP to distinguish a dead host from a refusal."""
    host, _, port = address.rpartition(":")
    remedy = f"fedspine-edge broker --host {host} --port {port}  # on the broker's machine, or start another one"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        yield Check("broker", "failed", f"{address} does not answer: {first_line(error)}", remedy)
        return
    try:
        _connect(BrokerSettings(host=host.strip("[]"), port=int(port)), f"fedspine-doctor-{os.getpid()}")
    except Exception as error:
        detail = f"{address} accepts TCP but no anonymous MQTT 5 connection: {first_line(error)}"
        remedy = "check that MQTT listens there; with TLS or passwords: fedspine-edge doctor --config device.toml"
        yield Check("broker", "failed", detail, remedy)
    else:
        yield Check("broker", "ok", f"{address} accepts MQTT 5")


def device_checks(path: str) -> Iterator[Check]:
    """Check the broker, the data, the model and the state folder of a device."""
    from fedspine_edge.protocol.topics import Topics, client_id

    config = load_config(path, DeviceConfig)
    topics, name = Topics(config.fleet), config.device_id
    this_client = client_id(config.fleet, "doctor", name)
    yield _login(config.broker, this_client, topics.device_filters(name), topics.report(name))
    yield _checked("data", lambda: _data(config))
    yield _model(config.model)
    yield _folder("state_dir", Path(config.state_dir))


def fleet_checks(path: str) -> Iterator[Check]:
    """Check the broker, the strategy and the run folder of a fleet."""
    from fedspine_edge.protocol.topics import Topics, client_id

    config = load_config(path, FleetConfig)
    topics = Topics(config.fleet)
    yield _login(config.broker, client_id(config.fleet, "doctor"), topics.server_filters, topics.ack("doctor"))
    yield _checked("strategy", lambda: _strategy(config))
    yield _run_dir(Path(config.run_dir))


def _login(settings: BrokerSettings, client_id: str, filters: tuple[str, ...], topic: str) -> Check:
    """Connect with these settings, subscribe, and publish an empty message to `topic`."""

    def log_in() -> str:
        try:  # report at once; the transport would retry
            socket.create_connection((settings.host, settings.port), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            why = explain_connect_error(error, tls=bool(settings.ca_file))
            text = f"no connection to the MQTT broker at {settings.host}:{settings.port}: {why.reason}."
            raise BrokerUnreachable(text, remedy=why.remedy) from None
        _connect(settings, client_id, filters, topic)
        tls, user = ", TLS" if settings.ca_file else "", f", user {settings.username}" if settings.username else ""
        return f"{settings.host}:{settings.port} accepts MQTT 5{tls}{user}, and a message to {topic}"

    found = _checked("broker", log_in)
    if found.state == "ok" and settings.password_file and not (settings.ca_file or _is_loopback(settings.host)):
        return Check("broker", "warn", f"{found.detail}; the password is sent unencrypted", "set broker.ca_file")
    return found


def _connect(settings: BrokerSettings, client_id: str, filters: tuple[str, ...] = (), topic: str = "") -> None:
    from fedspine_edge.transport.mqtt import MqttTransport

    transport = MqttTransport(settings, client_id, publish_timeout_s=CONNECT_TIMEOUT_S, flush_timeout_s=1.0)
    try:
        transport.connect(timeout_s=CONNECT_TIMEOUT_S)
        if filters:
            transport.subscribe(*filters)
            transport.publish(topic, b"")
            until = time.monotonic() + REFUSAL_TIMEOUT_S
            while (left := until - time.monotonic()) > 0:
                transport.receive(timeout_s=left)  # raises a refusal
    finally:
        transport.close()


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _data(config: DeviceConfig) -> str:
    from fedspine_edge.data.examples import split_holdout
    from fedspine_edge.data.loading import read_examples

    data = config.data
    train, held = split_holdout(read_examples(data.path, data, config.task), data.holdout, config.seed, where=data.path)
    return f"{data.path}: {len(train):,} examples to train on, {len(held):,} held out"


def _model(name: str) -> Check:
    """Check the files of a base model. A device checks the weights when it reads them."""
    folder = Path(name).expanduser()
    if (folder.suffix == ".gguf" and folder.is_file()) or any(folder.glob("*.gguf")):
        return Check("model", "ok", f"{folder}: GGUF")
    if not folder.exists():
        if _HUB_ID.fullmatch(name):
            detail = f"{name} is not a folder here; the device will fetch it from the Hugging Face hub when it starts"
            return Check("model", "warn", detail, "correct model, or copy the folder here, if this is not intended")
        return Check("model", "failed", f"model folder {folder} does not exist", "correct model in the config file")
    wanted = {
        "config.json": ("config.json",),
        "*.safetensors": ("*.safetensors",),
        "tokenizer": TOKENIZER_VOCABULARIES,
    }
    missing = [what for what, patterns in wanted.items() if not any(any(folder.glob(p)) for p in patterns)]
    if missing:
        detail = f"{folder} has no {', no '.join(missing)}"
        return Check("model", "failed", detail, "copy the whole folder of the base model, as Hugging Face writes it")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Check("model", "ok", f"{folder}: {size / 1e6:,.0f} MB of weights")


def _strategy(config: FleetConfig) -> str:
    from fedspine_edge.strategies import create

    create(config)
    return f"{config.strategy}: {config.num_rounds} rounds to a pruning ratio of {config.pruning_ratio:g}"


def _run_dir(path: Path) -> Check:
    from fedspine_edge.server.journal.reader import FILE
    from fedspine_edge.server.run_dir import is_server_running

    found = _folder("run_dir", path)
    if found.state == "ok" and (path / FILE).exists():
        state = "a server is running on it" if is_server_running(path) else "the server will continue it"
        return Check("run_dir", "ok", f"{path} contains a run; {state}")
    return found


def _folder(name: str, path: Path) -> Check:
    """Check whether this user can write to the folder or create it."""
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    remedy = f"give it to this user (chown), or set {name} to another folder"
    if not nearest.is_dir():
        return Check(name, "failed", f"{nearest} is not a folder", f"set {name} to another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        return Check(name, "failed", f"{nearest} cannot be written by this user", remedy)
    return Check(name, "ok", f"{path}{'' if path.exists() else ' will be created'}")


def _checked(name: str, check: Callable[[], str]) -> Check:
    """Return the detail from `check` as ok, or its error as failed."""
    try:
        return Check(name, "ok", check())
    except FedspineError as error:
        return Check(name, "failed", error.message, error.remedy or "correct the config file")

"""Embedded MQTT 5 broker: rumqttd from the `iotcore` wheel, in a separate process.

`python -m fedspine_edge.transport.broker` runs the broker in the foreground. `EmbeddedBroker` starts that command,
waits until it accepts MQTT connections, and stops it. The child process also exits when its parent dies for any
reason. The broker has no TLS, no passwords and no persistence, and listens on loopback by default. Use Mosquitto or
EMQX for a fleet on a network.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from fedspine_edge.errors import ConfigError, FedspineError, MissingDependency, TransportError

MAX_PAYLOAD_BYTES = 2 * 1024 * 1024
"""Twice the largest chunk of the protocol. With rumqttd's default of 20 KB, clients would be disconnected."""

_SEGMENT_BYTES, _SEGMENTS = 16 * 1024 * 1024, 8
"""Size and number of log segments that the router keeps per topic filter.

A subscriber that falls behind by more than all segments loses messages. The router never frees a log. The logs of the
server's chunks, one per topic, therefore hold a single message (the custom segment below); the chunks themselves are
retained messages and stored elsewhere. Measured over rounds of 6.3 MB in 64 chunks, this leaves 0.6 MB per round
instead of 2.9 MB.
"""

_CONFIG = """
id = 0
[router]
id = 0
max_connections = 10000
max_outgoing_packet_count = 200
max_segment_size = {segment_bytes}
max_segment_count = {segments}
[router.custom_segment."fedspine/v1/+/blob/+/+"]
max_segment_size = 1024
max_segment_count = 1
[v5.1]
name = "v5"
listen = "{listen}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 30000
max_payload_size = {max_payload_bytes}
max_inflight_count = 200
dynamic_filters = true
"""

_BIND_ATTEMPTS = 5

# MQTT 5 CONNECT: clean start, keep-alive 5 s, no properties, an empty client id (the broker assigns one).
_CONNECT_PACKET = b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x05\x00\x00\x00"


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that is free at this moment. Another process may take it before it is used."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def accepts_mqtt(host: str, port: int, *, timeout_s: float = 2.0) -> bool:
    """Return whether `host:port` answers an MQTT 5 CONNECT with a CONNACK within `timeout_s` seconds."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=timeout_s) as probe:
        probe.sendall(_CONNECT_PACKET)
        return probe.recv(1) == b"\x20"
    return False


def run_broker(host: str = "127.0.0.1", port: int = 1883, *, die_with_parent: bool = False) -> None:
    """Run the broker in this process until it is killed.

    Args:
        host: IP address to listen on. Any address but loopback exposes an open broker to that network.
        port: TCP port.
        die_with_parent: Whether to exit when standard input closes, as it does when the parent process dies.

    Raises `MissingDependency` without iotcore and `TransportError` when the port is taken.
    """
    native = _load_iotcore()
    _require_free(host, port)
    if die_with_parent:
        _end_with_parent()
    # The router logs an error span for every packet. tracing.span logs only the names of spans without fields
    # ("spawn;", "disconnect;") and no events, so silencing it loses no warning.
    for name in ("rumqttd", "tracing.span"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="fedspine-broker-") as folder:
        config = Path(folder) / "rumqttd.toml"
        listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        config.write_text(
            _CONFIG.format(
                listen=listen,
                segment_bytes=_SEGMENT_BYTES,
                segments=_SEGMENTS,
                max_payload_bytes=MAX_PAYLOAD_BYTES,
            )
        )
        broker = native(config_path=str(config))
    broker.run_forever()


def _load_iotcore() -> type:
    try:
        from iotcore import IotCoreBroker
    except ImportError:
        raise MissingDependency.of("iotcore", extra="broker", purpose="the embedded broker") from None
    return IotCoreBroker  # type: ignore[no-any-return]


def _require_free(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise TransportError(
            f"the embedded broker cannot listen on {host}:{port}: {error.strerror or error}.",
            remedy=f"Choose another port, or find the process with: ss -ltnp 'sport = :{port}'",
        ) from None


def _end_with_parent() -> None:
    """Exit at end-of-file on standard input: the kernel closes the parent's end when the parent dies for any reason.

    PR_SET_PDEATHSIG would fire when the parent's *thread* ends, and callers may start brokers in threads.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


class EmbeddedBroker:
    """Broker process for the duration of a `with` block.

    Args:
        host: IP address to listen on.
        port: TCP port. 0 picks a free one, and another one if a process takes it first.
        start_timeout_s: Longest wait for the first accepted MQTT connection, in seconds.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, start_timeout_s: float = 30.0) -> None:
        if not 0 <= port <= 65535:
            raise ConfigError(f"broker port is {port}; it must be within 0..65535.")
        self.host = host
        self.port = port
        self._attempts = _BIND_ATTEMPTS if port == 0 else 1
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the broker, running or not. None before `start` and after `stop`."""
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._process is not None and self._process.poll() is None

    @property
    def _address(self) -> str:
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    def start(self) -> EmbeddedBroker:
        """Start the process and wait until it accepts connections; after `stop` or a crash, on the same port again.

        Raises `MissingDependency`, or `TransportError` when the port is taken or the process does not start.
        """
        # A crashed process closes its sockets a moment before it can be waited for.
        if self.running and accepts_mqtt(self._address, self.port):
            return self
        _load_iotcore()
        while True:
            self._attempts -= 1
            port = self.port or free_port(self.host)
            try:
                self._spawn(port)
            except TransportError:
                if self._attempts <= 0:
                    raise
                continue
            self.port, self._attempts = port, 1
            return self

    def stop(self, *, timeout_s: float = 5.0) -> None:
        """Terminate the process and wait for it; kill it after `timeout_s` seconds. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def __enter__(self) -> EmbeddedBroker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self, port: int) -> None:
        self.stop()
        _require_free(self.host, port)
        command = [sys.executable, "-m", "fedspine_edge.transport.broker", "--host", self.host, "--port", str(port)]
        with tempfile.TemporaryFile() as log_file:
            # With its own session, Ctrl-C in a terminal reaches only this program, which stops the broker last.
            self._process = subprocess.Popen(
                [*command, "--die-with-parent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log_file,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            deadline = time.monotonic() + self._start_timeout_s
            while time.monotonic() < deadline and self.running:
                if accepts_mqtt(self._address, port, timeout_s=1.0) and self.running:
                    return
                time.sleep(0.02)
            code = self._process.poll()
            self.stop()
            log_file.seek(0)
            reason = log_file.read()[-2000:].decode(errors="replace").strip()
        if code is None:
            reason = f"no connection was accepted within {self._start_timeout_s:g} s. {reason}"
        raise TransportError(
            f"the embedded broker did not start on {self.host}:{port}: {reason or f'exit code {code}'}",
            remedy="Try again, choose another port, or use another broker.",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of this module. Returns exit code 2 when the port is in use or iotcore is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m fedspine_edge.transport.broker",
        description="Run the embedded MQTT 5 broker in the foreground (no TLS, no passwords, no persistence).",
        epilog="example: python -m fedspine_edge.transport.broker --port 1883",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=1883, help="TCP port (default: %(default)s)")
    parser.add_argument("--die-with-parent", action="store_true", help="exit when standard input closes")
    options = parser.parse_args(arguments)
    if not 1 <= options.port <= 65535:
        parser.error(f"--port is {options.port}; it must be within 1..65535")
    try:
        run_broker(options.host, options.port, die_with_parent=options.die_with_parent)
    except FedspineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

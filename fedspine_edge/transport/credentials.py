"""TLS contexts and passwords for a broker, and explanations of failed connection attempts."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

from fedspine_edge.config import BrokerSettings
from fedspine_edge.errors import ConfigError

_BAD_CREDENTIALS, _NOT_AUTHORIZED, _BAD_CLIENT_ID = 0x86, 0x87, 0x85
_UNSUPPORTED_VERSION = (0x01, 0x84)


class ConnectAttemptFailed(Exception):
    """One failed attempt to connect.

    Args:
        reason: Description of the failure, without a full stop.
        remedy: Advice to the user.
        permanent: Whether retrying with the same settings cannot help.
    """

    def __init__(self, reason: str, remedy: str, *, permanent: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.remedy, self.permanent = reason, remedy, permanent


class _TlsSocket(ssl.SSLSocket):
    """TLS socket that closes when its handshake fails; paho would leave that to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def tls_context(settings: BrokerSettings) -> ssl.SSLContext | None:
    """Return the TLS context for `settings`, or None for a plain connection. Raises `ConfigError`."""
    if settings.key_file and not settings.cert_file:
        raise ConfigError("broker.key_file is set without broker.cert_file.", remedy="Set both, or neither.")
    if settings.cert_file and not settings.ca_file:
        raise ConfigError(
            "broker.cert_file is set without broker.ca_file.", remedy="Set broker.ca_file to turn TLS on."
        )
    if not settings.ca_file:
        return None
    for key in ("ca_file", "cert_file", "key_file"):
        name = getattr(settings, key)
        if name and not Path(name).is_file():
            raise ConfigError(
                f"broker.{key} is {name!r}, which is not a file.",
                remedy="Give the path of a PEM file. Relative paths start at the current folder.",
            )
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
        context.sslsocket_class = _TlsSocket
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file or None)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"the TLS files in [broker] cannot be used: {error}.",
            remedy="Use PEM files, and a key that belongs to the certificate.",
        ) from None
    return context


def read_password(settings: BrokerSettings) -> str | None:
    """Return the first line of the password file, or None without a file. Raises `ConfigError`."""
    if not settings.password_file:
        return None
    if not settings.username:
        raise ConfigError("broker.password_file is set without broker.username.", remedy="Set broker.username as well.")
    try:
        lines = Path(settings.password_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"broker.password_file {settings.password_file!r} cannot be read: {why}.",
            remedy="Give a file that this user may read. Relative paths start at the current folder.",
        ) from None
    if not lines or not lines[0]:
        raise ConfigError(
            f"broker.password_file {settings.password_file!r} is empty.",
            remedy="Write the password on the first line of the file.",
        )
    return lines[0]


def explain_connect_error(error: Exception, tls: bool) -> ConnectAttemptFailed:
    """Return why the TCP connection or the TLS handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectAttemptFailed(
            f"TLS: the broker's certificate is not trusted ({error.verify_message or error.reason})",
            "Set broker.ca_file to the authority that signed it, and broker.host to a name in it.",
            permanent=True,
        )
    if isinstance(error, ssl.SSLError):
        return ConnectAttemptFailed(
            f"TLS: the handshake failed ({error.reason or error})",
            "Check that broker.port is the broker's TLS port (usually 8883), and check the client certificate.",
        )
    if isinstance(error, socket.gaierror):
        return ConnectAttemptFailed(
            f"DNS: the host name is unknown ({error.strerror})", "Check broker.host and the network."
        )
    if isinstance(error, ConnectionRefusedError):
        return ConnectAttemptFailed(
            "connection refused: nothing listens on this port",
            "Correct broker.host and broker.port, or start a broker: fedspine-edge broker",
        )
    if isinstance(error, TimeoutError):
        return ConnectAttemptFailed("the connection timed out", "Check broker.host, the network and any firewall.")
    if tls and isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return ConnectAttemptFailed(
            "TLS: the broker closed the connection during the handshake",
            "Check that broker.port is the broker's TLS port (usually 8883).",
        )
    return ConnectAttemptFailed(str(error) or type(error).__name__, "Check broker.host and broker.port.")


def explain_no_answer(lost: str, tls: bool) -> ConnectAttemptFailed:
    """Return why the broker accepted TCP but did not answer MQTT's CONNECT."""
    what = "was closed by the other side" if lost else "was not answered in time"
    hint = (
        "Check that it is an MQTT broker and accepts the client certificate."
        if tls
        else "Check that it is an MQTT broker. A TLS port needs broker.ca_file."
    )
    return ConnectAttemptFailed(f"the connection {what}", hint)


def explain_refusal(reason_code: Any) -> ConnectAttemptFailed:
    """Return why the broker refused the connection, from the reason code of its CONNACK."""
    remedies = {
        _BAD_CREDENTIALS: "Check broker.username and broker.password_file.",
        _NOT_AUTHORIZED: "Check broker.username and broker.password_file, or the broker's access list.",
        _BAD_CLIENT_ID: "Allow this device_id as a client identifier at the broker.",
        **dict.fromkeys(_UNSUPPORTED_VERSION, "The broker must speak MQTT 5 (Mosquitto >= 1.6, EMQX >= 5)."),
    }
    remedy = remedies.get(reason_code.value)
    return ConnectAttemptFailed(
        f"the broker refused the connection: {reason_code}",
        remedy or "Check the broker's log.",
        permanent=remedy is not None,
    )

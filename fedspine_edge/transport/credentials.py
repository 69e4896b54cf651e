"""What it takes to get into a broker: TLS, password, and what went wrong in words a person can act on."""

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
        reason: What happened, without a full stop.
        remedy: What the user can do about it.
        final: Trying again with the same settings cannot help.
    """

    def __init__(self, reason: str, remedy: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.remedy, self.final = reason, remedy, final


class _TlsSocket(ssl.SSLSocket):
    """Closes itself when its handshake fails, which paho leaves to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def tls_context(settings: BrokerSettings) -> ssl.SSLContext | None:
    """The TLS context that `settings` ask for, or None for a plain connection. Raises `ConfigError`."""
    if settings.key_file and not settings.cert_file:
        raise ConfigError("broker.key_file is set without broker.cert_file.", remedy="Set both or neither.")
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
                remedy="Give the path of a PEM file; it is relative to the folder the command is run in.",
            )
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
        context.sslsocket_class = _TlsSocket
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file or None)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"the TLS files of [broker] cannot be used: {error}.",
            remedy="All of them must be PEM files that belong together.",
        ) from None
    return context


def password(settings: BrokerSettings) -> str | None:
    """The first line of the password file, or None without one. Raises `ConfigError`."""
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
            remedy="Give a file that this user may read; paths are relative to the folder the command is run in.",
        ) from None
    if not lines or not lines[0]:
        raise ConfigError(
            f"broker.password_file {settings.password_file!r} has no first line.",
            remedy="Write the password there, alone on the first line.",
        )
    return lines[0]


def explain(error: Exception, tls: bool) -> ConnectAttemptFailed:
    """Why the TCP connection or the TLS handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectAttemptFailed(
            f"TLS: the broker's certificate is not trusted ({error.verify_message or error.reason})",
            "broker.ca_file must hold the authority that signed it, and broker.host must be a name in it.",
            final=True,
        )
    if isinstance(error, ssl.SSLError):
        return ConnectAttemptFailed(
            f"TLS: the handshake failed ({error.reason or error})",
            "Check that broker.port is the broker's TLS port (usually 8883), and the client certificate if it asks.",
        )
    if isinstance(error, socket.gaierror):
        return ConnectAttemptFailed(
            f"DNS: the host name is unknown ({error.strerror})", "Check broker.host and the network."
        )
    if isinstance(error, ConnectionRefusedError):
        return ConnectAttemptFailed(
            "connection refused: nothing listens there",
            "Correct broker.host and broker.port, or start a broker: fedspine-edge broker",
        )
    if isinstance(error, TimeoutError):
        return ConnectAttemptFailed(
            "no answer in time", "Check broker.host, the network and firewalls between here and there."
        )
    if tls and isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return ConnectAttemptFailed(
            "TLS: the broker closed the connection during the handshake",
            "Check that broker.port is the broker's TLS port (usually 8883).",
        )
    return ConnectAttemptFailed(str(error) or type(error).__name__, "Check broker.host and broker.port.")


def no_answer(lost: str, tls: bool) -> ConnectAttemptFailed:
    """Why a connection opened without an answer to MQTT's CONNECT."""
    what = "closed the connection" if lost else "did not answer in time"
    hint = (
        "Check that it is an MQTT broker and accepts the client certificate."
        if tls
        else "Check that it is an MQTT broker; a TLS port needs broker.ca_file."
    )
    return ConnectAttemptFailed(f"the other side {what} instead of accepting it", hint)


def refusal(reason_code: Any) -> ConnectAttemptFailed:
    """Why the broker said no; `reason_code` is that of its CONNACK."""
    remedies = {
        _BAD_CREDENTIALS: "Check broker.username and broker.password_file.",
        _NOT_AUTHORIZED: "Check broker.username and broker.password_file, or the broker's access list.",
        _BAD_CLIENT_ID: "Let the broker accept this device_id as client id.",
        **dict.fromkeys(_UNSUPPORTED_VERSION, "The broker must speak MQTT 5 (Mosquitto >= 1.6, EMQX >= 5)."),
    }
    remedy = remedies.get(reason_code.value)
    return ConnectAttemptFailed(
        f"the broker refused the connection: {reason_code}", remedy or "See the broker's log.", final=remedy is not None
    )

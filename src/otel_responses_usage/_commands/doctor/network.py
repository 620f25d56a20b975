"""What answers at an address: asked with a few bytes over a socket of our own."""

from __future__ import annotations

import contextlib
import socket
import ssl
from enum import Enum
from typing import Final, NamedTuple

_PATIENCE_S: Final = 2.0
# What a client of HTTP/2, and so of gRPC, sends first: the preface, and an empty frame of settings.
_HTTP2: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_HTTP2_SETTINGS: Final = 4
_FRAME_TYPE: Final = 3
_TLS_ALERT: Final = b"\x15\x03"


class Answer(str, Enum):
    """What an address did when it was asked."""

    UNRESOLVED = "unresolved"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    SILENT = "silent"
    HTTP1 = "http1"
    HTTP2 = "http2"
    OTHER = "other"


class Service(NamedTuple):
    """What answers at an address.

    Attributes:
        answer: The protocol, or why there is none.
        tls: Whether it speaks TLS.
        certificate_error: Why its certificate is not accepted; empty if it is, or there is none.

    """

    answer: Answer
    tls: bool = False
    certificate_error: str = ""


def ask(host: str, port: int, *, prefers_tls: bool, authority: str | None = None) -> Service:
    """Return what answers at an address.

    Args:
        host: The host name or address.
        port: The port.
        prefers_tls: Whether the exporter uses TLS. The other way is tried, too.
        authority: The file with the certificates to trust. The default is those of the system.

    """
    try:
        with socket.create_connection((host, port), _PATIENCE_S):
            pass
    except socket.gaierror:
        return Service(Answer.UNRESOLVED)
    except ConnectionRefusedError:
        return Service(Answer.REFUSED)
    except (TimeoutError, OSError):
        return Service(Answer.UNREACHABLE)
    with_tls, plain = _ask_with_tls(host, port, authority), _ask_plain(host, port)
    if with_tls is not None and (
        prefers_tls or plain.answer not in {Answer.HTTP1, Answer.HTTP2} or plain.tls
    ):
        return with_tls
    return plain


def _ask_plain(host: str, port: int) -> Service:
    try:
        with socket.create_connection((host, port), _PATIENCE_S) as connection:
            return _talk(connection)
    except OSError:
        return Service(Answer.OTHER)


def _ask_with_tls(host: str, port: int, authority: str | None) -> Service | None:
    """Return what answers over TLS. `None` if there is no TLS."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with socket.create_connection((host, port), _PATIENCE_S) as connection:
            connection.settimeout(_PATIENCE_S)
            with context.wrap_socket(connection, server_hostname=host) as secured:
                chosen = secured.selected_alpn_protocol()
    except (OSError, ValueError):
        return None
    # A server without ALPN is one of HTTP/1.1: gRPC requires it.
    answer = Answer.HTTP2 if chosen == "h2" else Answer.HTTP1
    return Service(answer, True, _certificate_error(host, port, authority))


def _certificate_error(host: str, port: int, authority: str | None) -> str:
    try:
        context = ssl.create_default_context(cafile=authority)
    except (OSError, ssl.SSLError):
        return "the file of OTEL_EXPORTER_OTLP_CERTIFICATE cannot be read"
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with socket.create_connection((host, port), _PATIENCE_S) as connection:
            connection.settimeout(_PATIENCE_S)
            with context.wrap_socket(connection, server_hostname=host):
                return ""
    except ssl.SSLCertVerificationError as error:
        return error.verify_message or "it cannot be verified"
    except OSError:
        return ""


def _talk(connection: socket.socket) -> Service:
    connection.settimeout(_PATIENCE_S)
    received = b""
    with contextlib.suppress(OSError):
        connection.sendall(_HTTP2)
        while len(received) <= _FRAME_TYPE and (piece := connection.recv(64)):
            received += piece
    if received.startswith(_TLS_ALERT):
        return Service(Answer.OTHER, True)
    if received.startswith(b"HTTP/1"):
        return Service(Answer.HTTP1)
    if len(received) > _FRAME_TYPE and received[_FRAME_TYPE] == _HTTP2_SETTINGS:
        return Service(Answer.HTTP2)
    # Some servers of HTTP/1.1 do not answer the preface, but a request.
    with (
        contextlib.suppress(OSError),
        socket.create_connection(connection.getpeername()[:2], _PATIENCE_S) as other,
    ):
        other.settimeout(_PATIENCE_S)
        other.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        if other.recv(64).startswith(b"HTTP/1"):
            return Service(Answer.HTTP1)
    return Service(Answer.SILENT if not received else Answer.OTHER)

"""Reads what a connection has received, without waiting, also after the application has closed it."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from typing import Any, Final, Protocol

_READ_BYTES: Final = 65536
# At one close no more than this is read from a connection.
_MAX_BYTES: Final = 1 << 20


class Wire(Protocol):
    """One end of a connection. No method waits."""

    ended: bool

    def read(self) -> bytes:
        """Return the bytes that have arrived. Sets `ended` if no more can arrive."""
        ...

    def keep(self) -> None:
        """Prepare for the close by the HTTP library: `read` must work after it. Raises if it cannot."""
        ...

    def close(self) -> None:
        """Close what `keep` has kept."""
        ...


class _SocketWire:
    """A socket. The HTTP library sets the timeout again before it reads."""

    def __init__(self, connection: Any) -> None:
        self.ended = False
        self._socket = connection
        self._kept: Any = None

    def read(self) -> bytes:
        received = bytearray()
        try:
            self._socket.settimeout(0)
            while len(received) < _MAX_BYTES:
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    self.ended = True
                    break
                received += data
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except (OSError, ValueError):
            self.ended = True
        return bytes(received)

    def keep(self) -> None:
        # The close by the HTTP library closes its own handle only, and sends nothing.
        self._socket = self._kept = _duplicate(self._socket)

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()


class _TlsSocketWire(_SocketWire):
    """A TLS socket. It cannot be duplicated, so the HTTP library gets a closed socket in its place."""

    def __init__(self, connection: Any, owner: Any) -> None:
        super().__init__(connection)
        self._owner = owner

    def keep(self) -> None:
        closed = socket.socket()
        closed.close()
        self._owner._sock = closed  # noqa: SLF001
        self._kept = self._socket


class _StreamWire(_SocketWire):
    """A connection of an event loop."""

    def __init__(self, stream: Any) -> None:
        transport = getattr(stream, "_transport", None)
        queue = () if transport is None else stream._protocol.read_queue  # noqa: SLF001
        raw = stream.socket if transport is None else transport.get_extra_info("socket")
        super().__init__(_duplicate(raw))
        self._kept = self._socket
        self._transport = transport
        self._queued = b"".join(queue)

    def read(self) -> bytes:
        queued, self._queued = self._queued, b""
        return queued + super().read()

    def keep(self) -> None:
        # anyio would say to the server that the client has left. After `abort` it has nothing to close.
        if self._transport is not None:
            self._transport.abort()


class _TlsStreamWire:
    """A TLS connection of an event loop."""

    def __init__(self, inner: _StreamWire, tls: Any, incoming: ssl.MemoryBIO) -> None:
        self.ended = False
        self._inner = inner
        self._tls = tls
        self._incoming = incoming

    def read(self) -> bytes:
        received = bytearray()
        try:
            if data := self._inner.read():
                self._incoming.write(data)
            while data := self._tls.read(_READ_BYTES):
                received += data
            self.ended = True
        except ssl.SSLWantReadError:
            self.ended = self._inner.ended
        except (OSError, ValueError):
            self.ended = True
        return bytes(received)

    def keep(self) -> None:
        self._inner.keep()

    def close(self) -> None:
        self._inner.close()


def wire_of(network_stream: Any) -> Wire | None:
    """Return the wire of a network stream of `httpcore`, or `None` if its kind is not known."""
    try:
        attributes = vars(network_stream)
        connection, stream = attributes.get("_sock"), attributes.get("_stream")
        if connection is not None:
            if "ssl_obj" in attributes:  # TLS inside of TLS
                return None
            is_tls = hasattr(connection, "_sslobj")
            return _TlsSocketWire(connection, network_stream) if is_tls else _SocketWire(connection)
        inner = getattr(stream, "transport_stream", None)
        if inner is None:
            return _StreamWire(stream)
        incoming = getattr(stream, "_read_bio", None) or getattr(stream, "_incoming", None)
        if incoming is None or hasattr(inner, "transport_stream"):
            return None
        return _TlsStreamWire(_StreamWire(inner), stream._ssl_object, incoming)  # noqa: SLF001
    except Exception:  # a backend of another kind, or no file descriptor is left
        return None


def _duplicate(connection: Any) -> socket.socket:
    """Return a second handle to a connection. It still works after the first is closed."""
    descriptor = os.dup(connection.fileno())
    try:
        return socket.socket(fileno=descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise

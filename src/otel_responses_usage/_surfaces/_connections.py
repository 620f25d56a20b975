"""HTTP/1.1 connections for the requests of the look-ups.

The HTTP library is not used for them: it writes log lines, and its GET takes more than twice the processor
time. `http.client` reads the answers. Its `HTTPConnection` is not used, because other instrumentations
replace its methods.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401  # `socket` imports it at the first connection; forks wait for this import
import errno
import http.client
import io
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

from .._lookup.worker import Pace

# An idle connection is kept for so long. Servers close theirs after 5 s or more.
_KEEP_S: Final = 5.0
_MOST_IDLE: Final = 32
_MOST_INTERIM: Final = 8
_BUFFER: Final = 65_536
# Raised if the server has closed an idle connection. The request is then sent on a new one.
_CLOSED_MEANWHILE: Final = (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError)
# This process lacks something. These errors say nothing about the server.
_LACKING: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN}
)


class NotConnectedError(OSError):
    """There is no connection: it was refused, or the name or the route of the server is unknown."""


def lacks_resources(error: OSError) -> bool:
    """Return whether this process lacks file descriptors, ports or memory."""
    return error.errno in _LACKING and not isinstance(error, (ssl.SSLError, socket.gaierror))


class Destination(NamedTuple):
    """Where connections lead to. Equal destinations share their connections.

    Attributes:
        host: The host of the server.
        port: Its port.
        ssl_context: The application's context for speaking TLS; `None` for plain HTTP.
        uds: The path of a Unix socket to connect to instead.
        local_address: The address to connect from.

    """

    host: str
    port: int
    ssl_context: ssl.SSLContext | None
    uds: str | None
    local_address: str | None


class Reply(NamedTuple):
    """The answer to a GET. A body that is too large is empty."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Connections:
    """Connections of our own, shared by all threads of the look-ups."""

    def __init__(self, largest_body: int, pace: Pace) -> None:
        self._largest_body = largest_body
        self._pace = pace
        self._lock = threading.Lock()
        self._idle: deque[_Connection] = deque()  # ordered by last use
        self._in_use: dict[_Connection, None] = {}
        self._interrupted = False

    def get(self, destination: Destination, request: bytes, timeout_s: float) -> Reply:
        """Send a request and return its answer.

        Raises:
            TimeoutError: The time was up.
            NotConnectedError: There is no connection to the server.
            OSError: The connection broke, or this process lacks resources.
            http.client.HTTPException: The server does not speak HTTP.

        """
        deadline = time.monotonic() + timeout_s
        connection = self._take_idle(destination)
        if connection is not None:
            try:
                return self._ask(connection, request, deadline)
            except _CLOSED_MEANWHILE:
                if self._interrupted:
                    raise
        return self._ask(_Connection(destination, _connect(destination, timeout_s)), request, deadline)

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._lock:
            idle, self._idle = self._idle, deque()
        _close(idle)

    def interrupt(self) -> None:
        """End the requests that are under way. They raise `OSError`. No request may follow."""
        self._interrupted = True
        for connection in list(self._in_use):
            connection.interrupt()

    def _ask(self, connection: _Connection, request: bytes, deadline: float) -> Reply:
        self._in_use[connection] = None
        can_be_kept = False
        try:
            reply, can_be_kept = connection.ask(request, deadline, self._largest_body, self._pace)
        finally:
            self._in_use.pop(connection, None)
            if can_be_kept:
                self._keep(connection)
            else:
                connection.close()
        return reply

    def _take_idle(self, destination: Destination) -> _Connection | None:
        oldest = time.monotonic() - _KEEP_S
        expired = []
        found = None
        with self._lock:
            while self._idle and self._idle[0].used_at < oldest:
                expired.append(self._idle.popleft())
            for connection in reversed(self._idle):
                if connection.destination == destination:
                    found = connection
                    self._idle.remove(found)
                    break
        _close(expired)
        return found

    def _keep(self, connection: _Connection) -> None:
        connection.used_at = time.monotonic()
        with self._lock:
            self._idle.append(connection)
            # After an interrupt nothing takes it any more, and `close` may have been called already.
            most = 0 if self._interrupted else _MOST_IDLE
            surplus = [self._idle.popleft()] if len(self._idle) > most else []
        _close(surplus)


class _Connection:
    """One connection."""

    def __init__(self, destination: Destination, sock: socket.socket) -> None:
        self.destination = destination
        self.used_at = 0.0
        self._socket = sock

    def ask(self, request: bytes, deadline: float, largest_body: int, pace: Pace) -> tuple[Reply, bool]:
        """Send a request; return the answer, and whether the connection can be used again."""
        incoming = _Incoming(self._socket, deadline, pace)
        file = io.BufferedReader(incoming, _BUFFER)
        source: Any = SimpleNamespace(makefile=lambda _: file)  # the one method of a socket that is used
        self._socket.settimeout(incoming.left_s())
        self._socket.sendall(request)
        interim = []
        while True:
            response = http.client.HTTPResponse(source, method="GET")
            response.begin()
            if response.status >= 200:
                break
            interim.append(response)  # kept, because its finalizer closes the shared file
            if len(interim) > _MOST_INTERIM:
                raise http.client.BadStatusLine("too many interim responses")
        body = response.read(largest_body + 1)
        is_whole = len(body) <= largest_body
        if is_whole and response.length:  # `read` with a limit does not raise this
            raise http.client.IncompleteRead(body, response.length)
        reply = Reply(response.status, response.headers, body if is_whole else b"")
        return reply, is_whole and not response.will_close

    def interrupt(self) -> None:
        """Wake the thread that reads."""
        # The `shutdown` of a TLS socket would also drop the TLS state, which that thread uses. The sockets of
        # eventlet have no such method in their class.
        shutdown = getattr(socket.socket, "shutdown", None)
        with contextlib.suppress(Exception):
            if shutdown is None:
                self._socket.shutdown(socket.SHUT_RDWR)
            else:
                shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


class _Incoming(io.RawIOBase):
    """Reads from a socket until a deadline."""

    def __init__(self, sock: socket.socket, deadline: float, pace: Pace) -> None:
        self._socket = sock
        self._deadline = deadline
        self._pace = pace
        self._has_read = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._has_read:  # before the first read, the timeout has just been set
            self._socket.settimeout(self.left_s())
        self._has_read = True
        self._pace.end()
        size = self._socket.recv_into(buffer)
        self._pace.begin()
        return size

    def left_s(self) -> float:
        """Return the seconds that are left; raise `TimeoutError` if none are."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


def _connect(destination: Destination, timeout_s: float) -> socket.socket:
    try:
        sock = _open_socket(destination, timeout_s)
    except TimeoutError:
        raise
    except OSError as error:
        if lacks_resources(error):
            raise
        raise NotConnectedError from error
    try:
        if destination.ssl_context is not None:
            # As the HTTP library does at each connection: another client may use this context for HTTP/2.
            destination.ssl_context.set_alpn_protocols(["http/1.1"])
            return destination.ssl_context.wrap_socket(sock, server_hostname=destination.host)
    except BaseException:
        sock.close()
        raise
    return sock


def _open_socket(destination: Destination, timeout_s: float) -> socket.socket:
    if destination.uds is None:
        source = (destination.local_address, 0) if destination.local_address else None
        sock = socket.create_connection((destination.host, destination.port), timeout_s, source)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(destination.uds)
    except BaseException:
        sock.close()
        raise
    return sock


def _close(connections: Iterable[_Connection]) -> None:
    for connection in connections:
        connection.close()

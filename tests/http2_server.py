"""The Responses API over HTTP/2, by TLS, with streams and connections that the server ends in mid-body."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import trustme
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded
from h2.exceptions import ProtocolError

from embedded.http_server import Pause, Reply, SeenRequest, Send, Wait

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

# After `goaway` the server sends the rest of the stream. After `goaway, close` it ends the connection.
Fault = Literal["rst_stream", "goaway", "goaway, close"]


class Http2Server:
    """Answers as `api` says.

    `fault` says for each request what happens after how many pieces of the body. `seen` counts the requests
    by method.
    """

    def __init__(
        self,
        api: Callable[[SeenRequest], Reply],
        fault: Callable[[SeenRequest], tuple[int, Fault] | None],
    ) -> None:
        self._api = api
        self._fault = fault
        self.seen: Counter[str] = Counter()
        authority = trustme.CA()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self._context.set_alpn_protocols(["h2"])
        self.client_context = ssl.create_default_context()
        authority.configure_trust(self.client_context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._sockets: set[socket.socket] = set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._sockets):
            _end(connection)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # The clients and the networks of these tests end connections at any time.
        with contextlib.suppress(OSError, ProtocolError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = self._context.wrap_socket(connection, server_side=True)
            self._sockets.add(tls)
            try:
                _Connection(tls, self._answer, self._fault).run()
            finally:
                self._sockets.discard(tls)
                _end(tls)
                tls.close()

    def _answer(self, request: SeenRequest) -> Reply:
        self.seen[request.method] += 1
        return self._api(request)


class _Connection:
    """One HTTP/2 connection."""

    def __init__(
        self,
        tls: ssl.SSLSocket,
        answer: Callable[[SeenRequest], Reply],
        fault: Callable[[SeenRequest], tuple[int, Fault] | None],
    ) -> None:
        self._socket = tls
        self._answer = answer
        self._fault = fault
        self._state = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self._lock = threading.Lock()

    def run(self) -> None:
        heads: dict[int, dict[str, str]] = {}
        bodies: dict[int, bytes] = {}
        with self._lock:
            self._state.initiate_connection()
            self._flush()
        while data := self._socket.recv(65536):
            with self._lock:
                for event in self._state.receive_data(data):
                    if isinstance(event, RequestReceived):
                        heads[event.stream_id] = dict(event.headers)
                        bodies[event.stream_id] = b""
                    elif isinstance(event, DataReceived):
                        bodies[event.stream_id] += event.data
                        self._state.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, StreamEnded):
                        head, body = heads.pop(event.stream_id), bodies.pop(event.stream_id)
                        playing = threading.Thread(
                            target=self._play, args=(event.stream_id, head, body), daemon=True
                        )
                        playing.start()
                self._flush()

    def _play(self, stream_id: int, head: dict[str, str], body: bytes) -> None:
        request = SeenRequest(head[":method"], head[":path"], {}, head, body, time.time())
        reply = self._answer(request)
        after, kind = self._fault(request) or (-1, None)
        sent = 0
        # The client may have ended the stream or the connection.
        with contextlib.suppress(OSError, ProtocolError):
            with self._lock:
                headers = [(":status", str(reply.status)), *reply.headers.items()]
                self._state.send_headers(stream_id, headers)
                self._flush()
            for step in reply.steps:
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                elif isinstance(step, Wait):
                    step.event.wait()
                elif isinstance(step, Send):
                    if kind is not None and sent == after:
                        time.sleep(0.05)  # the client has read what was sent
                        if not self._do(kind, stream_id):
                            return
                    with self._lock:
                        self._state.send_data(stream_id, step.data)
                        self._flush()
                    sent += 1
            with self._lock:
                self._state.end_stream(stream_id)
                self._flush()

    def _do(self, kind: Fault, stream_id: int) -> bool:
        """Do what goes wrong, and return whether the stream goes on."""
        with self._lock:
            if kind == "rst_stream":
                self._state.reset_stream(stream_id, ErrorCodes.INTERNAL_ERROR)
                self._flush()
                return False
            # The library would not send on a connection that it has ended, so the frame is written by hand.
            last_stream_id = stream_id if kind == "goaway" else 0
            payload = last_stream_id.to_bytes(4, "big") + ErrorCodes.NO_ERROR.to_bytes(4, "big")
            self._socket.sendall(len(payload).to_bytes(3, "big") + b"\x07\x00" + bytes(4) + payload)
            if kind == "goaway":
                return True
            _end(self._socket)
            return False

    def _flush(self) -> None:
        self._socket.sendall(self._state.data_to_send())


def _end(connection: socket.socket) -> None:
    # Unlike `close` it also wakes the thread that reads, and it leaves the TLS state alone.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)

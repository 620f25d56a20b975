"""An HTTP/1.1 server that answers by script, down to how it cuts the connection."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import responses
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from types import TracebackType

    from typing_extensions import Self

HEAD_LIMIT = 1 << 20
EVENT_STREAM = "text/event-stream; charset=utf-8"


@dataclass(frozen=True)
class SeenRequest:
    """A request as it arrived, body and all."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def json(self) -> Any:
        """The body, decoded; None when there is none."""
        return json.loads(self.body) if self.body else None


@dataclass(frozen=True)
class Send:
    """Bytes that leave at once: one HTTP chunk, one TCP segment if they fit."""

    data: bytes


@dataclass(frozen=True)
class Pause:
    """Silence for a while; over at once when the client goes away."""

    seconds: float


@dataclass(frozen=True)
class Wait:
    """Silence until somebody sets the event."""

    event: threading.Event


@dataclass(frozen=True)
class Hold:
    """Silence, with the socket open, until the client goes away or the server stops."""


@dataclass(frozen=True)
class Cut:
    """The connection ends here, in the middle of the body.

    `fin` closes in order, after everything sent has been delivered. `rst` resets: the client may lose
    what it has received but not yet read, as with a real reset.
    """

    how: Literal["fin", "rst"] = "fin"


Step: TypeAlias = Send | Pause | Wait | Hold | Cut


@dataclass(frozen=True)
class Reply:
    """What the server does about one request: the steps `before` the head, the head, the steps of the body.

    A body is chunked unless `chunked` is false: then its bytes go out as they are, and it ends by its
    `content-length` header or, without one, with the connection.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": EVENT_STREAM})
    steps: tuple[Step, ...] = ()
    before: tuple[Step, ...] = ()
    chunked: bool = True

    @classmethod
    def json(
        cls, body: object, status: int = 200, headers: Mapping[str, str] | None = None, delay: float = 0.0
    ) -> Reply:
        """A whole JSON document, after `delay` seconds of nothing."""
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        described = {"content-type": "application/json", "content-length": str(len(data))}
        return cls(
            status=status,
            headers={**described, **(headers or {})},
            steps=(Send(data),),
            before=(Pause(delay),) if delay else (),
            chunked=False,
        )

    @classmethod
    def sse(
        cls,
        events: Iterable[Mapping[str, Any] | bytes],
        *,
        pace: float = 0.0,
        event_lines: bool = True,
        end: Step | None = None,
        headers: Mapping[str, str] | None = None,
        before: tuple[Step, ...] = (),
    ) -> Reply:
        """One chunk per event, `pace` seconds apart, then `end`, or the clean end of the body.

        An event given as bytes is sent as it is.
        """
        steps: list[Step] = []
        for event in events:
            if pace and steps:
                steps.append(Pause(pace))
            steps.append(Send(event if isinstance(event, bytes) else frame(event, event_lines=event_lines)))
        if end is not None:
            steps.append(end)
        return cls(
            headers={"content-type": EVENT_STREAM, **(headers or {})}, steps=tuple(steps), before=before
        )


def frame(event: Mapping[str, Any], *, event_lines: bool = True) -> bytes:
    """The event as the API puts it on the wire."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {event['type']}\n" if event_lines else ""
    return f"{name}data: {data}\n\n".encode()


@dataclass
class Exchange:
    """One request and, as it happens, how many steps of its reply are sent, and the end of the reply.

    Times are those of `time.time()`.
    """

    request: SeenRequest
    sent: int = 0
    last_write_at: float | None = None
    client_left_at: float | None = None
    ended_at: float | None = None


class ScriptedServer:
    """A server on loopback that does to each request what `handler` replies; a context manager.

    Without a `port` it takes a free one. With `tls` it speaks TLS.

    It runs on an event loop and a daemon thread of its own, and `handler` runs on that loop. A handler
    that raises is answered with 500, and leaving the context raises the same exception once more.
    """

    def __init__(
        self,
        handler: Callable[[SeenRequest], Reply | Awaitable[Reply]],
        port: int = 0,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = tls
        self.exchanges: list[Exchange] = []
        self.connections = 0
        self._handler = handler
        self._now: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._wires: set[_Wire] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gates: dict[threading.Event, asyncio.Future[None]] = {}
        self._faults: list[Exception] = []
        self._port = port
        self._listening = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve()), name="scripted-server", daemon=True
        )

    @property
    def url(self) -> str:
        """The origin to point a client at, without a slash at its end."""
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._port}"

    @property
    def requests(self) -> list[SeenRequest]:
        """All requests so far, in the order of their arrival."""
        return [exchange.request for exchange in self.exchanges]

    @property
    def open_connections(self) -> int:
        """Connections that neither side has closed yet."""
        return len(self._wires)

    def in_flight_of(self, method: str | None = None) -> int:
        """Requests being answered now, of one method or of all."""
        return self._now[method or "*"]

    def peak_of(self, method: str | None = None) -> int:
        """The most requests ever being answered at the same time, of one method or of all."""
        return self._peak[method or "*"]

    def start(self) -> Self:
        """Listens on 127.0.0.1 when it returns."""
        self._thread.start()
        self._listening.wait()
        return self

    def stop(self) -> None:
        """Drops every connection and frees the port and the thread, whatever is held open."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and self._faults:
            raise self._faults[0]

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        # The kernel cuts the backlog down to what it allows.
        listener = await self._loop.create_server(
            self._wire, "127.0.0.1", self._port, backlog=1 << 15, ssl=self._tls
        )
        self._port = listener.sockets[0].getsockname()[1]
        self._listening.set()
        await self._stopping.wait()
        # A connection that is being accepted while its listener closes is lost to asyncio: nothing ends it.
        self._loop.remove_reader(listener.sockets[0].fileno())
        for _ in range(5):  # turns of the loop, until what was just accepted is a wire
            await asyncio.sleep(0)
        listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for wire in self._wires:
            wire.transport.abort()
        while self._wires:
            await asyncio.sleep(0)

    def _wire(self) -> _Wire:
        return _Wire(self._opened, self._wires.discard)

    def _opened(self, wire: _Wire) -> None:
        self.connections += 1
        self._wires.add(wire)
        task = self._loop.create_task(self._converse(wire))
        self._tasks.add(task)
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(fault := task.exception(), Exception):
            self._faults.append(fault)

    async def _converse(self, wire: _Wire) -> None:
        # Whatever the client did to the connection, it did it on purpose.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while (request := await wire.request()) is not None and await self._exchange(wire, request):
                pass
        wire.transport.close()

    async def _exchange(self, wire: _Wire, request: SeenRequest) -> bool:
        """Answers one request; true if the connection can carry another."""
        exchange = Exchange(request)
        self.exchanges.append(exchange)
        for key in (request.method, "*"):
            self._now[key] += 1
            self._peak[key] = max(self._peak[key], self._now[key])
        try:
            return await self._answer(wire, exchange)
        finally:
            exchange.client_left_at = wire.left_at
            exchange.ended_at = wire.left_at or time.time()
            for key in (request.method, "*"):
                self._now[key] -= 1

    async def _answer(self, wire: _Wire, exchange: Exchange) -> bool:
        reply = await self._reply(exchange.request)
        if not await self._play(wire, exchange, reply.before, chunked=False):
            return False
        bounded = reply.chunked or "content-length" in reply.headers
        await wire.send(_head(reply, bounded=bounded))
        if not await self._play(wire, exchange, reply.steps, chunked=reply.chunked):
            return False
        if reply.chunked:
            exchange.last_write_at = time.time()
            await wire.send(b"0\r\n\r\n")
        return bounded and exchange.request.headers.get("connection", "").lower() != "close"

    async def _reply(self, request: SeenRequest) -> Reply:
        try:
            reply = self._handler(request)
            return await reply if inspect.isawaitable(reply) else reply
        except Exception as error:
            self._faults.append(error)
            return Reply.json({"error": {"message": repr(error), "type": "server_error"}}, status=500)

    async def _play(self, wire: _Wire, exchange: Exchange, steps: tuple[Step, ...], *, chunked: bool) -> bool:
        """Takes the steps in turn; false if the connection is over."""
        for step in steps:
            match step:
                case Send(data):
                    exchange.last_write_at = time.time()
                    await wire.send(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
                    exchange.sent += 1
                case Pause(seconds):
                    await asyncio.wait([wire.gone], timeout=seconds)
                case Wait(event):
                    await asyncio.wait([wire.gone, self._gate(event)], return_when=asyncio.FIRST_COMPLETED)
                case Hold():
                    await asyncio.wait([wire.gone])
                case Cut(how):
                    wire.cut(how)
                    return False
            if wire.gone.done():
                return False
        return True

    def _gate(self, event: threading.Event) -> asyncio.Future[None]:
        # One poll per event, not per connection: thousands may wait for the same one.
        if event not in self._gates:
            self._gates[event] = self._loop.create_future()
            self._loop.call_soon(self._poll, event)
        return self._gates[event]

    def _poll(self, event: threading.Event) -> None:
        if event.is_set():
            self._gates.pop(event).set_result(None)
        else:
            self._loop.call_later(0.002, self._poll, event)


class _Wire(asyncio.StreamReaderProtocol):
    """A connection that knows when its client has gone, also while nobody reads from it."""

    def __init__(self, on_open: Callable[[_Wire], None], on_close: Callable[[_Wire], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self.loop.create_future()
        self.left_at: float | None = None
        self.on_open = on_open
        self.on_close = on_close
        self.reader = asyncio.StreamReader(limit=HEAD_LIMIT, loop=self.loop)
        super().__init__(self.reader, loop=self.loop)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport = cast("asyncio.Transport", transport)
        self.writer = asyncio.StreamWriter(self.transport, self, self.reader, self.loop)
        self.on_open(self)

    def eof_received(self) -> bool | None:
        # An HTTP client that closes its half has no use for ours.
        self._leave()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if exc is not None:
            self._leave()
        self.on_close(self)

    def _leave(self) -> None:
        if not self.gone.done():
            self.left_at = time.time()
            self.gone.set_result(None)

    async def request(self) -> SeenRequest | None:
        """The next request, or None when the client is done."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as end:
            if end.partial:
                raise
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines if line)
        }
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        url = urlsplit(target)
        return SeenRequest(method, unquote(url.path), dict(parse_qsl(url.query)), headers, body, time.time())

    async def send(self, data: bytes) -> None:
        """Returns when the kernel has taken the bytes, or nearly all of them."""
        # asyncio complains on the log about writes to a connection that is already lost.
        if not self.transport.is_closing():
            self.writer.write(data)
            await self.writer.drain()

    def cut(self, how: Literal["fin", "rst"]) -> None:
        if how == "rst":
            connection: socket.socket = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()


def _head(reply: Reply, *, bounded: bool) -> bytes:
    framing = {"transfer-encoding": "chunked"} if reply.chunked else {}
    ending = {} if bounded else {"connection": "close"}
    lines = [f"HTTP/1.1 {reply.status} {responses.get(reply.status, '')}"]
    lines += [f"{name}: {value}" for name, value in {**reply.headers, **framing, **ending}.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")

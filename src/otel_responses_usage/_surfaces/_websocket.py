"""Calls over a WebSocket: taps the connections that `responses.connect()` makes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from opentelemetry import context as otel_context
from opentelemetry.trace import SpanContext

from .. import _fault
from .._answer.message import decoded
from .._call.invocation import Invocation
from .._call.lanes import Lanes, SentMessage
from .._call.ledger import Ledger
from .._call.settlement import MakeTarget
from .._facts.outcome import CANCELLED
from .._facts.request import ResponsesRequest, Server, describe_message
from .._facts.response import Response
from ._describe import is_azure
from ._opening import CallOpener
from ._scope import NO_SCOPE
from ._target_factory import TargetFactory, no_target
from ._unread_messages import unread_messages

Wrapped = Callable[..., Any]

_CREATE: Final = "response.create"
_MAX_QUEUED: Final = 256
_CLIENT: Final = "ConnectionManager__client"  # the end of a private name, which begins with the class
# The SDK's own readers. If one of them is cancelled, the application has closed its session.
_SDK_READERS: Final = "openai.lib.responses_websocket"
_MAX_FRAMES: Final = 32
# What the library sends as one message. It sends other iterables in parts, which the SDK does not use.
_MESSAGES: Final = (str, bytes, bytearray, memoryview)
_CLOSED_OK: Final = "ConnectionClosedOK"
_CLOSED: Final = "ConnectionClosed"
_SCHEMES: Final = {"wss": "https", "ws": "http"}


class _Opened(NamedTuple):
    """The client that opens a connection, and the URL that it opens, without query."""

    client: Any
    url: Any


class _Opening:
    """The connection that is being opened. Tasks that are made meanwhile keep this object, but not a client.

    Attributes:
        opened: The client and the URL; `None` when the connection is open, or if they are not known.

    """

    def __init__(self, opened: _Opened | None) -> None:
        self.opened = opened


_opening: Final[ContextVar[_Opening | None]] = ContextVar("otel_responses_usage.opening", default=None)


class WebSocketSurface:
    """Wrappers for the making of connections.

    A connection of the SDK has one of the library `websockets` inside. All messages go through that one,
    whatever method the application uses. So its `send`, `recv` and `close` are replaced, for each connection.
    """

    def __init__(self, ledger: Ledger, opener: CallOpener) -> None:
        self._ledger = ledger
        self._opener = opener
        self._taps: weakref.WeakSet[_ConnectionTap] = weakref.WeakSet()
        self._reconnecting: weakref.WeakSet[Any] = weakref.WeakSet()  # connections with our `_make_ws`
        # When and where messages were sent that the SDK keeps back until there is a connection, by the hash
        # of the message.
        self._queued: OrderedDict[int, deque[SentMessage]] = OrderedDict()

    def enter(self, wrapped: Wrapped, manager: Any, args: Any, kwargs: Any) -> Any:
        """Open a connection."""
        with self._opening_by(manager):
            return wrapped(*args, **kwargs)

    async def async_enter(self, wrapped: Wrapped, manager: Any, args: Any, kwargs: Any) -> Any:
        """Open a connection."""
        with self._opening_by(manager):
            return await wrapped(*args, **kwargs)

    def connection_made(self, wrapped: Wrapped, connection: Any, args: Any, kwargs: Any) -> None:
        """Tap a new connection, and those that replace it when the SDK connects again."""
        wrapped(*args, **kwargs)
        try:
            opening = _opening.get()
            self._on_connection(connection, None if opening is None else opening.opened)
        except Exception:
            _fault.report("tapping a WebSocket")

    def enqueued(self, wrapped: Wrapped, queue: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """Note when and where a message was sent that the SDK keeps back."""
        # Before it is queued: another thread may send it at once.
        is_noted = self._note_queued(*args, **kwargs)
        is_queued = False
        try:
            is_queued = wrapped(*args, **kwargs)
        finally:
            if is_noted and is_queued is False:
                self._take_queued(*args, **kwargs)
        return is_queued

    def remove(self) -> None:
        """Remove all taps."""
        for tap in list(self._taps):
            tap.remove()
        for connection in list(self._reconnecting):
            make = getattr(connection._make_ws, "__wrapped__", None)  # noqa: SLF001
            if make is not None:
                connection._make_ws = make  # noqa: SLF001

    @_fault.catch_and_report("looking at a message that waits")
    def _note_queued(self, data: str | bytes, **_: object) -> bool:
        if _CREATE not in (data if isinstance(data, str) else data.decode("utf-8", "replace")):
            return False
        self._queued.setdefault(hash(data), deque(maxlen=_MAX_QUEUED)).append(SentMessage.now())
        while len(self._queued) > _MAX_QUEUED:
            self._queued.popitem(last=False)
        return True

    @_fault.catch_and_report("looking at a message that waited")
    def _take_queued(self, data: str | bytes, **_: object) -> SentMessage | None:
        key = hash(data)
        queued = self._queued.get(key)
        if not queued:
            return None
        sent = queued.popleft()
        if not queued:
            self._queued.pop(key, None)
        return sent

    def sent(self, message: str | bytes) -> SentMessage:
        """Return when and where the application sent a message that is being sent now."""
        queued = self._take_queued(message) if self._queued else None
        return queued or SentMessage.now()

    @contextlib.contextmanager
    def _opening_by(self, manager: Any) -> Iterator[None]:
        opened = None
        try:
            attributes = vars(manager)
            client = next(attributes[name] for name in attributes if name.endswith(_CLIENT))
            opened = _Opened(client, manager._prepare_url())  # noqa: SLF001
        except Exception:
            _fault.report("opening a WebSocket")
        opening = _Opening(opened)
        token = _opening.set(opening)
        try:
            yield
        finally:
            _opening.reset(token)
            opening.opened = None

    def _on_connection(self, connection: Any, opened: _Opened | None) -> None:
        self._tap(connection, connection._connection, opened)  # noqa: SLF001
        make = getattr(connection, "_make_ws", None)
        if make is None:
            return
        connection_ref = weakref.ref(connection)

        def on_made(socket: Any) -> Any:
            owner = connection_ref()
            try:
                if owner is not None:
                    self._tap(owner, socket, opened)
            except Exception:
                _fault.report("tapping a WebSocket")
            return socket

        async def make_async(*args: Any) -> Any:
            return on_made(await make(*args))

        def make_sync(*args: Any) -> Any:
            return on_made(make(*args))

        tapped = make_async if inspect.iscoroutinefunction(make) else make_sync
        connection._make_ws = functools.wraps(make)(tapped)  # noqa: SLF001
        self._reconnecting.add(connection)

    def _tap(self, connection: Any, socket: Any, opened: _Opened | None) -> None:
        caller = _Caller(self._ledger, self._opener, connection, socket, opened)
        self._taps.add(
            _ConnectionTap(socket, Lanes(caller.open_call, caller.describe, caller.observe), self.sent)
        )


class _Caller:
    """Opens the calls of one connection. It keeps neither the client nor the SDK's connection."""

    def __init__(
        self, ledger: Ledger, opener: CallOpener, connection: Any, socket: Any, opened: _Opened | None
    ) -> None:
        self._ledger = ledger
        self._opener = opener
        self._connection_ref = weakref.ref(connection)
        self._server = Server.from_url_parts(None, None, "")
        self._make_target: MakeTarget = no_target
        if opened is not None:
            url = opened.url
            scheme = _SCHEMES.get(url.scheme, url.scheme)
            client_class: type = type(opened.client)
            azure = is_azure(client_class)
            self._server = Server.from_url_parts(url.host, url.port, scheme, azure=azure)
            try:
                self._make_target = _target_factory(
                    opened.client, url.copy_with(scheme=scheme), socket.request
                )
            except Exception:
                _fault.report("preparing the look-ups of a WebSocket")

    def describe(self, message: Mapping[str, Any]) -> ResponsesRequest:
        """Return what is known of the call that a message makes."""
        return describe_message(message, self._server)

    def open_call(
        self,
        request: ResponsesRequest,
        parameters: Mapping[str, Any],
        sent: SentMessage,
        link: SpanContext | None = None,
    ) -> Invocation | None:
        """Open a call in the context in which its message was sent."""
        if not self._ledger.accepts_calls:
            return None
        token = otel_context.attach(sent.context)
        try:
            invocation = self._opener.open(request, parameters, None, NO_SCOPE, sent.start_ns, link)
        finally:
            otel_context.detach(token)
        connection = self._connection_ref()
        if invocation is not None:
            invocation.on_answer(self._make_target)
            if invocation.keeps_content and parameters:
                invocation.on_sent(json.dumps(parameters).encode())
            if connection is not None:
                invocation.response_ref = weakref.ref(connection, invocation.on_garbage_collected)
        return invocation

    def observe(self, message: bytes) -> None:
        """Use a terminal event that comes after its call has ended: the call may lack its usage."""
        observation = self._ledger.observation
        if observation.is_useful:
            response = (decoded(message) or {}).get("response")
            if isinstance(response, dict):
                observation.observe(self._server, Response.from_json(response))


class _ConnectionTap:
    """Replaces three methods of one connection of the library `websockets`."""

    def __init__(self, socket: Any, lanes: Lanes, sent: Callable[[str | bytes], SentMessage]) -> None:
        """Replace the methods.

        Args:
            socket: The connection. It keeps this object alive.
            lanes: The calls of the connection.
            sent: Says when and where the application sent a message.

        """
        self._socket_ref = weakref.ref(socket)
        self._lanes = lanes
        self._sent = sent
        self._is_cancelled = False  # whether the reader was cancelled, and nothing was received since
        make = self._async_methods if inspect.iscoroutinefunction(socket.recv) else self._methods
        self._methods_made = make(socket.send, socket.recv, socket.close)
        for name, method in self._methods_made.items():
            setattr(socket, name, method)

    def remove(self) -> None:
        """Put the methods of the connection back, unless another package has replaced them since."""
        socket = self._socket_ref()
        for name, method in self._methods_made.items():
            if socket is not None and vars(socket).get(name) is method:
                delattr(socket, name)

    def _methods(self, send: Wrapped, recv: Wrapped, close: Wrapped) -> dict[str, Wrapped]:
        lanes = self._lanes
        # Calls are noted in the order in which they are sent. The library has such a lock, too.
        lock = threading.RLock()

        def tapped_send(message: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(message, _MESSAGES):
                return send(message, *args, **kwargs)
            with lock:
                on_unsent = self._on_send(message)
                try:
                    return send(message, *args, **kwargs)
                except Exception as error:
                    if on_unsent is not None:
                        on_unsent(error)
                    raise

        def tapped_recv(*args: Any, **kwargs: Any) -> Any:
            try:
                message = recv(*args, **kwargs)
            except BaseException as error:
                self._on_recv_error(error)
                raise
            if not lanes.read_fast(message):
                self._on_message(message)
            return message

        def tapped_close(*args: Any, **kwargs: Any) -> Any:
            self._on_close()
            return close(*args, **kwargs)

        return {"send": tapped_send, "recv": tapped_recv, "close": tapped_close}

    def _async_methods(self, send: Wrapped, recv: Wrapped, close: Wrapped) -> dict[str, Wrapped]:
        lanes = self._lanes

        async def tapped_send(message: Any, *args: Any, **kwargs: Any) -> Any:
            on_unsent = self._on_send(message) if isinstance(message, _MESSAGES) else None
            try:
                return await send(message, *args, **kwargs)
            except Exception as error:
                if on_unsent is not None:
                    on_unsent(error)
                raise

        async def tapped_recv(*args: Any, **kwargs: Any) -> Any:
            try:
                message = await recv(*args, **kwargs)
            except BaseException as error:
                self._on_recv_error(error)
                raise
            if not lanes.read_fast(message):
                self._on_message(message)
            return message

        async def tapped_close(*args: Any, **kwargs: Any) -> Any:
            self._on_close()
            return await close(*args, **kwargs)

        return {"send": tapped_send, "recv": tapped_recv, "close": tapped_close}

    @_fault.catch_and_report("looking at a message that is sent")
    def _on_send(self, message: Any) -> Callable[[Exception], None] | None:
        if not isinstance(message, str):
            message = bytes(message)
        return self._lanes.on_send(message, self._sent(message))

    def _on_message(self, message: Any) -> None:
        self._is_cancelled = False
        self._lanes.on_message(message)

    @_fault.catch_and_report("looking at the end of a WebSocket")
    def _on_recv_error(self, error: BaseException) -> None:
        """Note that no message was received. Only the end of the connection ends its calls."""
        names = {cls.__name__ for cls in type(error).__mro__}
        self._is_cancelled = not isinstance(error, Exception) and not _is_read_by_sdk()
        self._lanes.stop_reading_fast()
        if _CLOSED_OK in names:
            self._lanes.end_all(Invocation.on_body_end)
        elif _CLOSED in names:
            self._lanes.end_all(lambda call: call.on_read_error(error, closed=False))

    @_fault.catch_and_report("looking at the close of a WebSocket")
    def _on_close(self) -> None:
        """Note that the application closes the connection."""
        is_cancelled = self._is_cancelled

        self._read_unread()

        def end(call: Invocation) -> None:
            call.on_leave()
            if is_cancelled:
                call.finish(CANCELLED)
            else:
                call.on_close(None)

        self._lanes.end_all(end)

    @_fault.catch_and_report("looking at what had arrived")
    def _read_unread(self) -> None:
        # As for an answer over HTTP: what has arrived counts if it ends a response.
        if self._lanes.is_in_use:
            self._lanes.on_unread(unread_messages(self._socket_ref()))


def _target_factory(client: Any, url: Any, handshake: Any) -> TargetFactory:
    """Return what makes the targets of all calls of a connection, with the credentials of its handshake."""
    library = sys.modules[type(url).__module__.partition(".")[0]]
    headers = library.Headers(
        [
            (name, value)
            for name, value in handshake.headers.raw_items()
            if not name.lower().startswith(("sec-websocket-", "upgrade"))
        ]
    )
    return TargetFactory(client, url.copy_with(raw_path=handshake.path.encode("ascii")), headers)


def _is_read_by_sdk() -> bool:
    """Whether a reader of the SDK's sessions reads now, and not the application."""
    frame = sys._getframe()  # noqa: SLF001
    for _ in range(_MAX_FRAMES):
        if str(frame.f_globals.get("__name__", "")).startswith(_SDK_READERS):
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False

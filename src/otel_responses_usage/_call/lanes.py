"""The calls of one WebSocket connection: which call a message belongs to."""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from opentelemetry.context import Context, get_current
from opentelemetry.trace import SpanContext

from .. import _fault
from .._answer.message import decoded, type_of
from .._answer.reception import read_nothing
from .._facts.request import ResponsesRequest
from .invocation import Invocation

_CREATED: Final = "response.created"
# These follow `response.created`. Some servers send one of them in its place.
_STARTS: Final = frozenset({_CREATED, "response.in_progress", "response.queued"})
_ERROR: Final = "error"
_FAILED: Final = "response.failed"
_RESPONSE_ENDS: Final = frozenset({"response.completed", "response.incomplete", _FAILED})
_ENDS: Final = _RESPONSE_ENDS | {_ERROR}
# What becomes of input that was sent to a running response. It is no part of an answer.
_OF_INPUT: Final = ("response.steer.", "response.inject.")
_LANE_KEY: Final = b'"stream_id"'
_LANE: Final = re.compile(rb'"stream_id"\s*:\s*(?:"([^"\\]{1,256})"|null)\s*(\}\s*\Z)?')

_MAX_STEERED: Final = 64
_MAX_LANES: Final = 64


class SentMessage(NamedTuple):
    """When and where the application sent a message.

    Attributes:
        context: The context that was current.
        start_ns: The time, in nanoseconds of the wall clock.

    """

    context: Context
    start_ns: int

    @classmethod
    def now(cls) -> SentMessage:
        """Return the current time and context."""
        return cls(get_current(), time.time_ns())


class OpenCall(Protocol):
    """Opens a call in the context in which its message was sent."""

    def __call__(
        self,
        request: ResponsesRequest,
        parameters: Mapping[str, Any],
        sent: SentMessage,
        link: SpanContext | None = None,
    ) -> Invocation | None: ...


class _Call:
    """A call of a lane.

    Attributes:
        request: Its parameters.
        sent: When and where its message was sent.
        invocation: The call itself; `None` if it is not recorded.

    """

    __slots__ = ("invocation", "request", "sent")

    def __init__(self, request: ResponsesRequest, sent: SentMessage, invocation: Invocation | None) -> None:
        self.request = request
        self.sent = sent
        self.invocation = invocation

    @property
    def ended(self) -> _EndedCall:
        """What is kept of the call after its end."""
        span_context = self.invocation.call_span.span.get_span_context() if self.invocation else None
        return _EndedCall(self.request, self.sent, span_context)


class _EndedCall(NamedTuple):
    """What is kept of a call after its end: a successor has the same parameters, and a link to its span."""

    request: ResponsesRequest
    sent: SentMessage
    span_context: SpanContext | None


class _Lane:
    """The calls of one lane. A server runs them one after the other, in the order in which they were sent.

    Attributes:
        waiting: The calls that have not begun.
        current: The call whose answer arrives now.
        current_id: The id of its response.
        last: The call that ended last.
        last_id: The id of its response.
        error: An error that belongs to the current call or to one that waits. The next message tells.
        message_end: How its messages end, if they name the lane there.

    """

    __slots__ = ("current", "current_id", "error", "last", "last_id", "message_end", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Call] = deque()
        self.current: _Call | None = None
        self.current_id: str | None = None
        self.last: _EndedCall | None = None
        self.last_id: str | None = None
        self.error: bytes | None = None
        self.message_end = b""

    @property
    def is_idle(self) -> bool:
        return self.current is None and not self.waiting

    def begin(self, call: _Call, response_id: str | None) -> None:
        self.current, self.current_id = call, response_id

    def end(self) -> None:
        # Another thread may end the calls at the same time, by a close.
        current, current_id = self.current, self.current_id
        self.current = self.current_id = None
        if current is not None:
            self.last, self.last_id = current.ended, current_id


class Lanes:
    """All calls of one connection, by lane.

    One thread receives. Others may send at the same time: they only add to `waiting` of a lane. The memory
    depends on the number of open calls and of lanes, which is bounded.

    Attributes:
        read_fast: Reads most messages, and returns true. It returns false for a message that `on_message`
            must read.

    """

    def __init__(
        self,
        open_call: OpenCall,
        describe: Callable[[Mapping[str, Any]], ResponsesRequest],
        observe: Callable[[bytes], object],
    ) -> None:
        """Begin without calls.

        Args:
            open_call: Opens a call. It returns `None` if the call is not recorded.
            describe: Returns the parameters of a call from its message.
            observe: Receives each terminal event that belongs to no open call. Its call may have ended
                earlier, by an `error` event or a close, and may lack its usage.

        """
        self._observe = observe
        self._open_call = open_call
        self._describe = describe
        self._default = _Lane()
        self._named: dict[str, _Lane] = {}
        self.read_fast: Callable[[bytes], bool] = read_nothing
        self._has_seen_names = False  # whether a message of the server had the name of a lane
        # The fast paths of the current calls, by how their messages end: most name their lane there.
        self._readers: dict[bytes, Callable[[bytes], bool]] = {}
        self._steered: dict[str, SentMessage] = {}  # by the id of the response that is steered

    @_fault.catch_and_report("looking at a message that is sent")
    def on_send(self, message: str | bytes, sent: SentMessage) -> Callable[[Exception], None] | None:
        """Open the call that a message makes, before it is sent.

        Args:
            message: The message.
            sent: When and where the application sent it.

        Returns:
            What to call with the exception if the message cannot be sent. `None` if it makes no call.

        """
        event = decoded(message) or {}
        if event.get("type") == "response.steer":
            previous_id = event.get("previous_response_id")
            if isinstance(previous_id, str):
                self._steered[previous_id] = sent
                for other in list(self._steered)[:-_MAX_STEERED]:
                    self._steered.pop(other, None)
        if event.get("type") != "response.create":
            return None
        request = self._describe(event)
        call = _Call(request, sent, self._open_call(request, event, sent))
        lane = self._lane(request.lane)
        lane.waiting.append(call)

        def on_unsent(error: Exception) -> None:
            with contextlib.suppress(ValueError):  # it has begun
                lane.waiting.remove(call)
            if call.invocation is not None:
                call.invocation.on_raise(error)

        return on_unsent

    @_fault.catch_and_report("looking at a message")
    def on_message(self, message: Any) -> None:
        """Read a message that the application receives, and that `read_fast` has not read."""
        is_bytes = message.__class__ is bytes
        if not is_bytes:
            message = message.encode() if isinstance(message, str) else bytes(message)
        name, end = _lane_name(message)
        lane = self._default if name is None else self._named.get(name)
        if lane is None:
            return  # the application has sent nothing in this lane
        self._has_seen_names = self._has_seen_names or name is not None
        self._read(lane, message)
        invocation = lane.current.invocation if lane.current is not None and lane.error is None else None
        read_fast = read_nothing if invocation is None else invocation.read_fast
        if not is_bytes or not self._named:
            self.read_fast = read_fast if is_bytes else read_nothing
            return
        self._readers.pop(lane.message_end, None)
        lane.message_end = end
        if invocation is not None and end:
            self._readers[end] = read_fast
            if name is not None and len(self._readers) == 1:
                # Only this lane has a response now. To find the lane of a message would double its cost.
                self.read_fast = invocation.read_fast_of(end)
                return
        self.read_fast = self._read_in_lanes

    def _read_in_lanes(self, message: bytes) -> bool:
        """Read most messages of a connection whose lanes have names. See `read_fast`."""
        try:
            read_fast = self._readers[message[message.rfind(_LANE_KEY) :]]
        except (KeyError, TypeError):  # the first releases of the library return text as `str`
            return False
        return read_fast(message)

    def stop_reading_fast(self) -> None:
        """Have the next message passed to `on_message`."""
        self.read_fast = read_nothing

    @property
    def is_in_use(self) -> bool:
        """Whether a call has not ended."""
        return not all(lane.is_idle for lane in (self._default, *self._named.values()))

    @_fault.catch_and_report("looking at what had arrived")
    def on_unread(self, messages: Sequence[bytes]) -> None:
        """Read messages that had arrived when the application closed the connection, if they end a response.

        The others do not count, since the application never received them.
        """
        names = [_lane_name(message)[0] for message in messages]
        last = {
            name: number
            for number, (name, message) in enumerate(zip(names, messages, strict=True))
            if type_of(message) in _RESPONSE_ENDS
        }
        if not last:
            return
        for call in self._open_calls():
            if call.invocation is not None:
                call.invocation.on_leave()
        for number, (name, message) in enumerate(zip(names, messages, strict=True)):
            if number <= last.get(name, -1):
                self.on_message(message)

    def _open_calls(self) -> list[_Call]:
        lanes = (self._default, *self._named.values())
        current = [lane.current for lane in lanes]
        return [*filter(None, current), *(call for lane in lanes for call in list(lane.waiting))]

    def end_all(self, end: Callable[[Invocation], object]) -> None:
        """End all calls, since no message arrives any more."""
        self.read_fast = read_nothing
        self._readers.clear()
        for lane in (self._default, *self._named.values()):
            self._assign_error(lane, is_of_current=True)
            calls = [*([] if lane.current is None else [lane.current]), *lane.waiting]
            lane.waiting.clear()
            lane.end()
            for call in calls:
                if call.invocation is not None and not call.invocation.ended:
                    end(call.invocation)

    def _read(self, lane: _Lane, message: bytes) -> None:
        """Read a message of a lane that is not like the last one there."""
        if lane.current is not None and lane.error is None:
            invocation = lane.current.invocation
            if invocation is not None and invocation.read_fast(message):
                return
        event_type = type_of(message)
        if event_type is None or event_type.startswith(_OF_INPUT):
            return
        self._assign_error(lane, is_of_current=event_type in (_CREATED, _FAILED))
        if lane.is_idle and not self._has_seen_names and event_type in _STARTS | _ENDS:
            self._take_from_named(lane)
        if event_type in _STARTS:
            self._begin(lane, message, event_type)
        elif event_type == _ERROR:
            if lane.current is not None and lane.waiting:
                lane.error = message
                return
            if lane.current is None and lane.waiting:
                lane.begin(lane.waiting.popleft(), None)  # it was refused
        elif event_type in _ENDS:
            if self._is_of_last(lane, message, event_type):
                self._observe(message)
                return
        elif lane.current is None and lane.last_id is None:
            lane.last = None  # what follows has nothing to do with a call that was refused
        # If there is no call, the server sends what nobody has asked for.
        if lane.current is not None and _has_ended(lane.current, message, event_type):
            lane.end()

    def _take_from_named(self, lane: _Lane) -> None:
        """Take the oldest call that waits: some servers accept the name of a lane, but do not repeat it."""
        waiting = [named for named in self._named.values() if named.waiting]
        if waiting:
            oldest = min(waiting, key=lambda named: named.waiting[0].sent.start_ns)
            lane.waiting.append(oldest.waiting.popleft())

    def _begin(self, lane: _Lane, message: bytes, event_type: str) -> None:
        """Note that a response begins, unless it is the current one or the last one."""
        if lane.current is not None and event_type != _CREATED:
            return
        response = (decoded(message) or {}).get("response")
        if not isinstance(response, dict):
            return
        response_id, previous_id = response.get("id"), response.get("previous_response_id")
        if lane.current is not None:
            if lane.current_id == response_id:
                return
            if lane.current.invocation is not None:
                lane.current.invocation.on_body_end()  # the next response begins, and its end was not seen
            lane.end()
        elif response_id is not None and lane.last_id == response_id:
            return
        steering = self._steered.pop(previous_id, None) if isinstance(previous_id, str) else None
        head = lane.waiting[0] if lane.waiting else None
        if head is not None and (steering is None or head.request.previous_response_id == previous_id):
            lane.begin(lane.waiting.popleft(), response_id)
        elif previous_id is not None and lane.last is not None and lane.last_id == previous_id:
            # It continues a response that was steered: nobody has sent a message for it.
            steered = lane.last
            request = steered.request._replace(previous_response_id=previous_id, generate=None)
            sent = (steering or steered.sent)._replace(start_ns=time.time_ns())
            invocation = None
            if steered.span_context is not None:  # a call that is not recorded has no recorded continuation
                parameters = {"model": request.model, "previous_response_id": previous_id}
                invocation = self._open_call(request, parameters, sent, steered.span_context)
            lane.begin(_Call(request, sent, invocation), response_id)

    def _is_of_last(self, lane: _Lane, message: bytes, event_type: str) -> bool:
        """Whether a terminal event belongs to the call that ended last.

        If no response has begun, the event may be the whole answer to the call that waits.
        """
        if lane.current is not None:
            return (
                lane.last_id is not None
                and lane.last_id.encode() in message
                and (lane.current_id or "").encode() not in message
                and _response_id(message) == lane.last_id
            )
        if not lane.waiting:
            return True
        response_id = _response_id(message)
        is_of_last = lane.last is not None and (
            # After the `error` event that refuses a call, some servers send `response.failed`, too.
            event_type == _FAILED if lane.last_id is None else lane.last_id == response_id
        )
        if not is_of_last:
            lane.begin(lane.waiting.popleft(), response_id)
        elif lane.last_id is None:
            lane.last = None  # only one such event follows
        return is_of_last

    def _assign_error(self, lane: _Lane, *, is_of_current: bool) -> None:
        """End the call that an error belongs to: the current one, or the next one, which was refused.

        A server may refuse a call at once, while an earlier one of its lane still runs. Then the messages of
        the current call continue after the error.
        """
        error, lane.error = lane.error, None
        if error is None:
            return
        if is_of_current or not lane.waiting:
            if lane.current is not None and _has_ended(lane.current, error, _ERROR):
                lane.end()
        else:
            _has_ended(lane.waiting.popleft(), error, _ERROR)

    def _lane(self, name: str | None) -> _Lane:
        if name is None:
            return self._default
        if name not in self._named and len(self._named) >= _MAX_LANES:
            for other, lane in list(self._named.items()):
                if lane.is_idle:
                    self._named.pop(other, None)
        return self._named.setdefault(name, _Lane())


def _has_ended(call: _Call, message: bytes, event_type: str) -> bool:
    """Have a call read a message, and return whether that was its last one."""
    if call.invocation is None:
        return event_type in _ENDS
    call.invocation.on_message(message)
    return call.invocation.ended


def _response_id(message: bytes) -> str | None:
    response = (decoded(message) or {}).get("response")
    response_id = response.get("id") if isinstance(response, dict) else None
    return response_id if isinstance(response_id, str) else None


def _lane_name(message: bytes) -> tuple[str | None, bytes]:
    """Return the lane of a message, `None` for the default lane, and the end of the message that names it.

    The name may stand anywhere in the message. It cannot be inside of a string, where its quotes are escaped.
    An object inside of the message may have a field of the same name, such as the metadata of a response. The
    second value is empty if the name is not at the end.
    """
    at = message.rfind(_LANE_KEY)
    if at < 0:
        return None, message[-1:]
    match = _LANE.match(message, at)
    if match and (match[2] or (message.rfind(b"{", 0, at) == 0 and message.find(b"[", 0, at) < 0)):
        name = match[1].decode("utf-8", "replace") if match[1] else None
        return name, message[at:] if match[2] else b""
    name = (decoded(message) or {}).get("stream_id")
    return name if isinstance(name, str) else None, b""

"""The calls of one WebSocket connection: which call a message belongs to."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Mapping
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
_ENDS: Final = frozenset({"response.completed", "response.incomplete", "response.failed", _ERROR})
# What becomes of steering. It is no part of an answer.
_STEERING: Final = "response.steer."
_LANE_KEY: Final = b'"stream_id"'
_LANE: Final = re.compile(rb'"stream_id"\s*:\s*"([^"\\]{1,256})"')

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


class _Call(NamedTuple):
    """A call of a lane.

    Attributes:
        request: Its parameters.
        sent: When and where its message was sent.
        invocation: The call itself; `None` if it is not recorded.

    """

    request: ResponsesRequest
    sent: SentMessage
    invocation: Invocation | None


class _Lane:
    """The calls of one lane. A server runs them one after the other, in the order in which they were sent.

    Attributes:
        waiting: The calls that have not begun.
        current: The call whose answer arrives now.
        current_id: The id of its response.
        last: The call that ended last, and the id of its response.

    """

    __slots__ = ("current", "current_id", "last", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Call] = deque()
        self.current: _Call | None = None
        self.current_id: str | None = None
        self.last: tuple[str | None, _Call] | None = None

    @property
    def is_idle(self) -> bool:
        return self.current is None and not self.waiting

    def begin(self, call: _Call, response_id: str | None) -> None:
        self.current, self.current_id = call, response_id

    def end(self) -> None:
        if self.current is not None:
            self.last = self.current_id, self.current
        self.current = self.current_id = None


class Lanes:
    """All calls of one connection, by lane.

    One thread receives. Others may send at the same time: they only add to `waiting` of a lane. The memory
    depends on the number of open calls and of lanes, which is bounded.

    Attributes:
        read_fast: Reads most messages, and returns true. It returns false for a message that `on_message`
            must read.

    """

    def __init__(
        self, open_call: OpenCall, describe: Callable[[Mapping[str, Any]], ResponsesRequest]
    ) -> None:
        """Begin without calls.

        Args:
            open_call: Opens a call. It returns `None` if the call is not recorded.
            describe: Returns the parameters of a call from its message.

        """
        self._open_call = open_call
        self._describe = describe
        self._default = _Lane()
        self._named: dict[str, _Lane] = {}
        self.read_fast: Callable[[bytes], bool] = read_nothing
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
            if isinstance(previous_id, str) and len(self._steered) < _MAX_STEERED:
                self._steered[previous_id] = sent
        if event.get("type") != "response.create":
            return None
        request = self._describe(event)
        call = _Call(request, sent, self._open_call(request, event, sent))
        lane = self._lane(request.lane)
        lane.waiting.append(call)

        def on_unsent(error: Exception) -> None:
            if call in lane.waiting:
                lane.waiting.remove(call)
            if call.invocation is not None:
                call.invocation.on_raise(error)

        return on_unsent

    @_fault.catch_and_report("looking at a message")
    def on_message(self, message: Any) -> None:
        """Read a message that the application receives, and that `read_fast` has not read."""
        if message.__class__ is not bytes:
            message = message.encode() if isinstance(message, str) else bytes(message)
        self._read(message)
        current = self._default.current if not self._named else None
        invocation = current.invocation if current is not None else None
        self.read_fast = invocation.read_fast if invocation is not None else read_nothing

    def end_all(self, end: Callable[[Invocation], object]) -> None:
        """End all calls, since no message arrives any more."""
        self.read_fast = read_nothing
        for lane in (self._default, *self._named.values()):
            calls = [*([] if lane.current is None else [lane.current]), *lane.waiting]
            lane.waiting.clear()
            lane.end()
            for call in calls:
                if call.invocation is not None and not call.invocation.ended:
                    end(call.invocation)

    def _read(self, message: bytes) -> None:
        """Read a message whose lane has to be found, or that is not like the last one."""
        name = _lane_name(message)
        lane = self._default if name is None else self._named.get(name)
        if lane is not None and lane.current is not None:
            invocation = lane.current.invocation
            if invocation is not None and invocation.read_fast(message):
                return
        event_type = type_of(message)
        if event_type is None or event_type.startswith(_STEERING):
            return
        if event_type in _STARTS:
            lane = lane or self._lane(name)
            self._begin(lane, message)
        elif event_type == _ERROR and lane is not None and lane.current is None and lane.waiting:
            lane.begin(lane.waiting.popleft(), None)  # it was refused
        if lane is None or lane.current is None:
            return  # the server sends what nobody has asked for
        invocation = lane.current.invocation
        if invocation is None:
            is_over = event_type in _ENDS
        else:
            invocation.on_message(message)
            is_over = invocation.ended
        if is_over:
            lane.end()

    def _begin(self, lane: _Lane, message: bytes) -> None:
        """Note that a response begins, unless it is the current one."""
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
        steering = self._steered.pop(previous_id, None) if isinstance(previous_id, str) else None
        head = lane.waiting[0] if lane.waiting else None
        if head is not None and (steering is None or head.request.previous_response_id == previous_id):
            lane.begin(lane.waiting.popleft(), response_id)
        elif previous_id is not None and lane.last is not None and lane.last[0] == previous_id:
            # It continues a response that was steered: nobody has sent a message for it.
            steered = lane.last[1]
            request = steered.request._replace(previous_response_id=previous_id, generate=None)
            sent = (steering or steered.sent)._replace(start_ns=time.time_ns())
            invocation = None
            if steered.invocation is not None:  # a call that is not recorded has no recorded continuation
                parameters = {"model": request.model, "previous_response_id": previous_id}
                link = steered.invocation.call_span.span.get_span_context()
                invocation = self._open_call(request, parameters, sent, link)
            lane.begin(_Call(request, sent, invocation), response_id)

    def _lane(self, name: str | None) -> _Lane:
        if name is None:
            return self._default
        if name not in self._named and len(self._named) >= _MAX_LANES:
            for other, lane in list(self._named.items()):
                if lane.is_idle:
                    self._named.pop(other, None)
        return self._named.setdefault(name, _Lane())


def _lane_name(message: bytes) -> str | None:
    """Return the lane of a message; `None` for the default lane.

    The name may stand anywhere in the message, but not inside of a string: there its quotes are escaped.
    """
    if _LANE_KEY not in message:
        return None
    names = _LANE.findall(message)
    if len(names) == 1:
        return str(names[0].decode("utf-8", "replace"))
    name = (decoded(message) or {}).get("stream_id")  # there may be another field of this name inside
    return name if isinstance(name, str) else None

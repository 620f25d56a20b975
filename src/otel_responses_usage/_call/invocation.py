"""One call, from its request to the end of its span."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

from .. import _fault
from .._answer.message import MessageReader
from .._answer.reception import Reception
from .._facts.headers import AnswerHeaders
from .._facts.outcome import ABANDONED, CANCELLED, CLOSED, EXIT, TRUNCATED, Ending, Outcome
from .._facts.request import WEBSOCKET, Operation, ResponsesRequest
from .._facts.response import error_code
from .._facts.usage import UsageSource
from .._story import begin_story
from .._telemetry.neighbour import CallSpan
from .services import Services
from .settlement import EndedCall, MakeTarget, Settlement
from .tail import CallTail

# How a call ends that does not stream and whose answer has no content.
_EMPTY: Final = Ending(Outcome.ERROR, "empty_response")


class _Resends(NamedTuple):
    """How often the SDK sends the request again, and when for the last time, by `time.monotonic`."""

    number: int
    last_at_s: float


_NO_RESENDS: Final = _Resends(0, 0.0)


class Invocation:
    """One call: it starts once, ends once, and is recorded once.

    The surfaces report each event of the call by calling a method. All ways to end the call lead to
    `finish`, which acts only once. A `Settlement` then records the call. No method raises or blocks.
    """

    __slots__ = (
        "__weakref__",
        "_content",
        "_decode_error",
        "_end_token",
        "_ended",
        "_has_document",
        "_has_left",
        "_make_target",
        "_reader_failed",
        "_reception",
        "_request",
        "_request_id",
        "_resends",
        "_services",
        "_start_ns",
        "_story",
        "_tail",
        "_wall_clock_offset_ns",
        "call_span",
        "response_ref",
    )

    def __init__(
        self, request: ResponsesRequest, call_span: CallSpan, start_ns: int, services: Services
    ) -> None:
        self._request = request
        self.call_span = call_span
        self._start_ns = start_ns
        self._wall_clock_offset_ns = time.time_ns() - time.perf_counter_ns()
        self._services = services
        self._reception = Reception(MessageReader if request.protocol == WEBSOCKET else None)
        self._make_target: MakeTarget | None = None
        self._has_document = False
        self._has_left = False
        self._end_token = None
        self._ended = False
        self._tail: CallTail | None = None
        self._decode_error: Ending | None = None
        self._reader_failed = False
        self._content: bytes | None = None
        self._request_id: str | None = None
        self._resends = _NO_RESENDS
        # A weak reference to the HTTP response, whose callback is `on_garbage_collected`.
        self.response_ref: Callable[[], object] | None = None
        self._story = begin_story()
        if self._story is not None:
            operation, span = request.operation, call_span.span.get_span_context().span_id
            self._story.tell("opened", operation=operation, model=request.model, span=f"{span:016x}")

    @property
    def ended(self) -> bool:
        """Whether the call has ended. Its span may stay open until the usage is known."""
        return self._ended

    @property
    def response(self) -> object:
        """The HTTP response, as long as the application holds it."""
        return self.response_ref() if self.response_ref is not None else None

    @property
    def request(self) -> ResponsesRequest:
        """The parameters of the call."""
        return self._request

    @property
    def response_id(self) -> str | None:
        """The id of its response, if it is known."""
        return self._reception.state.response.id

    @property
    def read_fast(self) -> Callable[[bytes], bool]:
        """A fast path that can read most pieces of the answer: see `Reception.read_fast`."""
        return self._reception.read_fast

    def on_headers(self, headers: AnswerHeaders) -> None:
        """Note the headers of an answer, also of one that the SDK does not accept."""
        self._request_id = headers.request_id
        if self._story is not None:
            self._story.tell("answered", request_id=headers.request_id)
        self.on_refusal(headers)

    def on_refusal(self, headers: AnswerHeaders) -> None:
        """Note the headers of an answer after which the SDK sends the request again."""
        if headers.rate_limits and not self._request.is_fetch:
            self._services.telemetry.record_rate_limits(headers.rate_limits, self._request, self.call_span)

    def on_resend(self, count: int = 1, *, delay_s: float = 0.0) -> None:
        """Note that the SDK sends the request again, after so many seconds."""
        self._resends = _Resends(self._resends.number + count, time.monotonic() + delay_s)

    @property
    def keeps_content(self) -> bool:
        """Whether the body of the request is needed: input tokens may have to be counted."""
        return self._services.config.input_count and self._request.operation is Operation.CHAT

    def on_sent(self, content: bytes) -> None:
        """Keep the body of the request until the call is recorded."""
        self._content = content

    def on_answer(self, make_target: MakeTarget) -> bool:
        """Note that an answer arrives.

        Args:
            make_target: Returns the target for a look-up of a response id.

        Returns:
            Whether to read this answer. False if the call has an answer already.

        """
        if self._make_target is not None:
            return False
        self._make_target = make_target
        return True

    def on_piece(self, piece: bytes) -> int:
        """Read the next piece of the answer. The terminal event ends the call at once.

        Returns:
            The number of bytes that were read, 0 for all. `on_remainder` reads the others.

        """
        if self._ended:
            return 0
        reception = self._reception
        consumed = reception.read(piece)
        ending = reception.state.ending
        if ending is not None:
            self.finish(ending)
        return consumed

    def on_message(self, message: bytes) -> None:
        """Read the next message of a WebSocket. An error event ends the call, too."""
        self.on_piece(message)
        if not self._ended and (error := self._reception.stream_error):
            self.finish(error)

    def on_remainder(self) -> None:
        """Read the remainder of the last piece.

        Called when the application asks for it, or has stopped reading.
        """
        while not self._ended and (remainder := self._reception.take_remainder()):
            self.on_piece(remainder)

    @_fault.catch_and_report("reading an answer")
    def on_document(self, content: bytes) -> None:
        """Read a complete body. The call ends later, in `on_return`."""
        self._reception.stop_timing()
        self.on_piece(content)
        self.on_remainder()
        self._reception.finish_document()
        self._has_document = True

    @_fault.catch_and_report("ending a call")
    def on_return(self) -> None:
        """Note that the SDK has returned its result to the application."""
        if self._has_document:
            self.on_body_end()
        elif self._make_target is None:
            self.finish(CLOSED)  # a client class with its own way to read: its answer cannot be read here

    @_fault.catch_and_report("ending a call")
    def on_raise(self, error: BaseException) -> None:
        """Note that the call raised before it returned a stream."""
        if not is_api_error(error) and time.monotonic() < self._resends.last_at_s:
            # Cancelled while the SDK waited before it would send the request again.
            self._resends = _Resends(self._resends.number - 1, 0.0)
        self.finish(_ending_of_error(error))

    @_fault.catch_and_report("ending a call")
    def on_body_end(self) -> None:
        """Note that the body ended without an error."""
        if self._ended:
            return
        reception = self._reception
        reception.finish_document()
        is_empty = reception.is_empty and not self._request.streams
        self.finish(reception.ending or reception.stream_error or (_EMPTY if is_empty else TRUNCATED))

    @_fault.catch_and_report("ending a call")
    def on_read_error(self, error: BaseException, *, closed: bool) -> None:
        """Note that reading the body raised.

        Args:
            error: The exception.
            closed: Whether the application closed the stream during the read.

        """
        if self._reception.is_done:
            self.on_body_end()  # all events are read: the SDK reads on only to reuse the connection
        elif not isinstance(error, Exception):
            self.finish(CANCELLED)
        else:
            ending = CLOSED if closed else Ending(Outcome.CUT, type(error).__name__)
            self.finish(self._reception.stream_error or ending)

    def on_decode_error(self, error: Exception) -> None:
        """Note that the next piece cannot be decoded: its reader raises if it goes on to decode it."""
        self._decode_error = self._decode_error or _ending_of_error(error)

    def on_reader_failed(self) -> None:
        """Note that the reader of the body raises now because of the decode error, or has raised."""
        self._reader_failed = True

    def on_reader_gone(self) -> None:
        """Note that the reader of the body has stopped, without a close until now."""
        if self._decode_error is not None:
            self.finish(self._decode_error)

    @_fault.catch_and_report("ending a call")
    def on_reader_error(self, error: Exception, unread: Sequence[bytes]) -> None:
        """Note that the SDK raised while it read the body.

        Args:
            error: The exception that the application received.
            unread: Pieces that had arrived. They do not change how the call ended, but may tell the usage.

        """
        end_ns = self._end()
        if end_ns is None:
            return
        reception = self._reception
        ending = _ending_of_error(error)
        if is_api_error(error):
            ending = reception.stream_error or ending
        reception.begin_tail()
        for piece in (reception.take_remainder(), *unread):
            if piece and reception.read_tail(piece):
                break
        self._record_or_look_up(ending, end_ns)

    def on_leave(self) -> None:
        """Note that the application reads no further: it never receives what has arrived since."""
        self._has_left = True

    @_fault.catch_and_report("ending a call")
    def on_close(self, cause: BaseException | None) -> None:
        """Note that the stream was closed.

        Args:
            cause: The exception that led to the close: the cancellation of the reading task, or
                `GeneratorExit` of a dropped stream. `None` if the application closed it.

        """
        if self._ended:
            return
        reception = self._reception
        if isinstance(cause, GeneratorExit):
            self.finish(reception.stream_error or self._decode_error or ABANDONED)
        elif cause is not None:
            self.finish(reception.stream_error or _ending_of_error(cause))
        elif self._reader_failed and self._decode_error is not None:
            self.finish(self._decode_error)
        elif reception.is_done:
            self.on_body_end()
        else:
            self.finish(reception.stream_error or CLOSED)

    @_fault.catch_and_report("looking at what had arrived")
    def on_buffered(self, pieces: Sequence[bytes]) -> None:
        """Read pieces that had arrived when the application closed the stream, if they end the call.

        Otherwise they do not count, since the application never received them. They may become part of the
        tail.
        """
        if self._reception.contains_end(pieces):
            for piece in pieces:
                self.on_piece(piece)
                self.on_remainder()

    def on_tail(self, piece: bytes) -> bool:
        """Read a piece of the tail, and return whether the tail can stop."""
        return self._reception.read_tail(piece)

    @property
    def tail_s(self) -> float:
        """For how many seconds to read the tail of the stream, if the application closes it now."""
        if self._ended or self._reader_failed or not self._can_have_tail:
            return 0.0
        config = self._services.config
        grace_s = config.grace_timeout if self._reception.state.is_output_done else 0.0
        return max(config.tail_timeout, grace_s)

    @property
    def held_tail_s(self) -> float:
        """The same for a tail that keeps the application's connection in use. Only if asked for."""
        return self._services.config.tail_timeout

    @property
    def _can_have_tail(self) -> bool:
        # A background response continues without its stream, so its look-up is exact. A fetch has no usage.
        request, reception = self._request, self._reception
        is_useful = request.streams and not request.background and not request.is_fetch
        return is_useful and reception.stream_error is None and not reception.is_done

    @_fault.catch_and_report("reading on")
    def begin_tail(self, read_on: Callable[[], float | None], close: Callable[[], object]) -> None:
        """End the call as closed, and have its tail read in the background.

        Args:
            read_on: Reads the tail with `on_tail`, and calls `on_tail_end`. Returns after how many seconds to
                call it again.
            close: Called once when the tail has ended, or cannot be read.

        """
        end_ns = self._end()
        if end_ns is None:
            close()
            return
        self._reception.begin_tail()
        server, services = self._request.server, self._services
        on_end = partial(self._on_tail_result, end_ns)
        self._tail = CallTail(server, self.call_span, services.telemetry, services.recovery, close, on_end)
        if not self._tail.begin(read_on):
            close()
            self._record_or_look_up(CLOSED, end_ns)

    def on_tail_end(self) -> None:
        """Note that the tail has been read. Acts only once."""
        if self._tail is not None:
            self._tail.end()

    def _on_tail_result(self, end_ns: int, is_cut_off: bool) -> None:
        self._reception.state.source = UsageSource.TAIL
        self._record_or_look_up(CLOSED, end_ns, is_cut_off=is_cut_off)

    def on_garbage_collected(self, _: object = None) -> None:
        """Note that the garbage collector has found the HTTP response. Another thread ends the call.

        The garbage collector may run at any point, even while this thread holds the lock that `span.end()`
        needs.
        """
        end_ns = self._end()
        if end_ns is not None:
            self._services.recovery.run_later(partial(self._end_collected, end_ns))

    @_fault.catch_and_report("ending a call")
    def finish(self, ending: Ending) -> None:
        """End the call now. Does nothing if it has ended."""
        end_ns = self._end()
        if end_ns is not None:
            self._record_or_look_up(ending, end_ns)

    def on_exit(self) -> None:
        """End the call because the process or the instrumentation ends."""
        self.on_leave()
        self.on_remainder()
        self.finish(EXIT)

    def discard(self) -> None:
        """Forget the call in a forked child: the parent process ends it."""
        self._end()

    def _end(self) -> int | None:
        """Mark the call as ended. Returns the wall-clock time in nanoseconds, or `None` if it had ended."""
        try:
            del self._end_token  # atomic: only one thread can
        except AttributeError:
            return None
        self._ended = True
        self._reception.stop()
        return self._now_ns()

    def _now_ns(self) -> int:
        return time.perf_counter_ns() + self._wall_clock_offset_ns

    def _record_or_look_up(self, ending: Ending, end_ns: int, *, is_cut_off: bool = False) -> None:
        """Record the ended call, or start a look-up that leads to its record.

        Args:
            ending: How the call ended.
            end_ns: When.
            is_cut_off: Whether its tail was cut off because the process or the instrumentation ends.

        """
        services, reception = self._services, self._reception
        services.on_end(self)
        self.response_ref = None  # its callback refers to this call
        reception.release()
        if self._story is not None:
            state, response = reception.state, reception.state.response
            self._story.tell(
                "ended",
                response=response.id,
                model=response.model or self._request.model,
                outcome=ending.outcome,
                error=ending.error_type,
                events=state.events,
            )
        call = EndedCall(
            self._request,
            self.call_span,
            self._start_ns,
            end_ns,
            self._wall_clock_offset_ns,
            ending,
            reception.state,
            self._request_id,
            self._resends.number,
            self._has_left,
            self._content,
            self._story,
        )
        make_target, self._make_target = self._make_target, None  # it holds the credentials
        self._content = None
        Settlement(call, make_target, services).settle(is_cut_off=is_cut_off)

    @_fault.catch_and_report("ending a call")
    def _end_collected(self, end_ns: int) -> None:
        self.on_leave()
        reception = self._reception
        if remainder := reception.take_remainder():
            reception.read_tail(remainder)
        ending = reception.ending or reception.stream_error or self._decode_error or ABANDONED
        self._record_or_look_up(ending, end_ns)


def _ending_of_error(error: BaseException) -> Ending:
    if not isinstance(error, Exception):
        return CANCELLED
    # Only SDK exceptions have the error code of the API. Other exceptions may use `code` for anything.
    code = error_code({"code": getattr(error, "code", None)}) if is_api_error(error) else None
    return Ending(Outcome.ERROR, code or type(error).__name__)


def is_api_error(error: BaseException) -> bool:
    """Whether the SDK has made this exception of an answer, or of its absence."""
    return any(cls.__name__ == "APIError" for cls in type(error).__mro__)

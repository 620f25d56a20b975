"""One call, from its request to the end of its span."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

from opentelemetry.trace import Span

from .. import _fault
from .._answer.reception import Reception
from .._config import Config
from .._facts.outcome import ABANDONED, CLOSED, EXIT, TRUNCATED, Ending, Outcome, ending_of
from .._facts.request import Operation, ResponsesRequest
from .._facts.response import Response, error_code
from .._facts.usage import MissingReason, Usage, UsageSource
from .._lookup.job import Endpoint, Job, LookupRequest, LookupResult, LookupTarget
from .._lookup.recovery import Recovery
from .._telemetry.telemetry import Record, Retrieval, Telemetry

# The reader of a tail ends it by itself within this time after the timeout.
_TAIL_GRACE_S: Final = 1.0

MakeTarget = Callable[[str], "LookupTarget | MissingReason"]


class Services(NamedTuple):
    """What all calls of one instrumentation share.

    Attributes:
        config: The settings.
        telemetry: Writes spans and metrics.
        recovery: Looks usage up.
        on_end: Called once with each call when it has ended.

    """

    config: Config
    telemetry: Telemetry
    recovery: Recovery
    on_end: Callable[[Invocation], object]


class _PendingUsage(NamedTuple):
    """State kept for an ended call until its usage is known."""

    ending: Ending
    end_ns: int
    # Holds the credentials. Released as soon as it has been used or will not be.
    make_target: MakeTarget | None
    has_no_target: bool = False


class Invocation:
    """The life of one call: it begins, ends once, and is settled once.

    What happens to the call is reported here by the surface that sees it first. Every way of ending leads
    to `finish`, which acts once. If the usage is known then, the span ends at once. Otherwise the call is
    handed to a look-up, and the span ends with the same end time when the look-up has a result. No method
    raises, and none waits.
    """

    __slots__ = (
        "__weakref__",
        "_end_token",
        "_ended",
        "_has_document",
        "_make_target",
        "_pending_usage",
        "_reception",
        "_request",
        "_services",
        "_start_ns",
        "_tail_token",
        "_wall_clock_offset_ns",
        "response_ref",
        "span",
    )

    def __init__(self, request: ResponsesRequest, span: Span, start_ns: int, services: Services) -> None:
        self._request = request
        self.span = span
        self._start_ns = start_ns
        self._wall_clock_offset_ns = time.time_ns() - time.perf_counter_ns()
        self._services = services
        self._reception = Reception()
        self._make_target: MakeTarget | None = None
        self._has_document = False
        self._end_token: list[None] = [None]
        self._ended = False
        self._tail_token: list[int] | None = None  # the end time of a call whose stream is still being read
        self._pending_usage: _PendingUsage | None = None
        self.response_ref: object = None  # kept alive for the surface that watches the answer

    @property
    def ended(self) -> bool:
        """Whether the call is over; its span may still be open until its usage is known."""
        return self._ended

    @property
    def read_fast(self) -> Callable[[bytes], bool]:
        """A fast path for most pieces of the answer: see `Reception.read_fast`."""
        return self._reception.read_fast

    def on_answer(self, make_target: MakeTarget) -> bool:
        """Note that there is an answer; `make_target` says where its response can be looked up.

        Returns:
            Whether the answer is to be watched: false if it is watched already.

        """
        if self._make_target is not None:
            return False
        self._make_target = make_target
        return True

    def on_piece(self, piece: bytes) -> int:
        """Read the next piece of the answer. The terminal event ends the call, whatever follows.

        Returns:
            How many bytes of it were read, 0 for all. The others are held until `on_remainder`.

        """
        if self._ended:
            return 0
        reception = self._reception
        consumed = reception.read(piece)
        ending = reception.state.ending
        if ending is not None:
            self.finish(ending)
        return consumed

    def on_remainder(self) -> None:
        """Read what is held of the last piece: the application asks for it now, or never will."""
        while not self._ended and (remainder := self._reception.take_remainder()):
            self.on_piece(remainder)

    @_fault.catch_and_report("reading an answer")
    def on_document(self, content: bytes) -> None:
        """Read a body that has arrived whole. The call ends when the SDK has made its object of it."""
        self.on_piece(content)
        self.on_remainder()
        self._reception.finish_document()
        self._has_document = True

    @_fault.catch_and_report("ending a call")
    def on_return(self) -> None:
        """Note that the SDK has given the application its object."""
        if self._has_document:
            self.on_body_end()
        elif self._make_target is None:
            self.finish(CLOSED)  # a client that reads answers in its own way: nothing more can be seen

    @_fault.catch_and_report("ending a call")
    def on_raise(self, error: BaseException) -> None:
        """Note that the call raised before the application had a stream."""
        self.finish(_ending_of_error(error))

    @_fault.catch_and_report("ending a call")
    def on_body_end(self) -> None:
        """Note that the body ended cleanly."""
        if self._ended:
            return
        reception = self._reception
        reception.finish_document()
        self.finish(reception.ending or reception.stream_error or TRUNCATED)

    @_fault.catch_and_report("ending a call")
    def on_read_error(self, error: BaseException, *, closed: bool) -> None:
        """Note that reading raised; `closed` says that the application closed the stream meanwhile."""
        if self._reception.is_done:
            self.on_body_end()  # only the connection is still being read, so that it can be used again
        elif not isinstance(error, Exception):
            self.finish(Ending(Outcome.CANCELLED, type(error).__name__))
        else:
            ending = CLOSED if closed else Ending(Outcome.CUT, type(error).__name__)
            self.finish(self._reception.stream_error or ending)

    @_fault.catch_and_report("ending a call")
    def on_close(self, cause: BaseException | None, *, is_readable: bool) -> float:
        """Note that the stream was closed.

        Args:
            cause: Why it was closed, if not because the application wanted it: what the SDK raised on an
                event, the cancellation of the reading task, or `GeneratorExit` where nobody reads on.
            is_readable: Whether the stream can be read further.

        Returns:
            For how many seconds it is to be read on, with `on_tail` and `on_tail_end`; mostly 0.

        """
        if self._ended:
            return 0.0
        reception, config = self._reception, self._services.config
        if isinstance(cause, GeneratorExit):
            self.finish(reception.stream_error or ABANDONED)
        elif cause is not None:
            self.finish(reception.stream_error or _ending_of_error(cause))
        elif reception.is_done:
            self.on_body_end()
        elif reception.stream_error is None and is_readable and self.needs_tail:
            end_ns = self._end()
            if end_ns is not None:
                reception.begin_tail()
                self._tail_token = [end_ns]
                # The reader of the tail may end with the application's event loop, without a word.
                self._services.recovery.run_after(config.tail_timeout + _TAIL_GRACE_S, self.on_tail_end)
                return config.tail_timeout
        else:
            self.finish(reception.stream_error or CLOSED)
        return 0.0

    @_fault.catch_and_report("looking at what had arrived")
    def on_buffered(self, pieces: Sequence[bytes]) -> None:
        """Read what had arrived when the stream was closed. It counts only if it ends the call.

        Otherwise it was not for the application, and may be read as a tail.
        """
        if self._reception.contains_end(pieces):
            for piece in pieces:
                self.on_piece(piece)
                self.on_remainder()

    def on_tail(self, piece: bytes) -> bool:
        """Read bytes that came after the call had ended; return whether nothing more is needed."""
        return self._reception.read_tail(piece)

    @_fault.catch_and_report("ending a call")
    def on_tail_end(self) -> None:
        """Note that the stream is not read any further."""
        if self._tail_token is None:
            return
        try:
            end_ns = self._tail_token.pop()  # atomic: of two threads one finds it empty
        except IndexError:
            return
        self._reception.state.source = UsageSource.TAIL
        self._record_or_look_up(CLOSED, end_ns)

    @property
    def needs_tail(self) -> bool:
        """Whether the stream is to be read on when the application closes it."""
        # A background response continues without its stream, and its look-up is exact. A fetch has no usage.
        request = self._request
        is_useful = request.streams and not request.background and request.operation is Operation.CHAT
        return self._services.config.tail_timeout > 0 and is_useful

    def on_garbage_collected(self, _: object = None) -> None:
        """Note that the garbage collector has found the answer. Another thread does the rest.

        The garbage collector may run at any point, also while this thread holds a lock that `span.end()`
        needs.
        """
        end_ns = self._end()
        if end_ns is not None:
            self._services.recovery.run_later(partial(self._end_collected, end_ns))

    @_fault.catch_and_report("ending a call")
    def finish(self, ending: Ending) -> None:
        """End the call now, if it has not ended yet."""
        end_ns = self._end()
        if end_ns is not None:
            self._record_or_look_up(ending, end_ns)

    def on_exit(self) -> None:
        """End the call because the process or the instrumentation ends."""
        self.on_remainder()
        self.finish(EXIT)
        self.on_tail_end()

    def discard(self) -> None:
        """Drop the call: the parent process ends it."""
        self._end()

    def _end(self) -> int | None:
        """Return when the call ended, in nanoseconds of the wall clock; `None` if it had ended before."""
        try:
            self._end_token.pop()  # atomic: of two threads one finds it empty
        except IndexError:
            return None
        self._ended = True
        self._reception.stop()
        return self._now_ns()

    def _now_ns(self) -> int:
        return time.perf_counter_ns() + self._wall_clock_offset_ns

    def _seconds_since(self, end_ns: int) -> float:
        return (self._now_ns() - end_ns) / 1e9

    def _record_or_look_up(self, ending: Ending, end_ns: int) -> None:
        """Write the ended call, or hand it to a look-up, after which it is written."""
        services, reception = self._services, self._reception
        services.on_end(self)
        reception.release()
        response = reception.state.response
        if self._request.operation is Operation.FETCH_RESPONSE:
            services.recovery.observe(self._request.server, response)
            self._write(ending, end_ns, response)
        elif response.usage is not None:
            self._write(ending, end_ns, response, usage=response.usage, source=reception.state.source)
        else:
            reason = self._reason_for_no_look_up() or self._look_up(ending, end_ns)
            if reason is not None:
                self._write(ending, end_ns, response, reason=_missing_reason(reason, response))
        self._make_target = None  # it holds the credentials

    @_fault.catch_and_report("ending a call")
    def _end_collected(self, end_ns: int) -> None:
        reception = self._reception
        if remainder := reception.take_remainder():
            reception.read_tail(remainder)
        self._record_or_look_up(reception.ending or reception.stream_error or ABANDONED, end_ns)

    def _reason_for_no_look_up(self) -> MissingReason | None:
        """Return the reason why the usage of this call cannot be looked up; `None` if it can be."""
        if self._reception.state.response.id is None or self._make_target is None:
            return MissingReason.NO_RESPONSE_ID
        if not self._request.stored:
            return MissingReason.NOT_STORED
        return None if self._services.config.retrieval else MissingReason.DISABLED

    def _look_up(self, ending: Ending, end_ns: int) -> MissingReason | None:
        """Hand the call to a look-up, or return the reason why none is made."""
        config, request = self._services.config, self._request
        timeout_s = config.background_timeout if request.background else config.retrieval_timeout
        self._pending_usage = _PendingUsage(ending, end_ns, self._make_target)
        response_id = str(self._reception.state.response.id)
        refusal = self._services.recovery.submit(Job(request.server, response_id, timeout_s, self))
        if refusal is not None:
            self._pending_usage = None
        return refusal

    def on_accept(self) -> None:
        """Note that the look-up has been accepted: the span stays open until its result."""
        self._services.telemetry.add_pending(self.span, 1)

    def on_begin(self, job: Job) -> LookupRequest | MissingReason:
        """Return what the look-up asks for, or the reason why it cannot ask."""
        pending, server = self._pending_usage, self._request.server
        if pending is None or pending.make_target is None:  # it has been settled
            return MissingReason.SHUTDOWN
        target: LookupTarget | MissingReason = MissingReason.TRANSPORT_ERROR
        try:
            target = pending.make_target(job.response_id)
        except Exception:
            _fault.report("preparing a look-up")
        has_no_target = isinstance(target, MissingReason)
        self._pending_usage = pending._replace(make_target=None, has_no_target=has_no_target)
        if isinstance(target, MissingReason):
            return target
        endpoint = Endpoint(server.address or "", server.port, self._request.background, target.tenant)
        return LookupRequest(endpoint, target)

    def on_result(self, job: Job, result: LookupResult, source: UsageSource) -> None:
        """Write the call with the result of its look-up, and end its span."""
        pending, state = self._pending_usage, self._reception.state
        assert pending is not None  # noqa: S101
        self._pending_usage = pending._replace(make_target=None)
        self._services.telemetry.add_pending(self.span, -1)
        response = state.response
        latest = response.merged_with(result.response) if result.response is not None else response
        is_known = result.usage is not None
        self._write(
            # A call that was answered while its work went on in the background ends as that work did.
            ending_of(latest, "completed") if state.source is UsageSource.RESPONSE else pending.ending,
            pending.end_ns,
            latest,
            usage=result.usage,
            source=source if is_known else None,
            reason=None if is_known else _missing_reason(result.reason or MissingReason.NO_USAGE, response),
            retrieval=None
            if pending.has_no_target
            else Retrieval(job.attempts, self._seconds_since(pending.end_ns)),
        )

    def _write(
        self,
        ending: Ending,
        end_ns: int,
        response: Response,
        *,
        usage: Usage | None = None,
        source: UsageSource | None = None,
        reason: MissingReason | None = None,
        retrieval: Retrieval | None = None,
    ) -> None:
        state = self._reception.state
        first, start = state.first_delta_at, self._start_ns - self._wall_clock_offset_ns  # by the same clock
        self._services.telemetry.finish(
            self.span,
            Record(
                request=self._request,
                start_ns=self._start_ns,
                end_ns=end_ns,
                ending=ending,
                response=response,
                events=state.events,
                deltas=state.deltas,
                time_to_first_chunk_s=None if first is None else (first - start) / 1e9,
                gaps_s=state.gaps_s,
                usage=usage,
                source=source,
                missing_reason=reason,
                retrieval=retrieval,
            ),
        )


def _missing_reason(reason: MissingReason, response: Response) -> MissingReason:
    """Return the missing reason. A terminal response with null usage is always ``no_usage``."""
    return MissingReason.NO_USAGE if response.is_terminal else reason


def _ending_of_error(error: BaseException) -> Ending:
    name = type(error).__name__
    if not isinstance(error, Exception):
        return Ending(Outcome.CANCELLED, name)
    # Of the API's error body, where the SDK found one; what an application raises may have any `code`.
    is_of_api = any(cls.__name__ == "APIError" for cls in type(error).__mro__)
    code = error_code({"code": getattr(error, "code", None)}) if is_of_api else None
    return Ending(Outcome.ERROR, code or name)

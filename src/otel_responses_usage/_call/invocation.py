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


class _Unsettled(NamedTuple):
    """State kept for an ended call until its usage is known."""

    ending: Ending
    end_ns: int
    # Holds the credentials. Released as soon as it has been used or will not be.
    make_target: MakeTarget | None
    cannot_ask: bool = False


class Invocation:
    """The life of one call: it begins, ends once, and is settled once.

    What happens to the call is reported here by the surface that sees it first. Every way of ending leads
    to `finish`, which acts once. If the usage is known then, the span ends at once. Otherwise the call is
    handed to a look-up, and the span ends with the same end time when the look-up has a result. No method
    raises, and none waits.
    """

    __slots__ = (
        "__weakref__",
        "_answered",
        "_ended",
        "_make_target",
        "_open",
        "_reception",
        "_request",
        "_services",
        "_start_ns",
        "_tail_of",
        "_to_wall_clock_ns",
        "_unsettled",
        "span",
        "watch",
    )

    def __init__(self, request: ResponsesRequest, span: Span, start_ns: int, services: Services) -> None:
        self._request = request
        self.span = span
        self._start_ns = start_ns
        self._to_wall_clock_ns = time.time_ns() - time.perf_counter_ns()
        self._services = services
        self._reception = Reception()
        self._make_target: MakeTarget | None = None
        self._answered = False
        self._open: list[None] = [None]
        self._ended = False
        self._tail_of: list[int] | None = None  # the end time of a call whose stream is still being read
        self._unsettled: _Unsettled | None = None
        self.watch: object = None  # kept alive for the surface that watches the answer

    @property
    def ended(self) -> bool:
        """Whether the call is over; its span may still be open until its usage is known."""
        return self._ended

    @property
    def passes(self) -> Callable[[bytes], bool]:
        """A fast path for most pieces of the answer: see `Reception.passes`."""
        return self._reception.passes

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
            How many bytes of it were read, 0 for all. The others are held until `on_held`.

        """
        if self._ended:
            return 0
        reception = self._reception
        taken = reception.read(piece)
        ending = reception.state.ending
        if ending is not None:
            self.finish(ending)
        return taken

    def on_held(self) -> None:
        """Read what is held of the last piece: the application asks for it now, or never will."""
        while not self._ended and (held := self._reception.take_held()):
            self.on_piece(held)

    @_fault.contained("reading an answer")
    def on_document(self, content: bytes) -> None:
        """Read a body that has arrived whole. The call ends when the SDK has made its object of it."""
        self.on_piece(content)
        self.on_held()
        self._reception.finish_document()
        self._answered = True

    @_fault.contained("ending a call")
    def on_return(self) -> None:
        """Note that the SDK has given the application its object."""
        if self._answered:
            self.on_body_end()
        elif self._make_target is None:
            self.finish(CLOSED)  # a client that reads answers in its own way: nothing more can be seen

    @_fault.contained("ending a call")
    def on_raise(self, error: BaseException) -> None:
        """Note that the call raised before the application had a stream."""
        self.finish(_ending_of_error(error))

    @_fault.contained("ending a call")
    def on_body_end(self) -> None:
        """Note that the body ended cleanly."""
        if self._ended:
            return
        reception = self._reception
        reception.finish_document()
        self.finish(reception.ending or reception.stream_error or TRUNCATED)

    @_fault.contained("ending a call")
    def on_read_error(self, error: BaseException, *, closed: bool) -> None:
        """Note that reading raised; `closed` says that the application closed the stream meanwhile."""
        if self._reception.is_done:
            self.on_body_end()  # only the connection is still being read, so that it can be used again
        elif not isinstance(error, Exception):
            self.finish(Ending(Outcome.CANCELLED, type(error).__name__))
        else:
            ending = CLOSED if closed else Ending(Outcome.CUT, type(error).__name__)
            self.finish(self._reception.stream_error or ending)

    @_fault.contained("ending a call")
    def on_close(self, raised: BaseException | None, *, can_read_on: bool) -> float:
        """Note that the stream was closed.

        Args:
            raised: Why it was closed, if not because the application wanted it: what the SDK raised on an
                event, the cancellation of the reading task, or `GeneratorExit` where nobody reads on.
            can_read_on: Whether the stream can be read further.

        Returns:
            For how many seconds it is to be read on, with `on_tail` and `on_tail_end`; mostly 0.

        """
        if self._ended:
            return 0.0
        reception, config = self._reception, self._services.config
        if isinstance(raised, GeneratorExit):
            self.finish(reception.stream_error or ABANDONED)
        elif raised is not None:
            self.finish(reception.stream_error or _ending_of_error(raised))
        elif reception.is_done:
            self.on_body_end()
        elif reception.stream_error is None and can_read_on and self.wants_tail:
            end_ns = self._end()
            if end_ns is not None:
                reception.begin_tail()
                self._tail_of = [end_ns]
                # The reader of the tail may end with the application's event loop, without a word.
                self._services.recovery.run_after(config.tail_timeout + _TAIL_GRACE_S, self.on_tail_end)
                return config.tail_timeout
        else:
            self.finish(reception.stream_error or CLOSED)
        return 0.0

    @_fault.contained("looking at what had arrived")
    def on_unread(self, pieces: Sequence[bytes]) -> None:
        """Read what had arrived when the stream was closed. It counts only if it ends the call.

        Otherwise it was not for the application, and may be read as a tail.
        """
        if self._reception.would_end(pieces):
            for piece in pieces:
                self.on_piece(piece)
                self.on_held()

    def on_tail(self, piece: bytes) -> bool:
        """Read bytes that came after the call had ended; return whether nothing more is needed."""
        return self._reception.read_tail(piece)

    @_fault.contained("ending a call")
    def on_tail_end(self) -> None:
        """Note that the stream is not read any further."""
        if self._tail_of is None:
            return
        try:
            end_ns = self._tail_of.pop()  # atomic: of two threads one finds it empty
        except IndexError:
            return
        self._reception.state.source = UsageSource.TAIL
        self._settle(CLOSED, end_ns)

    @property
    def wants_tail(self) -> bool:
        """Whether the stream is to be read on when the application closes it."""
        # A background response continues without its stream, and its look-up is exact. A fetch has no usage.
        request = self._request
        is_useful = request.streams and not request.background and request.operation is Operation.CHAT
        return self._services.config.tail_timeout > 0 and is_useful

    def on_lost(self, _: object = None) -> None:
        """Note that the garbage collector has found the answer. Another thread does the rest.

        The garbage collector may run at any point, also while this thread holds a lock that `span.end()`
        needs.
        """
        end_ns = self._end()
        if end_ns is not None:
            self._services.recovery.run_later(partial(self._settle_lost, end_ns))

    @_fault.contained("ending a call")
    def finish(self, ending: Ending) -> None:
        """End the call now, if it has not ended yet."""
        end_ns = self._end()
        if end_ns is not None:
            self._settle(ending, end_ns)

    def abort(self) -> None:
        """End the call because the process or the instrumentation ends."""
        self.on_held()
        self.finish(EXIT)
        self.on_tail_end()

    def discard(self) -> None:
        """Drop the call: the parent process ends it."""
        self._end()

    def _end(self) -> int | None:
        """Return when the call ended, in nanoseconds of the wall clock; `None` if it had ended before."""
        try:
            self._open.pop()  # atomic: of two threads one finds it empty
        except IndexError:
            return None
        self._ended = True
        self._reception.stop()
        return self._now_ns()

    def _now_ns(self) -> int:
        return time.perf_counter_ns() + self._to_wall_clock_ns

    def _seconds_since(self, end_ns: int) -> float:
        return (self._now_ns() - end_ns) / 1e9

    def _settle(self, ending: Ending, end_ns: int) -> None:
        """Write the ended call, or hand it to a look-up, after which it is written."""
        services, reception = self._services, self._reception
        services.on_end(self)
        reception.give_up()
        response = reception.state.response
        if self._request.operation is Operation.FETCH_RESPONSE:
            services.recovery.observe(self._request.server, response)
            self._write(ending, end_ns, response)
        elif response.usage is not None:
            self._write(ending, end_ns, response, usage=response.usage, source=reception.state.source)
        else:
            reason = self._why_not() or self._look_up(ending, end_ns)
            if reason is not None:
                self._write(ending, end_ns, response, reason=_final(reason, response))
        self._make_target = None  # it holds the credentials

    @_fault.contained("ending a call")
    def _settle_lost(self, end_ns: int) -> None:
        reception = self._reception
        if held := reception.take_held():
            reception.read_tail(held)
        self._settle(reception.ending or reception.stream_error or ABANDONED, end_ns)

    def _why_not(self) -> MissingReason | None:
        """Return the reason why the usage of this call cannot be looked up; `None` if it can be."""
        if self._reception.state.response.id is None or self._make_target is None:
            return MissingReason.NO_RESPONSE_ID
        if not self._request.stored:
            return MissingReason.NOT_STORED
        return None if self._services.config.retrieval else MissingReason.DISABLED

    def _look_up(self, ending: Ending, end_ns: int) -> MissingReason | None:
        """Hand the call to a look-up, or return the reason why none is made."""
        config, request = self._services.config, self._request
        patience_s = config.background_timeout if request.background else config.retrieval_timeout
        self._unsettled = _Unsettled(ending, end_ns, self._make_target)
        response_id = str(self._reception.state.response.id)
        refusal = self._services.recovery.submit(Job(request.server, response_id, patience_s, self))
        if refusal is not None:
            self._unsettled = None
        return refusal

    def on_accept(self) -> None:
        """Note that the look-up has been accepted: the span stays open until its result."""
        self._services.telemetry.add_pending(self.span, 1)

    def on_begin(self, job: Job) -> LookupRequest | MissingReason:
        """Return what the look-up asks for, or the reason why it cannot ask."""
        unsettled, server = self._unsettled, self._request.server
        if unsettled is None or unsettled.make_target is None:  # it has been settled
            return MissingReason.SHUTDOWN
        target: LookupTarget | MissingReason = MissingReason.TRANSPORT_ERROR
        try:
            target = unsettled.make_target(job.response_id)
        except Exception:
            _fault.report("preparing a look-up")
        cannot_ask = isinstance(target, MissingReason)
        self._unsettled = unsettled._replace(make_target=None, cannot_ask=cannot_ask)
        if isinstance(target, MissingReason):
            return target
        endpoint = Endpoint(server.address or "", server.port, self._request.background, target.tenant)
        return LookupRequest(endpoint, target)

    def on_result(self, job: Job, result: LookupResult, source: UsageSource) -> None:
        """Write the call with the result of its look-up, and end its span."""
        unsettled, state = self._unsettled, self._reception.state
        assert unsettled is not None  # noqa: S101
        self._unsettled = unsettled._replace(make_target=None)
        self._services.telemetry.add_pending(self.span, -1)
        response = state.response
        latest = response.updated(result.response) if result.response is not None else response
        known = result.usage is not None
        self._write(
            # A call that was answered while its work went on in the background ends as that work did.
            ending_of(latest, "completed") if state.source is UsageSource.RESPONSE else unsettled.ending,
            unsettled.end_ns,
            latest,
            usage=result.usage,
            source=source if known else None,
            reason=None if known else _final(result.reason or MissingReason.NO_USAGE, response),
            retrieval=None
            if unsettled.cannot_ask
            else Retrieval(job.attempts, self._seconds_since(unsettled.end_ns)),
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
        first, start = state.first_delta_at, self._start_ns - self._to_wall_clock_ns  # by the same clock
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


def _final(reason: MissingReason, response: Response) -> MissingReason:
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

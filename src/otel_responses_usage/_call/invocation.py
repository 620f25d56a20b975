"""One call, from its request to the end of its span."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, NamedTuple

from opentelemetry.trace import Span

from .. import _fault
from .._answer.body import BodyReader, DocumentReader, body_reader
from .._answer.state import AnswerState
from .._config import Config
from .._facts.outcome import ABANDONED, CLOSED, EXIT, TRUNCATED, Ending, Outcome, ending_of
from .._facts.request import Operation, ResponsesRequest
from .._facts.response import Response, error_code
from .._facts.usage import MissingReason, Usage, UsageSource
from .._lookup.job import Aim, Job, Place, Retrieved, Target
from .._lookup.recovery import Recovery
from .._telemetry.telemetry import Record, Retrieval, Telemetry

# A tail that is over by itself has ended by then.
_TAIL_GRACE_S: Final = 1.0


class _Wait(NamedTuple):
    """What a call that has ended waits with for its usage."""

    ending: Ending
    end_ns: int
    # It holds the request with its prompt, and is let go when it has been used or will not be.
    make_target: Callable[[str], Target | MissingReason] | None
    cannot_ask: bool = False


class Invocation:
    """A call under way: what happens to it is reported here, by whoever sees it first.

    Every way of ending leads to `finish`, which acts once. Either the usage is known then and the span
    ends at once, or the call is handed to the look-up and the span ends, with the same end time, when
    that has settled. No method raises, and none waits.
    """

    __slots__ = (
        "__weakref__",
        "_answered",
        "_config",
        "_ended",
        "_held",
        "_make_target",
        "_on_finish",
        "_open",
        "_reader",
        "_reads",
        "_recovery",
        "_request",
        "_start_ns",
        "_state",
        "_tail_of",
        "_telemetry",
        "_to_wall_clock_ns",
        "_wait",
        "passes",
        "span",
        "watch",
    )

    def __init__(
        self,
        request: ResponsesRequest,
        span: Span,
        start_ns: int,
        config: Config,
        telemetry: Telemetry,
        recovery: Recovery,
        on_finish: Callable[[Invocation], object],
    ) -> None:
        self._request = request
        self.span = span
        self._start_ns = start_ns
        self._to_wall_clock_ns = time.time_ns() - time.perf_counter_ns()
        self._config = config
        self._telemetry = telemetry
        self._recovery = recovery
        self._on_finish = on_finish
        self._state = AnswerState()
        self._reader: BodyReader | None = None  # known from the first piece on
        self._reads = True
        self._held = b""  # has arrived, but its reader has not asked for it
        self._make_target: Callable[[str], Target | MissingReason] | None = None
        self._answered = False
        self._open: list[None] = [None]
        self._ended = False
        self._tail_of: list[int] | None = None  # the end of a call whose stream is being read on
        self._wait: _Wait | None = None
        # A quick way for most pieces of the answer: whether it has taken one, or `on_bytes` has to.
        self.passes: Callable[[bytes], bool] = sees_nothing
        self.watch: object = None  # kept for whoever watches over the answer on the call's behalf

    @property
    def ended(self) -> bool:
        """Whether the call is over; its span may still be waiting for its usage."""
        return self._ended

    def on_answer(self, make_target: Callable[[str], Target | MissingReason]) -> bool:
        """Note that there is an answer; `make_target` says where its response can be looked up.

        Returns:
            Whether the answer is to be watched: it is not, if somebody does already.

        """
        if self._make_target is not None:
            return False
        self._make_target = make_target
        return True

    def on_bytes(self, piece: bytes) -> int:
        """Take the next bytes of the answer, and say how many of them, 0 for all.

        The terminal event ends the call, whatever follows. What was not taken is held until the reader asks
        for it, or nobody will: see `on_held` and `EventReader.feed`.
        """
        if self._ended or not self._reads:
            return 0
        try:
            if self._reader is None:
                self._reader = body_reader(piece, self._state)
                self.passes = self._reader.repeats
            taken = self._reader.feed(piece)
        except Exception:
            _fault.report("reading a stream")
            self.passes = sees_nothing
            self._reads = False  # what the stream would have told is looked up
            return 0
        self._held = piece[taken:] if taken else b""
        ending = self._state.ending
        if ending is not None:
            self.finish(ending)
        return taken

    def on_held(self) -> None:
        """Take what was held of a piece: its reader asks for it, or never will."""
        while self._held and not self._ended:
            held, self._held = self._held, b""
            self.on_bytes(held)

    @_fault.contained("reading an answer")
    def on_document(self, content: bytes) -> None:
        """Take a body that has been read whole. The call ends when the SDK has made its object of it."""
        self.on_bytes(content)
        self.on_held()
        self._read_document()
        self._answered = True

    @_fault.contained("ending a call")
    def on_return(self) -> None:
        """Note that the SDK has given the application its object."""
        if self._answered:
            self.on_body_end()
        elif self._make_target is None:
            self.finish(CLOSED)  # by a client that reads answers in a way of its own: there is no more to see

    @_fault.contained("ending a call")
    def on_raise(self, error: BaseException) -> None:
        """Note that the call raised before the application had a stream."""
        self.finish(_ending_of_error(error))

    @_fault.contained("ending a call")
    def on_body_end(self) -> None:
        """Note that the body ended cleanly."""
        if self._ended:
            return
        self._read_document()
        self.finish(self._state.ending or self._stream_error() or TRUNCATED)

    @_fault.contained("ending a call")
    def on_read_error(self, error: BaseException, *, closed: bool) -> None:
        """Note that reading raised; `closed` says that the application closed the stream meanwhile."""
        if self._reader is not None and self._reader.done:
            self.on_body_end()  # whoever reads on does it for the connection's sake, and not for long
        elif not isinstance(error, Exception):
            self.finish(Ending(Outcome.CANCELLED, type(error).__name__))
        else:
            self.finish(
                self._stream_error() or (CLOSED if closed else Ending(Outcome.CUT, type(error).__name__))
            )

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
        if isinstance(raised, GeneratorExit):
            self.finish(self._stream_error() or ABANDONED)
        elif raised is not None:
            self.finish(self._stream_error() or _ending_of_error(raised))
        elif self._reader is not None and self._reader.done:
            self.on_body_end()
        elif self._stream_error() is None and can_read_on and self.wants_tail:
            end_ns = self._end()
            if end_ns is not None:
                self._state.freeze()
                self._tail_of = [end_ns]
                # Whoever reads on may die with the application's event loop.
                self._recovery.run_after(self._config.tail_timeout + _TAIL_GRACE_S, self.on_tail_end)
                return self._config.tail_timeout
        else:
            self.finish(self._stream_error() or CLOSED)
        return 0.0

    @_fault.contained("looking at what had arrived")
    def on_unread(self, pieces: Sequence[bytes]) -> None:
        """Take what had arrived when the stream was closed: it counts only if it ends the call."""
        if not pieces:
            return
        # Copies try it first. What does not end the call was not for the application, and may be read on.
        reader, state = copy.deepcopy((self._reader, self._state))
        if _ends(reader or body_reader(pieces[0], state), state, pieces):
            for piece in pieces:
                self.on_bytes(piece)
                self.on_held()

    def on_tail(self, piece: bytes) -> bool:
        """Take bytes that were read after the call had ended; say whether they suffice."""
        try:
            if self._reader is None:
                self._reader = body_reader(piece, self._state)
            return _ends(self._reader, self._state, (piece,))
        except Exception:
            _fault.report("reading on")
            return True

    @_fault.contained("ending a call")
    def on_tail_end(self) -> None:
        """Note that the stream is not read on any more."""
        if self._tail_of is None:
            return
        try:
            end_ns = self._tail_of.pop()
        except IndexError:
            return
        self._state.source = UsageSource.TAIL
        self._settle(CLOSED, end_ns)

    @property
    def wants_tail(self) -> bool:
        """Whether the stream is to be read on when the application closes it."""
        # A background response goes on without its stream, and is looked up for nothing; a fetch has no
        # usage.
        request = self._request
        is_worth_it = request.streams and not request.background and request.operation is Operation.CHAT
        return self._config.tail_timeout > 0 and is_worth_it

    def on_lost(self, _: object = None) -> None:
        """Note that the garbage collector has found the answer. The rest is done on another thread.

        A collector may interrupt anything, also somebody who holds a lock that ending a span takes.
        """
        end_ns = self._end()
        if end_ns is not None:
            self._recovery.run_later(partial(self._settle_lost, end_ns))

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

    def disown(self) -> None:
        """Forget the call: it is another process's to end."""
        self._end()

    def _end(self) -> int | None:
        """Return when the call ended, in nanoseconds of the wall clock; `None` if it had ended before."""
        try:
            self._open.pop()  # atomic: of two threads one finds it empty
        except IndexError:
            return None
        self._ended = True
        self.passes = sees_nothing
        return self._now_ns()

    def _now_ns(self) -> int:
        return time.perf_counter_ns() + self._to_wall_clock_ns

    def _seconds_since(self, end_ns: int) -> float:
        return (self._now_ns() - end_ns) / 1e9

    def _settle(self, ending: Ending, end_ns: int) -> None:
        self._on_finish(self)
        if isinstance(self._reader, DocumentReader):
            self._reader.give_up()
        self._close_books(ending, end_ns)
        # They hold the request with its prompt, and a call may wait long for its usage.
        self._make_target = self._reader = None
        self._held = b""

    @_fault.contained("ending a call")
    def _settle_lost(self, end_ns: int) -> None:
        if self._held:
            self.on_tail(self._held)
        self._settle(self._state.ending or self._stream_error() or ABANDONED, end_ns)

    def _close_books(self, ending: Ending, end_ns: int) -> None:
        response = self._state.response
        if self._request.operation is Operation.FETCH_RESPONSE:
            self._recovery.observe(self._request.server, response)
            self._write(ending, end_ns, response, None, None, None, None)
        elif response.usage is not None:
            self._write(ending, end_ns, response, response.usage, self._state.source, None, None)
        else:
            reason = self._why_not() or self._look_up(ending, end_ns, response)
            if reason is not None:
                final = self._final(reason, response)
                write = partial(self._write, ending, end_ns, response, None, None, final, None)
                if reason is MissingReason.OVERLOAD:  # very many calls are at their end
                    self._recovery.run_soon(write)
                else:
                    write()

    def _why_not(self) -> MissingReason | None:
        if self._state.response.id is None:
            return MissingReason.NO_RESPONSE_ID
        if not self._request.stored:
            return MissingReason.NOT_STORED
        return None if self._config.retrieval else MissingReason.DISABLED

    def _look_up(self, ending: Ending, end_ns: int, response: Response) -> MissingReason | None:
        if self._make_target is None:  # there was no answer
            return MissingReason.NO_RESPONSE_ID
        config = self._config
        patience_s = config.background_timeout if self._request.background else config.retrieval_timeout
        self._wait = _Wait(ending, end_ns, self._make_target)
        deadline = time.monotonic() + patience_s - self._seconds_since(end_ns)
        refused = self._recovery.submit(Job(self._request.server, str(response.id), deadline, self))
        if refused is not None:
            self._wait = None
        return refused

    def on_begin(self, job: Job) -> Aim | MissingReason:
        """Note that the worker takes up the look-up, and say where the response is asked for, and how."""
        wait, server = self._wait, self._request.server
        if wait is None or wait.make_target is None:  # it has been settled
            return MissingReason.SHUTDOWN
        self._telemetry.hold(self.span)
        job.held.append(None)
        if not job.is_open:  # it was settled meanwhile, perhaps before the span was held
            self._release(job)
        target: Target | MissingReason = MissingReason.TRANSPORT_ERROR
        try:
            target = wait.make_target(job.response_id)
        except Exception:
            _fault.report("preparing a look-up")
        if isinstance(target, MissingReason):
            self._wait = wait._replace(make_target=None, cannot_ask=True)
            return target
        self._wait = wait._replace(make_target=None)
        place = Place(server.address or "", server.port, self._request.background, target.tenant)
        return Aim(place, target)

    def on_result(self, job: Job, result: Retrieved, source: UsageSource) -> None:
        """Take what has come of the look-up."""
        wait, response = self._wait, self._state.response
        assert wait is not None  # noqa: S101
        self._wait = wait._replace(make_target=None)
        self._release(job)
        latest = response.updated(result.response) if result.response is not None else response
        known = result.usage is not None
        self._write(
            # A call that was answered while its work went on ends as that work did.
            ending_of(latest, "completed") if self._state.source is UsageSource.RESPONSE else wait.ending,
            wait.end_ns,
            latest,
            result.usage,
            source if known else None,
            None if known else self._final(result.reason or MissingReason.NO_USAGE, response),
            None if wait.cannot_ask else Retrieval(job.attempts, self._seconds_since(wait.end_ns)),
        )

    def _release(self, job: Job) -> None:
        try:
            job.held.pop()  # atomic: of two threads one finds it empty
        except IndexError:
            return
        self._telemetry.release(self.span)

    def _final(self, reason: MissingReason, response: Response) -> MissingReason:
        """Return the reason to tell: a response that ended without usage said so itself."""
        return MissingReason.NO_USAGE if response.is_terminal else reason

    def _write(
        self,
        ending: Ending,
        end_ns: int,
        response: Response,
        usage: Usage | None,
        source: UsageSource | None,
        reason: MissingReason | None,
        retrieval: Retrieval | None,
    ) -> None:
        state = self._state
        first, start = state.first_delta_at, self._start_ns - self._to_wall_clock_ns  # by the same clock
        self._telemetry.finish(
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

    def _read_document(self) -> None:
        if isinstance(self._reader, DocumentReader):
            self._reader.finish()

    def _stream_error(self) -> Ending | None:
        code = self._state.stream_error
        return None if code is None else Ending(Outcome.ERROR, code)


def _ends(reader: BodyReader, state: AnswerState, pieces: Iterable[bytes]) -> bool:
    """Have these pieces read, and say whether they end the response."""
    for piece in pieces:
        taken = reader.feed(piece)
        while taken:
            piece = piece[taken:]
            taken = reader.feed(piece)
    return state.ending is not None


def _ending_of_error(error: BaseException) -> Ending:
    name = type(error).__name__
    if not isinstance(error, Exception):
        return Ending(Outcome.CANCELLED, name)
    # Of the API's error body, where the SDK found one; what an application raises may have any `code`.
    is_of_api = any(cls.__name__ == "APIError" for cls in type(error).__mro__)
    code = error_code({"code": getattr(error, "code", None)}) if is_of_api else None
    return Ending(Outcome.ERROR, code or name)


def sees_nothing(_: bytes) -> bool:
    """Take no piece at all: the quick way where there is none."""
    return False

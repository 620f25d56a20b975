"""An ended call: recorded at once if its usage is known, and otherwise after a look-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from opentelemetry.trace import NonRecordingSpan

from .. import _fault
from .._answer.state import AnswerState
from .._facts.outcome import Ending, Outcome, ending_of
from .._facts.request import Operation, ResponsesRequest
from .._facts.response import Response
from .._facts.usage import MissingReason, Usage, UsageSource
from .._lookup.job import Endpoint, Job, LookupRequest, LookupResult, LookupTarget
from .._story import Story
from .._telemetry.neighbour import CallSpan
from .._telemetry.record import Record, Retrieval
from .._telemetry.uncounted import UncountedCall
from .input_count import InputCount
from .services import Services

if TYPE_CHECKING:
    from .delivery import CallRecords

# The usage was in the answer itself.
_ANSWER_SOURCES: Final = frozenset({UsageSource.STREAM, UsageSource.RESPONSE})

MakeTarget = Callable[[str], "LookupTarget | MissingReason"]


class EndedCall(NamedTuple):
    """What is known of a call when it ends. Times in nanoseconds are of the wall clock.

    Attributes:
        request: Its parameters.
        call_span: Its span.
        start_ns: When it began.
        end_ns: When it ended.
        wall_clock_offset_ns: The wall clock's time less that of `time.perf_counter_ns`.
        ending: How it ended.
        state: The facts of its answer.
        request_id: The server's id of the HTTP request.
        resend_count: How often the SDK sent the request again.
        has_left: Whether the application stopped to read before the end of the answer.
        content: The body of its request, if input tokens are to be counted.
        story: Logs its steps; `None` if that is off.

    """

    request: ResponsesRequest
    call_span: CallSpan
    start_ns: int
    end_ns: int
    wall_clock_offset_ns: int
    ending: Ending
    state: AnswerState
    request_id: str | None
    resend_count: int
    has_left: bool
    content: bytes | None = None
    story: Story | None = None


class Settlement:
    """Records one ended call, once, with its usage or the reason why it is unknown.

    If the usage is known, the span ends at once. Otherwise a look-up starts. The span then ends after the
    look-up, with the end time of the call.
    """

    __slots__ = ("_call", "_has_no_target", "_make_count_target", "_make_target", "_services")

    def __init__(self, call: EndedCall, make_target: MakeTarget | None, services: Services) -> None:
        """Record nothing yet.

        Args:
            call: The call.
            make_target: Returns the target for a look-up. `None` if there was no answer. It holds the
                credentials, and is released after its last use.
            services: What records the call and looks up its usage.

        """
        self._call = call
        self._make_target = make_target
        self._make_count_target = make_target if call.content is not None else None
        self._has_no_target = False
        self._services = services

    def settle(self, *, is_cut_off: bool) -> None:
        """Record the call, or start a look-up that leads to its record.

        Args:
            is_cut_off: Whether its tail was cut off because the process or the instrumentation ends.

        """
        request, response = self._call.request, self._call.state.response
        if request.is_fetch:
            # The answer may show the response under another id.
            self._services.observation.observe(request.server, response._replace(id=request.response_id))
            self._write(response)
        elif response.usage is not None:
            self._write(response, usage=response.usage, source=self._call.state.source)
        else:
            reason = self._reason_for_no_look_up() or self._look_up()
            if reason is not None:
                self._make_target = None
                final = _missing_reason(MissingReason.SHUTDOWN if is_cut_off else reason, response)
                self._write(response, reason=final, in_turn=reason is MissingReason.OVERLOAD)

    def on_accept(self) -> None:
        """Note that the look-up is accepted: the span stays open until its result."""
        self._services.telemetry.add_pending(self._call.call_span, 1)

    def on_begin(self, job: Job) -> LookupRequest | MissingReason:
        """Return what to look up, or the missing reason if the call has no target."""
        make_target, self._make_target = self._make_target, None
        if make_target is None:  # the call has its result already
            return MissingReason.SHUTDOWN
        target: LookupTarget | MissingReason = MissingReason.TRANSPORT_ERROR
        try:
            target = make_target(job.response_id)
        except Exception:
            _fault.report("preparing a look-up")
        if isinstance(target, MissingReason):
            self._has_no_target = True
            return target
        server = self._call.request.server
        endpoint = Endpoint(server.address or "", server.port, self._is_background, target.tenant)
        return LookupRequest(endpoint, target)

    def leave_to_parent(self) -> Callable[[], object]:
        """Return a function that counts the span as pending no more: the parent process ends it."""
        return partial(self._services.telemetry.add_pending, self._call.call_span, -1)

    def on_result(self, job: Job, result: LookupResult, source: UsageSource) -> None:
        """Record the call with the result of its look-up, and end its span."""
        self._make_target = None
        call, response = self._call, self._call.state.response
        self._services.telemetry.add_pending(call.call_span, -1)
        latest = response.merged_with(result.response) if result.response is not None else response
        is_known = result.usage is not None
        # The final status of a background response decides, not its status when the call returned.
        is_document = call.state.source is UsageSource.RESPONSE
        self._write(
            latest,
            ending=ending_of(latest, "completed") if is_document else call.ending,
            usage=result.usage,
            source=source if is_known else None,
            reason=None if is_known else _missing_reason(result.reason or MissingReason.NO_USAGE, response),
            retrieval=None if self._has_no_target else Retrieval(job.attempts, self._seconds_since_end()),
            job=job,
        )

    def _reason_for_no_look_up(self) -> MissingReason | None:
        """Return why the usage cannot be looked up, or `None` if it can."""
        call, response = self._call, self._call.state.response
        if response.id is None or self._make_target is None:
            return MissingReason.NO_RESPONSE_ID
        if call.request.operation is Operation.COMPACT:  # its result is not stored as a response
            is_complete = call.ending.outcome is Outcome.COMPLETED
            return MissingReason.NO_USAGE if is_complete else MissingReason.NOT_STORED
        # A background response is stored for some ten minutes in any case.
        if (response.is_not_stored or not call.request.stored) and not self._is_background:
            return MissingReason.NOT_STORED
        if self._is_background and call.request.completion_window and not response.is_terminal:
            return MissingReason.DEFERRED  # it may take hours
        return None if self._services.config.retrieval else MissingReason.DISABLED

    @property
    def _is_background(self) -> bool:
        """Whether the response runs in the background: by the request or by its own account."""
        return self._call.request.background or self._call.state.response.is_background

    def _look_up(self) -> MissingReason | None:
        """Start a look-up. Returns the missing reason if none can be started."""
        settings, response = self._services.config, self._call.state.response
        # A final response with null usage rarely gets one later. Only a cancelled one may be charged later.
        asks_once = response.is_terminal and response.status != "cancelled"
        job = Job(
            self._call.request.server,
            str(response.id),
            settings.background_timeout if self._is_background else settings.retrieval_timeout,
            self,
            is_background=self._is_background,
            asks_once=asks_once,
            story=self._call.story,
        )
        return self._services.recovery.submit(job)

    def _seconds_since_end(self) -> float:
        now_ns = time.perf_counter_ns() + self._call.wall_clock_offset_ns
        return (now_ns - self._call.end_ns) / 1e9

    def _write(
        self,
        response: Response,
        *,
        ending: Ending | None = None,
        usage: Usage | None = None,
        source: UsageSource | None = None,
        reason: MissingReason | None = None,
        retrieval: Retrieval | None = None,
        job: Job | None = None,
        in_turn: bool = False,
    ) -> None:
        call, state = self._call, self._call.state
        first = state.first_delta_at
        start = call.start_ns - call.wall_clock_offset_ns  # by perf_counter, like `first`
        record = Record(
            request=call.request,
            start_ns=call.start_ns,
            end_ns=call.end_ns,
            ending=ending or call.ending,
            response=response,
            events=state.events,
            deltas=state.deltas,
            time_to_first_chunk_s=None if first is None else (first - start) / 1e9,
            gaps_s=state.gaps_s,
            usage=usage,
            source=source,
            missing_reason=reason,
            retrieval=retrieval,
            request_id=call.request_id,
            resend_count=call.resend_count,
            is_received=source in _ANSWER_SOURCES and not call.has_left,
        )
        if reason is None or not self._count_input(record, reason, job):
            self._tell(record, job, in_turn=in_turn)

    def _count_input(self, record: Record, reason: MissingReason, job: Job | None) -> bool:
        """Ask for the input tokens of the call, and record it after that; return whether that is done."""
        make_target, self._make_count_target = self._make_count_target, None
        call = self._call
        if make_target is None or call.content is None or record.is_refused:
            return False

        def on_end(count_job: Job, result: LookupResult, source: UsageSource) -> None:
            if result.usage is None or result.response is None:
                self._tell(record._replace(input_count=result.input_tokens), job, count_job)
                return
            response = record.response.merged_with(result.response)
            known = record._replace(response=response, usage=result.usage, source=source, missing_reason=None)
            self._tell(known)

        server, services = call.request.server, self._services
        count = InputCount(server, call.content, make_target, call.call_span, services, on_end)
        return count.begin(record.response.id, reason)

    def _tell(self, record: Record, *jobs: Job | None, in_turn: bool = False) -> None:
        """Write the span and the metrics, tell the application, and keep the call if it has no usage.

        With `in_turn` all but the last may have to wait for their turn. The application may fetch the
        response before that.
        """
        call, delivery, records = self._call, self._services.delivery, None
        if call.story is not None:
            model, reason = record.response.model or call.request.model, record.missing_reason
            call.story.tell(
                "settled", response=record.response.id, model=model, source=record.source, reason=reason
            )
        if delivery is not None and not call.request.is_fetch:
            records = delivery.records_of(call.call_span, record)

        def finish() -> None:
            try:
                self._services.telemetry.finish(call.call_span, record)
            finally:  # also if a signal handler raises here
                if records is not None:
                    records.put_first()

        if not in_turn:
            finish()
        if record.missing_reason is not None and record.response.id is not None:
            self._keep(record.response, record.missing_reason, jobs, records)
        if in_turn:
            self._services.recovery.run_in_turn(finish)

    def _keep(
        self,
        response: Response,
        reason: MissingReason,
        jobs: Sequence[Job | None],
        records: CallRecords | None,
    ) -> None:
        """Have the call counted if the application itself is shown its usage later."""
        request = self._call.request
        if request.operation is not Operation.CHAT:
            return
        call = UncountedCall(
            request.operation,
            request.server,
            request.model,
            request.completion_window,
            reason,
            NonRecordingSpan(self._call.call_span.span.get_span_context()),
            self._call.call_span.baggage.on_points,
            tools=response.tools,
        )
        self._services.observation.keep(str(response.id), call, *jobs, records=records)


def _missing_reason(reason: MissingReason, response: Response) -> MissingReason:
    """Return the missing reason. A terminal response with null usage is always `no_usage`."""
    return MissingReason.NO_USAGE if response.is_terminal else reason

"""Writes all spans and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode

from .. import _fault
from .._callback import result_of
from .._facts.headers import RateLimit
from .._facts.outcome import Outcome
from .._facts.request import ResponsesRequest
from .._facts.response import Response
from . import semconv as names
from .attributes import (
    common_attributes,
    end_attributes,
    own_attributes,
    start_attributes,
    usage_span_attributes,
    without_none,
)
from .baggage import NO_BAGGAGE, BaggageReader
from .instruments import GenAIInstruments, Origin, OwnInstruments
from .neighbour import CallSpan, Neighbour
from .record import Record
from .uncounted import UncountedCall

if TYPE_CHECKING:
    from .._call_record import CallRecord


class Telemetry:
    """Starts and ends the spans, and records the metric points."""

    def __init__(
        self,
        tracer: trace.Tracer,
        meter: metrics.Meter,
        generations: Sequence[names.Generation] = (names.CURRENT,),
        baggage_keys: Sequence[str] = (),
        response_hook: Callable[[Span, CallRecord], object] | None = None,
    ) -> None:
        self._tracer = tracer
        self._reads_baggage = bool(baggage_keys)
        self._baggage = BaggageReader(baggage_keys)
        self._tell_hook = None if response_hook is None else _with_record(response_hook)
        self._has_sdk = False
        self._instruments = [
            GenAIInstruments(meter, generation, has_fetches=generation is generations[0])
            for generation in generations
        ]
        self._own_instruments = OwnInstruments(meter)

    def begin_anew(self) -> None:
        """Leave the locks to the parent process. Called in a forked child."""
        self._baggage.begin_anew()

    def start(
        self,
        request: ResponsesRequest,
        start_ns: int,
        neighbour: Neighbour | None,
        *,
        has_span: bool,
        link: SpanContext | None = None,
    ) -> CallSpan:
        """Start the span of a call, as a child of the current span.

        Args:
            request: The parameters of the call.
            start_ns: When the call began, in nanoseconds of the wall clock.
            neighbour: Who else has a span of this call. Then it gets none of ours.
            has_span: Whether it is to have a span of ours otherwise.
            link: The context of the span of a call that led to this one.

        """
        baggage = self._baggage.read() if self._reads_baggage else NO_BAGGAGE
        if neighbour is not None or not has_span:
            parent = neighbour.context if neighbour else trace.get_current_span().get_span_context()
            return CallSpan(NonRecordingSpan(parent), False, neighbour, baggage)
        attributes = start_attributes(request)
        span = self._tracer.start_span(
            request.span_name,
            kind=SpanKind.CLIENT,
            attributes=attributes if baggage is NO_BAGGAGE else {**baggage.on_span, **attributes},
            links=None if link is None else (Link(link),),
            start_time=start_ns,
        )
        return CallSpan(span, True, None, baggage)

    @property
    def has_sdk(self) -> bool:
        """Whether a provider of an OpenTelemetry SDK is set: calls can be recorded.

        Once true, it stays true.
        """
        if self._has_sdk:
            return True
        # Before the application sets a provider, the tracer is a proxy without a real tracer.
        tracer = getattr(self._tracer, "_tracer", self._tracer)
        if isinstance(tracer, trace.NoOpTracer) and not self._own_instruments.are_recorded:
            return False
        self._has_sdk = True
        return True

    def is_recorded(self, call_span: CallSpan) -> bool:
        """Whether anything is recorded of this call: a span, or any metric."""
        span, neighbour = call_span.span, call_span.neighbour
        is_sampled = neighbour.context.trace_flags.sampled if neighbour else span.is_recording()
        return is_sampled or self._own_instruments.are_recorded

    def add_pending(self, call_span: CallSpan, change: int) -> None:
        """Add `change` to the number of calls that wait for their usage."""
        _run_step(self._own_instruments.add_pending, change, _origin_of(call_span))

    def record_rate_limits(
        self, limits: Sequence[RateLimit], request: ResponsesRequest, call_span: CallSpan
    ) -> None:
        """Record the rate limits that the headers of an answer told."""
        _run_step(self._own_instruments.record_rate_limits, limits, request, _origin_of(call_span))

    def count_circuit(self, address: str, port: int | None, change: int) -> None:
        """Add `change` to the number of open circuits: 1 if one opens, -1 if one closes."""
        self._own_instruments.count_circuit(address, port, change)

    def count_on_call_loss(self, loss: str) -> None:
        """Count one record that the application's own function did not take."""
        self._own_instruments.count_on_call_loss(loss)

    def count_fault(self) -> None:
        """Count one error of the instrumentation itself."""
        self._own_instruments.count_fault()

    def finish(self, call_span: CallSpan, record: Record) -> None:
        """Record the metrics of an ended call, and end its span with the end time of the call.

        The metrics come first. An error in one step does not stop the next. So the tokens are recorded
        even if an exporter raises on the span. All steps run in an empty context. In the context of the
        caller instrumentation may be suppressed, and some span processors then drop the span.
        """
        span, neighbour = call_span.span, call_span.neighbour
        token = attach(Context())
        try:
            is_told = neighbour is not None and _is_told(neighbour, record)
            _run_step(self._record_metrics, record, _origin_of(call_span), neighbour, is_told)
            if neighbour is not None:
                _run_step(self._add_to_neighbour, call_span, record, neighbour, is_told)
            elif span.is_recording():
                _run_step(self._set_attributes, span, record)
            if self._tell_hook is not None:
                _run_step(self._tell_hook, call_span, record)
        finally:
            if call_span.is_own:
                _run_step(span.end, record.end_ns)
            detach(token)

    def record_late_usage(self, call: UncountedCall, response: Response) -> None:
        """Record the usage of a call whose span has ended without it.

        Args:
            call: The call.
            response: Its response, with its usage.

        """
        token = attach(Context())
        try:
            origin = Origin(_context_of(call.span), call.labels)
            _run_step(self._record_late_metrics, call, response, origin)
        finally:
            detach(token)

    def _record_late_metrics(self, call: UncountedCall, response: Response, origin: Origin) -> None:
        key = (call.operation, call.server, call.model, response.model)
        attributes = {
            **call.labels,
            **common_attributes(*key, response.service_tier, call.completion_window),
        }
        if response.usage is not None:
            for instruments in self._instruments:
                instruments.record_tokens(response.usage, attributes, origin.context)
        if response.tools is not None:
            tools = response.tools.without(call.tools) if call.tools is not None else response.tools
            self._own_instruments.record_tools(tools, call.server.provider, call.model, origin)
        self._own_instruments.count_late_usage(call, origin)

    def _add_to_neighbour(
        self, call_span: CallSpan, record: Record, neighbour: Neighbour, is_told: bool
    ) -> None:
        """Write what the neighbour does not know: on its span, and in a span of its own below that."""
        if record.is_refused:
            neighbour.release()
        elif not is_told:
            # At the end of the call and without a length: it is a fact about the call and no work of its own.
            usage_span = self._tracer.start_span(
                f"usage {record.request.model}" if record.request.model else "usage",
                context=_context_of(call_span.span),
                attributes={**call_span.baggage.on_span, **without_none(usage_span_attributes(record))},
                start_time=record.end_ns,
            )
            usage_span.end(record.end_ns)
        if neighbour.can_be_added_to:
            neighbour.add(without_none(own_attributes(record)), call_span.baggage.on_span)

    def _set_attributes(self, span: Span, record: Record) -> None:
        span.set_attributes(end_attributes(record))
        if record.ending.is_error:
            span.set_status(Status(StatusCode.ERROR))

    def _record_metrics(
        self, record: Record, origin: Origin, neighbour: Neighbour | None, is_told: bool
    ) -> None:
        request, response, error_type = record.request, record.response, record.ending.error_type
        key, tier = (request.operation, request.server, request.model, response.model), response.service_tier
        context, labels = origin
        common = {**labels, **common_attributes(*key)}
        of_duration = {**labels, **common_attributes(*key, tier)}
        of_tokens = common_attributes(*key, tier, request.completion_window)
        if labels:
            of_tokens = {**labels, **of_tokens}
        if error_type:
            of_duration[names.ERROR_TYPE] = error_type
        for instruments in self._instruments:
            other = neighbour if instruments.is_current else None  # neighbours use the current names
            if other is None or not other.records_times:
                instruments.record_times(record, common, of_duration, context)
            is_left_to_other = other is not None and is_told and other.records_tokens
            if record.usage is not None and not request.is_fetch and not is_left_to_other:
                instruments.record_tokens(record.usage, of_tokens, context)
        self._own_instruments.record(record, origin)
        if response.tools is not None and not request.is_fetch:
            provider = request.server.provider
            self._own_instruments.record_tools(response.tools, provider, request.model, origin)


def _is_told(neighbour: Neighbour, record: Record) -> bool:
    """Whether the neighbour's span has the usage, or will have it."""
    try:
        if record.usage is None:
            return False
        if not record.is_received:
            return neighbour.has_usage
        is_error = record.ending.outcome is Outcome.ERROR
        return neighbour.learn(record.usage, record.response, is_error=is_error)
    except Exception:
        _fault.report("looking at another instrumentation's span")
        return False


def _with_record(hook: Callable[[Span, CallRecord], object]) -> Callable[[CallSpan, Record], object]:
    """Return a function that calls the hook with the record of a call."""
    from .call_record import call_record

    return lambda call_span, record: result_of(hook, call_span.span, call_record(call_span, record))


def _run_step(step: Callable[..., object], *args: object) -> None:
    try:
        step(*args)
    except Exception:
        _fault.report("telling of a call")


def _origin_of(call_span: CallSpan) -> Origin:
    return Origin(_context_of(call_span.span), call_span.baggage.on_points)


def _context_of(span: Span) -> Context:
    """The context that links a metric point to its span."""
    return trace.set_span_in_context(span, Context())

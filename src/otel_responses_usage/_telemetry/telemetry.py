"""Writes all spans and metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from opentelemetry import metrics, trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import NonRecordingSpan, Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from .. import _fault
from .._facts.outcome import Ending, Outcome
from .._facts.request import Operation, ResponsesRequest, Server
from .._facts.response import Response
from .._facts.usage import MissingReason, Usage, UsageSource
from . import semconv as names
from .neighbour import CallSpan, Neighbour

_API_TYPE: Final = "responses"
# Optional attributes at the start of a span: the index of the field in the request, and the name.
_REQUEST_ATTRIBUTES: Final = tuple(
    (ResponsesRequest._fields.index(field), name)
    for field, name in (
        ("max_output_tokens", names.REQUEST_MAX_TOKENS),
        ("temperature", names.REQUEST_TEMPERATURE),
        ("top_p", names.REQUEST_TOP_P),
        ("reasoning_effort", names.REQUEST_REASONING_LEVEL),
        ("previous_response_id", names.REQUEST_PREVIOUS_RESPONSE_ID),
        ("stream_cursor", names.REQUEST_STREAM_CURSOR),
        ("conversation_id", names.CONVERSATION_ID),
        ("output_type", names.OUTPUT_TYPE),
        ("service_tier", names.OPENAI_REQUEST_SERVICE_TIER),
        ("response_id", names.RESPONSE_ID),
    )
)

# Attributes of ours that a usage span has.
_USAGE_SPAN_NAMES: Final = (
    names.STREAM_OUTCOME,
    names.USAGE_SOURCE,
    names.USAGE_MISSING_REASON,
    names.RETRIEVAL_ATTEMPTS,
    names.RETRIEVAL_DURATION,
)

_RecordPoint: TypeAlias = Callable[[int, dict[str, AttributeValue], Context], None]


class Retrieval(NamedTuple):
    """The look-up that was made for a call."""

    attempts: int
    duration_s: float


class Record(NamedTuple):
    """All facts of an ended call. Times in nanoseconds are of the wall clock.

    Attributes:
        is_received: Whether the usage was in the answer, in a part that the application has received.

    """

    request: ResponsesRequest
    start_ns: int
    end_ns: int
    ending: Ending
    response: Response
    events: int
    deltas: Mapping[str, int]
    time_to_first_chunk_s: float | None
    gaps_s: list[float]
    usage: Usage | None
    source: UsageSource | None
    missing_reason: MissingReason | None
    retrieval: Retrieval | None
    is_received: bool

    @property
    def is_refused(self) -> bool:
        """Whether the call ended without any answer."""
        return self.ending.outcome is Outcome.ERROR and self.response.id is None and not self.events


class _Instruments:
    """The instruments for times and tokens of one generation of the conventions."""

    def __init__(self, meter: metrics.Meter, generation: names.Generation) -> None:
        self.is_current = generation is names.CURRENT
        self._duration = meter.create_histogram(
            generation.duration,
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=names.DURATION_BUCKETS_S,
        )
        self._time_to_first_chunk = meter.create_histogram(
            generation.time_to_first_chunk,
            unit="s",
            description="Time from the request to the first piece of a streamed answer.",
            explicit_bucket_boundaries_advisory=names.DURATION_BUCKETS_S,
        )
        self._time_per_output_chunk = meter.create_histogram(
            generation.time_per_output_chunk,
            unit="s",
            description="Time between the pieces of a streamed answer.",
            explicit_bucket_boundaries_advisory=names.CHUNK_BUCKETS_S,
        )
        recorders: dict[str, _RecordPoint] = {}
        for metric in generation.tokens:
            if metric.name not in recorders:
                recorders[metric.name] = _token_instrument(meter, metric)
        self._tokens = [(metric, recorders[metric.name]) for metric in generation.tokens]

    def record_times(
        self,
        record: Record,
        common: dict[str, AttributeValue],
        with_error: dict[str, AttributeValue],
        context: Context,
    ) -> None:
        """Record the duration and the chunk times of a call."""
        self._duration.record((record.end_ns - record.start_ns) / 1e9, with_error, context)
        if record.request.operation is not Operation.CHAT:
            return  # the chunks of a fetch belong to the original call
        if record.time_to_first_chunk_s is not None:
            self._time_to_first_chunk.record(record.time_to_first_chunk_s, common, context)
        for gap_s in record.gaps_s:
            self._time_per_output_chunk.record(gap_s, common, context)

    def record_tokens(self, record: Record, common: dict[str, AttributeValue], context: Context) -> None:
        """Record the tokens of a call, if they are known. A fetch generates no tokens."""
        if record.usage is None or record.request.operation is not Operation.CHAT:
            return
        for metric, record_tokens in self._tokens:
            tokens = getattr(record.usage, metric.field)
            if tokens is not None:
                record_tokens(tokens, {**common, **metric.attributes}, context)


def _token_instrument(meter: metrics.Meter, metric: names.TokenMetric) -> _RecordPoint:
    description = "Number of tokens used."
    if metric.instrument is names.TokenInstrument.COUNTER:
        return meter.create_counter(metric.name, unit="{token}", description=description).add
    return meter.create_histogram(
        metric.name,
        unit="{token}",
        description=description,
        explicit_bucket_boundaries_advisory=names.TOKEN_BUCKETS,
    ).record


class Telemetry:
    """Starts and ends the spans, and records the metric points."""

    def __init__(
        self,
        tracer: trace.Tracer,
        meter: metrics.Meter,
        generations: Sequence[names.Generation] = (names.CURRENT,),
    ) -> None:
        self._tracer = tracer
        self._has_sdk = False
        self._instruments = [_Instruments(meter, generation) for generation in generations]
        self._calls = meter.create_counter(
            names.METRIC_CALLS,
            unit="{call}",
            description="Responses calls, by how they ended and where their usage came from.",
        )
        self._retrieval_duration = meter.create_histogram(
            names.METRIC_RETRIEVAL_DURATION,
            unit="s",
            description="Time from the end of a call to the end of the look-up of its usage.",
            explicit_bucket_boundaries_advisory=names.DURATION_BUCKETS_S,
        )
        self._pending = meter.create_up_down_counter(
            names.METRIC_PENDING,
            unit="{call}",
            description="Spans held open for their usage.",
        )
        self._open_circuits = meter.create_up_down_counter(
            names.METRIC_OPEN_CIRCUITS,
            unit="{circuit}",
            description="Servers that are not asked for responses, since they had none.",
        )
        self._faults = meter.create_counter(
            names.METRIC_FAULTS,
            unit="{fault}",
            description="Faults of the instrumentation itself.",
        )

    def start(
        self, request: ResponsesRequest, start_ns: int, neighbour: Neighbour | None, *, has_span: bool
    ) -> CallSpan:
        """Start the span of a call, as a child of the current span.

        Args:
            request: The parameters of the call.
            start_ns: When the call began, in nanoseconds of the wall clock.
            neighbour: Who else has a span of this call. Then it gets none of ours.
            has_span: Whether it is to have a span of ours otherwise.

        """
        if neighbour is not None or not has_span:
            parent = neighbour.context if neighbour else trace.get_current_span().get_span_context()
            return CallSpan(NonRecordingSpan(parent), is_own=False, neighbour=neighbour)
        attributes = _start_attributes(
            request.operation, request.server, request.model, request.streams
        ).copy()
        for index, name in _REQUEST_ATTRIBUTES:
            value: Any = request[index]
            if value is not None:
                attributes[name] = value
        return CallSpan(
            self._tracer.start_span(
                request.span_name, kind=SpanKind.CLIENT, attributes=attributes, start_time=start_ns
            )
        )

    @property
    def has_sdk(self) -> bool:
        """Whether a provider of an OpenTelemetry SDK is set: calls can be recorded.

        Once true, it stays true.
        """
        if not self._has_sdk:
            # Before the application sets a provider, the tracer is a proxy without a real tracer.
            tracer = getattr(self._tracer, "_tracer", self._tracer)
            self._has_sdk = not isinstance(tracer, trace.NoOpTracer) or self._records_metrics
        return self._has_sdk

    def is_recorded(self, call_span: CallSpan) -> bool:
        """Whether anything is recorded of this call: a span, or any metric."""
        span, neighbour = call_span.span, call_span.neighbour
        is_sampled = neighbour.context.trace_flags.sampled if neighbour else span.is_recording()
        return is_sampled or self._records_metrics

    @property
    def _records_metrics(self) -> bool:
        # Before the application sets a provider, the instrument is a proxy without a real instrument.
        instrument = getattr(self._calls, "_real_instrument", self._calls)
        return instrument is not None and not isinstance(instrument, metrics.NoOpCounter)

    def add_pending(self, call_span: CallSpan, change: int) -> None:
        """Add `change` to the number of calls that wait for their usage."""
        _run_step(self._pending.add, change, None, _context_of(call_span.span))

    def count_circuit(self, address: str, port: int | None, change: int) -> None:
        """Add `change` to the number of open circuits: 1 if one opens, -1 if one closes."""
        self._open_circuits.add(
            change, _without_none({names.SERVER_ADDRESS: address or None, names.SERVER_PORT: port})
        )

    def count_fault(self) -> None:
        """Count one error of the instrumentation itself."""
        self._faults.add(1)

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
            _run_step(self._record_metrics, record, _context_of(span), neighbour, is_told)
            if neighbour is not None:
                _run_step(self._add_to_neighbour, span, record, neighbour, is_told)
            elif call_span.is_own:
                if span.is_recording():
                    _run_step(self._set_attributes, span, record)
                _run_step(span.end, record.end_ns)
        finally:
            detach(token)

    def _add_to_neighbour(self, span: Span, record: Record, neighbour: Neighbour, is_told: bool) -> None:
        """Write what the neighbour does not know: on its span, and in a span of its own below that."""
        if record.is_refused:
            neighbour.release()
        elif not is_told:
            # At the end of the call and without a length: it is a fact about the call and no work of its own.
            usage_span = self._tracer.start_span(
                f"usage {record.request.model}" if record.request.model else "usage",
                context=_context_of(span),
                attributes=_without_none(_usage_span_attributes(record)),
                start_time=record.end_ns,
            )
            usage_span.end(record.end_ns)
        if neighbour.can_be_added_to:
            neighbour.add(_without_none(_own_attributes(record)))

    def _set_attributes(self, span: Span, record: Record) -> None:
        response = record.response
        # A response that still runs in the background has no finish reason yet.
        has_finished = record.events or not response.is_running
        reason = record.ending.finish_reason(response) if has_finished else None
        attributes: dict[str, AttributeValue | None] = {
            names.RESPONSE_ID: response.id,
            names.RESPONSE_MODEL: response.model,
            names.RESPONSE_FINISH_REASONS: (reason,) if reason else None,
            names.OPENAI_RESPONSE_SERVICE_TIER: response.service_tier,
            names.RESPONSE_TIME_TO_FIRST_CHUNK: record.time_to_first_chunk_s,
            names.ERROR_TYPE: record.ending.error_type,
            **_own_attributes(record),
            **_usage_attributes(record),
        }
        span.set_attributes(_without_none(attributes))
        if record.ending.is_error:
            span.set_status(Status(StatusCode.ERROR))

    def _record_metrics(
        self, record: Record, context: Context, neighbour: Neighbour | None, is_told: bool
    ) -> None:
        request, ending = record.request, record.ending
        common = {
            **_common_attributes(request.operation, request.server, request.model, record.response.model)
        }
        with_error = common | {names.ERROR_TYPE: ending.error_type} if ending.error_type else common
        for instruments in self._instruments:
            other = neighbour if instruments.is_current else None  # neighbours use the current names
            if other is None or not other.records_times:
                instruments.record_times(record, common, with_error, context)
            if other is None or not (is_told and other.records_tokens):
                instruments.record_tokens(record, common, context)
        if request.operation is not Operation.CHAT:
            return
        self._calls.add(
            1,
            {
                **_call_attributes(
                    ending.outcome,
                    request.server.provider,
                    request.model,
                    record.source,
                    record.missing_reason,
                )
            },
            context,
        )
        if record.retrieval is not None:
            result = record.source or record.missing_reason
            self._retrieval_duration.record(
                record.retrieval.duration_s,
                {names.RETRIEVAL_RESULT: result.value if result else "none"},
                context,
            )


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


def _own_attributes(record: Record) -> dict[str, AttributeValue | None]:
    """The attributes with names of this package."""
    attributes: dict[str, AttributeValue | None] = {
        names.STREAM_OUTCOME: record.ending.outcome.value,
        names.RESPONSE_STATUS: record.response.status,
    }
    if record.request.streams or record.events:
        attributes[names.STREAM_EVENTS] = record.events
        attributes[names.STREAM_DELTAS] = sum(record.deltas.values())
    for kind, count in record.deltas.items():
        attributes[names.STREAM_DELTAS_BY_TYPE + kind] = count
    if record.request.operation is Operation.CHAT:
        attributes[names.USAGE_SOURCE] = record.source.value if record.source else None
        reason = record.missing_reason
        attributes[names.USAGE_MISSING_REASON] = reason.value if reason else None
    if record.retrieval is not None:
        attributes[names.RETRIEVAL_ATTEMPTS] = record.retrieval.attempts
        attributes[names.RETRIEVAL_DURATION] = record.retrieval.duration_s
    return attributes


def _usage_attributes(record: Record) -> dict[str, AttributeValue | None]:
    """The counts of tokens, if they are known. A fetch has none: they belong to the call it fetches."""
    usage = record.usage
    if usage is None or record.request.operation is not Operation.CHAT:
        return {}
    return {
        names.USAGE_INPUT_TOKENS: usage.input_tokens,
        names.USAGE_OUTPUT_TOKENS: usage.output_tokens,
        names.USAGE_CACHE_READ_INPUT_TOKENS: usage.cache_read_input_tokens,
        names.USAGE_CACHE_WRITE_INPUT_TOKENS: usage.cache_write_input_tokens,
        names.USAGE_REASONING_OUTPUT_TOKENS: usage.reasoning_output_tokens,
    }


def _usage_span_attributes(record: Record) -> dict[str, AttributeValue | None]:
    """The attributes of a usage span. It has no operation name, so that nobody counts it as a call."""
    own = _own_attributes(record)
    return {
        names.PROVIDER_NAME: record.request.server.provider,
        names.REQUEST_MODEL: record.request.model,
        names.RESPONSE_ID: record.response.id,
        names.RESPONSE_MODEL: record.response.model,
        **{name: own.get(name) for name in _USAGE_SPAN_NAMES},
        **_usage_attributes(record),
    }


def _run_step(step: Callable[..., None], *args: object) -> None:
    try:
        step(*args)
    except Exception:
        _fault.report("telling of a call")


def _context_of(span: Span) -> Context:
    """The context that links a metric point to its span."""
    return trace.set_span_in_context(span, Context())


def _without_none(attributes: Mapping[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


# Cached, since most calls of a process have the same values. Callers must copy the result.


@functools.lru_cache(maxsize=128)
def _start_attributes(
    operation: Operation, server: Server, model: str | None, streams: bool
) -> dict[str, AttributeValue]:
    return {
        **_common_attributes(operation, server, model),
        names.REQUEST_STREAM: streams,
        names.OPENAI_API_TYPE: _API_TYPE,
    }


@functools.lru_cache(maxsize=128)
def _common_attributes(
    operation: Operation, server: Server, requested_model: str | None, model: str | None = None
) -> dict[str, AttributeValue]:
    return _without_none(
        {
            names.OPERATION_NAME: operation.value,
            names.PROVIDER_NAME: server.provider,
            names.REQUEST_MODEL: requested_model,
            names.RESPONSE_MODEL: model,
            names.SERVER_ADDRESS: server.address,
            names.SERVER_PORT: server.port,
        }
    )


@functools.lru_cache(maxsize=128)
def _call_attributes(
    outcome: Outcome,
    provider: str,
    model: str | None,
    source: UsageSource | None,
    missing_reason: MissingReason | None,
) -> dict[str, AttributeValue]:
    return _without_none(
        {
            names.STREAM_OUTCOME: outcome.value,
            names.PROVIDER_NAME: provider,
            names.REQUEST_MODEL: model,
            names.USAGE_SOURCE: source.value if source else None,
            names.USAGE_MISSING_REASON: missing_reason.value if missing_reason else None,
        }
    )

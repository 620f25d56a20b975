"""Writes all spans and metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from opentelemetry import metrics, trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from .. import _fault
from .._facts.outcome import Ending, Outcome
from .._facts.request import Operation, ResponsesRequest, Server
from .._facts.response import Response
from .._facts.usage import MissingReason, Usage, UsageSource
from . import semconv as names

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

_RecordPoint: TypeAlias = Callable[[int, dict[str, AttributeValue], Context], None]


class Retrieval(NamedTuple):
    """The look-up that was made for a call."""

    attempts: int
    duration_s: float


class Record(NamedTuple):
    """All facts of an ended call. Times in nanoseconds are of the wall clock."""

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


class _Instruments:
    """The instruments for times and tokens of one generation of the conventions."""

    def __init__(self, meter: metrics.Meter, generation: names.Generation) -> None:
        self.duration = meter.create_histogram(
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

    def record(self, record: Record, common: dict[str, AttributeValue], context: Context) -> None:
        """Record the chunk times and the tokens of a call."""
        if record.time_to_first_chunk_s is not None:
            self._time_to_first_chunk.record(record.time_to_first_chunk_s, common, context)
        for gap_s in record.gaps_s:
            self._time_per_output_chunk.record(gap_s, common, context)
        if record.usage is None:
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

    def start(self, request: ResponsesRequest, start_ns: int) -> Span:
        """Start the span of a call, as a child of the current span."""
        attributes = _start_attributes(
            request.operation, request.server, request.model, request.streams
        ).copy()
        for index, name in _REQUEST_ATTRIBUTES:
            value: Any = request[index]
            if value is not None:
                attributes[name] = value
        return self._tracer.start_span(
            request.span_name, kind=SpanKind.CLIENT, attributes=attributes, start_time=start_ns
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

    def is_recorded(self, span: Span) -> bool:
        """Whether this span or any metric is recorded."""
        return span.is_recording() or self._records_metrics

    @property
    def _records_metrics(self) -> bool:
        # Before the application sets a provider, the instrument is a proxy without a real instrument.
        instrument = getattr(self._calls, "_real_instrument", self._calls)
        return instrument is not None and not isinstance(instrument, metrics.NoOpCounter)

    def add_pending(self, span: Span, change: int) -> None:
        """Add `change` to the number of spans that stay open until their usage is known."""
        _run_step(self._pending.add, change, None, _context_of(span))

    def count_circuit(self, address: str, port: int | None, change: int) -> None:
        """Add `change` to the number of open circuits: 1 if one opens, -1 if one closes."""
        self._open_circuits.add(
            change, _without_none({names.SERVER_ADDRESS: address or None, names.SERVER_PORT: port})
        )

    def count_fault(self) -> None:
        """Count one error of the instrumentation itself."""
        self._faults.add(1)

    def finish(self, span: Span, record: Record) -> None:
        """Record the metrics of an ended call, and end its span with the end time of the call.

        The metrics come first. An error in one step does not stop the next. So the tokens are recorded
        even if an exporter raises on the span. All steps run in an empty context. In the context of the
        caller instrumentation may be suppressed, and some span processors then drop the span.
        """
        token = attach(Context())
        try:
            _run_step(self._record_metrics, record, _context_of(span))
            if span.is_recording():
                _run_step(self._set_attributes, span, record)
            _run_step(span.end, record.end_ns)
        finally:
            detach(token)

    def _set_attributes(self, span: Span, record: Record) -> None:
        response, usage, retrieval = record.response, record.usage, record.retrieval
        # A response that still runs in the background has no finish reason yet.
        has_finished = record.events or not response.is_running
        reason = record.ending.finish_reason(response) if has_finished else None
        attributes: dict[str, AttributeValue | None] = {
            names.RESPONSE_ID: response.id,
            names.RESPONSE_MODEL: response.model,
            names.RESPONSE_FINISH_REASONS: (reason,) if reason else None,
            names.OPENAI_RESPONSE_SERVICE_TIER: response.service_tier,
            names.RESPONSE_TIME_TO_FIRST_CHUNK: record.time_to_first_chunk_s,
            names.STREAM_OUTCOME: record.ending.outcome.value,
            names.RESPONSE_STATUS: response.status,
            names.ERROR_TYPE: record.ending.error_type,
        }
        if record.request.streams or record.events:
            attributes[names.STREAM_EVENTS] = record.events
            attributes[names.STREAM_DELTAS] = sum(record.deltas.values())
        for kind, count in record.deltas.items():
            attributes[names.STREAM_DELTAS_BY_TYPE + kind] = count
        if record.request.operation is Operation.CHAT:
            attributes[names.USAGE_SOURCE] = record.source.value if record.source else None
            attributes[names.USAGE_MISSING_REASON] = (
                record.missing_reason.value if record.missing_reason else None
            )
            if usage is not None:
                attributes |= {
                    names.USAGE_INPUT_TOKENS: usage.input_tokens,
                    names.USAGE_OUTPUT_TOKENS: usage.output_tokens,
                    names.USAGE_CACHE_READ_INPUT_TOKENS: usage.cache_read_input_tokens,
                    names.USAGE_CACHE_WRITE_INPUT_TOKENS: usage.cache_write_input_tokens,
                    names.USAGE_REASONING_OUTPUT_TOKENS: usage.reasoning_output_tokens,
                }
        if retrieval is not None:
            attributes[names.RETRIEVAL_ATTEMPTS] = retrieval.attempts
            attributes[names.RETRIEVAL_DURATION] = retrieval.duration_s
        span.set_attributes(_without_none(attributes))
        if record.ending.is_error:
            span.set_status(Status(StatusCode.ERROR))

    def _record_metrics(self, record: Record, context: Context) -> None:
        request, ending = record.request, record.ending
        common = {
            **_common_attributes(request.operation, request.server, request.model, record.response.model)
        }
        with_error = common | {names.ERROR_TYPE: ending.error_type} if ending.error_type else common
        # A fetch generates no tokens. Its chunks belong to the original call.
        is_fetch = request.operation is not Operation.CHAT
        for instruments in self._instruments:
            instruments.duration.record((record.end_ns - record.start_ns) / 1e9, with_error, context)
            if not is_fetch:
                instruments.record(record, common, context)
        if is_fetch:
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

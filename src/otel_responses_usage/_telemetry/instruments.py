"""The metric instruments: those of the GenAI conventions, and those of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from opentelemetry import metrics
from opentelemetry.context import Context
from opentelemetry.util.types import AttributeValue

from .._facts.headers import RateLimit
from .._facts.request import ResponsesRequest
from .._facts.tools import ToolUsage
from .._facts.usage import Usage
from . import semconv as names
from .attributes import call_attributes, model_attributes, without_none
from .record import Record
from .uncounted import UncountedCall

_RecordPoint: TypeAlias = Callable[[int, dict[str, AttributeValue], Context], None]


class Origin(NamedTuple):
    """What every point of a call has: the context of its span, and the attributes from baggage."""

    context: Context
    labels: Mapping[str, str]


_IMAGE_GENERATION: Final = "image_generation_call"
# A server names the types of its tools. Each type makes series of metrics.
_MAX_TOOL_TYPES: Final = 100
_OTHER_TYPE: Final = "other"


class GenAIInstruments:
    """The instruments for times and tokens of one generation of the conventions."""

    def __init__(self, meter: metrics.Meter, generation: names.Generation, *, has_fetches: bool) -> None:
        """Make the instruments.

        Args:
            meter: Makes them.
            generation: Their names.
            has_fetches: Whether fetches are recorded here, and not by another generation.

        """
        self.is_current = generation is names.CURRENT
        durations = {
            name: meter.create_histogram(
                name,
                unit="s",
                description="GenAI operation duration.",
                explicit_bucket_boundaries_advisory=names.DURATION_BUCKETS_S,
            )
            for name in {generation.duration, *((generation.fetch_duration,) if has_fetches else ())}
        }
        self._duration = durations[generation.duration]
        self._fetch_duration = durations[generation.fetch_duration] if has_fetches else None
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
            explicit_bucket_boundaries_advisory=names.DURATION_BUCKETS_S,
        )
        recorders: dict[str, _RecordPoint] = {}
        for metric in generation.tokens:
            if metric.name not in recorders:
                recorders[metric.name] = _token_recorder(meter, metric)
        self._tokens = [(metric, recorders[metric.name]) for metric in generation.tokens]

    def record_times(
        self,
        record: Record,
        common: dict[str, AttributeValue],
        with_error: dict[str, AttributeValue],
        context: Context,
    ) -> None:
        """Record the duration and the chunk times of a call."""
        duration = self._fetch_duration if record.request.is_fetch else self._duration
        if duration is not None:
            duration.record((record.end_ns - record.start_ns) / 1e9, with_error, context)
        if record.request.is_fetch:
            return  # the chunks of a fetch belong to the original call
        if record.time_to_first_chunk_s is not None:
            self._time_to_first_chunk.record(record.time_to_first_chunk_s, common, context)
        for gap_s in record.gaps_s:
            self._time_per_output_chunk.record(gap_s, common, context)

    def record_tokens(self, usage: Usage, attributes: dict[str, AttributeValue], context: Context) -> None:
        """Record the tokens of a call."""
        for metric, record_tokens in self._tokens:
            tokens = getattr(usage, metric.field)
            if tokens is not None:
                record_tokens(tokens, {**attributes, **metric.attributes}, context)


def _token_recorder(meter: metrics.Meter, metric: names.TokenMetric) -> _RecordPoint:
    description = "Number of tokens used."
    if metric.instrument is names.TokenInstrument.COUNTER:
        return meter.create_counter(metric.name, unit="{token}", description=description).add
    return meter.create_histogram(
        metric.name,
        unit="{token}",
        description=description,
        explicit_bucket_boundaries_advisory=names.TOKEN_BUCKETS,
    ).record


class OwnInstruments:
    """The instruments with names of this package."""

    def __init__(self, meter: metrics.Meter) -> None:
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

        self._late_usage = meter.create_counter(
            names.METRIC_LATE_USAGE,
            unit="{call}",
            description="Calls whose usage the application was shown after they had been recorded.",
        )
        self._input_count = meter.create_counter(
            names.METRIC_INPUT_COUNT,
            unit="{token}",
            description="Input tokens of calls without usage, as the API counts them beforehand.",
        )
        self._tool_calls = meter.create_counter(
            names.METRIC_TOOL_CALLS,
            unit="{call}",
            description="Output items that hosted tools made.",
        )
        self._web_search_requests = meter.create_counter(
            names.METRIC_WEB_SEARCH_REQUESTS,
            unit="{request}",
            description="Web searches that are billed.",
        )
        self._tool_tokens = meter.create_counter(
            names.METRIC_TOOL_TOKENS,
            unit="{token}",
            description="Tokens of hosted tools, which are not part of the usage of a call.",
        )
        self._retries = meter.create_counter(
            names.METRIC_RETRIES,
            unit="{retry}",
            description="Requests that the SDK sent again.",
        )
        self._rate_limit_remaining = meter.create_gauge(
            names.METRIC_RATE_LIMIT_REMAINING,
            description="What was left of a rate limit at the last answer, in tokens or requests.",
        )
        self._rate_limit = meter.create_gauge(
            names.METRIC_RATE_LIMIT_LIMIT,
            description="A rate limit as the last answer told it, in tokens or requests.",
        )
        self._on_call_losses = meter.create_counter(
            names.METRIC_ON_CALL_LOSSES,
            unit="{call}",
            description="Calls whose record the application's own function did not take.",
        )
        self._tool_types: dict[str, None] = {}

    @property
    def are_recorded(self) -> bool:
        """Whether a meter provider is set that records."""
        # Before the application sets a provider, the instrument is a proxy without a real instrument.
        instrument = getattr(self._calls, "_real_instrument", self._calls)
        return instrument is not None and not isinstance(instrument, metrics.NoOpCounter)

    def record(self, record: Record, origin: Origin) -> None:
        """Record an ended call."""
        request = record.request
        if record.resend_count:
            attributes = model_attributes(request.server.provider, request.model)
            self._retries.add(record.resend_count, {**origin.labels, **attributes}, origin.context)
        if request.is_fetch:
            return
        attributes = call_attributes(
            record.ending.outcome,
            request.server.provider,
            request.model,
            record.source,
            record.missing_reason,
        )
        self._calls.add(1, {**origin.labels, **attributes}, origin.context)
        if record.input_count is not None and record.missing_reason is not None:
            counted = {
                **origin.labels,
                **model_attributes(request.server.provider, request.model),
                names.USAGE_MISSING_REASON: record.missing_reason.value,
            }
            self._input_count.add(record.input_count, counted, origin.context)
        if record.retrieval is not None:
            result = record.source or record.missing_reason
            self._retrieval_duration.record(
                record.retrieval.duration_s,
                {**origin.labels, names.RETRIEVAL_RESULT: result.value if result else "none"},
                origin.context,
            )

    def record_tools(self, tools: ToolUsage, provider: str, model: str | None, origin: Origin) -> None:
        """Record the use of hosted tools in one response. A count of zero makes no point."""
        common = {**origin.labels, **model_attributes(provider, model)}
        for kind, count in tools.calls:
            self._tool_calls.add(count, {**common, names.TOOL_TYPE: self._tool_type(kind)}, origin.context)
        if tools.web_search_requests:
            self._web_search_requests.add(tools.web_search_requests, {**common}, origin.context)
        image_tokens = {"input": tools.image_input_tokens, "output": tools.image_output_tokens}
        for token_type, tokens in image_tokens.items():
            if tokens:
                attributes = {**common, names.TOOL_TYPE: _IMAGE_GENERATION, names.TOKEN_TYPE: token_type}
                self._tool_tokens.add(tokens, attributes, origin.context)

    def record_rate_limits(
        self, limits: Sequence[RateLimit], request: ResponsesRequest, origin: Origin
    ) -> None:
        """Record the rate limits that the headers of an answer told."""
        server = request.server
        for kind, limit, remaining in limits:
            attributes = {
                **origin.labels,
                **model_attributes(server.provider, request.model),
                **without_none({names.SERVER_ADDRESS: server.address, names.SERVER_PORT: server.port}),
                names.RATE_LIMIT_TYPE: kind,
            }
            if limit is not None:
                self._rate_limit.set(limit, attributes, origin.context)
            if remaining is not None:
                self._rate_limit_remaining.set(remaining, attributes, origin.context)

    def count_late_usage(self, call: UncountedCall, origin: Origin) -> None:
        """Count a call whose usage became known after it had been recorded."""
        attributes = {
            **origin.labels,
            **model_attributes(call.server.provider, call.model),
            names.USAGE_MISSING_REASON: call.missing_reason.value,
        }
        self._late_usage.add(1, attributes, origin.context)

    def add_pending(self, change: int, origin: Origin) -> None:
        """Add to the number of calls that wait for their usage."""
        self._pending.add(change, {**origin.labels}, origin.context)

    def count_circuit(self, address: str, port: int | None, change: int) -> None:
        """Add to the number of open circuits."""
        self._open_circuits.add(
            change, without_none({names.SERVER_ADDRESS: address or None, names.SERVER_PORT: port})
        )

    def count_on_call_loss(self, loss: str) -> None:
        """Count one record that the application's own function did not take."""
        self._on_call_losses.add(1, {names.ON_CALL_LOSS: loss})

    def count_fault(self) -> None:
        """Count one error of the instrumentation itself."""
        self._faults.add(1)

    def _tool_type(self, kind: str) -> str:
        """Return the type, or `other` if there are too many."""
        if kind not in self._tool_types:
            if len(self._tool_types) >= _MAX_TOOL_TYPES:
                return _OTHER_TYPE
            self._tool_types[kind] = None
        return kind

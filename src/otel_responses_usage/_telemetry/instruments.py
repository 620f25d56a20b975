"""The metric instruments: those of the GenAI conventions, and those of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from opentelemetry import metrics
from opentelemetry.context import Context
from opentelemetry.util.types import AttributeValue

from .._facts.request import Operation
from . import semconv as names
from .attributes import call_attributes, without_none
from .record import Record

_RecordPoint: TypeAlias = Callable[[int, dict[str, AttributeValue], Context], None]


class GenAIInstruments:
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

    @property
    def are_recorded(self) -> bool:
        """Whether a meter provider is set that records."""
        # Before the application sets a provider, the instrument is a proxy without a real instrument.
        instrument = getattr(self._calls, "_real_instrument", self._calls)
        return instrument is not None and not isinstance(instrument, metrics.NoOpCounter)

    def record(self, record: Record, context: Context) -> None:
        """Record an ended call."""
        request = record.request
        if request.operation is not Operation.CHAT:
            return
        attributes = call_attributes(
            record.ending.outcome,
            request.server.provider,
            request.model,
            record.source,
            record.missing_reason,
        )
        self._calls.add(1, {**attributes}, context)
        if record.retrieval is not None:
            result = record.source or record.missing_reason
            self._retrieval_duration.record(
                record.retrieval.duration_s,
                {names.RETRIEVAL_RESULT: result.value if result else "none"},
                context,
            )

    def add_pending(self, change: int, context: Context) -> None:
        """Add to the number of calls that wait for their usage."""
        self._pending.add(change, None, context)

    def count_circuit(self, address: str, port: int | None, change: int) -> None:
        """Add to the number of open circuits."""
        self._open_circuits.add(
            change, without_none({names.SERVER_ADDRESS: address or None, names.SERVER_PORT: port})
        )

    def count_fault(self) -> None:
        """Count one error of the instrumentation itself."""
        self._faults.add(1)

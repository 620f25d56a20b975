"""Providers that do the work of real ones and keep nothing; and one call told by hand."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracerProvider, SpanKind

Json = dict[str, Any]

_BUCKETS = [0.01 * 2**power for power in range(14)]  # as many as our histograms have


class _Exporter(SpanExporter):
    """Counts spans, and keeps the last ones."""

    def __init__(self) -> None:
        self.spans: deque[Any] = deque(maxlen=16)
        self.number = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Take the spans."""
        self.spans.extend(spans)
        self.number += len(spans)
        return SpanExportResult.SUCCESS


class Told:
    """A pair of SDK providers, and what was told to them last.

    Attributes:
        reader: Reads the metrics.
        tracer_provider: Takes the spans.
        span_processor: Passes the spans on.

    """

    def __init__(self) -> None:
        self._exporter = _Exporter()
        # What was taken since the last reading, and not since the beginning.
        self.reader = InMemoryMetricReader(dict.fromkeys((Counter, Histogram), AggregationTemporality.DELTA))
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.span_processor = SimpleSpanProcessor(self._exporter)
        self.tracer_provider.add_span_processor(self.span_processor)

    @functools.cached_property
    def meter_provider(self) -> MeterProvider:
        """Takes the metrics. If it is made, the reader can have no other provider."""
        return MeterProvider([self.reader], shutdown_on_exit=False)

    @property
    def providers(self) -> Json:
        """The providers, as `instrument()` takes them."""
        return {"tracer_provider": self.tracer_provider, "meter_provider": self.meter_provider}

    def note(self, span: Any) -> None:
        """Take a span that another SDK has ended."""
        self._exporter.export([span])

    @property
    def ended(self) -> int:
        """How many spans have ended."""
        return self._exporter.number

    @property
    def attributes(self) -> Json:
        """The attributes of the last span."""
        return dict(self._exporter.spans[-1].attributes or {}) if self._exporter.spans else {}

    def take_spans(self) -> list[tuple[Json, list[Json]]]:
        """Return the attributes of the last spans, and those of their events, each span once."""
        spans = [
            (dict(span.attributes or {}), [dict(event.attributes or {}) for event in span.events])
            for span in self._exporter.spans
        ]
        self._exporter.spans.clear()
        return spans

    def points(self) -> list[tuple[str, Json, bool]]:
        """Every point since the last reading: its instrument, its series, and whether it is a histogram's.

        All points that a counter has taken of one series are one.
        """
        data: Any = self.reader.get_metrics_data()
        return [
            (metric.name, dict(point.attributes), hasattr(point, "bucket_counts"))
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
            for _ in range(getattr(point, "count", 1))
        ]


def deaf() -> Json:
    """Providers of an application that has configured none."""
    return {"tracer_provider": NoOpTracerProvider(), "meter_provider": NoOpMeterProvider()}


def unsampled() -> Json:
    """Providers of an application that samples nothing and has no metrics."""
    return {"tracer_provider": TracerProvider(ALWAYS_OFF), "meter_provider": NoOpMeterProvider()}


def by_hand(attributes: Json, points: list[tuple[str, Json, bool]], at_start: int) -> Callable[[], None]:
    """Return a function that tells of one call like another: `at_start` of its attributes at first.

    The rest follow when it ends; each point is linked with the span.
    """
    told = Told()
    tracer, meter = told.tracer_provider.get_tracer("by_hand"), told.meter_provider.get_meter("by_hand")
    items = list(attributes.items())
    first, rest = dict(items[:at_start]), dict(items[at_start:])
    histograms = {
        name: meter.create_histogram(name, explicit_bucket_boundaries_advisory=_BUCKETS)
        for name, _, is_histogram in points
        if is_histogram
    }
    counters = {name: meter.create_counter(name) for name, _, is_histogram in points if not is_histogram}

    def call() -> None:
        span = tracer.start_span(
            "chat gpt-5.4-mini", None, SpanKind.CLIENT, dict(first), None, time.time_ns()
        )
        linked = trace.set_span_in_context(span, Context())
        for name, series, is_histogram in points:
            if is_histogram:
                histograms[name].record(11, dict(series), linked)
            else:
                counters[name].add(1, dict(series), linked)
        span.set_attributes(dict(rest))
        span.end(time.time_ns())

    return call

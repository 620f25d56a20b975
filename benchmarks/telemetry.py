"""Providers that do the work of real ones and keep nothing; and one call told by hand."""

from __future__ import annotations

import time
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


class LastSpan(SpanExporter):
    """Takes every span and keeps the last."""

    def __init__(self) -> None:
        self.span: ReadableSpan | None = None
        self.number = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Take the spans."""
        self.span = spans[-1]
        self.number += len(spans)
        return SpanExportResult.SUCCESS


class Told:
    """A pair of SDK providers, and what was told to them last."""

    def __init__(self) -> None:
        self._exporter = LastSpan()
        # What was taken since the last reading, and not since the beginning.
        self._reader = InMemoryMetricReader(dict.fromkeys((Counter, Histogram), AggregationTemporality.DELTA))
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.span_processor = SimpleSpanProcessor(self._exporter)
        self.tracer_provider.add_span_processor(self.span_processor)
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)

    @property
    def providers(self) -> Json:
        """The providers, as `instrument()` takes them."""
        return {"tracer_provider": self.tracer_provider, "meter_provider": self.meter_provider}

    def count(self, spans: int) -> None:
        """Count spans that another SDK has ended."""
        self._exporter.number += spans

    @property
    def ended(self) -> int:
        """How many spans have ended."""
        return self._exporter.number

    @property
    def attributes(self) -> Json:
        """The attributes of the last span."""
        span = self._exporter.span
        return dict(span.attributes or {}) if span is not None else {}

    def points(self) -> list[tuple[str, Json, bool]]:
        """Every point since the last reading: its instrument, its series, and whether it is a histogram's.

        All points that a counter has taken of one series are one.
        """
        data: Any = self._reader.get_metrics_data()
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

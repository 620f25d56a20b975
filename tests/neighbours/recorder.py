"""What the SDK's exporters get, and what the process logs."""

from __future__ import annotations

import logging
import re
import sys
import threading
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = "otel_responses_usage"
APPLICATION = "application"
TOKENS = "gen_ai.client.token.usage"
CALLS = "openai_responses.calls"


class Recorder:
    """Spans and points of a process, by whatever providers they came."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.processor = SimpleSpanProcessor(self.exporter)
        self.reader = InMemoryMetricReader()
        self.others: list[str] = []  # spans that are not OpenTelemetry's

    def set_providers(self, *, spans: bool = True, points: bool = True, sampled: bool = True) -> None:
        """Set the SDK's global providers, unless the neighbour does that itself."""
        if spans:
            provider = TracerProvider(sampler=ALWAYS_ON if sampled else ALWAYS_OFF)
            provider.add_span_processor(self.processor)
            trace.set_tracer_provider(provider)
        if points:
            metrics.set_meter_provider(MeterProvider([self.reader]))

    def spans(self) -> list[ReadableSpan]:
        """All spans that have ended, but the application's."""
        return [span for span in self.exporter.get_finished_spans() if scope_of(span) != APPLICATION]

    def application_spans(self) -> list[ReadableSpan]:
        """The spans that the harness has made around each scenario."""
        return [span for span in self.exporter.get_finished_spans() if scope_of(span) == APPLICATION]

    def points(self, name: str) -> list[tuple[str, Any]]:
        """The points of one instrument in all scopes, each with the scope's name."""
        data = self.reader.get_metrics_data()
        return [
            (scope.scope.name, point)
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def input_tokens(self, scope: str | None = None) -> dict[str, float]:
        """The input tokens of the metric by request model: of one scope, or the sum of all."""
        sums: Counter[str] = Counter()
        for name, point in self.points(TOKENS):
            if scope in (None, name) and point.attributes.get("gen_ai.token.type") == "input":
                attributes = point.attributes
                model = attributes.get("gen_ai.request.model", attributes.get("gen_ai.response.model"))
                sums[str(model)] += point.sum
        return dict(sums)

    def exemplars(self) -> Iterator[tuple[str, int | None]]:
        """The exemplars of our token points: the request model, and the id of the span."""
        for scope, point in self.points(TOKENS):
            if scope == OURS:
                for exemplar in point.exemplars:
                    yield str(point.attributes.get("gen_ai.request.model")), exemplar.span_id

    def calls(self) -> int:
        """Our count of calls."""
        return sum(point.value for _, point in self.points(CALLS))


def scope_of(span: ReadableSpan) -> str:
    """The name of the instrumentation that made the span."""
    return span.instrumentation_scope.name if span.instrumentation_scope else ""


class Complaints(logging.Handler):
    """Log records above DEBUG, warnings, and exceptions that no code has handled."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: Counter[str] = Counter()

    def watch(self) -> None:
        """Start."""
        logging.root.addHandler(self)
        logging.root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        warnings.simplefilter("default")
        sys.unraisablehook = lambda hint: self._add("unraisable", repr(hint.exc_value))
        threading.excepthook = lambda hint: self._add("thread", repr(hint.exc_value))

    def emit(self, record: logging.LogRecord) -> None:
        text = str(record.msg)
        if record.name == "py.warnings":
            text = text.partition("\n")[0].partition(": ")[2]  # without the place
            text = re.sub(r"\d+", "N", text)
        self._add(f"{record.name} {record.levelname}", text)

    def _add(self, kind: str, text: str) -> None:
        self.seen[f"{kind}: {text.strip()[:160]}"] += 1

"""Where the demo's telemetry goes: to the embedded receiver, and to an endpoint of the user's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc_metrics
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc_spans
from opentelemetry.exporter.otlp.proto.http import metric_exporter as http_metrics
from opentelemetry.exporter.otlp.proto.http import trace_exporter as http_spans
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.trace import ReadableSpan

    from embedded.otlp_receiver import OtlpReceiver

# A demo does not wait long for an endpoint that is not there.
TIMEOUT_S = 3


class CountingExporter(SpanExporter):
    """Exports through another exporter and remembers how many spans were accepted."""

    def __init__(self, exporter: SpanExporter) -> None:
        self.offered = self.accepted = 0
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Passes the spans on."""
        result = self._exporter.export(spans)
        self.offered += len(spans)
        self.accepted += len(spans) if result is SpanExportResult.SUCCESS else 0
        return result

    def shutdown(self) -> None:
        """Shuts the other exporter down."""
        self._exporter.shutdown()


@dataclass(frozen=True)
class Outlet:
    """A pair of exporters with the same destination."""

    name: str
    spans: CountingExporter
    metrics: MetricExporter

    def statement(self) -> str:
        """What became of the spans."""
        colour = "green" if self.spans.accepted == self.spans.offered else "red"
        counts = f"{self.spans.accepted} of {self.spans.offered} spans accepted"
        return f"Sent to {self.name}, with the metrics: [{colour}]{counts}[/].\n"


def outlets(receiver: OtlpReceiver) -> list[Outlet]:
    """The receiver first, then the endpoint of the environment, if it names one."""
    endpoint = receiver.grpc_endpoint
    found = [
        Outlet(
            "the embedded receiver",
            CountingExporter(grpc_spans.OTLPSpanExporter(endpoint, insecure=True)),
            grpc_metrics.OTLPMetricExporter(endpoint, insecure=True),
        )
    ]
    if endpoint := os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""):
        spans: SpanExporter
        metrics: MetricExporter
        if os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc") == "grpc":
            spans = grpc_spans.OTLPSpanExporter(timeout=TIMEOUT_S)
            metrics = grpc_metrics.OTLPMetricExporter(timeout=TIMEOUT_S)
        else:
            spans = http_spans.OTLPSpanExporter(timeout=TIMEOUT_S)
            metrics = http_metrics.OTLPMetricExporter(timeout=TIMEOUT_S)
        found.append(Outlet(endpoint, CountingExporter(spans), metrics))
    return found

"""Where the demo's telemetry goes: to the embedded receiver, and to an endpoint of the user's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc_metrics
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc_spans
from opentelemetry.exporter.otlp.proto.http import metric_exporter as http_metrics
from opentelemetry.exporter.otlp.proto.http import trace_exporter as http_spans
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from endpoint import likely_cause

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from embedded.otlp_receiver import OtlpReceiver

# A demo does not wait long for an endpoint that is not there.
TIMEOUT_S = 3


class CountingSpanExporter(SpanExporter):
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


class CountingMetricExporter(MetricExporter):
    """Exports through another exporter and remembers whether everything was accepted."""

    def __init__(self, exporter: MetricExporter) -> None:
        # What the environment says about temporality and buckets is known to the other exporter alone.
        super().__init__(exporter._preferred_temporality, exporter._preferred_aggregation)  # noqa: SLF001
        self.accepted = True
        self._exporter = exporter

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        """Passes the metrics on."""
        result = self._exporter.export(metrics_data, timeout_millis, **kwargs)
        self.accepted = self.accepted and result is MetricExportResult.SUCCESS
        return result

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Flushes the other exporter."""
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Shuts the other exporter down."""
        self._exporter.shutdown(timeout_millis, **kwargs)


@dataclass(frozen=True)
class Outlet:
    """Exporters with the same destination; without `metrics` it takes none."""

    endpoint: str
    protocol: str
    spans: CountingSpanExporter
    metrics: CountingMetricExporter | None

    def statement(self) -> str:
        """What became of the telemetry and, if nothing arrived, the likely cause."""
        accepted = f"{self.spans.accepted} of {self.spans.offered} spans accepted"
        if not self.spans.accepted:
            return (
                f"Sent to {self.endpoint} by {self.protocol}: [red]{accepted}[/]."
                f" {likely_cause(self.endpoint, self.protocol)}"
            )
        colour = "green" if self.spans.accepted == self.spans.offered else "red"
        said = f"Sent to {self.endpoint}: [{colour}]{accepted}[/]"
        if self.metrics is None:
            return f"{said}."
        if self.metrics.accepted:
            return f"{said}, and the metrics."
        return f"{said}, but [red]not the metrics[/]. OTEL_METRICS_EXPORTER=none leaves them out."


def outlets(receiver: OtlpReceiver) -> list[Outlet]:
    """The receiver first, then the endpoint of the environment, if it names one."""
    endpoint = receiver.grpc_endpoint
    found = [
        Outlet(
            endpoint,
            "grpc",
            CountingSpanExporter(grpc_spans.OTLPSpanExporter(endpoint, insecure=True)),
            CountingMetricExporter(grpc_metrics.OTLPMetricExporter(endpoint, insecure=True)),
        )
    ]
    if endpoint := os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""):
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        spans: SpanExporter
        metrics: MetricExporter
        if protocol == "grpc":
            spans = grpc_spans.OTLPSpanExporter(timeout=TIMEOUT_S)
            metrics = grpc_metrics.OTLPMetricExporter(timeout=TIMEOUT_S)
        else:
            spans = http_spans.OTLPSpanExporter(timeout=TIMEOUT_S)
            metrics = http_metrics.OTLPMetricExporter(timeout=TIMEOUT_S)
        no_metrics = os.environ.get("OTEL_METRICS_EXPORTER") == "none"
        counted = None if no_metrics else CountingMetricExporter(metrics)
        found.append(Outlet(endpoint, protocol, CountingSpanExporter(spans), counted))
    return found

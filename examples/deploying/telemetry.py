"""OpenTelemetry for one process: `set_up()` when it starts, `shut_down()` before it ends."""

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from otel_responses_usage import ResponsesUsageInstrumentor


def set_up() -> None:
    """Export spans and metrics over OTLP. Does nothing under `opentelemetry-instrument`."""
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    tracer_provider = TracerProvider()
    tracer_provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(tracer_provider)
    metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())]))
    ResponsesUsageInstrumentor().instrument()


def shut_down() -> None:
    """Wait for pending look-ups, then export all spans and metrics."""
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
        if hasattr(provider, "shutdown"):  # without an SDK there is none
            provider.shutdown()


def flush() -> None:
    """Export all spans and metrics. The process continues."""
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
        if hasattr(provider, "force_flush"):
            provider.force_flush()

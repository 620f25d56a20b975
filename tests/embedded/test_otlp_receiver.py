"""The receiver decodes what the real exporters send."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetrics
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpans
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from embedded.otlp_receiver import OtlpReceiver, Scope

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.trace.export import SpanExporter


def exporters(protocol: str, receiver: OtlpReceiver) -> tuple[SpanExporter, MetricExporter]:
    url = receiver.http_endpoint
    match protocol:
        case "grpc":
            endpoint = receiver.grpc_endpoint
            return GrpcSpans(endpoint, insecure=True), GrpcMetrics(endpoint, insecure=True)
        case "gzip":
            gzip = Compression.Gzip
            return HttpSpans(f"{url}/v1/traces", compression=gzip), HttpMetrics(
                f"{url}/v1/metrics", compression=gzip
            )
        case _:
            return HttpSpans(f"{url}/v1/traces"), HttpMetrics(f"{url}/v1/metrics")


@pytest.mark.parametrize("protocol", ["grpc", "http", "gzip"])
def test_spans_and_metrics_arrive_whole(protocol: str) -> None:
    """A span and three kinds of metric are received with every part that was recorded."""
    resource = Resource({"service.name": "shop"})
    with OtlpReceiver() as receiver:
        spans, metrics = exporters(protocol, receiver)
        tracing, metering = (
            TracerProvider(resource=resource),
            MeterProvider([PeriodicExportingMetricReader(metrics)], resource),
        )
        tracing.add_span_processor(BatchSpanProcessor(spans))
        meter = metering.get_meter("scope", "1.0", "https://example.com/schema")
        with tracing.get_tracer("scope", "1.0", "https://example.com/schema").start_as_current_span(
            "call", kind=trace.SpanKind.CLIENT, attributes={"n": 1, "list": ["a", "b"]}
        ) as span:
            span.add_event("seen", {"x": True})
            span.set_status(trace.StatusCode.ERROR, "broken")
            meter.create_histogram("size", "By", explicit_bucket_boundaries_advisory=[1, 10]).record(
                5, {"k": "v"}
            )
            meter.create_counter("calls", "{call}").add(2)
            meter.create_up_down_counter("open").add(-1.5)
        tracing.shutdown()
        metering.shutdown()
        [received] = receiver.wait_for_spans(1)
        size, calls, is_open = (receiver.wait_for_metric(name) for name in ("size", "calls", "open"))
    context = span.get_span_context()
    scope = Scope("scope", "1.0", "https://example.com/schema")
    assert (received.trace_id, received.span_id) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    assert (received.name, received.kind, received.parent_id) == ("call", "CLIENT", "")
    assert (received.status, received.status_message) == ("ERROR", "broken")
    assert received.attributes == {"n": 1, "list": ("a", "b")}
    assert received.events == (("seen", {"x": True}),)
    assert received.resource["service.name"] == "shop"
    assert received.scope == size.scope == scope
    assert 0 < received.duration_s < 5
    [point] = size.points
    assert (size.unit, size.kind, size.temporality) == ("By", "histogram", "CUMULATIVE")
    assert (point.count, point.sum, point.bounds, point.buckets) == (1, 5, (1, 10), (0, 1, 0))
    assert point.attributes == {"k": "v"}
    assert [exemplar.span_id for exemplar in point.exemplars] == [received.span_id]
    assert (calls.kind, calls.monotonic, calls.points[0].value) == ("sum", True, 2)
    assert (is_open.monotonic, is_open.points[0].value) == (False, -1.5)
    assert any(b"broken" in payload for payload in receiver.payloads)


def test_waiting_in_vain_says_what_came() -> None:
    """A wait that is not fulfilled names what it waited for."""
    with OtlpReceiver() as receiver, pytest.raises(TimeoutError, match="no 1 spans"):
        receiver.wait_for_spans(1, timeout=0.01)

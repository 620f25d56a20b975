"""An OTLP receiver on loopback, gRPC and HTTP, that keeps what arrives in a shape fit for questions."""

from __future__ import annotations

import gzip
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_service
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from embedded.http_server import Reply, ScriptedServer, Send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from typing_extensions import Self

    from embedded.http_server import SeenRequest

Attributes: TypeAlias = dict[str, Any]
ExportRequest: TypeAlias = (
    trace_service.ExportTraceServiceRequest | metrics_service.ExportMetricsServiceRequest
)


@dataclass(frozen=True)
class Scope:
    """The library that speaks."""

    name: str
    version: str
    schema_url: str


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came over the wire; `status` and `kind` by their OTLP names, ids in hex."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    status: str
    status_message: str
    attributes: Attributes
    events: tuple[tuple[str, Attributes], ...]
    resource: Attributes
    scope: Scope

    @property
    def duration_s(self) -> float:
        """From start to end."""
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True)
class Exemplar:
    """A single measurement that points at its span."""

    value: float
    trace_id: str
    span_id: str
    attributes: Attributes


@dataclass(frozen=True)
class Point:
    """One series of a metric: `value` of a sum or gauge, the other numbers of a histogram."""

    attributes: Attributes
    value: float | None
    count: int | None
    sum: float | None
    bounds: tuple[float, ...]
    buckets: tuple[int, ...]
    exemplars: tuple[Exemplar, ...]


@dataclass(frozen=True)
class ReceivedMetric:
    """A metric as last exported; `kind` is histogram, sum or gauge."""

    name: str
    unit: str
    description: str
    kind: str
    monotonic: bool
    temporality: str
    points: tuple[Point, ...]
    resource: Attributes
    scope: Scope


class OtlpReceiver:
    """Receives traces and metrics over real sockets; a context manager.

    `spans` has every span in the order of arrival, `metrics` the latest export of each metric by name,
    `payloads` every request body as received, decompressed, for those who look for what must not be there;
    `requests` has the same, parsed.
    """

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.metrics: dict[str, ReceivedMetric] = {}
        self.payloads: list[bytes] = []
        self.requests: list[ExportRequest] = []
        self._news = threading.Condition()
        self._http = ScriptedServer(self._on_http)
        self._grpc = grpc.server(ThreadPoolExecutor(2, thread_name_prefix="otlp-receiver"))
        self._grpc.add_generic_rpc_handlers(
            (_service("trace.v1.Trace", self._on_traces), _service("metrics.v1.Metrics", self._on_metrics))
        )
        self._grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")

    @property
    def grpc_endpoint(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT with the protocol `grpc`."""
        return f"http://127.0.0.1:{self._grpc_port}"

    @property
    def http_endpoint(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT with the protocol `http/protobuf`."""
        return self._http.url

    def start(self) -> Self:
        """Receives over both protocols when it returns."""
        self._grpc.start()
        self._http.start()
        return self

    def stop(self) -> None:
        """Frees ports and threads; what was received stays."""
        self._http.stop()
        self._grpc.stop(grace=None).wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_for_spans(self, count: int, timeout: float = 10.0) -> list[ReceivedSpan]:
        """All spans, as soon as there are so many; TimeoutError if they do not come."""
        self._wait(lambda: len(self.spans) >= count, f"{count} spans", timeout)
        return list(self.spans)

    def wait_for_metric(self, name: str, timeout: float = 10.0) -> ReceivedMetric:
        """The metric, as soon as it has arrived; TimeoutError if it does not come."""
        self._wait(lambda: name in self.metrics, f"metric {name}", timeout)
        return self.metrics[name]

    def _wait(self, there: Callable[[], bool], what: str, timeout: float) -> None:
        with self._news:
            if not self._news.wait_for(there, timeout):
                raise TimeoutError(
                    f"no {what} within {timeout} s, only {[span.name for span in self.spans]}"
                    f" and {sorted(self.metrics)}"
                )

    def _on_http(self, request: SeenRequest) -> Reply:
        receivers = {"/v1/traces": self._on_traces, "/v1/metrics": self._on_metrics}
        receive = receivers.get(request.path)
        if receive is None or request.method != "POST":
            return Reply.json({"message": f"no {request.method} {request.path} here"}, status=404)
        zipped = request.headers.get("content-encoding") == "gzip"
        answer = receive(gzip.decompress(request.body) if zipped else request.body)
        headers = {"content-type": "application/x-protobuf", "content-length": str(len(answer))}
        return Reply(headers=headers, steps=(Send(answer),), chunked=False)

    def _on_traces(self, body: bytes) -> bytes:
        request = trace_service.ExportTraceServiceRequest.FromString(body)
        spans = spans_of(request)
        with self._news:
            self.payloads.append(body)
            self.requests.append(request)
            self.spans += spans
            self._news.notify_all()
        return trace_service.ExportTraceServiceResponse().SerializeToString()

    def _on_metrics(self, body: bytes) -> bytes:
        request = metrics_service.ExportMetricsServiceRequest.FromString(body)
        metrics = metrics_of(request)
        with self._news:
            self.payloads.append(body)
            self.requests.append(request)
            self.metrics.update((metric.name, metric) for metric in metrics)
            self._news.notify_all()
        return metrics_service.ExportMetricsServiceResponse().SerializeToString()


def spans_of(request: trace_service.ExportTraceServiceRequest) -> list[ReceivedSpan]:
    """The spans of one export."""
    return [
        _span(span, of_resource.resource, of_scope)
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def metrics_of(request: metrics_service.ExportMetricsServiceRequest) -> list[ReceivedMetric]:
    """The metrics of one export."""
    return [
        _metric(metric, of_resource.resource, of_scope)
        for of_resource in request.resource_metrics
        for of_scope in of_resource.scope_metrics
        for metric in of_scope.metrics
    ]


def _service(name: str, receive: Callable[[bytes], bytes]) -> grpc.GenericRpcHandler:
    # Without a deserializer the handler is given the bytes, as over HTTP.
    export: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
        lambda body, _context: receive(body)
    )
    return grpc.method_handlers_generic_handler(
        f"opentelemetry.proto.collector.{name}Service", {"Export": export}
    )


def _span(span: trace_pb2.Span, resource: Resource, of_scope: trace_pb2.ScopeSpans) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_message=span.status.message,
        attributes=_attributes(span.attributes),
        events=tuple((event.name, _attributes(event.attributes)) for event in span.events),
        resource=_attributes(resource.attributes),
        scope=_scope(of_scope),
    )


def _metric(
    metric: metrics_pb2.Metric, resource: Resource, of_scope: metrics_pb2.ScopeMetrics
) -> ReceivedMetric:
    kind = metric.WhichOneof("data")
    data: Any = getattr(metric, kind) if kind else metrics_pb2.Gauge()
    temporality = getattr(data, "aggregation_temporality", metrics_pb2.AGGREGATION_TEMPORALITY_UNSPECIFIED)
    return ReceivedMetric(
        name=metric.name,
        unit=metric.unit,
        description=metric.description,
        kind=kind or "empty",
        monotonic=getattr(data, "is_monotonic", False),
        temporality=metrics_pb2.AggregationTemporality.Name(temporality).removeprefix(
            "AGGREGATION_TEMPORALITY_"
        ),
        points=tuple(map(_point, data.data_points)),
        resource=_attributes(resource.attributes),
        scope=_scope(of_scope),
    )


def _point(point: metrics_pb2.NumberDataPoint | metrics_pb2.HistogramDataPoint) -> Point:
    exemplars = tuple(
        Exemplar(
            value=_number(exemplar),
            trace_id=exemplar.trace_id.hex(),
            span_id=exemplar.span_id.hex(),
            attributes=_attributes(exemplar.filtered_attributes),
        )
        for exemplar in point.exemplars
    )
    if isinstance(point, metrics_pb2.NumberDataPoint):
        return Point(_attributes(point.attributes), _number(point), None, None, (), (), exemplars)
    return Point(
        attributes=_attributes(point.attributes),
        value=None,
        count=point.count,
        sum=point.sum,
        bounds=tuple(point.explicit_bounds),
        buckets=tuple(point.bucket_counts),
        exemplars=exemplars,
    )


def _number(holder: metrics_pb2.NumberDataPoint | metrics_pb2.Exemplar) -> float:
    return holder.as_int if holder.WhichOneof("value") == "as_int" else holder.as_double


def _scope(of_scope: trace_pb2.ScopeSpans | metrics_pb2.ScopeMetrics) -> Scope:
    return Scope(of_scope.scope.name, of_scope.scope.version, of_scope.schema_url)


def _attributes(pairs: Iterable[KeyValue]) -> Attributes:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return tuple(map(_value, value.array_value.values))
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case kind:
            return getattr(value, kind)

"""The demo's calls, sent through the Collector to Jaeger and read back as Jaeger's page reads them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_PROTOCOL,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.console import Console

from acts import ACTS
from demo import perform
from embedded.otlp_receiver import OtlpReceiver, ReceivedSpan
from outlets import outlets
from programs import Collector, Jaeger, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVICE = "otel-responses-usage-demo"
SPANS = 2 * len(ACTS) + 1  # one around each call, one for each call, one for the resumed stream


@dataclass(frozen=True)
class Told:
    """What the SDK exported, and what Jaeger has of it; by span id."""

    exported: dict[str, ReceivedSpan]
    shown: dict[str, dict[str, Any]]
    processes: list[dict[str, Any]]


@pytest.fixture(scope="module", params=["grpc", "http/protobuf"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """The demo, over each of the protocols, to the receiver that decodes OTLP and to the Collector."""
    directory = tmp_path_factory.mktemp("jaeger")
    with (
        pytest.MonkeyPatch.context() as patch,
        Jaeger(directory / "jaeger") as jaeger,
        Collector(directory / "collector", JAEGER_OTLP_ENDPOINT=jaeger.otlp_endpoint) as collector,
        OtlpReceiver() as receiver,
    ):
        by_http = request.param != "grpc"
        endpoint = collector.http_endpoint if by_http else f"http://{collector.grpc_endpoint}"
        patch.setenv(OTEL_EXPORTER_OTLP_ENDPOINT, endpoint)
        patch.setenv(OTEL_EXPORTER_OTLP_PROTOCOL, request.param)
        perform(Console(file=io.StringIO()), outlets(receiver))
        exported = receiver.wait_for_spans(SPANS)
        wait_until(lambda: len(jaeger.spans(SERVICE)) == SPANS, f"{SPANS} spans in Jaeger")
        traces = jaeger.traces(SERVICE)
        yield Told(
            {span.span_id: span for span in exported},
            {span["spanID"]: span for trace in traces for span in trace["spans"]},
            [process for trace in traces for process in trace["processes"].values()],
        )


def tags(span: dict[str, Any]) -> dict[str, Any]:
    """A span's tags; Jaeger shows a list as JSON."""
    return {tag["key"]: tag["value"] for tag in span["tags"]}


def expected_tags(span: ReceivedSpan) -> dict[str, Any]:
    """The attributes, and what Jaeger says in tags of its own: kind, status and scope."""
    attributes = {
        name: json.dumps(value, separators=(",", ":")) if isinstance(value, tuple) else value
        for name, value in span.attributes.items()
    }
    scope = {"otel.scope.name": span.scope.name, "otel.scope.version": span.scope.version}
    error = {"error": True, "otel.status_code": "ERROR"} if span.status == "ERROR" else {}
    return {
        **attributes,
        **{name: value for name, value in scope.items() if value},
        "span.kind": span.kind.lower(),
        **error,
    }


def test_every_span_is_there_once_under_its_name(told: Told) -> None:
    """Jaeger has the spans that were exported, by id and name, and no others."""
    names = {span_id: span.name for span_id, span in told.exported.items()}
    assert len(names) == SPANS
    assert {span_id: span["operationName"] for span_id, span in told.shown.items()} == names


def test_tags_say_kind_status_and_every_attribute(told: Told) -> None:
    """Each span's tags are its attributes, its kind and its status, with nothing masked and nothing added."""
    assert {span_id: tags(span) for span_id, span in told.shown.items()} == {
        span_id: expected_tags(span) for span_id, span in told.exported.items()
    }


def test_a_call_hangs_below_the_span_that_made_it(told: Told) -> None:
    """A call's span refers to the application's span around it, in the same trace."""
    parents = {
        span_id: [(reference["refType"], reference["traceID"], reference["spanID"])]
        for span_id, span in told.shown.items()
        for reference in span["references"]
    }
    assert parents == {
        span_id: [("CHILD_OF", span.trace_id, span.parent_id)]
        for span_id, span in told.exported.items()
        if span.parent_id
    }
    assert len(parents) == len(ACTS) + 1


def test_a_span_has_the_times_of_its_stream(told: Told) -> None:
    """Start and duration are the stream's to the microsecond, also where the look-up took longer."""
    assert {span_id: (span["startTime"], span["duration"]) for span_id, span in told.shown.items()} == {
        span_id: (span.start_ns // 1000, (span.end_ns - span.start_ns) // 1000)
        for span_id, span in told.exported.items()
    }
    looked_up = [span for span in told.shown.values() if "openai_responses.retrieval.duration" in tags(span)]
    assert len(looked_up) >= 3
    for span in looked_up:
        parent = told.shown[span["references"][0]["spanID"]]
        # The application was done before the answer to the look-up was there.
        assert span["startTime"] + span["duration"] <= parent["startTime"] + parent["duration"]


def test_the_tokens_of_calls_that_ended_early_can_be_searched(told: Told) -> None:
    """Streams that were cut, closed and cancelled have their tokens, as integers."""
    known = {
        (tags(span)["openai_responses.stream.outcome"], tags(span)["openai_responses.usage.source"])
        for span in told.shown.values()
        if "gen_ai.usage.output_tokens" in tags(span)
    }
    assert known >= {("cut", "retrieval"), ("closed", "retrieval"), ("cancelled", "retrieval")}
    types = {
        tag["type"]
        for span in told.shown.values()
        for tag in span["tags"]
        if tag["key"].startswith("gen_ai.usage.")
    }
    assert types == {"int64"}


def test_jaeger_names_the_service_and_its_instance(told: Told) -> None:
    """All spans are those of one process of the demo."""
    assert {process["serviceName"] for process in told.processes} == {SERVICE}
    instances = {tags(process).get("service.instance.id") for process in told.processes}
    assert len(instances) == 1


def test_a_span_that_is_sent_twice_is_there_once(tmp_path: Path) -> None:
    """What is sent again, because nobody knows whether it arrived, is stored under the same id."""
    spans = InMemorySpanExporter()
    tracing = TracerProvider(resource=Resource.create({"service.name": "twice"}))
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    tracing.get_tracer("twice").start_span("once").end()
    with Jaeger(tmp_path) as jaeger:
        exporter = OTLPSpanExporter(f"http://{jaeger.otlp_endpoint}", insecure=True)
        for _ in range(2):
            assert exporter.export(spans.get_finished_spans()) is SpanExportResult.SUCCESS
        exporter.shutdown()
        assert [span["operationName"] for span in jaeger.spans("twice")] == ["once"]

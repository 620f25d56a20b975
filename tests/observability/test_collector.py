"""The Collector configuration: a real Collector takes it, and passes on what it should and nothing else."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc_metrics
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc_spans
from opentelemetry.exporter.otlp.proto.http import metric_exporter as http_metrics
from opentelemetry.exporter.otlp.proto.http import trace_exporter as http_spans
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_PROTOCOL,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from rich.console import Console

from demo import perform
from embedded.otlp_receiver import OtlpReceiver, ReceivedSpan
from outlets import outlets
from programs import COLLECTOR_CONFIG, ROOT, Collector, run, samples, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT = COLLECTOR_CONFIG.read_text("utf-8")
CONFIG: dict[str, Any] = yaml.safe_load(TEXT)
SERVICE = CONFIG["service"]
PIPELINES = SERVICE["pipelines"]
MANIFEST = yaml.safe_load((ROOT / "collector-builder.yaml").read_text("utf-8"))
OPEN_METRICS = "application/openmetrics-text"
# Prometheus 3 could do with dots in names.
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,*/*;q=0.2"
)
DEFAULT = re.compile(r"\$\{env:(\w+):-([^}]*)\}")

# What other libraries may put on their spans, by what must become of it.
MASKED = {
    "gen_ai.input.messages": '[{"role": "user", "parts": [{"content": "canary-question"}]}]',
    "gen_ai.prompt.0.content": "canary-prompt",
    "gen_ai.content.prompt": "canary-content",
    "gen_ai.event.content": "canary-event",
    "gen_ai.tool.call.arguments": '{"city": "canary-city"}',
    "llm.output_messages.0.message.content": "canary-output",
    "llm.prompt_template.variables": '{"city": "canary-variable"}',
    "output.value": "canary-value",
    "tool.parameters": '{"city": "canary-parameter"}',
    "request_data": '{"input": "canary-request"}',
    "response_data": '{"message": "canary-response"}',
    "http.request.body": '{"input": "canary-body"}',
    "http.request.header.authorization": ("Token canary-header",),
    "http.request.header.x-auth-token": ("canary-auth",),
    "http.request.header.x_session_token": ("canary-session",),
    "http.request.header.x-amz-security-token": ("canary-security",),
    "db.password": "canary-password",
    "my.api_key": "canary-api-key",
    "note": "with sk-proj-canaryKey01 in it",
    "argv": ("--key", "sk-canaryKey0002"),
    "header": "Bearer canary.bearer.0001",
    "jwt": "eyJcanaryhead.eyJcanarybody.canarysign",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\ncanary-pem\n-----END RSA PRIVATE KEY-----",
    "dsn": "postgres://shop:canary-pass@db/shop",
    "payload": 'before {"role": "assistant", "content": "canary-answer"} after',
    "printed": "[{'role': 'user', 'content': 'canary-repr'}]",
    "aws": "AKIACANARYCANARYCANA",
}
UNTOUCHED = {
    "gen_ai.token.type": "input",
    "gen_ai.usage.input_tokens": 7,
    "gen_ai.conversation.id": "conv_sk",
    "gen_ai.response.finish_reasons": ("stop",),
    "gen_ai.output.type": "text",
    "code.function.name": "task-scheduler-of-basic-things",
    "http.request.body.size": 70,
    "url.full": "https://api.example/v1/responses",
    "secretary": True,
    "ratio": 0.5,
}


def by_default(value: object) -> str:
    """A value as it is where no environment variable is set."""
    return DEFAULT.sub(r"\2", str(value))


def endpoints(node: object) -> list[str]:
    """Every address that something listens on or sends to, at any depth."""
    if isinstance(node, list):
        return [endpoint for item in node for endpoint in endpoints(item)]
    if not isinstance(node, dict):
        return []
    own = [node["endpoint"]] if "endpoint" in node else []
    own += [f"{node['host']}:{node['port']}"] if "host" in node else []
    return own + [endpoint for item in node.values() for endpoint in endpoints(item)]


@dataclass(frozen=True)
class Passed:
    """A Collector that runs, and what it passes on."""

    collector: Collector
    receiver: OtlpReceiver


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Passed]:
    """The Collector as configured, with a receiver in Jaeger's place, after the demo's calls."""
    directory = tmp_path_factory.mktemp("collector")
    with (
        OtlpReceiver() as jaeger,
        OtlpReceiver() as receiver,
        Collector(directory, JAEGER_OTLP_ENDPOINT=jaeger.grpc_endpoint.removeprefix("http://")) as collector,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(OTEL_EXPORTER_OTLP_ENDPOINT, f"http://{collector.grpc_endpoint}")
        patch.setenv(OTEL_EXPORTER_OTLP_PROTOCOL, "grpc")
        perform(Console(file=io.StringIO()), outlets(receiver))
        yield Passed(collector, jaeger)


def send(spans: SpanExporter, metrics: MetricExporter, attributes: dict[str, Any]) -> None:
    """Send a span and a count with these attributes everywhere that attributes can be."""
    resource = Resource.create({"service.name": "canaries", **attributes})
    tracing = TracerProvider(resource=resource)
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    with tracing.get_tracer("canaries").start_as_current_span("canary", attributes=attributes) as span:
        span.add_event("exception", attributes)
    metering = MeterProvider([PeriodicExportingMetricReader(metrics)], resource)
    metering.get_meter("canaries").create_counter("canaries").add(1, attributes)
    tracing.shutdown()
    metering.shutdown()


@pytest.fixture(scope="module", params=["grpc", "http/protobuf"])
def canary(request: pytest.FixtureRequest, passed: Passed) -> ReceivedSpan:
    """A span with everything that must be masked, and with what must not, as it came out of the Collector."""
    spans: SpanExporter
    metrics: MetricExporter
    before = len(passed.receiver.spans)
    if request.param == "grpc":
        endpoint = f"http://{passed.collector.grpc_endpoint}"
        spans = grpc_spans.OTLPSpanExporter(endpoint, insecure=True)
        metrics = grpc_metrics.OTLPMetricExporter(endpoint, insecure=True)
    else:
        endpoint = passed.collector.http_endpoint
        spans = http_spans.OTLPSpanExporter(f"{endpoint}/v1/traces")
        metrics = http_metrics.OTLPMetricExporter(f"{endpoint}/v1/metrics")
    send(spans, metrics, MASKED | UNTOUCHED)
    return passed.receiver.wait_for_spans(before + 1)[-1]


def test_the_collector_takes_the_configuration() -> None:
    """`otelcol validate` has nothing to say."""
    assert run("otelcol", "validate", f"--config={COLLECTOR_CONFIG}") == ""


def test_the_manifest_and_the_pinned_modules_agree() -> None:
    """What ocb is told to take is what go.mod pins, version by version."""
    modules = [
        module["gomod"].split() for part in MANIFEST.values() if isinstance(part, list) for module in part
    ]
    text = (ROOT / "scripts" / "programs" / "otelcol" / "go.mod").read_text("utf-8")
    required = dict(line.split()[:2] for line in text.splitlines() if line.startswith("\t"))
    assert modules
    assert {module: required.get(module) for module, _ in modules} == dict(modules)


@pytest.mark.parametrize("kind", ["receivers", "processors", "exporters"])
def test_every_component_is_used(kind: str) -> None:
    """What is configured is in a pipeline."""
    used = {name for pipeline in PIPELINES.values() for name in pipeline[kind]}
    assert set(CONFIG[kind]) <= used


@pytest.mark.parametrize("signal", ["traces", "metrics"])
def test_memory_is_limited_and_content_masked_before_anything_else(signal: str) -> None:
    """Of what is received the memory limiter sees everything first, and redaction second."""
    assert PIPELINES[signal]["receivers"] == ["otlp"]
    assert PIPELINES[signal]["processors"] == ["memory_limiter", "redaction"]


def test_what_is_sent_on_is_queued_on_disk_in_batches_that_fit_and_never_given_up() -> None:
    """The queue is in a storage; a batch is below the 4 MiB that a gRPC server takes; retries have no end."""
    settings = CONFIG["exporters"]["otlp_grpc/jaeger"]
    queue, retry = settings["sending_queue"], settings["retry_on_failure"]
    assert queue["storage"] in SERVICE["extensions"]
    assert queue["sizer"] == "bytes"
    assert queue["batch"]["min_size"] <= queue["batch"]["max_size"] < 4 * 1024 * 1024
    assert retry["max_elapsed_time"] == "0s"
    assert not [name for name in CONFIG["processors"] if name.partition("/")[0] == "batch"]


def test_every_address_is_on_loopback_and_can_be_set() -> None:
    """By default nothing leaves loopback; each address is an environment variable, and no two are equal."""
    found = endpoints(CONFIG)
    addresses = [by_default(endpoint) for endpoint in found]
    assert len(found) == 6
    assert all(DEFAULT.match(endpoint) for endpoint in found)
    assert {address.rpartition(":")[0] for address in addresses} == {"localhost"}
    assert len(set(addresses)) == len(addresses)


def test_one_variable_has_one_default() -> None:
    """A variable that is used twice means the same in both places."""
    defaults: dict[str, set[str]] = {}
    for variable, default in DEFAULT.findall(TEXT):
        defaults.setdefault(variable, set()).add(default)
    assert {variable: values for variable, values in defaults.items() if len(values) > 1} == {}


@pytest.mark.parametrize("name", MASKED)
def test_what_looks_like_a_key_or_content_is_masked(canary: ReceivedSpan, name: str) -> None:
    """Of an attribute with a key, a password or a message in it nothing of that is left."""
    for attributes in (canary.attributes, canary.resource, canary.events[0][1]):
        assert "canary" not in str(attributes[name]).lower()
        assert "****" in str(attributes[name])


def test_everything_else_passes_unchanged(canary: ReceivedSpan) -> None:
    """Names that only resemble those of secrets, numbers and lists are what they were."""
    for attributes in (canary.attributes, canary.resource, canary.events[0][1]):
        assert {name: attributes[name] for name in UNTOUCHED} == UNTOUCHED
        assert attributes["redaction.masked.count"] == len(MASKED)


def test_labels_are_masked_too(canary: ReceivedSpan, passed: Passed) -> None:
    """A label of a metric is no way around the second wall."""
    assert canary
    wait_until(lambda: "canaries_total" in passed.collector.scrape(), "counter of the canaries")
    labels = passed.collector.scrape(OPEN_METRICS)
    assert "canary-" not in labels
    assert "sk-proj" not in labels


METRICS = {
    "gen_ai_client_token_usage_sum": {"gen_ai_token_type": "output", "gen_ai_request_model": "gpt-5.4-mini"},
    "gen_ai_client_token_usage_bucket": {"gen_ai_token_type": "input"},
    "gen_ai_client_operation_duration_seconds_count": {"error_type": "RemoteProtocolError"},
    "gen_ai_client_operation_time_to_first_chunk_seconds_count": {"gen_ai_provider_name": "openai"},
    "gen_ai_client_operation_time_per_output_chunk_seconds_count": {"server_address": "127.0.0.1"},
    "openai_responses_calls_total": {"openai_responses_stream_outcome": "closed"},
    "openai_responses_retrieval_duration_seconds_count": {"openai_responses_retrieval_result": "retrieval"},
}


@pytest.mark.parametrize("accept", [OPEN_METRICS, PROMETHEUS_3, "text/plain"])
@pytest.mark.parametrize("name", METRICS)
def test_prometheus_finds_the_metrics_under_their_names(passed: Passed, name: str, accept: str) -> None:
    """Names and labels are those that dashboards and alerts ask for, and `job` is the service."""
    wait_until(lambda: "gen_ai_client_token_usage" in passed.collector.scrape(), "metric of the demo")
    labels = METRICS[name] | {"job": "otel-responses-usage-demo"}
    assert samples(passed.collector.scrape(accept), name, **labels) > 0


def test_exemplars_lead_to_spans(passed: Passed) -> None:
    """In the OpenMetrics format a bucket of the token histogram names the trace of a call."""
    wait_until(lambda: "gen_ai_client_token_usage" in passed.collector.scrape(), "metric of the demo")
    exemplar = re.compile(
        r'^gen_ai_client_token_usage_bucket\{.* # \{trace_id="(\w+)",span_id="(\w+)"\}', re.MULTILINE
    )
    found = set(exemplar.findall(passed.collector.scrape(OPEN_METRICS)))
    assert found
    assert found <= {(span.trace_id, span.span_id) for span in passed.receiver.spans}


def test_cached_tokens_are_counted_from_spans(passed: Passed) -> None:
    """Input tokens and the cached ones are counters by service, model and tier, over the demo's calls."""
    labels = {"gen_ai_request_model": "gpt-5.4-mini", "openai_response_service_tier": "default"}
    for metric, attribute in {
        "openai_responses_spans_input_tokens_total": "gen_ai.usage.input_tokens",
        "openai_responses_spans_cached_input_tokens_total": "gen_ai.usage.cache_read.input_tokens",
    }.items():

        def is_counted(metric: str = metric, attribute: str = attribute) -> bool:
            told = [span.attributes for span in passed.receiver.spans if span.name == "chat gpt-5.4-mini"]
            total = sum(attributes.get(attribute, 0) for attributes in told)
            counted = samples(passed.collector.scrape(), metric, job="otel-responses-usage-demo", **labels)
            return 0 < total == counted

        wait_until(is_counted, f"sum of {attribute} in {metric}")


def test_spans_are_counted_by_what_decides_the_price(passed: Passed) -> None:
    """Calls, compactions and usage spans count by tier and window. The sum on an agent's span does not."""
    before = len(passed.receiver.spans)
    tracing = TracerProvider(resource=Resource.create({"service.name": "cached"}))
    exporter = grpc_spans.OTLPSpanExporter(f"http://{passed.collector.grpc_endpoint}", insecure=True)
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    counts = {
        "gen_ai.usage.input_tokens": 1000,
        "gen_ai.usage.cache_read.input_tokens": 100,
        "gen_ai.usage.cache_write.input_tokens": 10,
    }
    flex = {"openai.response.service_tier": "flex"}
    window = {"openai_responses.request.completion_window": "2h"}
    looked_up = {"openai_responses.usage.source": "retrieval", "gen_ai.usage.output_tokens": 7}
    tenant = {"tenant.id": "acme"}
    for name, attributes in (
        ("chat m", {"gen_ai.operation.name": "chat", **counts, **flex}),
        ("chat m", {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 1000, **flex}),
        ("compact m", {"gen_ai.operation.name": "compact", **counts}),
        ("usage m", {**counts, **window, **looked_up, **tenant}),  # it has no operation
        ("invoke_agent a", {"gen_ai.operation.name": "invoke_agent", **counts}),
        ("fetch_response", {"gen_ai.operation.name": "fetch_response"}),
    ):
        span = tracing.get_tracer("cached").start_span(name, attributes=attributes)
        span.set_attribute("gen_ai.request.model", "m")
        span.end()
    tracing.shutdown()
    passed.receiver.wait_for_spans(before + 6)
    tier, of_window = "openai_response_service_tier", "openai_responses_request_completion_window"

    def counted(kind: str, **labels: str) -> float:
        name = f"openai_responses_spans_{kind}_total"
        return samples(passed.collector.scrape(), name, job="cached", gen_ai_request_model="m", **labels)

    wait_until(lambda: counted("input_tokens") == 4000, "input tokens of four spans")
    assert [counted(kind) for kind in ("cached_input_tokens", "cache_write_input_tokens")] == [300, 30]
    assert counted("input_tokens", **{tier: "flex"}) == 2000
    assert counted("cached_input_tokens", **{tier: "flex"}) == 100
    assert counted("cache_write_input_tokens", **{of_window: "2h"}) == 10
    assert counted("cached_input_tokens", tenant_id="acme") == 100
    assert counted("input_tokens", tenant_id="acme") == 0
    assert counted("recovered_tokens") == counted("recovered_tokens", tenant_id="acme") == 1007


def test_the_collector_tells_how_it_is(passed: Passed) -> None:
    """Its own metrics say what was accepted, sent and queued, by the names that docs/reliability.md gives."""
    received = len(passed.receiver.spans)
    assert passed.collector.metric("otelcol_receiver_accepted_spans", receiver="otlp") == received
    sent = {"exporter": "otlp_grpc/jaeger"}
    wait_until(
        lambda: passed.collector.metric("otelcol_exporter_sent_spans", **sent) == received,
        "count of spans sent",
    )
    assert passed.collector.metric("otelcol_exporter_queue_capacity") == 1e9
    assert passed.collector.metric("otelcol_exporter_queue_size") == 0
    assert passed.collector.metric("otelcol_receiver_refused_spans") == 0

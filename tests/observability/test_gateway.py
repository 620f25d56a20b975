"""A tier of gateways: one that is killed costs nothing, and sampling keeps what matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai
import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import StatusCode

from embedded.answer import Answer, usage
from embedded.http_server import Cut, Reply, ScriptedServer, SeenRequest
from embedded.otlp_receiver import OtlpReceiver, ReceivedSpan
from embedded.responses_api import Plan, ResponsesAPI, error
from otel_responses_usage import ResponsesUsageInstrumentor
from programs import COLLECTOR_CONFIG, ROOT, Collector, Jaeger, free_port, run, samples, wait_until
from traffic import Traffic, show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GATEWAYS = ROOT / "examples" / "gateway"
GATEWAY = GATEWAYS / "gateway.yaml"
TAIL_SAMPLING = GATEWAYS / "tail-sampling.yaml"
AGENT = (COLLECTOR_CONFIG, GATEWAYS / "agent.yaml")
NAME = "gateway.test"


@pytest.mark.parametrize(
    "files", [AGENT, (GATEWAY,), (GATEWAY, TAIL_SAMPLING)], ids=lambda files: files[-1].stem
)
def test_the_collector_takes_the_configuration(files: tuple[Path, ...]) -> None:
    """`otelcol validate` has nothing to say of what is laid over one another."""
    assert run("otelcol", "validate", *(f"--config={file}" for file in files)) == ""


def test_a_gateway_that_is_killed_under_load_costs_nothing(tmp_path: Path) -> None:
    """The agent spreads over the addresses of a name and goes on with one less; what that had comes later."""
    port = free_port()
    addresses = ("127.0.0.1", "127.0.0.2")
    jaeger = Jaeger(tmp_path / "jaeger")
    gateways = [
        Collector(
            tmp_path / address,
            GATEWAY,
            OTLP_GRPC_ENDPOINT=f"{address}:{port}",
            JAEGER_OTLP_ENDPOINT=jaeger.otlp_endpoint,
        )
        for address in addresses
    ]
    first, second = gateways
    agent = Collector(tmp_path / "agent", *AGENT, GATEWAY_ENDPOINT=f"dns:///{NAME}:{port}")
    agent.hosts = {NAME: addresses}
    with jaeger, first, second, agent, Traffic(agent.grpc_endpoint) as traffic:
        traffic.run(4)
        shares = [gateway.metric("otelcol_receiver_accepted_spans") for gateway in gateways]
        first.kill()
        traffic.burst(3000)
        traffic.run(2)
        after = second.metric("otelcol_receiver_accepted_spans")
        first.start()
        traffic.finish()
        sent = traffic.spans
        arrived = jaeger.wait_for("busy", len(sent))
        tokens = {
            kind: samples(agent.scrape(), "gen_ai_client_token_usage_sum", gen_ai_token_type=kind)
            for kind in ("input", "output")
        }
    show(
        f"Gateway killed: {len(sent)} spans in, {len(arrived)} out; by the two gateways {shares[0]:.0f} and"
        f" {shares[1]:.0f} before, {after - shares[1]:.0f} by the other while it was alone"
    )
    assert arrived == sent
    assert min(shares) > 0
    assert after > shares[1]
    assert tokens == traffic.tokens


@dataclass(frozen=True)
class Kind:
    """A kind of call: how many are made, what the server does about each, and how many must be kept."""

    calls: int
    plan: Callable[[], Plan | Reply]
    kept: range


def plan(input_tokens: int = 100, output_tokens: int = 30, **fate: Any) -> Plan:
    """What the server does about one call, with a response id of its own."""
    return Plan(Answer(("It ", "is."), usage(input_tokens, output_tokens)), **fate)


ALL = range(5, 6)
KINDS = {
    # Told late: the look-up takes longer than the span around the call needs to arrive.
    "cut": Kind(5, lambda: plan(cut_after=5, end=Cut(), get_replies=("in_progress",) * 4), ALL),
    # A fifth is asked for below.
    "ordinary": Kind(300, plan, range(30, 91)),
    "failed": Kind(5, lambda: error(500, "Something broke.", code="server_error"), ALL),
    "unmetered": Kind(5, lambda: Plan(Answer(("It ", "is."), None)), ALL),
    # Its usage is not missing for good, so it is one of the others.
    "deferred": Kind(100, plan, range(5, 41)),
    "costly": Kind(5, lambda: plan(output_tokens=50_000), ALL),
    "long": Kind(5, lambda: plan(input_tokens=500_000), ALL),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[ReceivedSpan]]]:
    """The spans that came out of a gateway that samples, by the kind of the call in their trace."""
    with (
        OtlpReceiver() as jaeger,
        Collector(
            tmp_path_factory.mktemp("gateway"),
            GATEWAY,
            TAIL_SAMPLING,
            JAEGER_OTLP_ENDPOINT=jaeger.grpc_endpoint.removeprefix("http://"),
            TAIL_DECISION_WAIT="4s",
            TAIL_PERCENTAGE="20",
        ) as gateway,
    ):
        make_calls(gateway.grpc_endpoint)
        traces = sum(kind.calls for kind in KINDS.values())
        decided = "otelcol_processor_tail_sampling_global_count_traces_sampled"
        wait_until(lambda: gateway.metric(decided) == traces, f"decision about {traces} traces")
        # A trace has two spans.
        jaeger.wait_for_spans(2 * int(gateway.metric(decided, decision="sampled")))
        kinds = {span.trace_id: span.name for span in jaeger.spans if not span.parent_id}
        spans: dict[str, list[ReceivedSpan]] = {kind: [] for kind in KINDS}
        for span in jaeger.spans:
            spans[kinds[span.trace_id]].append(span)
        yield spans


def make_calls(endpoint: str) -> None:
    """Make every call in a trace of its own, below a span that has the name of its kind and arrives first."""
    tracing, metering = TracerProvider(), MeterProvider()
    exporter = OTLPSpanExporter(f"http://{endpoint}", insecure=True)
    tracing.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=100))
    tracer = tracing.get_tracer("gateway")

    def choose(request: SeenRequest) -> Plan | Reply:
        return KINDS[request.json["input"]].plan()

    with ScriptedServer(ResponsesAPI(choose)) as server:
        ResponsesUsageInstrumentor().instrument(tracer_provider=tracing, meter_provider=metering)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-gateway", max_retries=0) as client:
            for kind, calls in ((kind, KINDS[kind].calls) for kind in KINDS):
                for _ in range(calls):
                    with tracer.start_as_current_span(kind):
                        call(client, kind)
        ResponsesUsageInstrumentor().uninstrument()
    tracing.shutdown()
    metering.shutdown()


def call(client: openai.OpenAI, kind: str) -> None:
    try:
        if kind == "deferred":
            window = {"background_options": {"completion_window": "2h"}}
            client.responses.create(model="gpt-5.4-mini", input=kind, background=True, extra_body=window)
            return
        for _ in client.responses.create(model="gpt-5.4-mini", input=kind, stream=True):
            pass
    except openai.OpenAIError:
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_keeps_what_matters_and_a_share_of_the_rest(
    kept: dict[str, list[ReceivedSpan]], kind: str
) -> None:
    """Every failed, cut, unmetered and expensive call is kept, and of the others about a fifth, as told."""
    calls = [span for span in kept[kind] if span.parent_id]
    assert len(calls) in KINDS[kind].kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_is_kept_whole_or_not_at_all(kept: dict[str, list[ReceivedSpan]], kind: str) -> None:
    """Of each trace both spans are there, however much later one of them came."""
    by_trace: dict[str, list[Any]] = {}
    for span in kept[kind]:
        by_trace.setdefault(span.trace_id, []).append(span)
    assert {len(spans) for spans in by_trace.values()} == {2}


def test_the_decision_waits_for_the_look_up(kept: dict[str, list[ReceivedSpan]]) -> None:
    """Calls whose usage took more than a second to look up came later than their callers, and in time."""
    calls = [span.attributes for span in kept["cut"] if span.parent_id]
    assert min(attributes["openai_responses.retrieval.duration"] for attributes in calls) > 1


def test_a_gateway_that_is_stopped_decides_first(tmp_path: Path) -> None:
    """On SIGTERM no trace waits out its time: those to be kept are sent, or sent after the restart."""
    tracing = TracerProvider()
    with OtlpReceiver() as jaeger:
        endpoint = jaeger.grpc_endpoint.removeprefix("http://")
        gateway = Collector(tmp_path, GATEWAY, TAIL_SAMPLING, JAEGER_OTLP_ENDPOINT=endpoint)
        with gateway:
            exporter = OTLPSpanExporter(f"http://{gateway.grpc_endpoint}", insecure=True)
            tracing.add_span_processor(BatchSpanProcessor(exporter))
            for _ in range(200):
                span = tracing.get_tracer("gateway").start_span("failed")
                span.set_status(StatusCode.ERROR)
                span.end()
            tracing.shutdown()
            assert jaeger.spans == []
        with gateway:
            assert len({span.span_id for span in jaeger.wait_for_spans(200)}) == 200

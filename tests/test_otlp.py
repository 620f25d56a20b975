"""What a service exports over OTLP, decoded from what arrived on the other side of a real socket.

An application runs in a process of its own. It makes calls to a server on loopback and sends its telemetry
to a receiver on loopback: with not a line of code (`opentelemetry-instrument`) or set up by hand, over gRPC
or HTTP. The tests ask the receiver.
"""

from __future__ import annotations

import bisect
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from embedded.answer import Answer, usage
from embedded.http_server import Cut, Exchange, Hold, Pause, Reply, ScriptedServer, SeenRequest
from embedded.otlp_receiver import OtlpReceiver, Point, ReceivedMetric, ReceivedSpan, Scope
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import HANGING_S, usage_attributes

MODEL = "gpt-5.4-mini"
SCOPE = Scope(
    "otel_responses_usage", version("otel-responses-usage"), "https://opentelemetry.io/schemas/1.37.0"
)

PROMPT = "canary-prompt-5e1c"
ANSWER = "canary-answer-b07d"
REASONING = "canary-reasoning-93fa"
KEY = "sk-canary-key-c44e"
CANARIES = (PROMPT, ANSWER, REASONING, KEY)

CALLS = ("whole", "closed", "cut")
# What the server bills for each.
BILLED = {
    "whole": usage(1201, 345, cached=1024, reasoning=128),
    "closed": usage(87, 612, cache_write=64),
    "cut": usage(4099, 9),
}
# A look-up that outlives its application's main part by a while.
STILL_AT_WORK = ("in_progress", "in_progress")

ZERO_CODE = """
from opentelemetry import trace

tracer = trace.get_tracer("shop")
"""

BY_HAND = """
from opentelemetry.exporter.otlp.proto.{package}.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.{package}.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from otel_responses_usage import ResponsesUsageInstrumentor

tracer_provider = TracerProvider()
tracer_provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
meter_provider = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
ResponsesUsageInstrumentor().instrument(tracer_provider=tracer_provider, meter_provider=meter_provider)
tracer = tracer_provider.get_tracer("shop")
"""

FAULTY_PROCESSOR = """
from opentelemetry.sdk.trace import SpanProcessor

class Faulty(SpanProcessor):
    def on_end(self, span):
        if span.name != "checkout":
            raise RuntimeError("no disk")

tracer_provider.add_span_processor(Faulty())
"""

APP = """
import logging
import sys
import time

from openai import OpenAI, OpenAIError

logging.getLogger("otel_responses_usage").setLevel(logging.DEBUG)
logging.getLogger("otel_responses_usage").addHandler(logging.StreamHandler(sys.stderr))

client = OpenAI(max_retries=0)
prompt, *calls = sys.argv[1:]
with tracer.start_as_current_span("checkout"):
    for call in calls:
        try:
            text = f"{call} {prompt}"
            with client.responses.create(model="gpt-5.4-mini", input=text, stream=True) as stream:
                for event in stream:
                    print(call, getattr(event, "delta", ""))
                    if call == "closed" and event.type == "response.output_text.delta":
                        break
        except OpenAIError as error:
            print(call, type(error).__name__)
        print(call, "ended at", time.time())
"""


@dataclass(frozen=True)
class Run:
    """The life of an application, as told by those it had to do with.

    `spans` and `exchanges` are by the call they belong to; so is `ended_at`, when the application saw the
    end of a stream. After the last of them it has nothing left to do, and at `exited_at` it is gone.
    """

    spans: dict[str, ReceivedSpan]
    metrics: dict[str, ReceivedMetric]
    payloads: tuple[bytes, ...]
    exchanges: dict[str, list[Exchange]]
    port: int
    out: str
    log: str
    ended_at: dict[str, float]
    exited_at: float

    def points(self, metric: str, *labels: str) -> dict[Any, Point]:
        """The points of a metric, by the values of the attributes that tell them apart."""
        points = self.metrics[metric].points
        named = {tuple(point.attributes.get(label) for label in labels): point for point in points}
        assert len(named) == len(points)
        return named


def plan(request: SeenRequest) -> Plan | Reply:
    """What the server does about the call that is named in the prompt."""
    call = request.json["input"].split()[0]
    if call == "refused":
        return error(401, f"Incorrect API key provided: {KEY}.", code="invalid_api_key")
    answer = Answer(
        id=f"resp_{call}",
        pieces=("The ", ANSWER, " of ", "it."),
        reasoning=(REASONING,),
        usage=BILLED.get(call),
    )
    return {
        "whole": Plan(answer),
        "closed": Plan(answer, cut_after=11, end=Hold()),
        "cut": Plan(answer, cut_after=12, end=Cut(), get_replies=STILL_AT_WORK),
        "hanging": Plan(answer, cut_after=12, end=Cut(), get_replies=(Reply(before=(Pause(30),)),)),
    }[call]


def run(
    source: str, *calls: str, protocol: str, directory: Path, zero_code: bool = False, **settings: str
) -> Run:
    """Run an application that makes these calls one after the other, and collect what became of it."""
    app = directory / "app.py"
    app.write_text(source + APP)
    launcher = [str(Path(sys.executable).with_name("opentelemetry-instrument"))] if zero_code else []
    with ScriptedServer(ResponsesAPI(plan, key=KEY)) as server, OtlpReceiver() as receiver:
        process = subprocess.run(  # noqa: S603  # what it runs is written above
            [*launcher, sys.executable, str(app), PROMPT, *calls],
            env={
                "PATH": os.environ["PATH"],
                "OPENAI_API_KEY": KEY,
                "OPENAI_BASE_URL": f"{server.url}/v1",
                "OTEL_SERVICE_NAME": "shop",
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_METRICS_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
                "OTEL_EXPORTER_OTLP_ENDPOINT": {
                    "grpc": receiver.grpc_endpoint,
                    "http/protobuf": receiver.http_endpoint,
                }[protocol],
                **settings,
            },
            capture_output=True,
            text=True,
            timeout=HANGING_S,
            check=False,
        )
        exited_at = time.time()
    assert process.returncode == 0, process.stderr
    exchanges: dict[str, list[Exchange]] = {call: [] for call in calls}
    for exchange in server.exchanges:
        request = exchange.request
        created = request.method == "POST"
        call = request.json["input"].split()[0] if created else request.path.rpartition("/resp_")[2]
        exchanges[call].append(exchange)
    spans = {
        str(span.attributes.get("gen_ai.response.id", span.name)).removeprefix("resp_"): span
        for span in receiver.spans
    }
    assert len(spans) == len(receiver.spans), receiver.spans
    return Run(
        spans=spans,
        metrics=receiver.metrics,
        payloads=tuple(receiver.payloads),
        exchanges=exchanges,
        port=int(server.url.rpartition(":")[2]),
        out=process.stdout,
        log=process.stderr,
        ended_at={call: float(at) for call, at in re.findall(r"(\w+) ended at (.+)", process.stdout)},
        exited_at=exited_at,
    )


def by_hand(protocol: str) -> str:
    """The lines that an application has of its own to set OpenTelemetry up."""
    return BY_HAND.format(package="grpc" if protocol == "grpc" else "http")


@pytest.fixture(
    scope="module",
    params=[
        "zero-code over grpc",
        "zero-code over http/protobuf",
        "by hand over grpc",
        "by hand over http/protobuf",
    ],
)
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A service that reads one stream to its end, closes one and loses one, and then exits."""
    way, _, protocol = request.param.partition(" over ")
    directory = tmp_path_factory.mktemp("shop")
    if way == "zero-code":
        return run(ZERO_CODE, *CALLS, protocol=protocol, directory=directory, zero_code=True)
    return run(by_hand(protocol), *CALLS, protocol=protocol, directory=directory)


def described(call: str, port: int, **more: Any) -> dict[str, Any]:
    """All attributes of a call's span except those that are times."""
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": f"resp_{call}",
        "gen_ai.response.model": "gpt-5.4-mini-2026-03-17",
        "openai.api.type": "responses",
        "openai.response.service_tier": "default",
        "openai_responses.response.status": "completed",
        "openai_responses.stream.outcome": call,
        "server.address": "127.0.0.1",
        "server.port": port,
        **usage_attributes(BILLED[call]),
        **more,
    }


def untimed(span: ReceivedSpan) -> dict[str, Any]:
    """The attributes of a span without those that are times, or ids of a request."""
    left_out = {
        "gen_ai.response.time_to_first_chunk",
        "openai_responses.request_id",
        "openai_responses.retrieval.duration",
    }
    return {name: value for name, value in span.attributes.items() if name not in left_out}


def test_a_whole_stream_arrives_with_the_usage_it_delivered(shop: Run) -> None:
    """The span of a stream read to its end says what was billed, and nothing was looked up for it."""
    assert untimed(shop.spans["whole"]) == described(
        "whole",
        shop.port,
        **{
            "gen_ai.response.finish_reasons": ("stop",),
            "openai_responses.stream.outcome": "completed",
            "openai_responses.stream.events": 18,
            "openai_responses.stream.deltas": 5,
            "openai_responses.stream.deltas_by_type.reasoning_summary_text": 1,
            "openai_responses.stream.deltas_by_type.output_text": 4,
            "openai_responses.usage.source": "stream",
        },
    )
    assert [exchange.request.method for exchange in shop.exchanges["whole"]] == ["POST"]


@pytest.mark.parametrize(
    ("call", "events", "pieces", "error_type", "attempts"),
    [("closed", 11, 1, {}, 1), ("cut", 12, 2, {"error.type": "RemoteProtocolError"}, 3)],
)
def test_a_stream_that_ended_early_arrives_with_the_usage_looked_up(
    shop: Run, call: str, events: int, pieces: int, error_type: dict[str, str], attempts: int
) -> None:
    """The span of a closed or cut stream says what was billed, after as many requests as were needed."""
    assert untimed(shop.spans[call]) == described(
        call,
        shop.port,
        **{
            "gen_ai.response.finish_reasons": ("error",),
            "openai_responses.stream.events": events,
            "openai_responses.stream.deltas": pieces + 1,
            "openai_responses.stream.deltas_by_type.reasoning_summary_text": 1,
            "openai_responses.stream.deltas_by_type.output_text": pieces,
            "openai_responses.usage.source": "retrieval",
            "openai_responses.retrieval.attempts": attempts,
            **error_type,
        },
    )
    assert [exchange.request.method for exchange in shop.exchanges[call]] == ["POST"] + ["GET"] * attempts


def test_each_call_is_one_client_span_below_its_callers(shop: Run) -> None:
    """Every call is one span of kind CLIENT and a child of the span in which the application made it."""
    checkout = shop.spans["checkout"]
    assert {
        call: (span.name, span.kind, span.trace_id, span.parent_id) for call, span in shop.spans.items()
    } == {
        "checkout": ("checkout", "INTERNAL", checkout.trace_id, ""),
        **dict.fromkeys(CALLS, (f"chat {MODEL}", "CLIENT", checkout.trace_id, checkout.span_id)),
    }


def test_only_a_lost_stream_is_an_error(shop: Run) -> None:
    """A stream that was cut has the status ERROR, without a message; the status of the others is unset."""
    assert {call: (shop.spans[call].status, shop.spans[call].status_message) for call in CALLS} == {
        "whole": ("UNSET", ""),
        "closed": ("UNSET", ""),
        "cut": ("ERROR", ""),
    }


@pytest.mark.parametrize("call", CALLS)
def test_a_span_has_the_times_of_its_stream(shop: Run, call: str) -> None:
    """A span begins before its request arrives and ends with its stream, however long a look-up takes."""
    span, [stream, *look_up] = shop.spans[call], shop.exchanges[call]
    start, end, last_write = span.start_ns / 1e9, span.end_ns / 1e9, stream.last_write_at
    assert last_write is not None
    assert stream.request.at - 0.5 < start < stream.request.at
    assert last_write < end < shop.ended_at[call]
    assert all(end < exchange.request.at for exchange in look_up)


def test_a_look_up_under_way_at_exit_is_waited_for(shop: Run) -> None:
    """The answer that settles a look-up may come after the application has done its last line."""
    *_, settling = shop.exchanges["cut"]
    assert settling.request.at > max(shop.ended_at.values())
    assert shop.spans["cut"].attributes["gen_ai.usage.output_tokens"] == BILLED["cut"]["output_tokens"]


def test_telemetry_names_its_origin(shop: Run) -> None:
    """Spans and metrics carry the scope with version and schema, and the service they come from."""
    ours = [shop.spans[call] for call in CALLS] + list(shop.metrics.values())
    assert {told.scope for told in ours} == {SCOPE}
    assert {told.resource["service.name"] for told in ours} == {"shop"}


def test_the_metrics_are_these(shop: Run) -> None:
    """Each instrument arrives once, under its name, with its unit and its kind."""
    assert {
        (metric.name, metric.unit, metric.kind, metric.monotonic) for metric in shop.metrics.values()
    } == {
        ("gen_ai.client.token.usage", "{token}", "histogram", False),
        ("gen_ai.client.operation.duration", "s", "histogram", False),
        ("gen_ai.client.operation.time_to_first_chunk", "s", "histogram", False),
        ("gen_ai.client.operation.time_per_output_chunk", "s", "histogram", False),
        ("openai_responses.calls", "{call}", "sum", True),
        ("openai_responses.retrieval.duration", "s", "histogram", False),
        ("openai_responses.pending", "{call}", "sum", False),
    }


@pytest.mark.parametrize("kind", ["input", "output"])
def test_the_token_histogram_has_every_token_once(shop: Run, kind: str) -> None:
    """Each call is one value in the histogram of its token type, in the buckets the conventions advise."""
    point = shop.points("gen_ai.client.token.usage", "gen_ai.token.type")[kind,]
    billed = [BILLED[call][f"{kind}_tokens"] for call in CALLS]
    bounds = tuple(4**power for power in range(14))
    places = [bisect.bisect_left(bounds, tokens) for tokens in billed]
    assert (point.count, point.sum, point.bounds) == (len(CALLS), sum(billed), bounds)
    assert point.buckets == tuple(places.count(place) for place in range(len(bounds) + 1))
    assert point.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": "gpt-5.4-mini-2026-03-17",
        "gen_ai.token.type": kind,
        "openai.response.service_tier": "default",
        "server.address": "127.0.0.1",
        "server.port": shop.port,
    }


@pytest.mark.parametrize("kind", ["input", "output"])
def test_token_exemplars_lead_to_the_spans_that_used_the_tokens(shop: Run, kind: str) -> None:
    """An exemplar of the token histogram has the ids of the span with that number of tokens."""
    point = shop.points("gen_ai.client.token.usage", "gen_ai.token.type")[kind,]
    used = {
        (span.trace_id, span.span_id, span.attributes[f"gen_ai.usage.{kind}_tokens"])
        for span in (shop.spans[call] for call in CALLS)
    }
    shown = {(exemplar.trace_id, exemplar.span_id, exemplar.value) for exemplar in point.exemplars}
    assert shown
    assert shown <= used


def test_the_duration_histogram_has_the_durations_of_the_spans(shop: Run) -> None:
    """The durations in the histogram are those of the spans; that of a cut stream has its error type."""
    points = shop.points("gen_ai.client.operation.duration", "error.type")
    summed = {error_type: point.sum for (error_type,), point in points.items()}
    well = shop.spans["whole"].duration_s + shop.spans["closed"].duration_s
    assert summed == pytest.approx(
        {None: well, "RemoteProtocolError": shop.spans["cut"].duration_s}, abs=1e-6
    )


def test_calls_are_counted_by_outcome_and_source(shop: Run) -> None:
    """Every call is counted once, with how it ended and where its usage came from; none is left pending."""
    calls = shop.points(
        "openai_responses.calls", "openai_responses.stream.outcome", "openai_responses.usage.source"
    )
    assert {labels: point.value for labels, point in calls.items()} == {
        ("completed", "stream"): 1,
        ("closed", "retrieval"): 1,
        ("cut", "retrieval"): 1,
    }
    assert [point.value for point in shop.metrics["openai_responses.pending"].points] == [0]


def test_nothing_of_prompt_answer_or_key_is_exported_or_logged(shop: Run) -> None:
    """What the application asked, was answered and identified itself with is in no payload and no log."""
    assert PROMPT in shop.exchanges["whole"][0].request.json["input"]
    assert KEY in shop.exchanges["cut"][-1].request.headers["authorization"]
    assert ANSWER in shop.out
    assert REASONING in shop.out
    told = [*shop.payloads, shop.log.encode()]
    assert any(b"resp_cut" in payload for payload in told)
    assert [canary for canary in CANARIES if any(canary.encode() in text for text in told)] == []


def test_a_fault_is_logged_without_content(tmp_path: Path) -> None:
    """A fault of the telemetry is a debug log line without prompt, answer or key, and the calls go on."""
    faulty = run(
        by_hand("http/protobuf") + FAULTY_PROCESSOR,
        *CALLS,
        "refused",
        protocol="http/protobuf",
        directory=tmp_path,
        OTEL_RESPONSES_USAGE_MAX_CONCURRENCY=f"many {KEY}",
    )
    assert "OTEL_RESPONSES_USAGE_MAX_CONCURRENCY (using 8)" in faulty.log
    assert "RuntimeError: no disk" in faulty.log
    for heard in (f"whole {ANSWER}", "cut APIConnectionError", "refused AuthenticationError"):
        assert heard in faulty.out
    told = [*faulty.payloads, faulty.log.encode()]
    assert any(b"invalid_api_key" in payload for payload in told)
    assert [canary for canary in CANARIES if any(canary.encode() in text for text in told)] == []


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_hanging_look_up_does_not_hold_an_exit_up(tmp_path: Path, protocol: str) -> None:
    """With a server that does not answer, a process is gone soon after the exit timeout, and says why."""
    shop = run(
        ZERO_CODE,
        "hanging",
        protocol=protocol,
        directory=tmp_path,
        zero_code=True,
        OTEL_RESPONSES_USAGE_EXIT_TIMEOUT="1",
        OTEL_RESPONSES_USAGE_RETRIEVAL_TIMEOUT="120",
    )
    span = shop.spans["hanging"]
    assert 1 <= shop.exited_at - shop.ended_at["hanging"] < 60
    # By the default the exit would wait for 5 s. By then the look-up has asked again, and has another reason.
    assert span.attributes["openai_responses.usage.missing_reason"] == "shutdown"
    assert "openai_responses.usage.source" not in span.attributes
    assert span.end_ns / 1e9 < shop.ended_at["hanging"]
    assert "gen_ai.client.token.usage" not in shop.metrics

"""Spans and metrics follow OpenTelemetry's GenAI conventions. docs/conventions.md has the deviations.

The tables below are those of release 0.1.0 of the conventions (open-telemetry/semantic-conventions-genai), of
the pages "client inference", "fetch response", "inference token metrics" and "OpenAI". They were read in the
model files as of pull request 571, which the changelog of the release names. They are compared with what real
calls of the SDK export.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from openai.types.responses import Response, ResponseUsage
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from opentelemetry.context import Context
from opentelemetry.sdk.metrics.export import Histogram, Sum
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.util.types import AttributeValue

import otel_responses_usage
from calls import CUT
from embedded.answer import FAILED, Answer, Json, usage
from embedded.http_server import Cut, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import Observed
from otel_responses_usage import Config, ResponsesUsageInstrumentor
from otel_responses_usage._telemetry import semconv

PACKAGE = Path(otel_responses_usage.__file__).parent
PAGE = (Path(__file__).parents[1] / "docs" / "conventions.md").read_text("utf-8")


class Attribute(NamedTuple):
    """One row of a table of the conventions."""

    type: str
    level: str


def _attributes(rows: str) -> dict[str, Attribute]:
    """Parse a table: name, type and requirement level. The rest of a row is the condition."""
    cells = (row.split(maxsplit=3) for row in rows.strip().splitlines())
    return {name: Attribute(kind, level) for name, kind, level, *_ in cells}


# Span `gen_ai.client.inference`.
INFERENCE = _attributes("""
gen_ai.operation.name                      string    required
gen_ai.provider.name                       string    required
error.type                                 string    conditional  if the operation ended in an error
gen_ai.conversation.id                     string    conditional  if the library or the application has one
gen_ai.output.type                         string    conditional  if the request names an output format
gen_ai.prompt.name                         string    conditional  if a named prompt template is used
gen_ai.prompt.version                      string    conditional  if the prompt has a name and a version
gen_ai.request.choice.count                int       conditional  if in the request and not 1
gen_ai.request.model                       string    conditional  if available
gen_ai.request.seed                        int       conditional  if in the request
gen_ai.request.stream                      boolean   conditional  if and only if the request is streaming
gen_ai.request.top_k                       int       conditional  if applicable
server.port                                int       conditional  if server.address is set
gen_ai.conversation.compacted              boolean   recommended  only true, never false
gen_ai.request.frequency_penalty           double    recommended
gen_ai.request.max_tokens                  int       recommended
gen_ai.request.presence_penalty            double    recommended
gen_ai.request.previous_response.id        string    recommended  if the request references a response
gen_ai.request.reasoning.level             string    recommended  when applicable
gen_ai.request.stop_sequences              string[]  recommended
gen_ai.request.temperature                 double    recommended
gen_ai.request.top_p                       double    recommended
gen_ai.response.finish_reasons             string[]  recommended
gen_ai.response.id                         string    recommended
gen_ai.response.model                      string    recommended
gen_ai.response.time_to_first_chunk        double    recommended  if the request was streaming
gen_ai.usage.audio.cache_read.input_tokens int       recommended  when applicable
gen_ai.usage.audio.input_tokens            int       recommended  when applicable
gen_ai.usage.audio.output_tokens           int       recommended  when applicable
gen_ai.usage.cache_read.input_tokens       int       recommended  when applicable
gen_ai.usage.cache_write.input_tokens      int       recommended  when applicable
gen_ai.usage.image.cache_read.input_tokens int       recommended  when applicable
gen_ai.usage.image.input_tokens            int       recommended  when applicable
gen_ai.usage.image.output_tokens           int       recommended  when applicable
gen_ai.usage.input_tokens                  int       recommended
gen_ai.usage.output_tokens                 int       recommended
gen_ai.usage.reasoning.output_tokens       int       recommended  when applicable
gen_ai.usage.text.cache_read.input_tokens  int       recommended  when applicable
gen_ai.usage.text.input_tokens             int       recommended  when applicable
gen_ai.usage.text.output_tokens            int       recommended  when applicable
server.address                             string    recommended
gen_ai.input.messages                      any       opt-in
gen_ai.output.messages                     any       opt-in
gen_ai.prompt.variable                     string    opt-in       a template: one attribute per variable
gen_ai.system_instructions                 any       opt-in
gen_ai.tool.definitions                    any       opt-in
""")

# What the page "OpenAI" adds to that span, or changes.
INFERENCE_OPENAI = _attributes("""
gen_ai.request.model                       string    required
openai.request.service_tier                string    conditional  if in the request and not auto
openai.response.service_tier               string    conditional  if the response has it
openai.api.type                            string    recommended
openai.response.system_fingerprint         string    recommended
""")

# Span `gen_ai.fetch_response.client`, with what the page "OpenAI" adds to it.
FETCH = _attributes("""
gen_ai.operation.name                      string    required
gen_ai.provider.name                       string    required
gen_ai.response.id                         string    required
error.type                                 string    conditional  if the operation ended in an error
gen_ai.request.stream_cursor               string    conditional  if the fetch resumes a stream
openai.response.service_tier               string    conditional  if the response has it
server.port                                int       conditional  if server.address is set
gen_ai.response.finish_reasons             string[]  recommended
gen_ai.response.model                      string    recommended
gen_ai.response.status                     string    recommended
openai.api.type                            string    recommended
server.address                             string    recommended
gen_ai.output.messages                     any       opt-in
gen_ai.system_instructions                 any       opt-in
gen_ai.tool.definitions                    any       opt-in
""")

# Attributes of other conventions on our spans: HTTP client spans of the general conventions.
OTHER = _attributes("""
http.request.resend_count                  int       recommended  if the request was sent again
""")

SPANS = {"inference": {**INFERENCE, **INFERENCE_OPENAI, **OTHER}, "fetch": {**FETCH, **OTHER}}

COMMON = _attributes("""
gen_ai.operation.name                      string    required
gen_ai.provider.name                       string    required
gen_ai.request.model                       string    conditional  if available
server.port                                int       conditional  if server.address is set
gen_ai.response.model                      string    recommended
server.address                             string    recommended
""")
ERROR = _attributes("error.type            string    conditional  if the operation ended in an error")
MODALITY = _attributes("gen_ai.token.modality string required")
TOKEN_TYPE = _attributes("gen_ai.token.type   string required")
# The page "OpenAI" adds these to the metrics of durations and tokens.
OPENAI = _attributes("""
openai.response.service_tier               string    recommended
openai.response.system_fingerprint         string    recommended
""")

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(4**exponent for exponent in range(14))


class Metric(NamedTuple):
    """One metric of the conventions."""

    kind: str
    unit: str
    attributes: dict[str, Attribute]
    boundaries: tuple[float, ...] | None = None


METRICS = {
    # For what is no inference, here a fetch.
    "gen_ai.client.operation.duration": Metric("histogram", "s", COMMON | ERROR | OPENAI, SECONDS),
    "gen_ai.client.inference.duration": Metric("histogram", "s", COMMON | ERROR | OPENAI, SECONDS),
    "gen_ai.client.inference.time_to_first_chunk": Metric("histogram", "s", COMMON, SECONDS),
    "gen_ai.client.inference.time_per_output_chunk": Metric("histogram", "s", COMMON, SECONDS),
    **{
        f"gen_ai.client.inference.usage.{name}": Metric("counter", "{token}", COMMON | MODALITY | OPENAI)
        for name in (
            "input_tokens",
            "output_tokens",
            "cache_read.input_tokens",
            "cache_write.input_tokens",
            "reasoning.output_tokens",
        )
    },
    **{
        f"gen_ai.client.inference.operation.{name}": Metric("histogram", "{token}", COMMON | OPENAI, TOKENS)
        for name in ("input_tokens", "output_tokens")
    },
}

# Metrics of the general conventions until 1.41, which release 0.1.0 has no more.
OLDER_METRICS = {
    "gen_ai.client.token.usage": Metric("histogram", "{token}", COMMON | TOKEN_TYPE | OPENAI, TOKENS),
    "gen_ai.client.operation.duration": METRICS["gen_ai.client.operation.duration"],
    "gen_ai.client.operation.time_to_first_chunk": Metric("histogram", "s", COMMON, SECONDS),
    "gen_ai.client.operation.time_per_output_chunk": Metric("histogram", "s", COMMON, SECONDS),
}

EVENTS = ("gen_ai.client.inference.operation.details", "gen_ai.client.inference.exception")

# Names that the newest opentelemetry-semantic-conventions lacks. It has had no new GenAI names since these
# conventions moved to a repository of their own.
NEWER_THAN_THE_PACKAGE = {
    "gen_ai.conversation.compacted",
    "gen_ai.prompt.variable",
    "gen_ai.prompt.version",
    "gen_ai.request.previous_response.id",
    "gen_ai.request.reasoning.level",
    "gen_ai.request.stream_cursor",
    "gen_ai.response.status",
    "gen_ai.token.modality",
    "gen_ai.usage.cache_write.input_tokens",
    *(name for name in INFERENCE if re.match(r"gen_ai\.usage\.(audio|image|text)\.", name)),
    *(name for name in METRICS if name.startswith("gen_ai.client.inference.")),
}

# The schema URL of the tracer and the meter of OpenTelemetry's own Python instrumentation
# (opentelemetry-util-genai 1.3b0). No Python package knows a URL for release 0.1.0 yet.
SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"

PREFIXES = ("gen_ai.", "openai.", "server.", "error.", "http.")
TYPES = {"string": (str,), "int": (int,), "double": (float,), "boolean": (bool,)}

CONTENT = "It is content. This package never reads content into telemetry."
NO_PARAMETER = "The Responses API has no such parameter."
NO_FIELD = "A response has no such field."
NO_MODALITY = "The usage of a response is not divided by modality."
NO_EVENTS = "Events need a provider of logs. The span has the same facts, without the content."

# Attributes and events of the conventions that are not written, and why.
NOT_WRITTEN = {
    "gen_ai.request.choice.count": NO_PARAMETER,
    "gen_ai.request.seed": NO_PARAMETER,
    "gen_ai.request.top_k": NO_PARAMETER,
    "gen_ai.request.frequency_penalty": NO_PARAMETER,
    "gen_ai.request.presence_penalty": NO_PARAMETER,
    "gen_ai.request.stop_sequences": NO_PARAMETER,
    "openai.response.system_fingerprint": NO_FIELD,
    **{name: NO_MODALITY for name in INFERENCE if re.match(r"gen_ai\.usage\.(audio|image|text)\.", name)},
    "gen_ai.input.messages": CONTENT,
    "gen_ai.output.messages": CONTENT,
    "gen_ai.prompt.variable": CONTENT,
    "gen_ai.system_instructions": CONTENT,
    "gen_ai.tool.definitions": CONTENT,
    **dict.fromkeys(EVENTS, NO_EVENTS),
}
PARAMETERS = {"n", "seed", "top_k", "frequency_penalty", "presence_penalty", "stop"}


# The calls: what the server answers, and what the application does.

MODEL = "gpt-5.4-mini"
ASKED: Json = {"model": MODEL, "input": "canary-of-the-input"}
ANSWER = Answer(usage=usage(20, 9, cached=4, cache_write=3, reasoning=2))
ZERO = Answer(usage=usage(20, 0))
LONG = Answer(pieces=("word ",) * 60, usage=usage(20, 60))
COMPACTION: Json = {"id": "cmp_1", "type": "compaction", "encrypted_content": "canary-of-the-compaction"}


class Scenario(NamedTuple):
    """One call: the handler of the server, the call itself, and options of the client."""

    answer: Callable[[SeenRequest], Any]
    call: Callable[[openai.OpenAI], Any]
    max_retries: int = 0


def _compacted_events(asked: Json) -> list[Json]:
    """The events of a response that the server has compacted on its way."""
    *events, terminal = ANSWER.events(asked)
    place = {"output_index": 9, "sequence_number": 9, "item": COMPACTION}
    terminal["response"]["output"].append(COMPACTION)
    added, done = ({"type": f"response.output_item.{when}", **place} for when in ("added", "done"))
    return [*events, added, done, terminal]


def _compacted(_: SeenRequest) -> Reply:
    body = {"id": "resp_compacted", "object": "response.compaction", "created_at": 1, "output": [COMPACTION]}
    return Reply.json({**body, "usage": ANSWER.usage})


def _busy_at_first(request: SeenRequest) -> Reply:
    if request.headers["x-stainless-retry-count"] == "0":
        return Reply.json({}, 500, {"retry-after-ms": "1"})
    return Reply.json(ANSWER.response(request.json))


def _drain(**more: Any) -> Callable[[openai.OpenAI], Any]:
    return lambda client: list(client.responses.create(**ASKED, stream=True, **more))


def _fetch(**more: Any) -> Callable[[openai.OpenAI], Any]:
    return lambda client: list(client.responses.retrieve(ANSWER.id, stream=True, **more))


INFERENCES = {
    "whole": Scenario(
        lambda request: Reply.json(ANSWER.response(request.json)),
        lambda client: client.responses.create(
            **ASKED,
            instructions="canary-of-the-instructions",
            temperature=0.5,
            top_p=1,
            max_output_tokens=100,
            reasoning={"effort": "low"},
            conversation="conv_1",
            text={"format": {"type": "json_object"}},
            service_tier="flex",
            prompt={"id": "pmpt_1", "version": "3", "variables": {"who": "canary-of-the-variable"}},
        ),
    ),
    "bare": Scenario(
        lambda request: Reply.json(ZERO.response(request.json)),
        lambda client: client.responses.create(**ASKED, service_tier="auto", stream=False),
    ),
    "by prompt": Scenario(
        lambda request: Reply.json(ANSWER.response(request.json)),
        lambda client: client.responses.create(prompt={"id": "pmpt_1"}),
    ),
    "streamed": Scenario(
        lambda request: Reply.sse(_compacted_events(request.json)), _drain(previous_response_id="resp_1")
    ),
    "continued": Scenario(
        lambda request: Reply.json(ANSWER.response(request.json)),
        lambda client: client.responses.create(**{**ASKED, "input": [COMPACTION]}),
    ),
    "long": Scenario(lambda request: Reply.sse(LONG.events(request.json)), _drain()),
    "failed": Scenario(lambda request: Reply.sse(Answer(ending=FAILED).events(request.json)), _drain()),
    "refused": Scenario(
        lambda _: error(400, "no"), lambda client: client.responses.create(**ASKED, stream=True)
    ),
    "cut": Scenario(
        lambda request: (
            Reply.sse(ANSWER.events(request.json)[:6], end=Cut())
            if request.method == "POST"
            else Reply.json(ANSWER.response(ASKED))
        ),
        _drain(),
    ),
    "unknown": Scenario(
        lambda request: (
            Reply.sse(ANSWER.events(request.json)[:6], end=Cut())
            if request.method == "POST"
            else error(401, "no")
        ),
        _drain(),
    ),
    "retried": Scenario(_busy_at_first, lambda client: client.responses.create(**ASKED), max_retries=1),
    "compact": Scenario(_compacted, lambda client: client.responses.compact(**ASKED)),
}
FETCHES = {
    "fetched": Scenario(lambda _: Reply.sse(_compacted_events({})), _fetch()),
    "resumed": Scenario(lambda _: Reply.sse(ANSWER.events()[3:]), _fetch(starting_after=2)),
    "fetched a failed one": Scenario(lambda _: Reply.sse(Answer(ending=FAILED).events()), _fetch()),
    "fetch refused": Scenario(lambda _: error(404, "no"), _fetch()),
}
SCENARIOS = INFERENCES | FETCHES
ANSWERED = INFERENCES.keys() - {"refused"}

# The calls whose span has a conditional attribute. All others do not have it.
HOLDS: dict[str, dict[str, set[str]]] = {
    "inference": {
        "error.type": {"failed", "refused", "cut", "unknown"},
        "gen_ai.conversation.id": {"whole"},
        "gen_ai.output.type": {"whole"},
        "gen_ai.prompt.name": {"whole", "by prompt"},
        "gen_ai.prompt.version": {"whole"},
        "gen_ai.request.model": INFERENCES.keys() - {"by prompt"},
        "gen_ai.request.stream": {"streamed", "long", "failed", "refused", "cut", "unknown"},
        "server.port": set(INFERENCES),
        "openai.request.service_tier": {"whole"},
        "openai.response.service_tier": ANSWERED - {"compact"},
        "gen_ai.conversation.compacted": {"streamed", "compact"},  # not "continued", a listed difference
        "gen_ai.request.previous_response.id": {"streamed"},
        "gen_ai.request.reasoning.level": {"whole"},
        "gen_ai.response.time_to_first_chunk": {"streamed", "long", "failed", "cut", "unknown"},
        "gen_ai.usage.input_tokens": ANSWERED - {"unknown"},
        "gen_ai.usage.output_tokens": ANSWERED - {"unknown"},
        "gen_ai.usage.cache_read.input_tokens": ANSWERED - {"unknown", "bare", "long", "failed"},
        "gen_ai.usage.cache_write.input_tokens": ANSWERED - {"unknown", "bare", "long", "failed"},
        "gen_ai.usage.reasoning.output_tokens": ANSWERED - {"unknown", "bare", "long", "failed"},
        "http.request.resend_count": {"retried"},
    },
    "fetch": {
        "error.type": {"fetched a failed one", "fetch refused"},  # the first one is a listed difference
        "gen_ai.request.stream_cursor": {"resumed"},
        "gen_ai.response.status": FETCHES.keys() - {"fetch refused"},
        "gen_ai.response.finish_reasons": set(FETCHES),  # that of a refused fetch is a listed difference
        "openai.response.service_tier": FETCHES.keys() - {"fetch refused"},
        "server.port": set(FETCHES),
    },
}


class _Starts(SpanProcessor):
    """Keeps the attributes that spans have at their start."""

    def __init__(self) -> None:
        self.attributes: list[dict[str, AttributeValue]] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002  # the SDK's
        self.attributes.append(dict(span.attributes or {}))


class Told(NamedTuple):
    """What was exported of one call."""

    span: ReadableSpan
    attributes: dict[str, AttributeValue]
    at_start: dict[str, AttributeValue]
    metrics: dict[str, Any]
    schema_urls: set[str]


def told(scenario: str, opt_in: str = "") -> Told:
    """What is exported of a call, with a value of `OTEL_SEMCONV_STABILITY_OPT_IN`. It is made once."""
    return _make(scenario, opt_in)


@functools.cache
def _make(scenario: str, opt_in: str) -> Told:
    answer, call, max_retries = SCENARIOS[scenario]
    observed, starts = Observed(), _Starts()
    observed.tracer_provider.add_span_processor(starts)
    instrumentor = ResponsesUsageInstrumentor()
    with pytest.MonkeyPatch.context() as patch, ScriptedServer(answer) as server:
        patch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", opt_in)
        instrumentor.instrument(
            tracer_provider=observed.tracer_provider,
            meter_provider=observed.meter_provider,
            config=Config(exit_timeout=0.5),
        )
        try:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=max_retries)
            with client, contextlib.suppress(openai.APIStatusError, *CUT):
                call(client)
            span = observed.span()
        finally:
            instrumentor.uninstrument()
    data = observed._metrics.get_metrics_data()
    scopes = [
        scope for resource in (data.resource_metrics if data else ()) for scope in resource.scope_metrics
    ]
    assert span.instrumentation_scope is not None
    return Told(
        span,
        dict(span.attributes or {}),
        starts.attributes[0],
        {metric.name: metric for scope in scopes for metric in scope.metrics},
        {str(span.instrumentation_scope.schema_url), *(str(scope.scope.schema_url) for scope in scopes)},
    )


def _conventional(names: Any) -> set[str]:
    """The names under the conventions' prefixes."""
    return {name for name in names if name.startswith(PREFIXES)}


def _written(name: str, names: set[str]) -> bool:
    """Whether an attribute of the table is among the names. It may be a template, such as a prefix."""
    return name in names or any(other.startswith(f"{name}.") for other in names)


def _spans() -> Iterator[tuple[str, str, Told]]:
    for signal, scenarios in (("inference", INFERENCES), ("fetch", FETCHES)):
        for scenario in scenarios:
            yield signal, scenario, told(scenario)


LATEST = "gen_ai_latest_experimental"
GENERATIONS = {"": OLDER_METRICS, LATEST: METRICS}
opt_ins = pytest.mark.parametrize("opt_in", GENERATIONS, ids=["older", "0.1.0"])


@pytest.mark.parametrize("signal", SPANS)
def test_each_attribute_is_written_or_listed_as_a_deviation(signal: str) -> None:
    """Some call writes each attribute of the table, or no call writes it and a reason is given."""
    names = {name for kind, _, call in _spans() if kind == signal for name in call.attributes}
    written = {name for name in SPANS[signal] if _written(name, names)}
    listed = SPANS[signal].keys() & NOT_WRITTEN.keys()
    assert written & listed == set(), "mended: take it out of the deviations"
    # A fetch is never sent again in these calls.
    assert SPANS[signal].keys() - listed - written <= ({*OTHER} if signal == "fetch" else set())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_other_attribute_is_written_under_the_conventions_names(scenario: str) -> None:
    """Each attribute of a span is in the table of its kind, and has the type of the table."""
    table = SPANS["inference" if scenario in INFERENCES else "fetch"]
    attributes = told(scenario).attributes
    assert _conventional(attributes) - table.keys() == set()
    for name in _conventional(attributes):
        _check_type(table[name].type, attributes[name], name)


def _check_type(kind: str, value: AttributeValue, name: str) -> None:
    if kind == "string[]":
        assert isinstance(value, tuple), name
        assert {type(item) for item in value} == {str}, name
    else:
        assert type(value) in TYPES[kind], (name, value)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_span_has_the_required_attributes(scenario: str) -> None:
    """What the conventions require is on every span, and what a sampler may need is there from the start."""
    table = SPANS["inference" if scenario in INFERENCES else "fetch"]
    required = {name for name, attribute in table.items() if attribute.level == "required"}
    if scenario == "by prompt":
        required.remove("gen_ai.request.model")  # a listed difference
    attributes, at_start = told(scenario).attributes, told(scenario).at_start
    assert required <= attributes.keys()
    sampled = {"gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"}
    sampled |= {"server.address", "server.port"}
    assert sampled & attributes.keys() <= at_start.keys()


@pytest.mark.parametrize(
    ("signal", "name"), [(signal, name) for signal, names in HOLDS.items() for name in names]
)
def test_a_conditional_attribute_is_there_under_its_condition_alone(signal: str, name: str) -> None:
    """An attribute with a condition is on the spans of the calls that meet it, and on no other."""
    assert {
        scenario for kind, scenario, call in _spans() if kind == signal and name in call.attributes
    } == HOLDS[signal][name]


def test_every_condition_has_a_call_that_meets_it() -> None:
    """No conditional attribute of ours is left out of the comparison above."""
    for signal, table in SPANS.items():
        conditional = {name for name, attribute in table.items() if attribute.level == "conditional"}
        assert conditional - NOT_WRITTEN.keys() - HOLDS[signal].keys() == set()


def test_the_values_are_those_of_the_conventions() -> None:
    """Values with a meaning of their own are spelled as the conventions spell them."""
    whole, streamed, bare = (told(scenario).attributes for scenario in ("whole", "streamed", "bare"))
    assert whole["openai.api.type"] == "responses"
    assert whole["gen_ai.output.type"] == "json"
    assert (whole["gen_ai.prompt.name"], whole["gen_ai.prompt.version"]) == ("pmpt_1", "3")
    assert whole["openai.request.service_tier"] == "flex"
    assert streamed["gen_ai.request.stream"] is True
    assert streamed["gen_ai.conversation.compacted"] is True
    assert (bare["gen_ai.usage.input_tokens"], bare["gen_ai.usage.output_tokens"]) == (20, 0)
    assert {
        scenario: told(scenario).attributes["gen_ai.response.finish_reasons"]
        for scenario in ("whole", "failed", "cut", "fetched", "fetched a failed one")
    } == {
        "whole": ("stop",),
        "failed": ("error",),
        "cut": ("error",),
        "fetched": ("stop",),
        "fetched a failed one": ("error",),
    }
    status = {scenario: told(scenario).attributes.get("gen_ai.response.status") for scenario in FETCHES}
    assert status == {
        "fetched": "completed",
        "resumed": "completed",
        "fetched a failed one": "failed",
        "fetch refused": None,
    }


def test_the_names_and_kinds_of_the_spans() -> None:
    """A span is of kind CLIENT. Its name is operation and model, that of a fetch the operation alone."""
    assert {call.span.kind for _, _, call in _spans()} == {SpanKind.CLIENT}
    names = {scenario: call.span.name for _, scenario, call in _spans()}
    assert names == {
        **dict.fromkeys(INFERENCES, f"chat {MODEL}"),
        **dict.fromkeys(FETCHES, "fetch_response"),
        "by prompt": "chat",
        "compact": f"compact {MODEL}",
    }


def test_a_fetch_has_no_tokens() -> None:
    """Neither the spans nor the metrics of a fetch have token counts."""
    for scenario in FETCHES:
        for opt_in in GENERATIONS:
            call = told(scenario, opt_in)
            names = [*call.attributes, *(name for name in call.metrics if name.startswith("gen_ai."))]
            assert not [name for name in names if "token" in name]


@opt_ins
def test_the_metrics_are_those_of_the_conventions(opt_in: str) -> None:
    """Each metric has the kind, unit and buckets of the conventions. No other metric has such a name."""
    seen: dict[str, Any] = {}
    for scenario in SCENARIOS:
        seen |= told(scenario, opt_in).metrics
    assert _conventional(seen) == GENERATIONS[opt_in].keys()
    for name, metric in GENERATIONS[opt_in].items():
        data = seen[name].data
        assert seen[name].unit == metric.unit, name
        if metric.kind == "counter":
            assert isinstance(data, Sum), name
            assert data.is_monotonic, name
            assert {type(point.value) for point in data.data_points} == {int}, name
        else:
            assert isinstance(data, Histogram), name
            assert {tuple(point.explicit_bounds) for point in data.data_points} == {metric.boundaries}, name


@opt_ins
def test_the_attributes_of_the_metrics_are_those_of_the_conventions(opt_in: str) -> None:
    """Each point has the required attributes. Each attribute of the table is written or listed as missing."""
    for name, metric in GENERATIONS[opt_in].items():
        points = [
            dict(point.attributes)
            for scenario in SCENARIOS
            if name in (metrics := told(scenario, opt_in).metrics)
            for point in metrics[name].data.data_points
        ]
        written = {attribute for point in points for attribute in _conventional(point)}
        expected = metric.attributes.keys() - NOT_WRITTEN.keys()
        if metric is METRICS["gen_ai.client.operation.duration"] and opt_in:
            expected -= {"gen_ai.request.model"}  # a fetch names no model
        assert written == expected, name
        for point in points:
            required = {key for key, attribute in metric.attributes.items() if attribute.level == "required"}
            assert required <= point.keys(), name
            for key in _conventional(point):
                _check_type(metric.attributes[key].type, point[key], key)


@opt_ins
def test_the_duration_is_that_of_the_span(opt_in: str) -> None:
    """The duration of a call is one point with the length and the `error.type` of its span."""
    for scenario in SCENARIOS:
        call = told(scenario, opt_in)
        of_inference = opt_in and scenario in INFERENCES
        name = "gen_ai.client.inference.duration" if of_inference else "gen_ai.client.operation.duration"
        [point] = call.metrics[name].data.data_points
        assert call.span.start_time is not None
        assert call.span.end_time is not None
        assert point.sum == pytest.approx((call.span.end_time - call.span.start_time) / 1e9), scenario
        assert point.attributes.get("error.type") == call.attributes.get("error.type"), scenario


@opt_ins
def test_the_times_of_chunks_are_those_of_streams(opt_in: str) -> None:
    """A call without a stream has no times of chunks, and neither has a fetch."""
    assert {
        scenario
        for scenario in SCENARIOS
        if any(name.endswith(".time_to_first_chunk") for name in told(scenario, opt_in).metrics)
    } == HOLDS["inference"]["gen_ai.response.time_to_first_chunk"]


@opt_ins
def test_our_own_metrics_use_the_conventions_names(opt_in: str) -> None:
    """Attributes of our own metrics that have a name of the conventions have its type, too."""
    known = {**SPANS["inference"], **FETCH, **TOKEN_TYPE}
    for scenario in SCENARIOS:
        for name, metric in told(scenario, opt_in).metrics.items():
            if name not in GENERATIONS[opt_in]:
                for point in metric.data.data_points:
                    for key in _conventional(point.attributes):
                        _check_type(known[key].type, point.attributes[key], f"{name}: {key}")


def test_each_name_in_the_code_is_in_a_table() -> None:
    """The tables have each name that the code can write, also those that none of these calls brings."""
    names = {value for name, value in vars(semconv).items() if name.isupper() and isinstance(value, str)}
    tables = [*SPANS.values(), *(metric.attributes for metric in (METRICS | OLDER_METRICS).values())]
    assert _conventional(names) <= {name for table in tables for name in table} | METRICS.keys()


def test_the_schema_url_is_that_of_opentelemetrys_own_instrumentation() -> None:
    """Spans and metrics name the same schema as those of OpenTelemetry's Python instrumentation."""
    assert {url for _, _, call in _spans() for url in call.schema_urls} == {SCHEMA_URL}


def test_the_names_are_those_of_the_newest_package() -> None:
    """The package of OpenTelemetry knows each name, or the name is newer than the package."""
    modules = [
        importlib.import_module(f"opentelemetry.semconv.{path}")
        for path in (
            "_incubating.attributes.gen_ai_attributes",
            "_incubating.attributes.openai_attributes",
            "_incubating.metrics.gen_ai_metrics",
            "attributes.error_attributes",
            "attributes.http_attributes",
            "attributes.server_attributes",
        )
    ]
    known = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    tables = [*SPANS.values(), *(metric.attributes for metric in (METRICS | OLDER_METRICS).values())]
    ours = {name for table in tables for name in table} | METRICS.keys() | OLDER_METRICS.keys()
    assert ours - known == NEWER_THAN_THE_PACKAGE


def test_no_content_is_written() -> None:
    """A span has no content: no input, no instructions, and no value of a variable of the prompt."""
    assert not [scenario for _, scenario, call in _spans() if "canary" in call.span.to_json()]


def test_no_events_are_written() -> None:
    """A call has no event, neither in its span nor as a log record."""
    assert not [scenario for _, scenario, call in _spans() if call.span.events]
    assert not [file for file in PACKAGE.rglob("*.py") if "opentelemetry._logs" in file.read_text("utf-8")]


def test_the_reasons_hold() -> None:
    """The SDK has no parameter and no field for an attribute that is left out for this reason."""
    assert PARAMETERS & ResponseCreateParamsBase.__annotations__.keys() == set()
    assert "system_fingerprint" not in Response.model_fields
    counts = ResponseUsage.model_json_schema()
    assert not [
        name for name in re.findall(r"'(\w+_tokens)'", str(counts)) if re.match("audio|image|text", name)
    ]


# Differences in more than a name.


def _unknown_is_not_zero() -> bool:
    metrics = told("unknown", LATEST).metrics
    return "gen_ai.client.inference.usage.input_tokens" not in metrics


def _retrieve_has_no_span() -> bool:
    observed = Observed()
    instrumentor = ResponsesUsageInstrumentor()
    with ScriptedServer(ResponsesAPI(lambda _: Plan(ANSWER))) as server:
        instrumentor.instrument(
            tracer_provider=observed.tracer_provider, meter_provider=observed.meter_provider, config=Config()
        )
        try:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k") as client:
                client.responses.create(**ASKED)
                client.responses.retrieve(ANSWER.id)
        finally:
            instrumentor.uninstrument()
    return [span.name for span in observed.spans()] == [f"chat {MODEL}"]


def _gaps(scenario: str) -> int:
    """The points of the time between chunks."""
    points = told(scenario, LATEST).metrics["gen_ai.client.inference.time_per_output_chunk"].data.data_points
    return sum(point.count for point in points)


# By its words in docs/conventions.md: whether it is still so.
DIFFERENCES: dict[str, Callable[[], bool]] = {
    "By default the metrics are those of the conventions before 0.1.0.": lambda: (
        "gen_ai.client.token.usage" in told("whole").metrics
        and "gen_ai.client.inference.duration" not in told("whole").metrics
    ),
    "`responses.compact` is the operation `compact`.": lambda: (
        told("compact").attributes["gen_ai.operation.name"] == "compact"
    ),
    "A span can lack `gen_ai.request.model`.": lambda: (
        "gen_ai.request.model" not in told("by prompt").attributes
    ),
    "`retrieve` without a stream has no span.": _retrieve_has_no_span,
    "The fetch of a failed response has the status error and `error.type`.": lambda: (
        told("fetched a failed one").span.status.status_code is StatusCode.ERROR
        and "error.type" in told("fetched a failed one").attributes
    ),
    "A compaction item in the request is not looked for.": lambda: (
        "gen_ai.conversation.compacted" not in told("continued").attributes
    ),
    "A refused fetch has the finish reason `error`.": lambda: (
        told("fetch refused").attributes.get("gen_ai.response.finish_reasons") == ("error",)
    ),
    "Unknown usage has no points, not even 0.": _unknown_is_not_zero,
    "A chunk is a delta.": lambda: _gaps("streamed") == len(ANSWER.pieces) - 1,
    "Of many chunks some are left out.": lambda: _gaps("long") < len(LONG.pieces) - 1,
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_still_one(difference: str) -> None:
    """A difference that is mended leaves the list and the page."""
    assert DIFFERENCES[difference]()


def _rows(heading: str) -> list[list[str]]:
    """The rows below the table head that begins with this word, cell by cell."""
    _, found, rest = PAGE.partition(f"\n| {heading} |")
    assert found, f"no table {heading}"
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_page_has_each_deviation_with_its_reason() -> None:
    """The table of the page has what is not written, with the level and the reason, and nothing else."""
    levels = {
        name: attribute.level for table in (FETCH, SPANS["inference"]) for name, attribute in table.items()
    }
    levels |= dict.fromkeys(EVENTS, "recommended") | {EVENTS[0]: "opt-in"}
    words = {"conditional": "conditionally required"}
    told_of = {
        (name, level, reason)
        for names, level, reason in _rows("attribute")
        for name in re.findall("`(.+?)`", names)
    }
    assert told_of == {
        (name, words.get(levels[name], levels[name]), reason) for name, reason in NOT_WRITTEN.items()
    }


def test_the_page_has_each_difference_with_its_reason() -> None:
    """The second table of the page has the other differences, each with a reason."""
    rows = _rows("difference")
    assert [row[0] for row in rows] == list(DIFFERENCES)
    assert all(reason for _, reason in rows)


def test_the_page_says_which_names_are_newer_than_the_package() -> None:
    """The list of names that Python's package lacks is complete, as far as this package writes them."""
    _, _, rest = PAGE.partition("## Names that are newer than the Python package")
    assert {*re.findall(r"`(gen_ai\..+?)`", rest.partition("\n## ")[0])} == {
        name for name in NEWER_THAN_THE_PACKAGE - NOT_WRITTEN.keys() if not name.startswith("gen_ai.client.")
    } | {"gen_ai.client.inference.*"}

"""Runs the cases of a framework against a server that knows the true token counts, and compares.

Each program of this folder marks its functions with `case` and ends with `main`. `scripts/test-frameworks`
runs it in the environment of its framework. pytest does not collect this folder.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib.metadata
import inspect
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import otel_responses_usage
from embedded.answer import Answer, FunctionCall, new_id, usage
from embedded.http_server import Cut, Hold, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI

MODEL = "gpt-5.4-mini"
PROMPT = "Tell me a story about the weather in Paris."
TOOL = "weather"  # a function whose name ends like this is called once, if the program offers one
SCENARIOS = ("run", "streamed", "left", "cut")

TIMEOUT_S = 150.0  # then the process ends with a traceback of all threads
PATIENCE_S = 15.0
EVENTS_BEFORE_END = 6  # of a stream that is left or cut: two of them are deltas
LEFT = usage(31, 165, cached=16, cache_write=8, reasoning=128)
LOOPBACK = ("127.0.0.1", "localhost", "::1", "", None)

# How a call may end and where its usage may come from, by scenario.
ENDS = {
    "run": ({"completed"}, {"response", "stream"}),
    "streamed": ({"completed"}, {"stream"}),
    "left": ({"closed", "cancelled", "abandoned"}, {"retrieval", "tail"}),
    "cut": ({"cut"}, {"retrieval"}),
}


@dataclass(frozen=True)
class Case:
    """A function of a program, and what happens to the streams meanwhile."""

    scenario: str
    way: str  # sync or async
    act: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.scenario}, {self.way}, {self.act.__name__}"


class Told(NamedTuple):
    """What was recorded during a case."""

    case: Case
    calls: int
    ends: tuple[str, ...]  # outcome and source or missing reason of the calls that differ from the rule
    own: int | None  # the framework's own count of tokens
    ours: int
    raised: str | None


class API(ResponsesAPI):
    """Ends streams as the current scenario says, and gives every answer a usage of its own."""

    def __init__(self, arguments: tuple[str, ...] | None) -> None:
        super().__init__(self._plan_of)
        self.scenario = "run"
        self._arguments = arguments
        self._numbers = itertools.count()

    def _plan_of(self, request: SeenRequest) -> Plan:
        asked, number = request.json, next(self._numbers)
        counts = LEFT
        if self.scenario != "left":
            counts = usage(32 + number, 245 + number, cached=16, cache_write=8, reasoning=128)
        answer = Answer(tuple(f"piece {n} " for n in range(12)), counts, id=new_id())
        tools = [tool["name"] for tool in asked.get("tools") or () if tool.get("type") == "function"]
        if self._arguments:
            # The answer is in the arguments of the one function that the request has.
            answer = replace(answer, pieces=(), calls=(FunctionCall(tools[0], self._arguments),))
        if self.scenario in ("run", "streamed"):
            answered = isinstance(asked["input"], list) and any(
                item.get("type") == "function_call_output" for item in asked["input"]
            )
            offered = next((tool for tool in tools if tool.endswith(TOOL)), None)
            if offered and not answered:
                answer = replace(answer, pieces=(), calls=(FunctionCall(offered, ('{"city"', ': "Paris"}')),))
            return Plan(answer)
        if not asked.get("stream"):
            return Plan(answer)
        end = Hold() if self.scenario == "left" else Cut()
        return Plan(answer, cut_after=EVENTS_BEFORE_END, end=end)


class Recorded:
    """Providers that keep what our package records. They are not global: a framework's own spans stay out."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)

    def sums(self, name: str) -> dict[str, float]:
        """Sums of a metric over all scopes: of a histogram by token type, of a counter under the key ''."""
        data, sums = self._reader.get_metrics_data(), {}
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    if metric.name != name:
                        continue
                    for point in metric.data.data_points:
                        kind = str(point.attributes.get("gen_ai.token.type", ""))
                        value = point.sum if hasattr(point, "sum") else point.value
                        sums[kind] = sums.get(kind, 0) + value
        return sums


CASES: list[Case] = []
# Frameworks keep async clients, which belong to one event loop.
LOOP = asyncio.new_event_loop()


def case(*scenarios: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Mark a function to be run in these scenarios. It returns the framework's own count of tokens.

    In `streamed` this may be None, or has to be true: it shows that the count is read in the right place.
    """

    def mark(act: Callable[[], Any]) -> Callable[[], Any]:
        way = "async" if inspect.iscoroutinefunction(act) else "sync"
        CASES.extend(Case(scenario, way, act) for scenario in scenarios)
        return act

    return mark


def weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"It rains in {city}."


def main(
    name: str,
    distribution: str,
    *,
    own_count: str,
    own_spans: Callable[[], None] | None = None,
    arguments: tuple[str, ...] | None = None,
) -> None:
    """Run all cases, and add the framework's row to the table in the file named on the command line.

    `own_count` says where `left` found its count. `own_spans` switches on the framework's own OpenTelemetry
    spans, which are off otherwise: the first case that leaves is then run once more, without our package.
    With `arguments` the server answers with a call of the request's first function.
    """
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    assert Path(otel_responses_usage.__file__).is_relative_to(Path(__file__).parents[2]), "not this checkout"
    reached = stay_on_loopback()
    api, recorded = API(arguments), Recorded()
    with ScriptedServer(api) as server:
        os.environ |= {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": f"{server.url}/v1"}
        os.environ["OPENAI_API_BASE"] = os.environ["OPENAI_BASE_URL"]
        instrumentor = otel_responses_usage.ResponsesUsageInstrumentor()
        instrumentor.instrument(
            tracer_provider=recorded.tracer_provider, meter_provider=recorded.meter_provider
        )
        told: list[Told] = []
        failed: list[str] = []
        for one in CASES:
            try:
                told.append(perform(one, api, server, recorded, instrumentor))
            except Exception:  # noqa: PERF203  # the other cases are run all the same
                failed.append(str(one))
                log("FAILED:", one, traceback.format_exc())
            else:
                log("exact:", one, *told[-1][1:])
        if faults := recorded.sums("openai_responses.faults"):
            failed.append(f"faults of the package: {faults}")
        instrumentor.uninstrument()
        spans = spans_of_its_own(own_spans, api) if own_spans else "-"
    log("addresses that were refused:", sorted(set(reached)))
    version = importlib.metadata.version(distribution)
    with Path(sys.argv[1]).open("a", encoding="utf-8") as rows:
        rows.write(row(name, version, told, len(failed), own_count, spans))
    if failed or {one.scenario for one in CASES} != set(SCENARIOS):
        sys.exit(f"failed: {failed}")


def log(*what: Any) -> None:
    print(*what, flush=True)  # noqa: T201


def stay_on_loopback() -> list[str]:
    """Refuse connections to other machines from now on. Return the list of addresses, which grows."""
    reached: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host not in LOOPBACK:
            reached.append(str(host))
            raise OSError(f"{host} is not on loopback")

    sys.addaudithook(audit)
    return reached


def act(one: Case) -> tuple[Any, str | None]:
    """Run a case. Return its result and, of a stream that was cut, the name of the exception."""
    try:
        return (LOOP.run_until_complete(one.act()) if one.way == "async" else one.act()), None
    except Exception as error:
        if one.scenario != "cut":
            raise
        return None, type(error).__name__


def settle() -> None:
    """Collect streams that were dropped, and let the event loop end their generators."""
    gc.collect()
    LOOP.run_until_complete(asyncio.sleep(0.02))


def perform(
    one: Case,
    api: API,
    server: ScriptedServer,
    recorded: Recorded,
    instrumentor: otel_responses_usage.ResponsesUsageInstrumentor,
) -> Told:
    """Run a case, and compare what was recorded with what the server knows."""
    api.scenario = one.scenario
    known, sums = set(api.stored), recorded.sums("gen_ai.client.token.usage")
    calls = recorded.sums("openai_responses.calls").get("", 0)
    recorded.exporter.clear()
    own, raised = act(one)
    settle()
    made = {answer: api.stored[answer] for answer in api.stored if answer not in known}
    assert made, "no call was made"
    deadline = time.monotonic() + PATIENCE_S
    while len(recorded.exporter.get_finished_spans()) < len(made) and time.monotonic() < deadline:
        settle()
    assert instrumentor.flush(PATIENCE_S), "look-ups are pending"
    spans = recorded.exporter.get_finished_spans()
    posts = sum(request.method == "POST" for request in server.requests)
    assert posts == len(api.stored), "a request was refused"

    attributes = [dict(span.attributes or {}) for span in spans]
    ids = [attribute.get("gen_ai.response.id") for attribute in attributes]
    assert sorted(map(str, ids)) == sorted(made), f"{attributes} of {list(made)}"
    ends, known_usage = [], []
    for attribute, answer in zip(attributes, ids, strict=True):
        truth = made[answer]
        outcome = attribute["openai_responses.stream.outcome"]
        source = attribute.get("openai_responses.usage.source")
        reason = attribute.get("openai_responses.usage.missing_reason")
        ends.append(f"{outcome}, {source or reason}")
        outcomes, sources = ENDS[one.scenario]
        # A response that the server does not store cannot be looked up.
        is_lost = one.scenario in ("left", "cut") and truth["store"] is False
        assert outcome in outcomes, attribute
        assert (reason == "not_stored") if is_lost else (source in sources), attribute
        assert {name: value for name, value in attribute.items() if name.startswith("gen_ai.usage.")} == (
            {} if is_lost else usage_attributes(truth["usage"])
        ), (attribute, truth["usage"])
        if not is_lost:
            known_usage.append(truth["usage"])
    now = recorded.sums("gen_ai.client.token.usage")
    for kind in ("input", "output"):
        true = sum(counts[f"{kind}_tokens"] for counts in known_usage)
        assert now.get(kind, 0) - sums.get(kind, 0) == true, (kind, now, sums, true)
    assert recorded.sums("openai_responses.calls")[""] - calls == len(made)
    ours = sum(counts["total_tokens"] for counts in known_usage)
    if one.scenario == "streamed" and own is not None:
        assert own == ours, f"the framework counts {own} tokens, the server {ours}"
    return Told(one, len(made), tuple(dict.fromkeys(ends)), own, ours, raised)


def usage_attributes(counts: dict[str, Any]) -> dict[str, int]:
    """The span attributes that stand for this usage. The server has no detail of zero."""
    return {
        "gen_ai.usage.input_tokens": counts["input_tokens"],
        "gen_ai.usage.output_tokens": counts["output_tokens"],
        "gen_ai.usage.cache_read.input_tokens": counts["input_tokens_details"]["cached_tokens"],
        "gen_ai.usage.cache_write.input_tokens": counts["input_tokens_details"]["cache_write_tokens"],
        "gen_ai.usage.reasoning.output_tokens": counts["output_tokens_details"]["reasoning_tokens"],
    }


def spans_of_its_own(switch_on: Callable[[], None], api: API) -> str:
    """Leave a run once more, without our package. Return what the framework's spans say of its tokens."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    switch_on()
    api.scenario = "left"
    one = next(one for one in CASES if one.scenario == "left")
    act(one)
    settle()
    spans = exporter.get_finished_spans()
    for span in spans:
        log("its own span:", span.name, dict(span.attributes or {}))
    assert spans, "the framework has made no spans of its own"
    counts = [
        int(str(value))
        for span in spans
        for name, value in (span.attributes or {}).items()
        if name in ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens")
    ]
    return str(sum(counts)) if counts else "none"


def row(name: str, version: str, told: list[Told], failed: int, own_count: str, spans: str) -> str:
    """The framework's row of the table."""
    tested = []
    for scenario in SCENARIOS:
        ways = sorted({one.case.way for one in told if one.case.scenario == scenario}, reverse=True)
        if ways:
            tested.append(f"{scenario} ({', '.join(ways)})")
    left = [one for one in told if one.case.scenario == "left"]
    own = " or ".join(dict.fromkeys("none" if one.own is None else str(one.own) for one in left))
    ours: dict[str, list[str]] = {}
    for one in left:
        for end in one.ends:
            outcome, source = end.split(", ")
            kept = ours.setdefault(str(one.ours) if one.ours else f"none, `{source}`", [])
            if outcome not in kept:
                kept.append(outcome)
    calls = sum(one.calls for one in told)
    cells = (
        f"{name} {version}",
        importlib.metadata.version("openai"),
        ", ".join(tested),
        f"{failed} of {len(CASES)} FAILED" if failed else f"exact in {calls} calls",
        f"{own} ({own_count})",
        spans,
        "; ".join(f"{tokens} ({', '.join(sorted(outcomes))})" for tokens, outcomes in ours.items()),
    )
    return f"| {' | '.join(cells)} |\n"

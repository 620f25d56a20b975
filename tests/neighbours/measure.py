"""Runs all scenarios in one process, beside one neighbour: `measure.py NEIGHBOUR ORDER`.

The order is `alone` (the neighbour without us), `ours first`, `theirs first` or `zero-code`. The program
prints what was recorded as JSON. The environment variable `PACKAGE` is a folder with our package.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from opentelemetry import context, trace
from opentelemetry.trace import SpanKind
from recorder import APPLICATION, OURS, Complaints, Recorder, scope_of
from server import Api, gets

from embedded.http_server import ScriptedServer
from neighbours import NEIGHBOURS, Neighbour

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from opentelemetry.sdk.trace import ReadableSpan

FLUSH_S = 15.0
# Where instrumentations write input tokens.
INPUT_TOKENS = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt")
NOT_INFERENCE = {"invoke_agent", "execute_tool", "create_agent", "invoke_workflow"}


@dataclass
class Ran:
    """What one process has recorded."""

    version: str = ""
    also: dict[str, str] = field(default_factory=dict)
    # By scenario:
    truth: dict[str, int] = field(default_factory=dict)
    metric: dict[str, float] = field(default_factory=dict)
    spans: dict[str, float] = field(default_factory=dict)
    our_metric: dict[str, float] = field(default_factory=dict)  # our part of the metric
    our_spans: dict[str, float] = field(default_factory=dict)  # our part of the spans
    types: dict[str, str] = field(default_factory=dict)  # of the stream or response
    errors: dict[str, str] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)
    # In all:
    ours: dict[str, int] = field(default_factory=dict)  # our spans by the first word of their name
    theirs: dict[str, int] = field(default_factory=dict)  # the other spans by scope and name
    misplaced: list[str] = field(default_factory=list)  # our spans that are not where or as they should be
    complaints: dict[str, int] = field(default_factory=dict)
    calls_made: int = 0
    calls_counted: int = 0
    look_ups: int = 0
    traced_look_ups: int = 0


def ours() -> Any:
    """Our instrumentor."""
    return importlib.import_module(OURS).ResponsesUsageInstrumentor()


def switch_on(neighbour: Neighbour, order: str) -> None:
    """Switch both on, in an order.

    Garbage is collected only between scenarios. Logfire attaches a context while the generator of a stream is
    collected. Before Python 3.12 that can happen while another context is being attached. CPython then reads
    memory that is free again: contexts get lost, or the process crashes.
    """
    gc.disable()
    if order != "alone":
        # At the end: of the entry points, ours comes last.
        sys.path.append(os.environ["PACKAGE"])
    if order == "zero-code":
        from opentelemetry.instrumentation.auto_instrumentation import initialize

        initialize(swallow_exceptions=False)
        if not neighbour.entry_point:
            neighbour.on()
    elif order == "ours first":
        ours().instrument()
        neighbour.on()
    else:
        neighbour.on()
        if order != "alone":
            ours().instrument()


class Runner:
    """Runs scenarios, each in a span of the application. Then it collects garbage."""

    def __init__(self, ran: Ran, kept: tuple[Any, ...]) -> None:
        self.ran = ran
        self.kept = kept
        self.loop = asyncio.new_event_loop()

    def run(self, name: str, scenario: Callable[[Any, str], Any], client: Any) -> None:
        """Run a scenario of the sync client."""
        before = context.get_current()
        with trace.get_tracer(APPLICATION).start_as_current_span(name):
            inside = context.get_current()
            try:
                self._note(name, scenario(client, name))
            except Exception as error:
                self._note_error(name, error)
            self._check(name, inside)
        self._check(name, before)
        gc.collect()

    def run_async(
        self, name: str, scenario: Callable[[Any, str], Awaitable[Any]], make_client: Callable[[], Any]
    ) -> None:
        """Run a scenario of the async client."""

        async def application() -> None:
            client = make_client()
            before = context.get_current()
            with trace.get_tracer(APPLICATION).start_as_current_span(name):
                inside = context.get_current()
                try:
                    self._note(name, await scenario(client, name))
                except Exception as error:
                    self._note_error(name, error)
                self._check(name, inside)
            self._check(name, before)
            if client not in self.kept:
                await client.close()

        self.loop.run_until_complete(application())
        gc.collect()
        self.loop.run_until_complete(asyncio.sleep(0))

    def _note(self, name: str, result: Any) -> None:
        self.ran.types[name] = f"{type(result).__module__}.{type(result).__qualname__}"

    def _note_error(self, name: str, error: Exception) -> None:
        text = str(error).partition("\n")[0]
        self.ran.errors[name] = f"{type(error).__module__}.{type(error).__qualname__}: {text[:120]}"

    def _check(self, name: str, expected: Any) -> None:
        if context.get_current() != expected:
            self.ran.leaks.append(name)


def run_scenarios(neighbour: Neighbour, ran: Ran) -> None:
    """Run all scenarios of a neighbour."""
    gc.freeze()  # what has been imported is not looked at again and again
    runner = Runner(ran, neighbour.clients)
    if neighbour.framework:
        frameworks = importlib.import_module("frameworks")
        for name, scenario in frameworks.scenarios(neighbour.framework).items():
            runner.run_async(name, scenario, neighbour.async_client)
    else:
        import scenarios

        client = neighbour.client()
        for name, scenario in scenarios.SYNC.items():
            runner.run(name, scenario, client)
        for name, scenario in scenarios.ASYNC.items():
            runner.run_async(name, scenario, neighbour.async_client)
    gc.collect()
    for client in neighbour.clients:
        if (closing := client.close()) is not None:
            runner.loop.run_until_complete(closing)
    runner.loop.run_until_complete(runner.loop.shutdown_asyncgens())


def input_tokens(span: ReadableSpan) -> float | None:
    """The input tokens of an inference span."""
    attributes = span.attributes or {}
    if attributes.get("gen_ai.operation.name") in NOT_INFERENCE:
        return None
    if attributes.get("openinference.span.kind", "LLM") != "LLM":
        return None
    for name in INPUT_TOKENS:
        if name in attributes:
            return float(str(attributes[name]))
    details = json.loads(str(attributes.get("langfuse.observation.usage_details", "{}")))
    return details.get("input", details.get("input_tokens"))


def assign(recorder: Recorder, ran: Ran) -> None:
    """Assign spans to scenarios, by the trace of the application's span."""
    scenario_of = {span.context.trace_id: span.name for span in recorder.application_spans() if span.context}
    known = {span.context.span_id for span in recorder.exporter.get_finished_spans() if span.context}
    sums: Counter[str] = Counter()
    our_sums: Counter[str] = Counter()
    # Logfire has a span and a log record for each stream.
    twice: dict[str, float] = {}
    kinds: Counter[str] = Counter()
    theirs: Counter[str] = Counter(recorder.others)
    for span in recorder.spans():
        scenario = scenario_of.get(span.context.trace_id if span.context else 0)
        if scope_of(span) == OURS:
            kind = span.name.partition(" ")[0]
            kinds[kind] += 1
            if scenario is None or span.parent is None or span.parent.span_id not in known:
                ran.misplaced.append(f"{span.name}: the parent")
            if kind == "usage" and span.start_time != span.end_time:
                ran.misplaced.append(f"{span.name}: it has a duration")
            if span.kind is not (SpanKind.INTERNAL if kind == "usage" else SpanKind.CLIENT):
                ran.misplaced.append(f"{span.name}: {span.kind.name}")
        else:
            theirs[f"{scope_of(span)}: {span.name}"] += 1
        tokens = input_tokens(span)
        if scenario is None or tokens is None:
            continue
        if scope_of(span).startswith("logfire"):
            twice[scenario] = max(twice.get(scenario, 0), tokens)
        else:
            sums[scenario] += tokens
        if scope_of(span) == OURS:
            our_sums[scenario] += tokens
    for model, span_id in recorder.exemplars():
        if span_id not in known:
            ran.misplaced.append(f"{model}: a point's exemplar has no span")
    sums.update(twice)
    ran.our_spans = dict(our_sums)
    ran.spans, ran.ours, ran.theirs = dict(sums), dict(kinds), dict(theirs)


def by_scenario(by_model: Mapping[str, Any]) -> dict[str, Any]:
    """The sums by scenario. The application's call inside of a framework's belongs to the same scenario."""
    sums: Counter[str] = Counter()
    for model, tokens in by_model.items():
        sums[model.partition("+")[0]] += tokens
    return dict(sums)


def main(name: str, order: str) -> None:
    """Run it all."""
    ran = Ran()
    api, recorder, complaints = Api(), Recorder(), Complaints()
    complaints.watch()
    with ScriptedServer(api) as server:
        neighbour = NEIGHBOURS[name](recorder, server.url)
        neighbour.set_up()
        switch_on(neighbour, order)
        run_scenarios(neighbour, ran)
        if order != "alone" and not ours().flush(FLUSH_S):
            complaints.seen["look-ups are still pending"] += 1
        trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
        seen = list(gets(server))
    assign(recorder, ran)
    ran.metric = by_scenario(recorder.input_tokens())
    ran.our_metric = by_scenario(recorder.input_tokens(OURS))
    ran.truth = by_scenario(api.tokens)
    ran.version = version(neighbour.distribution)
    ran.also = {name: version(name) for name in neighbour.also}
    ran.complaints = dict(complaints.seen)
    ran.calls_made, ran.calls_counted = api.calls, recorder.calls()
    ran.look_ups = sum(not own for own, _ in seen)
    ran.traced_look_ups = sum(not own and "traceparent" in request.headers for own, request in seen)
    sys.stdout.write(json.dumps(vars(ran)))
    sys.stdout.flush()
    os._exit(0)  # what a neighbour does at the exit is not measured


if __name__ == "__main__":
    main(*sys.argv[1:])

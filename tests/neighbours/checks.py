"""One check beside one neighbour, in a process of its own: `checks.py NEIGHBOUR CHECK`.

It prints as JSON what is wrong. See `measure` for the environment.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from measure import FLUSH_S, input_tokens, ours, switch_on
from opentelemetry import baggage, context, trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from recorder import APPLICATION, CALLS, OURS, TOKENS, Recorder, scope_of
from scenarios import PROMPT, REFUSED, read
from server import SLOW_S, Api, gets

from embedded.http_server import ScriptedServer
from neighbours import NEIGHBOURS, Neighbour

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.trace import ReadableSpan

DURATION = "gen_ai.client.operation.duration"
# What `on_call` was called with.
RECORDS: list[Any] = []


class Stage:
    """A neighbour, the server, and what is found to be wrong."""

    def __init__(self, name: str) -> None:
        self.api, self.recorder = Api(), Recorder()
        self.server = ScriptedServer(self.api).start()
        self.neighbour: Neighbour = NEIGHBOURS[name](self.recorder, self.server.url)
        self.faults: list[str] = []
        self._before: tuple[int, dict[str, float], int] = (0, {}, 0)

    def expect(self, what: str, found: Any, expected: Any) -> None:
        """Note a difference."""
        if found != expected:
            self.faults.append(f"{what}: {found}, not {expected}")

    def start(self) -> None:
        """Take what is there as read."""
        calls = self.recorder.calls()
        self._before = len(self.recorder.spans()), self.recorder.input_tokens(), calls

    def spans(self, scope: str | None = None) -> list[ReadableSpan]:
        """The spans since `start`."""
        spans = self.recorder.spans()[self._before[0] :]
        return [span for span in spans if scope in (None, scope_of(span))]

    def metric(self, model: str) -> float:
        """The input tokens of the metric since `start`, as a multiple of the truth."""
        tokens = self.recorder.input_tokens().get(model, 0) - self._before[1].get(model, 0)
        return tokens / self.api.tokens[model]

    def calls(self) -> int:
        """Our count of calls since `start`."""
        return self.recorder.calls() - self._before[2]

    def tokens(self) -> float:
        """The input tokens of all inference spans since `start`. Logfire's span and log count once."""
        sums: dict[tuple[int, Any], float] = {}
        for number, span in enumerate(self.spans()):
            tokens = input_tokens(span)
            if tokens is not None:
                is_logfire = scope_of(span).startswith("logfire") and span.context
                key = (0, span.context.trace_id) if is_logfire and span.context else (1, number)
                sums[key] = tokens
        return sum(sums.values())

    def drained(self, model: str, client: Any = None) -> None:
        """A streamed call, read to its end."""
        with trace.get_tracer(APPLICATION).start_as_current_span(model):
            made = client or self.neighbour.client()
            for _event in made.responses.create(model=model, input=PROMPT, stream=True):
                pass

    def closed(self, model: str, client: Any = None) -> None:
        """A streamed call, closed early."""
        with trace.get_tracer(APPLICATION).start_as_current_span(model):
            made = client or self.neighbour.client()
            stream = made.responses.create(model=model, input=PROMPT, stream=True)
            read(stream)
            stream.close()

    def flush(self) -> None:
        """Wait for look-ups."""
        self.expect("flushed", ours().flush(FLUSH_S), expected=True)


def always(stage: Stage, order: str) -> None:
    """The start time of our spans where we make one for every call."""
    os.environ["OTEL_RESPONSES_USAGE_SPANS"] = "always"
    both_on(stage, order)
    start_time(stage)


def both_on(stage: Stage, order: str, **settings: bool) -> None:
    """Set providers, and switch both on."""
    stage.neighbour.set_up(**settings)
    switch_on(stage.neighbour, order)


def is_right(stage: Stage, when: str) -> None:
    """Make calls, and expect them to be counted once."""
    stage.start()
    models = f"drained {when}", f"closed {when}"
    stage.drained(models[0])
    stage.closed(models[1])
    stage.flush()
    stage.expect(f"{when}: calls counted", stage.calls(), len(models))
    for model in models:
        stage.expect(f"{model}: metric", stage.metric(model), 1)
    stage.expect(f"{when}: spans", stage.tokens() / sum(stage.api.tokens[model] for model in models), 1)


def switching(stage: Stage, on: str, off: str) -> None:
    """Both on, off one by one, and ours on again."""
    both_on(stage, on)
    is_right(stage, "both on")
    if off == "ours off":
        ours().uninstrument()
        stage.start()
        stage.drained("ours off")
        stage.expect("ours off: our spans", [span.name for span in stage.spans(OURS)], [])
        stage.neighbour.off()
    else:
        stage.neighbour.off()
        is_right(stage, "theirs off")
        ours().uninstrument()
    stage.start()
    asked = len(list(gets(stage.server)))
    stage.drained("both off")
    stage.closed("both off, closed")
    stage.expect("both off: our spans", [span.name for span in stage.spans(OURS)], [])
    stage.expect("both off: look-ups", len(list(gets(stage.server))) - asked, 0)
    ours().instrument()
    is_right(stage, "on again")
    # OpenLLMetry leaves its wrappers on the SDK.
    if scope_names(stage) == {OURS}:
        stage.expect("on again: our spans", sorted(kinds(stage)), ["chat", "chat"])


def suppressed(stage: Stage) -> None:
    """The application suppresses instrumentation around its calls: also inside of an inference span."""
    inference = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "suppressed inside"}
    stage.start()
    with suppress_instrumentation():
        stage.drained("suppressed")
        stage.closed("suppressed, closed")
    with (
        trace.get_tracer(APPLICATION).start_as_current_span("chat", attributes=inference),
        suppress_instrumentation(),
    ):
        stage.drained("suppressed inside")
        stage.closed("suppressed inside, closed")
    stage.flush()
    stage.expect("our spans", [span.name for span in stage.spans(OURS)], [])
    stage.expect("our calls", stage.calls(), 0)
    stage.expect("our points", len([1 for scope, _ in stage.recorder.points(TOKENS) if scope == OURS]), 0)
    stage.expect("look-ups", len(list(gets(stage.server))), 0)
    is_right(stage, "afterwards")


def force_flush(stage: Stage) -> None:
    """The neighbour's span of a closed stream is exported at once. The server does not answer the look-up."""
    asked = len(list(gets(stage.server)))
    stage.start()
    stage.closed("hanging closed")
    _wait(lambda: len(list(gets(stage.server))) > asked, "no look-up")
    began = time.monotonic()
    trace.get_tracer_provider().force_flush(3000)  # type: ignore[attr-defined]
    if time.monotonic() - began > 2.5:
        stage.faults.append("the look-up has held force_flush()")
    theirs = [span.name for span in stage.spans() if scope_of(span) != OURS] + stage.recorder.others
    stage.expect("the neighbour's span is exported", bool(theirs), expected=True)
    stage.expect("our spans before the look-up has ended", [span.name for span in stage.spans(OURS)], [])


def unsampled(stage: Stage, order: str) -> None:
    """No span is recorded: the points are counted once."""
    both_on(stage, order, sampled=False)
    _points_are_right(stage)
    stage.expect("spans", [span.name for span in stage.spans()], [])


def meter_only(stage: Stage, order: str) -> None:
    """There is no tracer provider."""
    both_on(stage, order, spans=False)
    _points_are_right(stage)


def tracer_only(stage: Stage, order: str) -> None:
    """There is no meter provider."""
    both_on(stage, order, points=False)
    stage.start()
    stage.drained("drained")
    stage.closed("closed")
    stage.flush()
    stage.expect("spans", stage.tokens() / sum(stage.api.tokens.values()), 1)


def calls_of_an_old_client(stage: Stage, order: str) -> None:
    """A client whose methods were used before anything was on: whole, early, refused calls, each once."""
    stage.neighbour.set_up()
    sync, asynchronous = stage.neighbour.client(), stage.neighbour.async_client()
    for client in (sync, asynchronous):
        assert client.responses.create is not None
    switch_on(stage.neighbour, order)
    stage.start()
    stage.drained("drained", sync)
    stage.closed("closed", sync)
    errors = []

    async def refuse() -> None:
        for model in (REFUSED, "unreachable"):
            try:
                await asynchronous.responses.create(model=model, input=PROMPT)
            except Exception as error:
                errors.append(type(error).__name__)
            if model == REFUSED:
                stage.server.stop()

    try:
        stage.drained(REFUSED, sync)
    except Exception as error:
        errors.append(type(error).__name__)
    stage.flush()
    asyncio.run(refuse())
    with suppress(Exception):
        stage.drained("unreachable", sync)
    stage.flush()
    stage.expect("errors", errors, ["AuthenticationError", "AuthenticationError", "APIConnectionError"])
    stage.expect("calls counted", stage.calls(), 6)
    outcomes: Counter[str] = Counter()
    for _, point in stage.recorder.points(CALLS):
        if point.attributes["gen_ai.request.model"] in (REFUSED, "unreachable"):
            outcomes[point.attributes["openai_responses.stream.outcome"]] += point.value
    stage.expect("outcomes of refused calls", outcomes, {"error": 4})
    stage.expect("spans", stage.tokens() / sum(stage.api.tokens.values()), 1)


def start_time(stage: Stage) -> None:
    """Our duration of a call has the time before the server's answer in it."""
    stage.start()
    stage.drained("slow")
    stage.flush()
    stage.expect("slow: calls counted", stage.calls(), 1)
    if os.environ.get("OTEL_RESPONSES_USAGE_SPANS") == "always":
        stage.expect("slow: our spans", kinds(stage), ["chat"])
    for span in stage.spans(OURS):
        if (span.end_time or 0) - (span.start_time or 0) < SLOW_S * 1e9:
            stage.faults.append("slow: our span starts after the answer")
    for scope, point in stage.recorder.points(DURATION):
        if scope == OURS and point.attributes.get("gen_ai.request.model") == "slow" and point.sum < SLOW_S:
            stage.faults.append("slow: our duration starts at the answer")


def basics(stage: Stage, order: str) -> None:
    """The application's own suppression, the start time, and `force_flush()`, in one process."""
    both_on(stage, order)
    suppressed(stage)
    start_time(stage)
    if stage.neighbour.makes_spans and not stage.neighbour.async_only:
        force_flush(stage)


def tenants(stage: Stage, order: str, spans: str) -> None:
    """Each record has the tenant of its call. So have all token points of this package."""
    os.environ |= {
        "OTEL_RESPONSES_USAGE_BAGGAGE_KEYS": "tenant.id",
        "OTEL_RESPONSES_USAGE_ON_CALL": "checks:RECORDS.append",
        "OTEL_RESPONSES_USAGE_SPANS": spans,
    }
    both_on(stage, order)
    stage.start()
    context.attach(baggage.set_baggage("tenant.id", "acme"))
    stage.drained("drained")
    stage.closed("closed")
    stage.flush()
    _wait(lambda: len(RECORDS) == 2, "records are missing")  # one of each call
    told = {record.request_model: record.baggage.get("tenant.id") for record in RECORDS}
    stage.expect("tenants of records", told, {"drained": "acme", "closed": "acme"})
    points = [point.attributes for scope, point in stage.recorder.points(TOKENS) if scope == OURS]
    models = {point["gen_ai.request.model"] for point in points}
    stage.expect(
        "models of our token points", models, {"closed"} if spans == "auto" else {"drained", "closed"}
    )
    stage.expect("tenants of our token points", {point.get("tenant.id") for point in points}, {"acme"})


def _points_are_right(stage: Stage) -> None:
    stage.start()
    stage.drained("drained")
    stage.closed("closed")
    stage.flush()
    for model in ("drained", "closed"):
        stage.expect(f"{model}: metric", stage.metric(model), 1)
    stage.expect("calls counted", stage.calls(), 2)


def kinds(stage: Stage) -> list[str]:
    """Our spans since `start`, by the first word of their names."""
    return [span.name.partition(" ")[0] for span in stage.spans(OURS)]


def scope_names(stage: Stage) -> set[str]:
    """Whose spans there are since `start`."""
    return {scope_of(span) for span in stage.spans()}


def _wait(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.01)


CHECKS: dict[str, Callable[..., None]] = {
    "on/off": switching,
    "suppression, start, flush": basics,
    "start with spans=always": always,
    "old client": calls_of_an_old_client,
    "unsampled": unsampled,
    "meter only": meter_only,
    "tracer only": tracer_only,
    "tenants": tenants,
}


def main(name: str, check: str, *args: str) -> None:
    """Run a check. Its arguments are orders."""
    stage = Stage(name)
    try:
        CHECKS[check](stage, *args)
    except Exception as error:
        stage.faults.append(f"{type(error).__name__}: {error}")
        if os.environ.get("DEBUG"):
            raise
    distribution = stage.neighbour.distribution
    sys.stdout.write(json.dumps({"faults": stage.faults, "version": version(distribution)}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One instrumentation in its own environment: `python -m benchmarks.peer NAME [--quick]`.

Each is switched on as its README says, without the content of messages. What it exports is dropped. The
result is printed as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from opentelemetry import metrics, trace

from . import lockstep, pieces
from .call import AT_START
from .sdk import PROMPT, Work, async_reader, reader
from .telemetry import Told, by_hand

EVENTS, TURN = 5_000, 500
# More pairs make the error smaller: four times as many, half of it.
PAIRS = int(os.environ.get("BENCH_PAIRS", "8"))
CALLS, CALL_TURNS = 10, 16
QUICK_EVENTS, QUICK_TURN, QUICK_PAIRS = 100, 50, 1
QUICK_CALLS, QUICK_CALL_TURNS = 2, 3
CANARY = " canary-of-the-answer"
SETTLED_S = 0.3  # in which threads have recorded what they record of a call
READERS = {"sync": reader, "async": async_reader}


def none(_: Told) -> None:
    """Switch on nothing."""


def ours(_: Told) -> None:
    """Switch this project's on."""
    from otel_responses_usage import ResponsesUsageInstrumentor

    ResponsesUsageInstrumentor().instrument()


def genai(_: Told) -> None:
    """Switch opentelemetry-instrumentation-genai-openai on; it captures no content unless told to."""
    from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor  # type: ignore[import-not-found]

    OpenAIInstrumentor().instrument()


def logfire(told: Told) -> None:
    """Switch Logfire on; content is part of its spans, and cannot be left out but by scrubbing."""
    import logfire as fire  # type: ignore[import-not-found]

    fire.configure(
        send_to_logfire=False,
        console=False,
        additional_span_processors=[told.span_processor],
        metrics=fire.MetricsOptions(additional_readers=[told.reader]),
    )
    fire.instrument_openai()


def ddtrace(told: Told) -> None:
    """Switch ddtrace on; its traces are dropped where they would be written."""
    os.environ |= {
        "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
        "DD_REMOTE_CONFIGURATION_ENABLED": "false",
        "DD_TRACE_STARTUP_LOGS": "false",
    }
    from ddtrace import patch  # type: ignore[import-not-found]
    from ddtrace.trace import TraceFilter, tracer  # type: ignore[import-not-found]

    class Nowhere(TraceFilter):  # type: ignore[misc]
        def process_trace(self, spans: list[Any]) -> None:
            for span in spans:
                attributes = {**span.get_tags(), **span.get_metrics()}
                told.note(SimpleNamespace(attributes=attributes, events=()))

    tracer.configure(trace_processors=[Nowhere()])
    patch(openai=True)


def traceloop(_: Told) -> None:
    """Switch OpenLLMetry's instrumentation on, without content."""
    os.environ["TRACELOOP_TRACE_CONTENT"] = "false"
    from opentelemetry.instrumentation.openai import OpenAIInstrumentor  # type: ignore[import-not-found]

    OpenAIInstrumentor().instrument()


def openinference(_: Told) -> None:
    """Switch OpenInference on, without content."""
    from openinference.instrumentation import TraceConfig  # type: ignore[import-not-found]
    from openinference.instrumentation.openai import OpenAIInstrumentor  # type: ignore[import-not-found]

    OpenAIInstrumentor().instrument(config=TraceConfig(hide_inputs=True, hide_outputs=True))


SWITCHES: dict[str, Callable[[Told], None]] = {
    switch.__name__: switch for switch in (none, ours, openinference, traceloop, ddtrace, genai, logfire)
}


class Bodies:
    """The streams that are read, made once for all processes."""

    def __init__(self, *, quick: bool) -> None:
        self.turn = QUICK_TURN if quick else TURN
        events = pieces.padded(QUICK_EVENTS if quick else EVENTS)
        self.events = len(events)
        self.short = pieces.padded(pieces.SHORT, CANARY)
        self.by_division = {name: divide(events) for name, divide in pieces.DIVISIONS.items()}
        # The SDK decodes this one, as it does in an application.
        self.by_division[pieces.GZIP] = pieces.compressed(events)


class Caller:
    """Makes calls in one process, after an instrumentation has been switched on there."""

    def __init__(self, name: str, bodies: Bodies) -> None:
        self._bodies = bodies
        self._told = Told()
        self._readers: dict[tuple[str, str], Work] = {}
        if name != "logfire":  # which makes providers of its own
            trace.set_tracer_provider(self._told.tracer_provider)
            metrics.set_meter_provider(self._told.meter_provider)
        SWITCHES[name](self._told)
        for body in bodies.by_division.values():
            for _ in body:  # the memory of a body is copied at its first use after a fork
                pass

    def work(self, task: Any, pause: lockstep.Pause) -> Any:
        """Read one stream, make calls, or say what is recorded of one."""
        read = self._reader(task["how"], task.get("division", ""), pause)
        if task["kind"] == "observe":
            return self._observed(read)
        if task["kind"] == "stream":
            read()
            pause()
            return None
        tell = [by_hand(**span) for span in task["by_hand"]]
        for _ in range(task["turns"]):
            for _ in range(task["calls"]):
                read()
                for tell_span in tell:
                    tell_span()
            pause()
        return None

    def _reader(self, how: str, division: str, pause: lockstep.Pause) -> Work:
        if (how, division) not in self._readers:
            stream = self._bodies.by_division[division] if division else self._bodies.short
            encoding = "gzip" if division == pieces.GZIP else None
            self._readers[how, division] = READERS[how](
                stream, encoding=encoding, pause=pause, turn=self._bodies.turn
            )
        return self._readers[how, division]

    def _observed(self, read: Work) -> Any:
        """Return what one call records, and what it takes to record the same by hand."""
        for _ in range(2):  # what is recorded once in a process is recorded at the first call
            self._told.take_spans()
            self._told.points()
            read()
            time.sleep(SETTLED_S)
        spans, points = self._told.take_spans(), self._told.points()
        written = json.dumps([spans, points], default=str)
        attributes = [json.loads(json.dumps(found, default=str)) for found, _ in spans]
        return {
            "attributes": [len(found) for found in attributes],
            "has_usage": all(str(count) in json.dumps(attributes) for count in pieces.USAGE),
            "points": Counter(name for name, _, _ in points),
            "content": [
                what for what, text in (("input", PROMPT), ("output", CANARY.strip())) if text in written
            ],
            "by_hand": [
                {
                    "attributes": found,
                    "points": points if number == len(attributes) else [],
                    "at_start": AT_START,
                }
                for number, found in enumerate(attributes, 1)
            ],
        }


def main() -> None:
    """Measure the named one in lockstep with none, and with none and its spans and points by hand."""
    name, *options = sys.argv[1:]
    quick = "--quick" in options
    bodies = Bodies(quick=quick)
    pairs = [_pair(name, bodies, number, quick=quick) for number in range(QUICK_PAIRS if quick else PAIRS)]
    sys.stdout.write(json.dumps({"events": bodies.events, "short": len(bodies.short), "pairs": pairs}))


def _pair(name: str, bodies: Bodies, number: int, *, quick: bool) -> dict[str, Any]:
    """Measure once, in new processes: where the memory of a process lies makes a difference of 1 %."""
    calls, turns = (QUICK_CALLS, QUICK_CALL_TURNS) if quick else (CALLS, CALL_TURNS)
    workers = [
        lambda: Caller("none", bodies).work,
        lambda: Caller(name, bodies).work,
        lambda: Caller("none", bodies).work,
    ]
    found: dict[str, Any] = {}
    forwards = number % 2 == 0
    with lockstep.children(*(workers if forwards else workers[::-1])) as forked:
        plain, watched, by_hand_ = forked if forwards else forked[::-1]
        for how in READERS:
            lockstep.run([watched], [{"kind": "observe", "how": how}])
            recorded = watched.result
            if recorded and name == "ddtrace":  # its spans are not OpenTelemetry's
                recorded["by_hand"] = []
            spans = recorded["by_hand"] if recorded else []
            task = {"kind": "call", "how": how, "calls": calls, "turns": turns, "by_hand": []}
            tasks = [task, task, {**task, "by_hand": spans}]
            # The first turn is to warm up.
            took = lockstep.run([plain, watched, by_hand_], tasks)[1:]
            found[how] = {
                "recorded": recorded,
                "call": [[cost / calls for cost in turn] for turn in took],
                "streams": {},
            }
        for how in READERS:
            for division in bodies.by_division:
                task = {"kind": "stream", "how": how, "division": division}
                found[how]["streams"][division] = lockstep.run([plain, watched], [task, task])
    return found


if __name__ == "__main__":
    main()

"""One instrumentation at work in its own environment: `python -m benchmarks.peer NAME`.

Each is switched on as its README says, without the content of messages, and exports to nowhere. For each
line on standard input it measures once and answers with a line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from opentelemetry import metrics, trace

from . import pieces
from .telemetry import Told

EVENTS = 400
CALLS = 10


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

    processors = [told.span_processor]
    fire.configure(send_to_logfire=False, console=False, additional_span_processors=processors)
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
            told.count(len(spans))

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
    switch.__name__: switch for switch in (none, ours, genai, logfire, ddtrace, traceloop, openinference)
}


def main() -> None:
    """Switch the named one on, and measure whenever asked."""
    told = Told()
    if sys.argv[1] != "logfire":  # which makes providers of its own
        trace.set_tracer_provider(told.tracer_provider)
        metrics.set_meter_provider(told.meter_provider)
    SWITCHES[sys.argv[1]](told)
    from .sdk import async_reader, reader

    short, long = pieces.whole(pieces.SHORT), pieces.whole(pieces.SHORT + EVENTS)
    works = {
        "sync": (reader(short), reader(long)),
        "async": (async_reader(short), async_reader(long)),
    }
    for _ in sys.stdin:
        costs: dict[str, float] = {}
        for how, (read_short, read_long) in works.items():
            gc.collect()
            call_ns = min(_ns(read_short) for _ in range(CALLS))
            costs[f"call, {how}"] = call_ns
            costs[f"event, {how}"] = (min(_ns(read_long) for _ in range(3)) - call_ns) / EVENTS
        sys.stdout.write(json.dumps({"costs": costs, "spans": told.ended}) + "\n")
        sys.stdout.flush()


def _ns(work: Callable[[], object]) -> int:
    began = time.thread_time_ns()
    work()
    return time.thread_time_ns() - began


if __name__ == "__main__":
    main()

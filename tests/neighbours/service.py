"""A service with OpenTelemetry's own instrumentation and ours: see `observability/test_neighbours_stack.py`.

It is run by `opentelemetry-instrument`, with arguments `MODEL:SCENARIO`. Each line of the standard input
starts a round of these calls. After each round everything is exported, and a line is printed.
"""

from __future__ import annotations

import contextlib
import sys

import openai
from opentelemetry import metrics, trace
from scenarios import SYNC

from otel_responses_usage import ResponsesUsageInstrumentor

FLUSH_S = 20.0
# By this header the server knows what it must do about a call.
SCENARIO = "x-scenario"


def main(*calls: str) -> None:
    """Make rounds of calls."""
    ours = ResponsesUsageInstrumentor()
    ours.instrument()
    client = openai.OpenAI(api_key="k", max_retries=0)
    for _line in sys.stdin:
        for call in calls:
            model, _, name = call.partition(":")
            of_scenario = client.with_options(default_headers={SCENARIO: name})
            # A lost stream is closed like others. What differs is that the server does not show its response.
            scenario = SYNC.get(name) or SYNC["closed"]
            with contextlib.suppress(openai.APIStatusError):
                scenario(of_scenario, model)
        assert ours.flush(FLUSH_S), "look-ups are still pending"
        # Spans first, as with the default intervals.
        trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
        metrics.get_meter_provider().force_flush()  # type: ignore[attr-defined]
        sys.stdout.write("exported\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Makes eight calls, each with its own ending, and shows what telemetry came to know of them.

The calls go to an embedded Responses server, their spans and metrics over OTLP to an embedded receiver, and
the tables show what arrived there. With OTEL_EXPORTER_OTLP_ENDPOINT set everything is sent there as well.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from acts import ACTS, Act, Stage
from embedded.http_server import ScriptedServer
from embedded.otlp_receiver import OtlpReceiver
from embedded.responses_api import ResponsesAPI
from otel_responses_usage import ResponsesUsageInstrumentor
from outlets import Outlet, outlets
from tables import calls_table, outcomes_table, tokens_table, total

if TYPE_CHECKING:
    from openai.types.responses import ResponseStreamEvent
    from opentelemetry.trace import Tracer


def main() -> None:
    # A table that is not printed to a terminal need not be squeezed into one.
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110
    console = Console(highlight=False, width=wide)
    with OtlpReceiver() as receiver:
        sinks = outlets(receiver)
        api = perform(console, sinks)
        report(console, receiver, api)
        for sink in sinks[1:]:
            console.print(sink.statement())


def perform(console: Console, sinks: list[Outlet]) -> ResponsesAPI:
    """Plays every act under full instrumentation and returns when all telemetry has been delivered."""
    resource = Resource.create({"service.name": "otel-responses-usage-demo"})
    metering = MeterProvider([PeriodicExportingMetricReader(sink.metrics) for sink in sinks], resource)
    tracing = TracerProvider(resource=resource)
    for sink in sinks:
        tracing.add_span_processor(BatchSpanProcessor(sink.spans))
    instrumentor = ResponsesUsageInstrumentor()
    instrumentor.instrument(tracer_provider=tracing, meter_provider=metering)

    console.print(f"\n[bold]{len(ACTS)} calls to a Responses API on loopback[/], each with its own ending\n")
    coming = iter(ACTS)
    api = ResponsesAPI(lambda _: next(coming).plan)
    with ScriptedServer(api) as server:
        for act in ACTS:
            play(act, f"{server.url}/v1", console, tracing.get_tracer("demo"))
        with console.status("waiting for the look-ups of calls that ended early"):
            instrumentor.uninstrument()
    with console.status("delivering spans and metrics"):
        tracing.shutdown()
        metering.shutdown()
    return api


def play(act: Act, base_url: str, console: Console, tracer: Tracer) -> None:
    """Makes one call in a span of its own, its text visible as it comes."""
    began = time.monotonic()
    latest: deque[str] = deque(maxlen=9)

    def line(mark: str) -> Text:
        seconds = f"{time.monotonic() - began:.1f} s"
        text = Text("".join(latest), style="dim")
        return Text.assemble(mark, f" {act.title:<18}{seconds:>6}  ", text, no_wrap=True, overflow="ellipsis")

    with (
        Live(line("·"), console=console, transient=True, refresh_per_second=20) as live,
        tracer.start_as_current_span(act.title),
    ):

        def watch(event: ResponseStreamEvent) -> None:
            if event.type.endswith(".delta"):
                latest.append(getattr(event, "delta", ""))
                live.update(line("·"))

        act.play(Stage(base_url, watch))
    console.print(line("✓"), no_wrap=True, overflow="ellipsis")


def report(console: Console, receiver: OtlpReceiver, api: ResponsesAPI) -> None:
    """Prints what arrived, and holds it against the server's own books."""
    console.print("\n[bold]What arrived over OTLP[/]")
    console.print(calls_table(receiver.spans, wide=console.width >= 108))
    side_by_side = Table.grid(padding=(0, 4))
    side_by_side.add_row(tokens_table(receiver.metrics), outcomes_table(receiver.metrics))
    console.print(side_by_side)

    billed = sum(response["usage"]["output_tokens"] for response in api.stored.values())
    known = total(receiver.spans, "gen_ai.usage.output_tokens")
    deltas = total(receiver.spans, "openai_responses.stream.deltas")
    console.print(
        f"The server billed {billed:,} output tokens. Telemetry has [green]{known:,}[/] of them and says why"
        f" it cannot know the other {billed - known:,}. Counting deltas would have said [red]{deltas:,}[/].\n"
    )


if __name__ == "__main__":
    main()

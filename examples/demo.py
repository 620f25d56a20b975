"""Makes twelve calls, each with its own ending, and shows what telemetry came to know of them.

The calls go to an embedded Responses server, their spans and metrics over OTLP to an embedded receiver, and
the tables show what arrived there. With OTEL_EXPORTER_OTLP_ENDPOINT set everything is sent there as well.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Before the other imports, which take a second: Ctrl-C ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import logging
import os
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import page
import picture
from acts import ACTS, Act, Stage
from embedded.http_server import ScriptedServer
from embedded.otlp_receiver import OtlpReceiver
from embedded.responses_api import Plan, ResponsesAPI
from embedded.websocket_api import Turn, WebSocketAPI
from otel_responses_usage import Config, ResponsesUsageInstrumentor
from outlets import Outlet, outlets
from readings import Readings, read_calls
from tables import WIDE, calls_table, outcomes_table, readings_table, tokens_table, unknown_statement

if TYPE_CHECKING:
    from types import FrameType

    from opentelemetry.trace import Tracer

    from embedded.answer import Json

ROOT = Path(__file__).parents[1]
SHOW_CURSOR = b"\x1b[?25h"
# Pieces of text that the line of a call shows.
LAST_DELTAS = 9


def main() -> None:
    options = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Makes calls that end in every way, and shows what telemetry knows of their tokens.",
        epilog="With OTEL_EXPORTER_OTLP_ENDPOINT set, the telemetry is sent there, too.",
    )
    options.add_argument("--svg", type=_new_file, metavar="FILE", help="draw the table into this file")
    options.add_argument("--page", type=_new_file, metavar="FILE", help="write a page with a timeline")
    chosen = options.parse_args()
    signal.signal(signal.SIGINT, end_at_once)
    # The exporters report each failed try. In the end one sentence says what became of all.
    logging.getLogger("opentelemetry.exporter").addHandler(logging.NullHandler())
    logging.getLogger("opentelemetry.exporter").propagate = False

    # A table that is not printed to a terminal need not be squeezed into one.
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = Console(highlight=False, width=wide)
    with OtlpReceiver() as receiver:
        sinks = outlets(receiver)
        books = perform(console, sinks)
    report(console, receiver, books)
    if chosen.svg:
        chosen.svg.write_text(picture.draw(read_calls(receiver.spans)), "utf-8")
        console.print(f"The table is in {chosen.svg}.", soft_wrap=True)
    if chosen.page:
        chosen.page.write_text(page.write(receiver.spans, receiver.metrics), "utf-8")
        console.print(f"The page is {chosen.page.resolve().as_uri()}", soft_wrap=True)
    for sink in sinks[1:]:
        console.print(sink.statement(), soft_wrap=True)
    print_next_step(console, chosen.page, sinks[1:])
    if not all(sink.spans.accepted for sink in sinks):
        sys.exit(1)


def end_at_once(_signal: int, _frame: FrameType | None) -> None:
    """Ends the program by the signal: nothing that is under way here is worth waiting for."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), SHOW_CURSOR + b"\n")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)


def perform(console: Console, sinks: list[Outlet]) -> list[Json]:
    """Plays every act under full instrumentation. Returns the responses when all telemetry is delivered."""
    resource = Resource.create({"service.name": "otel-responses-usage-demo"})
    readers = [PeriodicExportingMetricReader(sink.metrics) for sink in sinks if sink.metrics]
    metering = MeterProvider(readers, resource)
    tracing = TracerProvider(resource=resource)
    for sink in sinks:
        tracing.add_span_processor(BatchSpanProcessor(sink.spans))
    instrumentor = ResponsesUsageInstrumentor()
    # More than the default grace, so that a busy machine shows the same as another.
    config = replace(Config.from_env(), grace_timeout=5)
    instrumentor.instrument(tracer_provider=tracing, meter_provider=metering, config=config)

    console.print(f"\n[bold]{len(ACTS)} calls to a Responses API on loopback[/], each with its own ending\n")
    coming = iter([act.plan for act in ACTS if not act.by_websocket])
    spoken = iter([act.plan for act in ACTS if act.by_websocket])
    api = ResponsesAPI(lambda _: next(coming))
    with ScriptedServer(api) as server, WebSocketAPI(lambda _: _turn(next(spoken))) as sockets:
        for act in ACTS:
            urls = f"{server.url}/v1", sockets.url.replace("http", "ws", 1)
            play(act, urls, console, tracing.get_tracer("demo"))
        with console.status("waiting for the look-ups of calls that ended early"):
            instrumentor.uninstrument()
    with console.status("delivering spans and metrics"):
        tracing.shutdown()
        metering.shutdown()
    return [*api.stored.values(), *sockets.stored.values()]


def _turn(plan: Plan) -> Turn:
    return Turn(plan.answer, pace=plan.pace)


def play(act: Act, urls: tuple[str, str], console: Console, tracer: Tracer) -> None:
    """Makes one call in a span of its own, its text visible as it comes."""
    began = time.monotonic()
    deltas: deque[str] = deque(maxlen=LAST_DELTAS + 1)

    def line(mark: str) -> Text:
        seconds = f"{time.monotonic() - began:.1f} s"
        latest = list(deltas)
        if len(latest) > LAST_DELTAS:
            latest[0] = "… "
        text = Text("".join(latest), style="dim")
        return Text.assemble(mark, f" {act.title:<18}{seconds:>6}  ", text, no_wrap=True, overflow="ellipsis")

    with (
        Live(line("·"), console=console, transient=True, refresh_per_second=20) as live,
        tracer.start_as_current_span(act.title),
    ):

        def watch(event: Any) -> None:
            if event.type.endswith(".delta"):
                deltas.append(getattr(event, "delta", ""))
                live.update(line("·"))

        act.play(Stage(*urls, watch))
    console.print(line("✓"), no_wrap=True, overflow="ellipsis")


def report(console: Console, receiver: OtlpReceiver, books: list[Json]) -> None:
    """Prints what arrived, and holds it against the server's own books."""
    wide = console.width >= WIDE
    console.print("\n[bold]What arrived over OTLP[/]: output tokens, read in three ways")
    console.print(
        "[dim]deltas       pieces of text that were counted; a piece is not a token\n"
        "last event   what the answer to the call itself told, if it arrived\n"
        f"{'out' if wide else 'in its span':<13}what this package found, and from where, or why not[/]"
    )
    console.print(calls_table(receiver.spans, wide=wide))
    side_by_side = Table.grid(padding=(0, 4))
    side_by_side.add_row(tokens_table(receiver.metrics), outcomes_table(receiver.metrics))
    console.print(side_by_side)

    calls = read_calls(receiver.spans)
    readings = Readings.of(calls)
    billed = sum(response["usage"]["output_tokens"] for response in books)
    console.print(f"[bold]Output tokens of these {len(calls)} calls[/]\n")
    console.print(readings_table(readings, billed))
    console.print(f"\n{unknown_statement(readings, billed)}\n", soft_wrap=True)


def print_next_step(console: Console, written: Path | None, sent: list[Outlet]) -> None:
    """Prints what to do after the demo."""
    lines = ["[bold]Next[/]: your own service, without a change to its code. In its environment:"]
    lines.append(f'    pip install "{ROOT}\\[instruments,otlp]"')
    lines.append("    opentelemetry-instrument python app.py")
    if not written:
        lines.append("These calls as a page: scripts/demo --page demo.html")
    if not sent:
        lines.append("In Arize Phoenix, a page for traces: examples/look/run")
    console.print("\n".join(lines), soft_wrap=True)


def _new_file(name: str) -> Path:
    path = Path(name)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path


if __name__ == "__main__":
    main()

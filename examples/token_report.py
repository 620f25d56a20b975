"""Shows on one call what its deltas do not tell: `python examples/token_report.py [--cut] [QUESTION]`.

With `--cut` the connection breaks half-way, and the counts come from looking the response up. With
OPENAI_API_KEY the question goes to OpenAI, without it to the embedded server.
"""

from __future__ import annotations

import argparse
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import openai
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.console import Console
from rich.table import Table

from otel_responses_usage import ResponsesUsageInstrumentor
from stand_ins import stand_in_api

if TYPE_CHECKING:
    from openai import Stream
    from openai.types.responses import ResponseStreamEvent
    from opentelemetry.sdk.trace import ReadableSpan


def main() -> None:
    options = argparse.ArgumentParser(description="What one call cost, and how that is known.")
    options.add_argument("question", nargs="?", default="Draw a crew of five.")
    options.add_argument("--model", default="gpt-5.4-mini")
    options.add_argument("--cut", action="store_true", help="break the connection after some text")
    chosen = options.parse_args()

    exporter = InMemorySpanExporter()
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = ResponsesUsageInstrumentor()
    instrumentor.instrument(tracer_provider=tracing)
    with stand_in_api():
        text = ask(chosen.question, chosen.model, cut=chosen.cut)
        # Waits for the look-up; a service that runs on has no need to.
        instrumentor.uninstrument()
    [span] = exporter.get_finished_spans()
    Console(highlight=False).print(report(text, span))


def ask(question: str, model: str, *, cut: bool) -> str:
    """Returns the text that arrived."""
    pieces: list[str] = []
    with openai.OpenAI(max_retries=0) as client, suppress(openai.APIConnectionError):
        # A response in the background runs on without its reader, so that its bill is soon final.
        stream = client.responses.create(model=model, input=question, stream=True, background=cut)
        for event in stream:
            if event.type == "response.output_text.delta":
                pieces.append(event.delta)
                if cut and len(pieces) == 7:
                    pull_the_plug(stream)
    return "".join(pieces)


def pull_the_plug(stream: Stream[ResponseStreamEvent]) -> None:
    """Breaks the connection below the SDK, as a network would."""
    connection: socket.socket = stream.response.extensions["network_stream"].get_extra_info("socket")
    connection.shutdown(socket.SHUT_RDWR)


def report(text: str, span: ReadableSpan) -> Table:
    """What the reader got and what the span knows, a line each."""
    told = dict(span.attributes or {})
    prefix = "openai_responses.stream.deltas_by_type."
    kinds = [
        f"{count} {name.removeprefix(prefix)}" for name, count in told.items() if name.startswith(prefix)
    ]
    lines = {
        "text assembled": text,
        "outcome": told["openai_responses.stream.outcome"],
        "deltas counted": f"{told['openai_responses.stream.deltas']} ({', '.join(kinds)})",
    }
    if source := told.get("openai_responses.usage.source"):
        lines["tokens billed"] = told["gen_ai.usage.output_tokens"]
        lines["of them reasoning"] = told.get("gen_ai.usage.reasoning.output_tokens", 0)
        lines["known from"] = source
    else:
        lines["tokens billed"] = f"not known: {told['openai_responses.usage.missing_reason']}"
    if attempts := told.get("openai_responses.retrieval.attempts"):
        seconds = told["openai_responses.retrieval.duration"]
        lines["looked up"] = f"{attempts} GET, done {seconds:.2f} s after the stream's end"
    table = Table.grid(padding=(0, 3))
    for title, value in lines.items():
        table.add_row(f"[bold]{title}[/]", str(value))
    return table


if __name__ == "__main__":
    main()

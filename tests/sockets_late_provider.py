"""Opens a connection, then sets a provider, then makes a call: run by a test, in a process of its own."""

from __future__ import annotations

import sys

import openai
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from otel_responses_usage import ResponsesUsageInstrumentor

ResponsesUsageInstrumentor().instrument()
with (
    openai.OpenAI(
        base_url=sys.argv[1], websocket_base_url=sys.argv[1].replace("http", "ws", 1), api_key="k"
    ) as client,
    client.responses.connect() as connection,
):
    for model in ("early", "late"):
        connection.send({"type": "response.create", "model": model, "input": "x"})
        while connection.recv().type != "response.completed":
            pass
        if model == "early":
            exporter = InMemorySpanExporter()
            provider = TracerProvider()
            provider.add_span_processor(SimpleSpanProcessor(exporter))
            trace.set_tracer_provider(provider)
sys.stdout.write(" ".join(span.name for span in exporter.get_finished_spans()))

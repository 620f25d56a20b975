"""What the programs of this folder share: OpenTelemetry, a way to wait for spans, and a reader of streams."""

from __future__ import annotations

import contextlib
import sys
import time

import openai
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from otel_responses_usage import ResponsesUsageInstrumentor

HTTP = sys.modules.get("httpx2") or sys.modules["httpx"]
CUT = (openai.APIConnectionError, HTTP.TransportError)

PATIENCE_S = 60.0


class Ended(SpanProcessor):
    """Counts the spans that have ended."""

    def __init__(self) -> None:
        self.count = 0

    def on_end(self, span: ReadableSpan) -> None:  # noqa: ARG002
        self.count += 1

    def has(self, count: int) -> bool:
        """Return whether so many spans have ended."""
        return self.count >= count

    def wait_for(self, count: int) -> None:
        """Wait in the calling thread until so many spans have ended."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.has(count):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.count} spans have ended, and not {count}")
            time.sleep(0.01)


def by_hand() -> None:
    """Set up providers that export over OTLP, and switch the instrumentation on."""
    tracer_provider = TracerProvider()
    tracer_provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(tracer_provider)
    metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())]))
    ResponsesUsageInstrumentor().instrument()


def watch_spans() -> Ended:
    """Count the spans of the provider, which may have been set up by `opentelemetry-instrument`."""
    ended = Ended()
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider), "opentelemetry-instrument has set up no provider"
    provider.add_span_processor(ended)
    return ended


def read(client: openai.OpenAI, call: str) -> None:
    """Make a call, which ends as its name says. The name is sent as the model, and the server acts on it."""
    stream = client.responses.create(model=call, input="x", stream=True)
    if call == "abandoned":
        next(stream)
    elif call == "closed":
        with stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    break
    else:
        with contextlib.suppress(*CUT):
            list(stream)


async def async_read(client: openai.AsyncOpenAI, call: str) -> None:
    """Do the same with an async client."""
    stream = await client.responses.create(model=call, input="x", stream=True)
    if call == "closed":
        async with stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    break
    else:
        with contextlib.suppress(*CUT):
            async with stream:
                async for _ in stream:
                    pass

"""Two responses over one WebSocket: a span with exact usage for each of them.

Run as a script it brings along what is missing: without OPENAI_API_KEY a server that answers, without
OTEL_EXPORTER_OTLP_ENDPOINT a receiver that prints what arrived.
"""

from __future__ import annotations

import openai
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from otel_responses_usage import ResponsesUsageInstrumentor
from stand_ins import stand_in_api, stand_in_receiver


def main() -> None:
    tracing = TracerProvider()
    tracing.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    metering = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
    instrumentor = ResponsesUsageInstrumentor()
    instrumentor.instrument(tracer_provider=tracing, meter_provider=metering)

    with openai.OpenAI().responses.connect() as connection:
        connection.response.create(model="gpt-5.4-mini", input="Draw a crew of five.")
        first = read(connection)
        connection.response.create(
            model="gpt-5.4-mini", input="The crew again.", previous_response_id=first.id
        )
        read(connection)

    # A service that runs until the interpreter exits needs none of this: it happens then.
    instrumentor.uninstrument()
    tracing.shutdown()
    metering.shutdown()


def read(
    connection: openai.resources.responses.responses.ResponsesConnection,
) -> openai.types.responses.Response:
    """Print the text of one response, and return the response."""
    for event in connection:
        if event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
        if event.type == "response.completed":
            print()
            return event.response
    raise ConnectionError("the server has closed the connection")


if __name__ == "__main__":
    with stand_in_api(by_websocket=True), stand_in_receiver():
        main()

"""Runs in a process of its own: sends a test span and a test metric, and makes a test call on loopback."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from typing import Any, Final

from opentelemetry import metrics, trace

from ..._instrumentor import SCOPE, ResponsesUsageInstrumentor

NAME: Final = "otel-responses-usage doctor"
METRIC: Final = "openai_responses.doctor"
_FLUSH_S: Final = 12.0

# An answer without tokens.
_ANSWER: Final = {
    "id": "resp_doctor",
    "object": "response",
    "created_at": 0,
    "model": "doctor",
    "status": "completed",
    "output": [],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 0,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 0,
    },
}


def main() -> None:
    """Do all steps. Each is written to the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--in-code", choices=["grpc", "http/protobuf"])
    protocol = parser.parse_args().in_code
    with contextlib.suppress(ImportError):
        import_module("openai")
    if protocol is not None:
        _step("set up", lambda: set_up(protocol))
    _step("send", send)
    _step("call", make_calls)
    _probe().on_exit()
    os._exit(0)  # at an ordinary exit the SDK would export once more


def set_up(protocol: str) -> None:
    """Set OpenTelemetry up as an application does in code: the exporters read the environment."""
    package = f"opentelemetry.exporter.otlp.proto.{'grpc' if protocol == 'grpc' else 'http'}"
    sdk_trace, sdk_metrics = (
        import_module("opentelemetry.sdk.trace"),
        import_module("opentelemetry.sdk.metrics"),
    )
    tracer_provider = sdk_trace.TracerProvider()
    processor = import_module("opentelemetry.sdk.trace.export").BatchSpanProcessor
    tracer_provider.add_span_processor(
        processor(import_module(f"{package}.trace_exporter").OTLPSpanExporter())
    )
    trace.set_tracer_provider(tracer_provider)
    reader = import_module("opentelemetry.sdk.metrics.export").PeriodicExportingMetricReader
    exporter = import_module(f"{package}.metric_exporter").OTLPMetricExporter()
    metrics.set_meter_provider(sdk_metrics.MeterProvider([reader(exporter)]))
    ResponsesUsageInstrumentor().instrument()


def send() -> None:
    """Send one span and one point through the exporters that are set up, and wait for their result."""
    span = trace.get_tracer(SCOPE).start_span(NAME)
    _write("span", recorded=span.is_recording())
    span.end()
    metrics.get_meter(SCOPE).create_counter(METRIC, "{run}", "Runs of otel-responses-usage doctor.").add(1)
    flushes = [
        threading.Thread(target=flush, args=(1000 * _FLUSH_S,), daemon=True)
        for provider in (trace.get_tracer_provider(), metrics.get_meter_provider())
        if (flush := getattr(provider, "force_flush", None)) is not None
    ]
    for thread in flushes:
        thread.start()
    deadline_s = time.monotonic() + _FLUSH_S
    for thread in flushes:
        thread.join(max(0.0, deadline_s - time.monotonic()))


def make_calls() -> None:
    """Make a call with each kind of client, to a server in this process. Nothing of them is exported."""
    openai = import_module("openai")
    for exporter in _probe().exporters:
        exporter.export = lambda *_, **__: None
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    settings: dict[str, Any] = {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": 5.0}
    openai.OpenAI(**settings).responses.create(model="doctor", input="")

    async def call() -> None:
        await openai.AsyncOpenAI(**settings).responses.create(model="doctor", input="")

    asyncio.run(call())
    server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # the name is that of the base class
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.dumps(_ANSWER).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def _step(name: str, step: Callable[[], object]) -> None:
    try:
        step()
    except Exception as error:
        _write("failed", step=name, message=f"{type(error).__name__}: {error}"[:600])


def _write(event: str, **facts: Any) -> None:
    _probe().write(event, **facts)


def _probe() -> Any:
    return sys.modules["_responses_usage_doctor_probe"]


if __name__ == "__main__":
    main()

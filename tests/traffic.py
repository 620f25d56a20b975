"""Calls in quantity: what a busy service sends, with books of what it must have told."""

from __future__ import annotations

import threading
import time
from itertools import cycle, islice
from typing import TYPE_CHECKING

import openai
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from embedded.answer import Answer, usage
from embedded.http_server import Cut, ScriptedServer
from embedded.responses_api import Plan, ResponsesAPI
from observed import PATIENCE_S, eventually
from otel_responses_usage import ResponsesUsageInstrumentor

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

MODEL = "gpt-5.4-mini"
LEAST_CALLS = 30
# A call that is read, one that is cut, and one that is closed: the latter two are looked up.
PLANS = (
    lambda: Plan(Answer(("One ", "two ", "three."), usage(100, 30, cached=64))),
    lambda: Plan(Answer(("One ", "two ", "three."), usage(70, 20)), cut_after=5, end=Cut()),
)


def show(figures: str) -> None:
    """Print figures for the documents, to those who run pytest with `-s`."""
    print(f"\n{figures}")  # noqa: T201


class Books(SpanProcessor):
    """The ids of all spans that have ended."""

    def __init__(self) -> None:
        self.ended: set[tuple[str, str]] = set()

    def on_end(self, span: ReadableSpan) -> None:
        """Enter the span."""
        context = span.get_span_context()
        assert context
        self.ended.add((f"{context.trace_id:032x}", f"{context.span_id:016x}"))


class Traffic:
    """A service under load, from `with` to `finish`: instrumented calls that end in several ways.

    It exports by OTLP over gRPC as a service does, only more often. It gives a batch up later, since an
    outage takes longer on a busy machine. Every span that ended is in `spans`, and every token that the
    server billed in `tokens`.
    """

    def __init__(self, endpoint: str, service: str = "busy", *, timeout: float = PATIENCE_S) -> None:
        resource = Resource.create({"service.name": service})
        metrics = OTLPMetricExporter(f"http://{endpoint}", insecure=True, timeout=timeout)
        self._metering = metering = MeterProvider([PeriodicExportingMetricReader(metrics, 500)], resource)
        spans = OTLPSpanExporter(
            f"http://{endpoint}", insecure=True, timeout=timeout, meter_provider=metering
        )
        processor = BatchSpanProcessor(spans, schedule_delay_millis=200, meter_provider=metering)
        self._books = Books()
        self._tracing = TracerProvider(resource=resource)
        self._tracing.add_span_processor(self._books)
        self._tracing.add_span_processor(processor)
        plans = cycle(PLANS)
        self._api = ResponsesAPI(lambda _: next(plans)())
        self._server = ScriptedServer(self._api)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, daemon=True) for _ in range(2)]
        self._finished = False

    @property
    def spans(self) -> set[tuple[str, str]]:
        """Trace and span id of every span that has ended."""
        return self._books.ended

    @property
    def tokens(self) -> dict[str, int]:
        """What the server billed so far, by the type of token."""
        billed = [response["usage"] for response in list(self._api.stored.values())]
        return {kind: sum(used[f"{kind}_tokens"] for used in billed) for kind in ("input", "output")}

    def run(self, seconds: float) -> None:
        """Let it go on for a while, and on a slow machine for some calls."""
        before = len(self.spans)
        self._stop.wait(seconds)
        eventually(lambda: len(self.spans) >= before + LEAST_CALLS, "there are some calls", PATIENCE_S)

    def burst(self, spans: int, per_second: int = 1000) -> None:
        """Spans of other libraries, of a kilobyte each."""
        tracer = self._tracing.get_tracer("busy")
        for number in range(spans):
            tracer.start_span("query", attributes={"db.query.text": "select 1 -- " + "x" * 1000}).end()
            if number % 50 == 0:
                self._stop.wait(50 / per_second)

    def finish(self) -> None:
        """Make no more calls, and export all that was told about those that were made."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        if not self._finished:
            self._finished = True
            ResponsesUsageInstrumentor().uninstrument()
            self._server.stop()
            self._tracing.shutdown()
            self._metering.shutdown()

    def __enter__(self) -> Self:
        self._server.start()
        ResponsesUsageInstrumentor().instrument(tracer_provider=self._tracing, meter_provider=self._metering)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def _call(self) -> None:
        with openai.OpenAI(base_url=f"{self._server.url}/v1", api_key="sk-busy", max_retries=0) as client:
            for events in cycle((None, None, 4)):
                if self._stop.is_set():
                    return
                try:
                    with client.responses.create(model=MODEL, input="?", stream=True) as stream:
                        for _ in islice(stream, events):
                            pass
                except openai.APIConnectionError:
                    pass
                time.sleep(0.02)

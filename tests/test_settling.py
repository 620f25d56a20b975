"""Every ended call is settled: its span arrives, and a flush or an exit waits for it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry import context, metrics, trace
from opentelemetry.instrumentation.utils import is_instrumentation_enabled, suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from calls import CUT as CUT_ERRORS
from calls import HTTP, MODEL
from conftest import Instrument, Serve
from embedded.answer import Answer, new_id, usage
from embedded.http_server import Cut, Hold, Pause, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI
from observed import Observed, eventually
from otel_responses_usage import ResponsesUsageInstrumentor
from test_exit import NamedAPI, begin, finish, run

ANSWER = Answer(pieces=("a", "b", "c", "d"), usage=usage(31, 245))
SOURCE, REASON = "openai_responses.usage.source", "openai_responses.usage.missing_reason"


class SlowAPI(ResponsesAPI):
    """Cuts every stream, and answers a GET after so many seconds."""

    def __init__(self, before_get_s: float) -> None:
        super().__init__(lambda _: Plan(replace(ANSWER, id=new_id()), cut_after=4, end=Cut()))
        self._before_get = Pause(before_get_s)

    def __call__(self, request: SeenRequest) -> Reply:
        reply = super().__call__(request)
        return replace(reply, before=(self._before_get,)) if request.method == "GET" else reply


def client_of(server: ScriptedServer) -> openai.OpenAI:
    return openai.OpenAI(api_key="k", base_url=f"{server.url}/v1", max_retries=0)


def read_cut(client: openai.OpenAI, **asked: Any) -> None:
    with contextlib.suppress(*CUT_ERRORS):
        list(client.responses.create(model=MODEL, input="x", stream=True, **asked))


def known(span: ReadableSpan) -> Any:
    attributes = span.attributes or {}
    return attributes.get(SOURCE) or attributes.get(REASON)


# --- suppression -------------------------------------------------------------------------------------


class DropsUnderSuppression(SpanProcessor):
    """Drops spans that end while instrumentation is suppressed, as Logfire's processor does."""

    def __init__(self, next_one: SpanProcessor) -> None:
        self._next = next_one

    def on_end(self, span: ReadableSpan) -> None:
        if is_instrumentation_enabled():
            self._next.on_end(span)


@pytest.fixture
def strict() -> Observed:
    """Providers whose spans must not end under suppression."""
    observed = Observed()
    observed.tracer_provider = TracerProvider(shutdown_on_exit=False)
    observed.tracer_provider.add_span_processor(DropsUnderSuppression(SimpleSpanProcessor(observed._spans)))
    return observed


@pytest.mark.parametrize("ends", ["cut", "dropped", "overload", "read under suppression"])
def test_no_span_ends_under_suppression(
    ends: str, strict: Observed, instrument: Instrument, serve: Serve
) -> None:
    """However a call ends, a processor that obeys suppression gets its span, and the points are there."""
    observed = instrument(strict, max_pending=0 if ends == "overload" else 8)
    with client_of(serve(SlowAPI(0.05))) as client:
        if ends == "dropped":
            stream = client.responses.create(model=MODEL, input="x", stream=True)
            next(iter(stream))
            del stream
            gc.collect()
        elif ends == "read under suppression":
            stream = client.responses.create(model=MODEL, input="x", stream=True)
            with suppress_instrumentation(), contextlib.suppress(*CUT_ERRORS):
                list(stream)
        else:
            read_cut(client)
        assert known(observed.span()) == ("overload" if ends == "overload" else "retrieval")
    assert sum(observed.calls().values()) == 1


def test_the_context_of_the_application_is_as_before(observed: Observed, serve: Serve) -> None:
    """Ending a call in an empty context leaves nothing behind in the application's."""
    with client_of(serve(SlowAPI(0))) as client:
        token = context.attach(context.set_value("own", 1))
        try:
            read_cut(client)
            assert context.get_value("own") == 1
        finally:
            context.detach(token)
    observed.span()


# --- flushing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["tracer_provider", "meter_provider"])
def test_a_flush_waits_for_pending_look_ups(provider: str, instrument: Instrument, serve: Serve) -> None:
    """When `force_flush()` of either provider returns, spans and points of ended calls are with it."""
    observed = instrument()
    with client_of(serve(SlowAPI(0.3))) as client:
        read_cut(client)
        assert observed.finished == 0
        assert getattr(observed, provider).force_flush()
        assert observed.finished == 1
    assert observed.tokens() == {"input": (1, 31), "output": (1, 245)}


@pytest.mark.parametrize(
    ("settings", "timeout_ms", "most_s"),
    [
        ({"flush_timeout": 0.2}, None, 0.2),
        ({"flush_timeout": 0.2}, 5_000, 0.2),
        ({"flush_timeout": 5.0}, 200, 0.2),
        ({"flush_timeout": 0.0}, None, 0.0),
    ],
    ids=["default", "longer", "shorter", "off"],
)
def test_a_flush_waits_no_longer_than_it_may(
    settings: dict[str, float], timeout_ms: int | None, most_s: float, instrument: Instrument, serve: Serve
) -> None:
    """Neither longer than the setting says, nor longer than the flush's own timeout."""
    observed = instrument(**settings)
    with client_of(serve(SlowAPI(2.0))) as client:
        read_cut(client)
        began = time.monotonic()
        observed.tracer_provider.force_flush(*([] if timeout_ms is None else [timeout_ms]))
        took_s = time.monotonic() - began
        assert observed.finished == 0
    assert most_s <= took_s < most_s + 0.7


def test_a_flush_does_not_wait_for_background_responses(instrument: Instrument, serve: Serve) -> None:
    """They may take minutes. `flush()` of the instrumentor waits for them, as long as its caller says."""
    observed = instrument(flush_timeout=5.0)
    with client_of(serve(SlowAPI(1.0))) as client:
        read_cut(client, extra_body={"background": True})
        began = time.monotonic()
        observed.tracer_provider.force_flush()
        assert time.monotonic() - began < 0.5
        assert not ResponsesUsageInstrumentor().flush(0.1)
        assert ResponsesUsageInstrumentor().flush(10)
        assert observed.finished == 1
    assert ResponsesUsageInstrumentor().flush(0)


def test_a_flush_ends_dropped_streams(instrument: Instrument, serve: Serve) -> None:
    """A stream that the garbage collector has found is settled by the flush that follows."""
    observed = instrument()
    with client_of(serve(SlowAPI(0.2))) as client:
        stream = client.responses.create(model=MODEL, input="x", stream=True)
        next(iter(stream))
        del stream
        gc.collect()
        observed.tracer_provider.force_flush()
        assert observed.finished == 1


def test_a_processor_may_flush_while_a_span_ends(instrument: Instrument, serve: Serve) -> None:
    """On a thread of the look-ups it does not wait for the job which that thread is just settling."""
    observed = Observed()
    took_s = []

    class Flushes(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:  # noqa: ARG002  # the interface's signature
            began = time.monotonic()
            observed.tracer_provider.force_flush()
            took_s.append(time.monotonic() - began)

    observed.tracer_provider.add_span_processor(Flushes())
    instrument(observed, flush_timeout=5.0)
    with client_of(serve(SlowAPI(0.05))) as client:
        read_cut(client)
        eventually(lambda: took_s, "a flush")
    assert took_s[0] < 1


def test_another_provider_waits_for_nothing(observed: Observed, serve: Serve) -> None:
    """A provider that gets nothing of ours is flushed and shut down at once, and ends no call."""
    other = Observed()
    with client_of(serve(SlowAPI(1.0))) as client:
        read_cut(client)
        began = time.monotonic()
        other.tracer_provider.force_flush()
        other.tracer_provider.shutdown()
        other.meter_provider.shutdown()
        assert time.monotonic() - began < 0.5
        assert known(observed.span()) == "retrieval"


# --- providers behind others -------------------------------------------------------------------------


class Delegates:
    """A provider that keeps the real one in a closure, so that no attribute leads to it."""

    def __init__(self, provider: Any) -> None:
        self.get_tracer = lambda *args, **kwargs: provider.get_tracer(*args, **kwargs)
        self.get_meter = lambda *args, **kwargs: provider.get_meter(*args, **kwargs)


class WrapsTracers(trace.TracerProvider):
    """A provider whose tracers are wrapped, as Logfire's are."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        return WrappedTracer(self._provider.get_tracer(*args, **kwargs))


class WrappedTracer(trace.Tracer):
    def __init__(self, tracer: trace.Tracer) -> None:
        self.tracer = tracer

    def start_span(self, *args: Any, **kwargs: Any) -> trace.Span:
        return self.tracer.start_span(*args, **kwargs)

    @contextlib.contextmanager
    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Iterator[trace.Span]:
        with self.tracer.start_as_current_span(*args, **kwargs) as span:
            yield span


@pytest.mark.parametrize("does", ["shutdown", "force_flush"])
@pytest.mark.parametrize("wrap", [Delegates, WrapsTracers])
def test_a_provider_is_recognised_behind_another(wrap: Any, does: str, serve: Serve) -> None:
    """Who wraps the SDK's provider, and shuts down or flushes the real one, loses no pending usage."""
    observed = Observed()
    instrumentor = ResponsesUsageInstrumentor()
    instrumentor.instrument(
        tracer_provider=wrap(observed.tracer_provider), meter_provider=metrics.NoOpMeterProvider()
    )
    try:
        with client_of(serve(SlowAPI(0.3))) as client:
            read_cut(client)
            getattr(observed.tracer_provider, does)()
            assert observed.finished == 1
            assert known(observed.span()) == "retrieval"
    finally:
        instrumentor.uninstrument()


@pytest.mark.parametrize("does", ["shutdown", "force_flush"])
def test_a_meter_provider_is_recognised_behind_another(does: str, serve: Serve) -> None:
    """The same of metrics, where there is no tracer provider at all."""
    observed = Observed()
    instrumentor = ResponsesUsageInstrumentor()
    instrumentor.instrument(
        tracer_provider=trace.NoOpTracerProvider(), meter_provider=Delegates(observed.meter_provider)
    )
    try:
        with client_of(serve(SlowAPI(0.3))) as client:
            read_cut(client)
            getattr(observed.meter_provider, does)()
            if does == "force_flush":
                assert observed.tokens() == {"input": (1, 31), "output": (1, 245)}
            assert not instrumentor._ledger._recovery._waiting  # type: ignore[union-attr]
    finally:
        instrumentor.uninstrument()


# --- what goes wrong around an end -------------------------------------------------------------------


def test_a_process_that_may_open_no_socket_ends_its_spans(
    observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test suite that forbids sockets, with a transport that needs none, gets spans with a reason."""

    class ForbiddenError(RuntimeError):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise ForbiddenError

    created = b'data: {"type":"response.created","response":{"id":"resp_1","status":"in_progress"}}\n\n'
    events = {"content-type": "text/event-stream"}
    transport = HTTP.MockTransport(lambda _: HTTP.Response(200, headers=events, content=iter([created])))
    client = openai.OpenAI(
        api_key="k", base_url="http://api.test/v1", http_client=HTTP.Client(transport=transport)
    )
    monkeypatch.setattr(socket, "socket", refuse)
    seen = [event.type for event in client.responses.create(model=MODEL, input="x", stream=True)]
    assert seen == ["response.created"]
    assert known(observed.span()) == "transport_error"
    assert observed.points("openai_responses.faults") == []


def test_a_thread_that_cannot_be_made_costs_one_usage_and_no_span(
    observed: Observed, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised where a look-up is handed over, the span of the call ends, and says so."""

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    with client_of(serve(SlowAPI(0))) as client:
        with monkeypatch.context() as patched:
            patched.setattr("otel_responses_usage._lookup.recovery.Workers", refuse)
            patched.setattr("otel_responses_usage._lookup.recovery.Recovery._get_workers", refuse)
            read_cut(client)
        assert known(observed.span()) == "transport_error"
        read_cut(client)
        assert sorted(map(known, observed.spans(2))) == ["retrieval", "transport_error"]


FROZEN_TIME = """
import time

real = time.monotonic
stopped_at = real()
time.monotonic = lambda: stopped_at
read_cut("cut")
began = real()
trace.get_tracer_provider().shutdown()
print(real() - began < 5)
"""


@pytest.mark.parametrize("before_get_s", [0.5, 30.0])
def test_a_shutdown_ends_while_the_clock_stands_still(
    before_get_s: float, tmp_path: Path, serve: Serve
) -> None:
    """Tests freeze the clock. What waits counts its waits, and is over in time all the same."""
    server = serve(NamedAPI(before_get=Pause(before_get_s)))
    ran = run(tmp_path, server, FROZEN_TIME, OTEL_RESPONSES_USAGE_EXIT_TIMEOUT="2")
    assert (ran.code, ran.output, ran.complaints) == (0, "True\n", "")
    told = {"source": "retrieval"} if before_get_s < 2 else {"missing": "shutdown"}
    assert told.items() <= ran.told()["cut"].items()


STOPPED = """
stream = read_half("open")
stream.close()
print("frozen", flush=True)
sys.stdin.readline()
trace.get_tracer_provider().force_flush()
"""


def test_a_process_that_is_frozen_asks_when_it_goes_on(tmp_path: Path, serve: Serve) -> None:
    """A process that stands still for longer than a look-up may take still gets the usage afterwards."""
    server = serve(NamedAPI(before_get=Pause(0.2)))
    process = begin(tmp_path, server, STOPPED, OTEL_RESPONSES_USAGE_RETRIEVAL_TIMEOUT="1")
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    ran = finish(tmp_path, process)
    assert (ran.code, ran.complaints) == (0, "")
    assert ran.told() == {"open": {"outcome": "closed", "source": "retrieval"}}


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_ends_the_wait_at_exit(presses: int, tmp_path: Path, serve: Serve) -> None:
    """A user who presses Ctrl-C while the exit waits gets the prompt back, without a traceback."""
    server = serve(NamedAPI(before_get=Hold()))
    body = 'read_half("open").close()\nprint("leaving", flush=True)'
    process = begin(tmp_path, server, body, OTEL_RESPONSES_USAGE_EXIT_TIMEOUT="20")
    assert process.stdout
    process.stdout.readline()
    time.sleep(0.5)
    began = time.monotonic()
    for _ in range(presses):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.01)
    ran = finish(tmp_path, process)
    assert time.monotonic() - began < 5
    if presses == 1:  # one that comes later may reach the SDK's own shutdown
        assert (ran.code, ran.complaints) == (0, "")
        assert ran.told() == {"open": {"outcome": "closed", "missing": "shutdown"}}


def test_threads_of_the_look_ups_end_when_they_are_not_needed(
    instrument: Instrument, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are at most as many as the setting says, and after a while one."""
    monkeypatch.setattr("otel_responses_usage._lookup.worker._IDLE_S", 0.2)
    observed = instrument(max_concurrency=3)

    def ours() -> int:
        return sum(thread.name == "otel-responses-usage" for thread in threading.enumerate())

    with client_of(serve(SlowAPI(0.1))) as client:
        most = 0
        for _ in range(12):
            read_cut(client)
            most = max(most, ours())
        observed.spans(12)
        assert 2 <= most <= 3
        eventually(lambda: ours() == 1, "one thread")
        read_cut(client)
        observed.spans(13)
    ResponsesUsageInstrumentor().uninstrument()
    assert ours() == 0

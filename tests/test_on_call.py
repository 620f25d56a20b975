"""`Config.on_call`: the application is told of each call, once, whatever becomes of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from calls import CUT, needs_resume, since
from conftest import Instrument, Serve
from embedded.answer import Answer, FunctionCall, new_id, usage
from embedded.http_server import Cut, Hold, Pause, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import HANGING_S, Observed, eventually
from otel_responses_usage import (
    CallRecord,
    Config,
    MissingReason,
    Outcome,
    ResponsesUsageInstrumentor,
    Usage,
    UsageSource,
)
from otel_responses_usage._call import delivery as _delivery
from test_exit import NamedAPI, run

MODEL = "gpt-5.4-mini"
PROMPT = "canary-of-the-prompt"
TEXT = "canary-of-the-answer "
KEY = "sk-canary-of-the-key"
COUNTS = usage(31, 245, cached=16, cache_write=5, reasoning=128)
USAGE = Usage(31, 245, 16, 5, 128)


class Told:
    """A function for `on_call` that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []
        self.threads: set[int] = set()

    def __call__(self, record: CallRecord) -> None:
        self.records.append(record)
        self.threads.add(threading.get_ident())

    def all(self, count: int = 1) -> list[CallRecord]:
        """Wait for so many records; more are a failure."""
        eventually(lambda: len(self.records) >= count, f"{count} records")
        assert len(self.records) == count, self.records
        return self.records

    def one(self) -> CallRecord:
        return self.all()[0]


@pytest.fixture
def told() -> Told:
    return Told()


def answer(**given: Any) -> Answer:
    return Answer(**{"pieces": (TEXT,) * 3, "usage": COUNTS, "id": new_id(), **given})


def planned(request: SeenRequest) -> Plan | Reply:
    """What a call comes to, as its model is named."""
    plans: dict[str, Callable[[], Plan | Reply]] = {
        "whole": lambda: Plan(answer()),
        "left": lambda: Plan(answer(), cut_after=5, end=Hold()),
        "cut": lambda: Plan(answer(), cut_after=5, end=Cut()),
        "lost": lambda: Plan(answer(), cut_after=5, end=Cut(), fate="lost"),
        "refused": lambda: error(429, "Slow down.", code="rate_limit_exceeded"),
        "tools": lambda: Plan(answer(pieces=(), calls=(FunctionCall("f", ("{", "}")),))),
    }
    name = request.json["model"]
    if name == "retried":
        first = request.headers.get("x-stainless-retry-count") == "0"
        return error(503, "Overloaded.") if first else Plan(answer())
    return plans[name]()


@pytest.fixture
def server(serve: Serve) -> ScriptedServer:
    """The Responses API; the model of a call says what becomes of it."""
    return serve(ResponsesAPI(planned))


def client_of(server: ScriptedServer, kind: type[Any] = openai.OpenAI, **given: Any) -> Any:
    return kind(base_url=f"{server.url}/v1", api_key=KEY, **{"max_retries": 0, **given})


def read(client: openai.OpenAI, model: str, **asked: Any) -> None:
    """Make a call and read what there is of its stream, but leave the ones that are named so."""
    with suppress(openai.APIError, *CUT):
        stream = client.responses.create(model=model, input=PROMPT, stream=True, **asked)
        with stream:
            for event in stream:
                if model == "left" and event.type == "response.output_text.delta":
                    break


# --- what a record says --------------------------------------------------------------------------------


EXACT = {"usage": USAGE, "missing_reason": None}
UNKNOWN = {"usage": None, "usage_source": None}
OF_STREAM = {"streamed": True, "operation": "chat", "status": "completed"}
FIELDS: dict[str, dict[str, Any]] = {
    "whole": EXACT
    | OF_STREAM
    | {
        "outcome": Outcome.COMPLETED,
        "usage_source": UsageSource.STREAM,
        "finish_reason": "stop",
        "error_type": None,
        "deltas": 3,
        "deltas_by_type": {"output_text": 3},
        "service_tier": "default",
        "retrieval_attempts": 0,
        "retrieval_duration_s": None,
    },
    "left": EXACT
    | OF_STREAM
    | {
        "outcome": Outcome.CLOSED,
        "usage_source": UsageSource.RETRIEVAL,
        "finish_reason": "error",
        "deltas": 1,
    }
    | {"error_type": None, "retrieval_attempts": 1},
    "cut": EXACT
    | OF_STREAM
    | {"outcome": Outcome.CUT, "usage_source": UsageSource.RETRIEVAL, "error_type": "RemoteProtocolError"},
    "lost": UNKNOWN
    | {"missing_reason": MissingReason.NOT_FOUND, "status": "in_progress", "retrieval_attempts": 4},
    "refused": UNKNOWN
    | {
        "missing_reason": MissingReason.NO_RESPONSE_ID,
        "outcome": Outcome.ERROR,
        "error_type": "rate_limit_exceeded",
        "response_id": None,
        "status": None,
        "events": 0,
        "time_to_first_chunk_s": None,
    },
    "tools": EXACT | {"finish_reason": "tool_calls", "deltas_by_type": {"function_call_arguments": 2}},
    "retried": EXACT | {"resend_count": 1, "outcome": Outcome.COMPLETED},
}


@pytest.mark.parametrize("model", FIELDS)
def test_a_record_says_what_the_span_says(
    model: str, instrument: Instrument, server: ScriptedServer, told: Told
) -> None:
    """Each field of a record is right, and those that the span has, too, are the same there."""
    observed = instrument(on_call=told)
    with client_of(server, max_retries=model == "retried") as client:
        read(client, model, extra_body={"conversation": "conv_1"})
    record, span = told.one(), observed.span()
    assert {name: getattr(record, name) for name in FIELDS[model]} == FIELDS[model]
    attributes = dict(span.attributes or {})
    known = record.usage or Usage()
    same = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": record.provider,
        "gen_ai.request.model": record.request_model,
        "gen_ai.response.model": record.response_model,
        "gen_ai.response.id": record.response_id,
        "gen_ai.conversation.id": record.conversation_id,
        "gen_ai.response.finish_reasons": record.finish_reason and (record.finish_reason,),
        "gen_ai.response.time_to_first_chunk": record.time_to_first_chunk_s,
        "gen_ai.usage.input_tokens": known.input_tokens,
        "gen_ai.usage.output_tokens": known.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": known.cache_read_input_tokens,
        "gen_ai.usage.cache_write.input_tokens": known.cache_write_input_tokens,
        "gen_ai.usage.reasoning.output_tokens": known.reasoning_output_tokens,
        "openai.response.service_tier": record.service_tier,
        "server.address": record.server_address,
        "server.port": record.server_port,
        "error.type": record.error_type,
        "http.request.resend_count": record.resend_count or None,
        "openai_responses.request_id": record.request_id,
        "openai_responses.response.status": record.status,
        "openai_responses.stream.outcome": record.outcome.value,
        "openai_responses.stream.events": record.events,
        "openai_responses.stream.deltas": record.deltas,
        "openai_responses.usage.source": record.usage_source and record.usage_source.value,
        "openai_responses.usage.missing_reason": record.missing_reason and record.missing_reason.value,
        "openai_responses.retrieval.attempts": record.retrieval_attempts or None,
        "openai_responses.retrieval.duration": record.retrieval_duration_s,
    }
    assert {name: attributes.get(name) for name in same} == same
    assert (record.start_time_ns, record.end_time_ns) == (span.start_time, span.end_time)
    assert record.span_context == span.get_span_context()
    assert (record.baggage, record.lane, record.is_late, record.input_count) == ({}, None, False, None)


def test_calls_that_do_not_stream(instrument: Instrument, serve: Serve, told: Told) -> None:
    """A response with its tools, the one it continues, and a compaction: each has its record."""
    first = answer()
    body = answer(model="other").response({"previous_response_id": first.id})
    body["output"] += [{"id": "i", "type": "web_search_call", "status": "completed"}]
    images = {"input_tokens": 50, "output_tokens": 4000, "total_tokens": 4050}
    body["tool_usage"] = {"web_search": {"num_requests": 2}, "image_gen": images}
    compaction = {"id": new_id(), "object": "response.compaction", "output": [], "usage": COUNTS}
    server = serve(lambda request: Reply.json(compaction if request.path.endswith("compact") else body))
    instrument(on_call=told)
    with client_of(server) as client:
        client.responses.create(model=MODEL, input=PROMPT, previous_response_id=first.id)
        client.post("/responses/compact", body={"model": MODEL, "input": PROMPT}, cast_to=object)
    made, compacted = told.all(2)
    assert (made.operation, compacted.operation) == ("chat", "compact")
    for record, response_id in ((made, body["id"]), (compacted, compaction["id"])):
        assert (record.response_id, record.streamed, record.usage) == (response_id, False, USAGE)
        assert (record.usage_source, record.outcome) == (UsageSource.RESPONSE, Outcome.COMPLETED)
    assert (made.request_model, made.response_model) == (MODEL, "other")
    assert made.previous_response_id == first.id
    assert (made.tool_calls, made.web_search_requests) == ({"web_search_call": 1}, 2)
    assert (made.image_generation_input_tokens, made.image_generation_output_tokens) == (50, 4000)
    assert (compacted.tool_calls, compacted.web_search_requests) == ({}, None)


@contextmanager
def messages(plan: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> Iterator[str]:
    """A server of the Responses API over WebSocket, and the address of it: it answers with these events."""
    server_module = pytest.importorskip("websockets.sync.server")

    def serve(connection: Any) -> None:
        for message in connection:
            for event in plan(json.loads(message)):
                connection.send(json.dumps(event))

    with server_module.serve(serve, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/v1"
        finally:
            server.shutdown()
            thread.join(10)


def ask(connection: Any, **asked: Any) -> None:
    """Make a call over a WebSocket, and read it to its end."""
    connection.response.create(model=MODEL, input=PROMPT, **asked)
    while not connection.recv().type.endswith(("completed", "failed", "incomplete")):
        pass


needs_websocket = since(2, 22)


@needs_websocket
def test_calls_over_a_websocket(instrument: Instrument, told: Told) -> None:
    """Each response of a connection has its record."""
    observed = instrument(on_call=told)
    answers = [answer(), answer()]
    left = list(answers)
    with (
        messages(lambda asked: left.pop(0).events(asked)) as url,
        openai.OpenAI(api_key=KEY, base_url="http://127.0.0.1:9/v1", websocket_base_url=url) as client,
        client.responses.connect() as connection,
    ):
        ask(connection)
        ask(connection)
    records = told.all(2)
    assert [record.response_id for record in records] == [one.id for one in answers]
    assert {record.usage for record in records} == {USAGE}
    assert {(record.streamed, record.deltas, record.outcome) for record in records} == {
        (True, 3, Outcome.COMPLETED)
    }
    assert [record.span_context for record in records] == [s.get_span_context() for s in observed.spans(2)]


def test_a_record_has_no_content_and_no_credentials(
    instrument: Instrument, server: ScriptedServer, told: Told
) -> None:
    """Nothing of the prompt, the answer and the key is in any field."""
    instrument(on_call=told)
    models = ("whole", "left", "cut", "lost", "refused")
    with client_of(server) as client:
        for model in models:
            read(client, model)
    for record in told.all(len(models)):
        shown = repr(record)
        assert "canary" not in shown, shown


@needs_resume
def test_a_fetch_has_no_record(instrument: Instrument, server: ScriptedServer, told: Told) -> None:
    """The record is that of the call whose response is fetched."""
    observed = instrument(on_call=told)
    with client_of(server) as client:
        read(client, "whole")
        list(client.responses.retrieve(told.one().response_id, stream=True))
    observed.spans(2)
    time.sleep(0.1)
    assert told.one().operation == "chat"


# --- when it is called ---------------------------------------------------------------------------------


class Ends(SpanProcessor):
    """Notes the ends of spans."""

    def __init__(self, events: list[tuple[str, int]]) -> None:
        self._events = events

    def on_end(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        assert context is not None
        self._events.append(("ended", context.span_id))


def test_once_per_call_after_its_span_in_the_order_of_settling(
    instrument: Instrument, server: ScriptedServer
) -> None:
    """Calls of many threads are told one after the other, each when its span has ended."""
    events: list[tuple[str, int]] = []
    observed = Observed()
    observed.tracer_provider.add_span_processor(Ends(events))
    instrument(observed, on_call=lambda record: events.append(("told", record.span_context.span_id)))
    models = ("whole", "left", "cut") * 10
    with client_of(server) as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda model: read(client, model), models))
    eventually(lambda: len(events) == 2 * len(models), "all told")
    told = [span_id for kind, span_id in events if kind == "told"]
    assert len(set(told)) == len(models)
    for span_id in told:
        assert events.index(("ended", span_id)) < events.index(("told", span_id))


def test_in_the_order_of_one_thread(instrument: Instrument, server: ScriptedServer, told: Told) -> None:
    """Calls that settle one after the other are told in this order, on one thread that is not theirs."""
    observed = instrument(on_call=told)
    with client_of(server) as client:
        for _ in range(30):
            client.responses.create(model="whole", input=PROMPT)
    ids = [(span.attributes or {})["gen_ai.response.id"] for span in observed.spans(30)]
    assert [record.response_id for record in told.all(30)] == ids
    assert len(told.threads) == 1
    assert threading.get_ident() not in told.threads


def test_without_an_sdk(server: ScriptedServer, told: Told) -> None:
    """An application without telemetry has exact numbers, also of calls that are looked up."""
    instrumentor = ResponsesUsageInstrumentor()
    instrumentor.instrument(
        tracer_provider=trace.NoOpTracerProvider(),
        meter_provider=metrics.NoOpMeterProvider(),
        config=Config(on_call=told, baggage_keys=("tenant.id",)),
    )
    try:
        models = ("whole", "left", "cut", "lost", "refused")
        with client_of(server) as client:
            for model in models:
                read(client, model)
        assert instrumentor.flush()
        sources = {record.request_model: record.usage_source for record in told.all(len(models))}
        assert sources == {
            "whole": UsageSource.STREAM,
            "left": UsageSource.RETRIEVAL,
            "cut": UsageSource.RETRIEVAL,
            "lost": None,
            "refused": None,
        }
        assert {record.usage for record in told.records if record.usage_source} == {USAGE}
        assert not any(record.span_context.is_valid for record in told.records)
    finally:
        instrumentor.uninstrument()


async def async_read(client: Any, model: str) -> None:
    with suppress(openai.APIError, *CUT):
        stream = await client.responses.create(model=model, input=PROMPT, stream=True)
        async for _ in stream:
            pass


@pytest.mark.parametrize("library", ["asyncio", "uvloop", "trio"])
def test_on_every_event_loop(
    library: str, instrument: Instrument, server: ScriptedServer, told: Told
) -> None:
    """The function runs beside the event loop, which goes on while it blocks."""
    runner = pytest.importorskip(library)
    instrument(on_call=lambda record: (time.sleep(0.2), told(record)))
    lasted = []

    async def main() -> None:
        async with client_of(server, openai.AsyncOpenAI) as client:
            for model in ("whole", "cut", "whole"):
                began = time.monotonic()
                await async_read(client, model)
                lasted.append(time.monotonic() - began)

    runner.run(main) if library == "trio" else runner.run(main())
    assert min(lasted) < 0.2
    assert {record.usage for record in told.all(3)} == {USAGE}
    assert threading.get_ident() not in told.threads


def test_flush_waits_for_the_function(instrument: Instrument, server: ScriptedServer, told: Told) -> None:
    """After `flush()` the application has been told of every call that had ended."""
    instrument(on_call=lambda record: (time.sleep(0.1), told(record)))
    with client_of(server) as client:
        for model in ("whole", "left", "whole"):
            read(client, model)
    assert ResponsesUsageInstrumentor().flush(10)
    assert len(told.records) == 3


def test_the_function_may_wait_for_itself(
    instrument: Instrument, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """`flush()` and a shutdown in the function return at once, and nothing is locked."""
    returned: list[bool] = []
    observed = Observed()

    def on_call(_: CallRecord) -> None:
        returned.append(ResponsesUsageInstrumentor().flush(10))
        observed.meter_provider.force_flush()
        observed.tracer_provider.shutdown()

    instrument(observed, on_call=on_call, exit_timeout=5)
    began = time.monotonic()
    with client_of(server) as client:
        read(client, "whole")
    assert eventually(lambda: returned, "returned") == [False]
    assert time.monotonic() - began < 4
    assert not caplog.records


def test_late_usage_is_told_as_a_second_record(
    instrument: Instrument, server: ScriptedServer, told: Told
) -> None:
    """Where the application is shown the usage after the call was told, a marked record follows, once."""
    instrument(on_call=told, retrieval=False)
    with client_of(server) as client:
        read(client, "left")
        first = told.one()
        for _ in range(2):
            client.responses.retrieve(first.response_id)
    first, second = told.all(2)
    assert (first.missing_reason, first.usage, first.is_late) == (MissingReason.DISABLED, None, False)
    changed = {
        "usage": USAGE,
        "usage_source": UsageSource.OBSERVATION,
        "missing_reason": None,
        "status": "completed",
        "service_tier": "default",
        "is_late": True,
    }
    assert second == dataclasses.replace(first, **changed)


def test_a_late_record_says_how_a_deferred_response_finished(
    instrument: Instrument, server: ScriptedServer, told: Told
) -> None:
    """While a response runs it has no finish reason; its second record has one."""
    instrument(on_call=told)
    window = {"background": True, "background_options": {"completion_window": "2h"}}
    with client_of(server) as client:
        deferred = client.responses.create(model="whole", input=PROMPT, extra_body=window)
        client.responses.retrieve(deferred.id)
    first, second = told.all(2)
    assert (first.missing_reason, first.finish_reason) == (MissingReason.DEFERRED, None)
    assert first.completion_window == "2h"
    assert (second.usage, second.finish_reason, second.is_late) == (USAGE, "stop", True)


# --- a function that does not behave -------------------------------------------------------------------


def losses(observed: Observed) -> dict[str, int]:
    return {
        point.attributes["openai_responses.on_call.loss"]: point.value
        for point in observed.points("openai_responses.on_call.losses")
    }


@pytest.mark.parametrize(
    "problem", [ValueError(PROMPT), SystemExit(3), asyncio.CancelledError(), GeneratorExit()], ids=repr
)
def test_what_it_raises_is_contained(
    problem: BaseException,
    instrument: Instrument,
    server: ScriptedServer,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is counted, the first is logged by its type, and the calls that follow are told."""
    seen: list[str | None] = []

    def on_call(record: CallRecord) -> None:
        seen.append(record.request_model)
        if record.request_model == "whole":
            raise problem

    observed = instrument(on_call=on_call)
    with client_of(server) as client:
        for model in ("whole", "whole", "cut"):
            read(client, model)
    eventually(lambda: len(seen) == 3, "all told")
    assert losses(observed) == {"raised": 2}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert type(problem).__name__ in record.getMessage()
    assert "on_call" in record.getMessage()
    assert PROMPT not in caplog.text
    assert capsys.readouterr().err == ""


def test_a_slow_function_loses_no_more_than_does_not_fit(
    instrument: Instrument,
    server: ScriptedServer,
    told: Told,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So many records wait, no call does, and what is refused is counted and logged once."""
    assert _delivery._MAX_RECORDS == 10_000
    monkeypatch.setattr(_delivery, "_MAX_RECORDS", 5)
    runs, goes_on = threading.Event(), threading.Event()

    def on_call(record: CallRecord) -> None:
        runs.set()
        goes_on.wait(30)
        told(record)

    observed = instrument(on_call=on_call)
    with client_of(server) as client:
        read(client, "whole")
        assert runs.wait(10)
        began = time.monotonic()
        for _ in range(8):
            read(client, "whole")
        assert time.monotonic() - began < 5
    assert losses(observed) == {"refused": 3}
    assert [record.getMessage() for record in caplog.records] == [
        "on_call is slow. 5 calls wait for it, and others are lost."
    ]
    goes_on.set()
    told.all(6)


async def coroutine_function(_: CallRecord) -> None:
    """A function that cannot be called on a thread."""


def test_a_coroutine_function_is_refused(
    instrument: Instrument, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an error in code, and where that cannot be seen it is counted and logged."""
    with pytest.raises(ValueError, match="coroutine"):
        Config(on_call=coroutine_function)
    observed = instrument(on_call=lambda record: coroutine_function(record))
    with client_of(server) as client:
        read(client, "whole")
    eventually(lambda: losses(observed) == {"raised": 1}, "counted")
    assert "coroutine" in caplog.text


def test_uninstrumenting_tells_what_is_left(server: ScriptedServer, told: Told) -> None:
    """`uninstrument()` waits for the function as for look-ups, and no call is told afterwards."""
    observed = Observed()
    config = Config(on_call=lambda record: (time.sleep(0.05), told(record)), exit_timeout=10)
    ResponsesUsageInstrumentor().instrument(
        tracer_provider=observed.tracer_provider, meter_provider=observed.meter_provider, config=config
    )
    with client_of(server) as client:
        for model in ("whole", "left", "cut", "whole"):
            read(client, model)
        ResponsesUsageInstrumentor().uninstrument()
        assert len(told.records) == 4
        read(client, "whole")
    assert len(told.records) == 4


# --- the end of a process ------------------------------------------------------------------------------

KEEPER = """
from otel_responses_usage import Config


def keep(record):
    time.sleep({takes_s})
    usage = record.usage and record.usage.output_tokens
    reason = record.missing_reason and record.missing_reason.value
    with (FOLDER / "told").open("a") as file:
        print(os.getpid(), record.request_model, usage, reason, file=file)


provide()
ResponsesUsageInstrumentor().instrument(config=Config(on_call=keep, exit_timeout={exit_timeout}))
"""


def kept(folder: Path) -> list[list[str]]:
    """What the function of an application has written: process, model, tokens, reason."""
    file = folder / "told"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


BUSY = """
for number in range(20):
    list(client.responses.create(model=f"whole-{number}", input="x", stream=True))
read_cut("cut")
stream = read_half("open")
"""
ENDS = {
    "end": "",
    "SIGTERM": """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
""",
    "shutdown": """
trace.get_tracer_provider().shutdown()
metrics.get_meter_provider().shutdown()
print(len((FOLDER / "told").read_text().splitlines()), flush=True)
os._exit(0)
""",
}


@pytest.mark.parametrize("way", ENDS)
def test_a_process_that_ends_has_told_everything(way: str, tmp_path: Path, serve: Serve) -> None:
    """However a process ends, the function is called before for what waits, and for what is open then."""
    setup = KEEPER.format(takes_s=0.02, exit_timeout=20)
    ran = run(tmp_path, serve(NamedAPI(before_get=Pause(0.2))), BUSY + ENDS[way], setup)
    assert "Traceback" not in ran.complaints
    wanted = [(f"whole-{number}", "245", "None") for number in range(20)]
    told = [tuple(rest) for _, *rest in kept(tmp_path)]
    assert sorted(told) == sorted([*wanted, ("cut", "245", "None"), ("open", "245", "None")])
    assert ran.total("openai_responses.on_call.losses") == 0
    if way == "shutdown":
        assert ran.output == "22\n"


def test_what_no_look_up_found_in_time_is_told(tmp_path: Path, serve: Serve) -> None:
    """Look-ups that hang until the exit timeout leave the function some time to be told so."""
    setup = KEEPER.format(takes_s=0.001, exit_timeout=6)
    ran = run(tmp_path, serve(NamedAPI(before_get=Hold())), BUSY + "print(time.time())", setup)
    # Not the end of the process: on a busy machine the interpreter takes seconds to end.
    told_at = (tmp_path / "told").stat().st_mtime
    assert told_at - float(ran.output) < 11, "less than two waits"
    told = {model: rest for _, model, *rest in kept(tmp_path)}
    assert {model: told[model] for model in ("cut", "open")} == {
        "cut": ["None", "shutdown"],
        "open": ["None", "shutdown"],
    }
    assert ran.total("openai_responses.on_call.losses") == 0


@pytest.mark.parametrize(
    "end", ["", "trace.get_tracer_provider().shutdown()\nmetrics.get_meter_provider().shutdown()"]
)
def test_a_function_that_blocks_for_ever_holds_an_exit_up_once(
    end: str, tmp_path: Path, serve: Serve
) -> None:
    """It keeps a process for the exit timeout, and not for one more at each provider; the rest is counted."""
    setup = KEEPER.format(takes_s=600, exit_timeout=8)
    ran = run(tmp_path, serve(NamedAPI(before_get=Pause(0))), BUSY + f"print(time.time())\n{end}", setup)
    assert ran.code == 0
    assert ran.ended_at - float(ran.output) < 8 + 7
    assert "Traceback" not in ran.complaints
    if not end:  # with it, the meter provider has exported before the records are given up
        assert ran.total("openai_responses.on_call.losses") == 21
    assert ran.complaints.count("on_call") == 1


FORK = """
for number in range(3):
    list(client.responses.create(model=f"whole-{number}", input="x", stream=True))
child = os.fork()
if child == 0:
    make_clients()
    list(client.responses.create(model="whole-of-the-child", input="x", stream=True))
    sys.exit()
os.waitpid(child, 0)
print(child, os.getpid())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_tells_of_its_own_calls(tmp_path: Path, serve: Serve) -> None:
    """What waits at a fork is told by the parent, and the child begins anew."""
    setup = KEEPER.format(takes_s=0.3, exit_timeout=20)
    ran = run(tmp_path, serve(NamedAPI(before_get=Pause(0))), FORK, setup)
    child, parent = ran.output.split()
    assert "Traceback" not in ran.complaints
    assert sorted((pid, model) for pid, model, *_ in kept(tmp_path)) == sorted(
        [*((parent, f"whole-{number}") for number in range(3)), (child, "whole-of-the-child")]
    )


# Instrumented before gevent replaces the locks and threads of Python, as `opentelemetry-instrument` does.
GREENLETS = """
import os, sys, time
sys.path[:0] = {path}
told = []


def keep(record):
    time.sleep(0.3)
    told.append((record.request_model, record.usage and record.usage.output_tokens))


from opentelemetry import metrics, trace
from otel_responses_usage import Config, ResponsesUsageInstrumentor
ResponsesUsageInstrumentor().instrument(
    tracer_provider=trace.NoOpTracerProvider(), meter_provider=metrics.NoOpMeterProvider(),
    config=Config(on_call=keep),
)
{patch}
import threading
import openai

gaps = [0.0]


def watch():
    while True:
        began = time.monotonic()
        time.sleep(0.02)
        gaps.append(time.monotonic() - began)


client = openai.OpenAI(max_retries=0)
list(client.responses.create(model="whole", input="x", stream=True))
threading.Thread(target=watch, daemon=True).start()
for model in ("whole", "cut"):
    try:
        list(client.responses.create(model=model, input="x", stream=True))
    except Exception:
        pass
deadline = time.monotonic() + 30
while len(told) < 3 and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.2)
list(client.responses.create(model="whole", input="x", stream=True))
ResponsesUsageInstrumentor().flush(30)
print(sorted(told), max(gaps) < 1.5)
"""


@pytest.mark.parametrize(
    ("library", "patch"),
    [
        ("gevent", "from gevent import monkey; monkey.patch_all()"),
        ("eventlet", 'sys.modules["trio"] = None; import eventlet; eventlet.monkey_patch()'),
    ],
)
def test_under_greenlets(library: str, patch: str, serve: Serve) -> None:
    """The function runs in a greenlet then, and nothing stops the others."""
    if find_spec(library) is None:
        pytest.skip(f"{library} is not there")
    server = serve(NamedAPI(before_get=Pause(0)))
    ran = subprocess.run(  # noqa: S603
        [sys.executable, "-c", GREENLETS.format(path=[], patch=patch)],
        env={**os.environ, "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": f"{server.url}/v1"},
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
    )
    told = [("cut", 245), ("whole", 245), ("whole", 245), ("whole", 245)]
    assert ran.stdout == f"{told} True\n", ran.stderr


# --- a function that is named in the environment --------------------------------------------------------

LAUNCHER = str(Path(sys.executable).with_name("opentelemetry-instrument"))

# An application that is one file, and tells how often it was imported and what its function was told.
OWN_MODULE = """
import os
import sys

import openai

print("begins as", __name__, flush=True)
told = []


def keep(record):
    told.append(record.usage.output_tokens)


{call}
"""
CALL = """
client = openai.OpenAI(max_retries=0)
for _ in range(2):
    list(client.responses.create(model="whole", input="x", stream=True))
from otel_responses_usage import ResponsesUsageInstrumentor
ResponsesUsageInstrumentor().flush()
print(told, flush=True)
"""


def zero_code(folder: Path, serve: Serve, *command: str, on_call: str) -> subprocess.CompletedProcess[str]:
    server = serve(NamedAPI(before_get=Pause(0)))
    return subprocess.run(  # noqa: S603
        [LAUNCHER, sys.executable, *command],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
            "OPENAI_API_KEY": "k",
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_RESPONSES_USAGE_ON_CALL": on_call,
        },
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "on_call", "name"),
    [
        (("app.py",), "app:keep", "__main__"),
        (("-c", "import package.app"), "package.app:keep", "package.app"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_function_of_the_application_itself(
    command: tuple[str, ...], on_call: str, name: str, tmp_path: Path, serve: Serve
) -> None:
    """It is the function that the application has: its module is not imported a second time."""
    (tmp_path / "package").mkdir()
    for file in (tmp_path / "app.py", tmp_path / "package" / "app.py"):
        file.write_text(OWN_MODULE.format(call=CALL))
    (tmp_path / "package" / "__init__.py").touch()
    ran = zero_code(tmp_path, serve, *command, on_call=on_call)
    assert (ran.stdout, ran.stderr) == (f"begins as {name}\n[245, 245]\n", "")


def test_a_function_of_the_program_that_runs(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    """`__main__` names the program, whatever its file is called; the function may be an attribute of it."""
    monkeypatch.setattr(sys.modules["__main__"], "keeper", SimpleNamespace(keep=told), raising=False)
    on_call = Config.from_env({"OTEL_RESPONSES_USAGE_ON_CALL": "__main__:keeper.keep"}).on_call
    assert on_call is not None
    on_call("a record")  # type: ignore[arg-type]
    assert told.records == ["a record"]


BROKEN = """
from pathlib import Path
with Path(__file__).with_name("imports").open("a") as file:
    file.write("x")
raise LookupError("canary")
"""


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such_module:keep", "ModuleNotFoundError"),
        ("no.such.module:keep", "ModuleNotFoundError"),
        ("json:no_such_function", "AttributeError"),
        ("broken_by_its_author:keep", "LookupError"),
        ("json:__name__", "TypeError"),
    ],
)
def test_a_wrong_name(
    name: str,
    problem: str,
    instrument: Instrument,
    server: ScriptedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning names it and says what is wrong, and the application does not notice."""
    (tmp_path / "broken_by_its_author.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    observed = instrument(on_call=Config.from_env({"OTEL_RESPONSES_USAGE_ON_CALL": name}).on_call)
    with client_of(server) as client:
        for _ in range(2):
            read(client, "whole")
    eventually(lambda: losses(observed) == {"raised": 2}, "counted")
    assert [record.getMessage() for record in caplog.records] == [
        f"on_call ({name}) has raised {problem}. Its further errors are not logged."
    ]
    if name.startswith("broken"):
        assert (tmp_path / "imports").read_text() == "x"

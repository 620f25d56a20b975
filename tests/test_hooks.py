"""Hooks, exclusion and the arguments of `instrument()`, in the form of other instrumentations."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from opentelemetry.trace import INVALID_SPAN, Span

from calls import needs_resume
from conftest import Serve
from embedded.answer import Answer, usage
from embedded.http_server import Hold, ScriptedServer
from embedded.responses_api import Plan, ResponsesAPI
from observed import Observed, eventually
from otel_responses_usage import CallRecord, Config, MissingReason, ResponsesUsageInstrumentor, UsageSource
from test_on_call import KEY, ask, messages, needs_websocket

MODEL = "gpt-5.4-mini"
PROMPT = "canary-of-the-prompt"
INFERENCE = {"gen_ai.operation.name": "chat", "gen_ai.request.model": MODEL}

Instrument = Callable[..., Observed]


@pytest.fixture
def instrument() -> Iterator[Instrument]:
    """Switch the instrumentation on with these arguments."""

    def switch_on(config: Config | None = None, **arguments: Any) -> Observed:
        observed = Observed()
        ResponsesUsageInstrumentor().instrument(
            tracer_provider=observed.tracer_provider,
            meter_provider=observed.meter_provider,
            config=config or Config(exit_timeout=0.5),
            **arguments,
        )
        return observed

    yield switch_on
    if ResponsesUsageInstrumentor().is_instrumented_by_opentelemetry:
        ResponsesUsageInstrumentor().uninstrument()


@pytest.fixture
def server(serve: Serve) -> ScriptedServer:
    """The Responses API. Streams of the model `left` do not end by themselves."""
    answer = Answer(usage=usage(7, 21))
    return serve(
        ResponsesAPI(
            lambda request: (
                Plan(answer, cut_after=5, end=Hold())
                if request.json["metadata"]["plan"] == "left"
                else Plan(answer)
            )
        )
    )


def client_of(server: ScriptedServer, kind: type[Any] = openai.OpenAI) -> Any:
    return kind(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def read(client: openai.OpenAI, plan: str = "whole", **asked: Any) -> None:
    with client.responses.create(
        model=MODEL, input=PROMPT, stream=True, metadata={"plan": plan}, **asked
    ) as stream:
        for event in stream:
            if plan == "left" and event.type == "response.output_text.delta":
                break


def faults(observed: Observed) -> int:
    return sum(point.value for point in observed.points("openai_responses.faults"))


# --- hooks ---------------------------------------------------------------------------------------------


def test_both_hooks_get_the_open_span(instrument: Instrument, server: ScriptedServer) -> None:
    """The request hook gets all parameters, and the response hook the record, before the span ends."""
    seen: list[Any] = []

    def on_request(span: Span, parameters: Any) -> None:
        seen.append(dict(parameters))
        span.set_attribute("own.request", True)

    def on_response(span: Span, record: CallRecord) -> None:
        seen.append(record)
        assert span.is_recording()
        span.set_attribute("own.output", record.usage.output_tokens if record.usage else -1)

    observed = instrument(request_hook=on_request, response_hook=on_response)
    with client_of(server) as client:
        read(client, "left", extra_body={"top_p": 0.5})
    span = observed.span()
    parameters, record = seen
    assert parameters == {
        "model": MODEL,
        "input": PROMPT,
        "stream": True,
        "metadata": {"plan": "left"},
        "top_p": 0.5,
    }
    assert record.usage_source is UsageSource.RETRIEVAL
    assert record.span_context == span.get_span_context()
    attributes = dict(span.attributes or {})
    assert (attributes["own.request"], attributes["own.output"]) == (True, 21)


def test_hooks_cannot_change_what_is_sent(instrument: Instrument, server: ScriptedServer) -> None:
    """The parameters are read-only, so a hook that takes the prompt out takes it out of nothing."""

    def on_request(_: Span, parameters: Any) -> None:
        parameters.pop("input")

    def excludes(parameters: Any) -> bool:
        del parameters["input"]
        return True

    observed = instrument(request_hook=on_request, exclude=excludes)
    with client_of(server) as client:
        read(client)
    assert server.requests[0].json["input"] == PROMPT
    observed.span()
    assert faults(observed) == 2


@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
def test_what_they_raise_is_contained(
    kind: type[Any], instrument: Instrument, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Each error is counted, nothing is logged above debug, and the call and its span are as ever."""

    def fail(*_: object) -> bool:
        raise ValueError(PROMPT)

    observed = instrument(request_hook=fail, response_hook=fail, exclude=fail)

    async def read_async() -> None:
        async with client_of(server, kind) as client:
            stream = await client.responses.create(
                model=MODEL, input=PROMPT, stream=True, metadata={"plan": "whole"}
            )
            async for _ in stream:
                pass

    if kind is openai.AsyncOpenAI:
        asyncio.run(read_async())
    else:
        with client_of(server) as client:
            read(client)
    assert (observed.span().attributes or {})["gen_ai.usage.output_tokens"] == 21
    assert faults(observed) == 3
    assert observed.calls() == {"stream": 1}
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError])
def test_a_hook_that_ends_a_thread_leaves_no_call_waiting(
    error: type[BaseException], instrument: Instrument, server: ScriptedServer
) -> None:
    """On a thread of the look-ups, an exception that is no error leaves no call that a flush waits for."""

    def end(*_: object) -> None:
        raise error

    observed = instrument(response_hook=end)
    with client_of(server) as client:
        for _ in range(3):
            read(client, "left")
    assert ResponsesUsageInstrumentor().flush(10)
    assert observed.calls() == {"retrieval": 3}
    assert len(observed.spans(3)) == 3


@needs_resume
def test_a_fetch_has_hooks(instrument: Instrument, server: ScriptedServer) -> None:
    """The span of a streamed fetch goes through both hooks; its record has no usage."""
    operations: list[Any] = []
    instrument(
        request_hook=lambda span, _: operations.append(span.name),
        response_hook=lambda _, record: operations.append((record.operation, record.usage)),
    )
    with client_of(server) as client:
        made = client.responses.create(model=MODEL, input=PROMPT, metadata={"plan": "whole"})
        operations.clear()
        list(client.responses.retrieve(made.id, stream=True))
    assert operations == ["fetch_response", ("fetch_response", None)]


@pytest.mark.parametrize("spans", ["auto", "never"])
def test_calls_without_a_span_of_ours_have_hooks(
    spans: str, instrument: Instrument, server: ScriptedServer
) -> None:
    """Beside another instrumentation, or without spans, both hooks get a span that is not recorded."""
    seen: list[Any] = []
    observed = instrument(
        Config(spans=spans, exit_timeout=0.5),  # type: ignore[arg-type]
        request_hook=lambda span, _: seen.append(span),
        response_hook=lambda span, record: seen.append((span, record.usage)),
    )
    tracer = observed.tracer_provider.get_tracer("theirs")
    attributes = INFERENCE if spans == "auto" else {}
    with tracer.start_as_current_span("theirs", attributes=attributes) as theirs, client_of(server) as client:
        read(client)
    asked, (answered, known) = seen
    assert asked is answered
    assert not asked.is_recording()
    assert asked.get_span_context() == theirs.get_span_context()
    assert known.output_tokens == 21


# --- exclusion -----------------------------------------------------------------------------------------


def test_excluded_calls_are_not_recorded(instrument: Instrument, server: ScriptedServer) -> None:
    """They have no span, no point, no record and no look-up, and hooks are not called for them."""
    told: list[CallRecord] = []
    asked: list[Any] = []
    observed = instrument(
        Config(on_call=told.append, exit_timeout=0.5),
        exclude=lambda parameters: parameters.get("prompt_cache_key") == "internal",
        request_hook=lambda _, parameters: asked.append(parameters),
    )
    with client_of(server) as client:
        read(client, "left", extra_body={"prompt_cache_key": "internal"})
        read(client, "whole")
    observed.span()
    eventually(lambda: told, "told")
    assert (len(told), len(asked), observed.calls()) == (1, 1, {"stream": 1})
    assert [request.method for request in server.requests] == ["POST", "POST"]


def test_a_neighbour_of_an_excluded_call_is_given_back(
    instrument: Instrument, server: ScriptedServer
) -> None:
    """The next call in the same span of another instrumentation belongs to that span."""
    observed = instrument(exclude=lambda parameters: parameters["input"] == "internal")
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client, tracer.start_as_current_span("theirs", attributes=INFERENCE):
        client.responses.create(model=MODEL, input="internal", metadata={"plan": "whole"})
        read(client)
    attributes = dict(observed.span().attributes or {})
    assert attributes["openai_responses.usage.source"] == "stream"
    assert observed.calls() == {"stream": 1}


@needs_websocket
@pytest.mark.parametrize("is_excluded", [True, False])
def test_a_response_that_continues_an_excluded_one(is_excluded: bool, instrument: Instrument) -> None:
    """What nobody sends a message for is recorded if the call that it continues is, and excluded with it."""
    first, second = Answer(usage=usage(1, 2)), Answer(usage=usage(3, 4))
    asked: list[Any] = []
    told: list[CallRecord] = []

    def plan(message: dict[str, Any]) -> list[dict[str, Any]]:
        return [*first.events(message), *second.events({**message, "previous_response_id": first.id})]

    observed = instrument(
        Config(on_call=told.append, exit_timeout=0.5),
        exclude=lambda parameters: (asked.append(parameters["model"]), is_excluded)[1],
        request_hook=lambda _, parameters: asked.append(parameters.get("previous_response_id")),
    )
    with (
        messages(plan) as url,
        openai.OpenAI(api_key=KEY, base_url="http://127.0.0.1:9/v1", websocket_base_url=url) as client,
        client.responses.connect() as connection,
    ):
        ask(connection)
        while connection.recv().type != "response.completed":
            pass
    if is_excluded:
        assert observed.finished == 0
        assert (told, asked) == ([], [MODEL])
        return
    observed.spans(2)
    eventually(lambda: len(told) == 2, "told")
    assert [record.usage and record.usage.output_tokens for record in told] == [2, 4]
    # It is not excluded by parameters that it has not.
    assert asked == [MODEL, None, first.id]
    assert faults(observed) == 0


@pytest.mark.parametrize("name", ["exclude", "request_hook", "response_hook"])
def test_a_coroutine_function_is_refused(name: str, instrument: Instrument) -> None:
    """It would never run. As `exclude` it would exclude each call, since a coroutine is true."""

    async def hook(*_: object) -> bool:
        return False

    with pytest.raises(ValueError, match=f"{name} must not be a coroutine function"):
        instrument(**{name: hook})
    assert not ResponsesUsageInstrumentor().is_instrumented_by_opentelemetry


@pytest.mark.filterwarnings("error")
def test_a_coroutine_as_a_result_is_a_fault(instrument: Instrument, server: ScriptedServer) -> None:
    """It cannot be seen before the call. The call is recorded, and Python does not warn of the coroutine."""

    async def hook(*_: object) -> bool:
        return True

    def wrapped(*arguments: object) -> object:
        return hook(*arguments)

    observed = instrument(exclude=wrapped, request_hook=wrapped, response_hook=wrapped)
    with client_of(server) as client:
        read(client)
    assert (observed.span().attributes or {})["gen_ai.usage.output_tokens"] == 21
    assert faults(observed) == 3


# --- arguments and variables ---------------------------------------------------------------------------


def test_unknown_arguments_are_named(instrument: Instrument, caplog: pytest.LogCaptureFixture) -> None:
    """One warning names them, each with the nearest right one, and the others are used."""
    instrument(request_hok=print, quite_different=1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "instrument() has no such arguments: quite_different, request_hok (use request_hook)"
    )


def test_what_launchers_pass_is_not_unknown(caplog: pytest.LogCaptureFixture) -> None:
    """The arguments of `opentelemetry-instrument` and of distributions raise no warning."""
    ResponsesUsageInstrumentor().instrument(
        tracer_provider=Observed().tracer_provider, skip_dep_check=True, raise_exception_on_conflict=True
    )
    ResponsesUsageInstrumentor().uninstrument()
    assert not caplog.records


def test_misspelt_variables_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The environment that `instrument()` reads is checked, too, and without values in the log."""
    monkeypatch.setenv("OTEL_RESPONSES_USAGE_BAGAGE_KEYS", "secret")
    ResponsesUsageInstrumentor().instrument(tracer_provider=Observed().tracer_provider)
    ResponsesUsageInstrumentor().uninstrument()
    (record,) = caplog.records
    assert "OTEL_RESPONSES_USAGE_BAGAGE_KEYS (use OTEL_RESPONSES_USAGE_BAGGAGE_KEYS)" in record.getMessage()
    assert "secret" not in caplog.text


def test_hooks_get_what_is_missing_too(instrument: Instrument, server: ScriptedServer) -> None:
    """Where the usage is not known, the record of the response hook has the reason."""
    records: list[CallRecord] = []
    instrument(
        Config(retrieval=False, exit_timeout=0.5), response_hook=lambda _, record: records.append(record)
    )
    with client_of(server) as client:
        read(client, "left")
    (record,) = records
    assert (record.usage, record.missing_reason) == (None, MissingReason.DISABLED)
    assert record.span_context != INVALID_SPAN.get_span_context()

"""Another instrumentation's span around a call, and other code between a client and the SDK's `request`.

Real neighbours are run by `scripts/test-neighbours`, each in an environment of its own. Here their signs are
made by hand: a span with their attributes, a container in the context, a wrapper of their name.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import openai
import openai.resources.responses.responses as responses_module
import pytest
import wrapt
from openai._base_client import SyncAPIClient
from opentelemetry import context, trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

from conftest import Instrument, Serve
from embedded.answer import Answer, usage
from embedded.http_server import Hold, ScriptedServer
from embedded.responses_api import Plan, ResponsesAPI
from observed import Observed, eventually, token_attributes
from otel_responses_usage import ResponsesUsageInstrumentor

MODEL = "gpt-5.4-mini"
ASKED: dict[str, Any] = {"model": MODEL, "input": "x"}
ANSWER = Answer(pieces=("one ", "two ", "three "), usage=usage(7, 21))
TOKENS = {"gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 21}
POINTS = {"input": (1, 7), "output": (1, 21)}
CONTAINER = "opentelemetry.genai.client.inference.context"
INFERENCE = {"gen_ai.operation.name": "chat", "gen_ai.request.model": MODEL}

# An open stream, of which all but the terminal event has arrived.
LEFT_OPEN = Plan(ANSWER, cut_after=3, end=Hold())


def plan_of(model: str) -> Plan:
    return LEFT_OPEN if model == "left open" else Plan(ANSWER)


@pytest.fixture
def server(serve: Serve) -> ScriptedServer:
    """The Responses API. Streams of the model `left open` do not end by themselves."""
    return serve(ResponsesAPI(lambda request: plan_of(request.json["metadata"]["plan"])))


def client_of(server: ScriptedServer, client_class: type[Any] = openai.OpenAI) -> Any:
    return client_class(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


def drain(client: openai.OpenAI, **given: Any) -> None:
    for _ in client.responses.create(**{**ASKED, **given}, metadata={"plan": "whole"}, stream=True):
        pass


def leave(client: openai.OpenAI, **given: Any) -> None:
    with client.responses.create(**{**ASKED, **given}, metadata={"plan": "left open"}, stream=True) as stream:
        next(iter(stream))


def span_of(observed: Observed, name: str) -> ReadableSpan:
    return next(span for span in observed.spans(observed.finished) if span.name == name)


def names_of(observed: Observed) -> list[str]:
    return sorted(span.name for span in observed.spans(observed.finished))


def settled(observed: Observed, calls: int = 1) -> None:
    eventually(lambda: sum(observed.calls().values()) == calls, f"{calls} calls")


class Container:
    """What OpenTelemetry's own instrumentation puts into the context, as far as it matters here."""

    def __init__(self) -> None:
        self.usage_input_tokens: int | None = None
        self.usage_output_tokens: int | None = None
        self.response_id: str | None = None


# --- another instrumentation's span --------------------------------------------------------------------


def test_a_whole_stream_adds_to_the_span_that_is_there(observed: Observed, server: ScriptedServer) -> None:
    """In the span of an inference there is no second one, and the points are recorded once."""
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client, tracer.start_as_current_span("theirs", attributes=INFERENCE):
        drain(client)
    assert names_of(observed) == ["theirs"]
    attributes = dict(observed.span().attributes or {})
    assert attributes["openai_responses.stream.outcome"] == "completed"
    assert attributes["openai_responses.usage.source"] == "stream"
    assert not token_attributes(observed.span())  # it has its own names for them
    assert observed.tokens() == POINTS
    assert observed.calls() == {"stream": 1}


def test_an_early_end_adds_one_span_below_the_one_that_is_there(
    observed: Observed, server: ScriptedServer
) -> None:
    """What the other instrumentation cannot know is in a span without a length, at the end of the call."""
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client:
        with tracer.start_as_current_span("theirs", attributes=INFERENCE) as theirs:
            leave(client)
        settled(observed)
    assert names_of(observed) == ["theirs", f"usage {MODEL}"]
    ours = span_of(observed, f"usage {MODEL}")
    assert ours.parent == theirs.get_span_context()
    assert ours.start_time == ours.end_time
    assert ours.kind is trace.SpanKind.INTERNAL
    attributes = dict(ours.attributes or {})
    assert attributes.pop("openai_responses.retrieval.duration") > 0
    assert attributes.pop("gen_ai.response.model").startswith(MODEL)
    assert attributes == token_attributes(ours) | {
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.id": attributes["gen_ai.response.id"],
        "openai.response.service_tier": "default",
        "openai_responses.stream.outcome": "closed",
        "openai_responses.usage.source": "retrieval",
        "openai_responses.retrieval.attempts": 1,
    }
    assert TOKENS.items() <= token_attributes(ours).items()
    assert observed.tokens() == POINTS


def test_an_early_end_says_why_its_usage_is_unknown(observed: Observed, server: ScriptedServer) -> None:
    """A missing reason is in the usage span, too."""
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client, tracer.start_as_current_span("theirs", attributes=INFERENCE):
        leave(client, store=False)
    ours = dict(span_of(observed, f"usage {MODEL}").attributes or {})
    assert ours["openai_responses.usage.missing_reason"] == "not_stored"
    assert observed.calls() == {"not_stored": 1}


def test_a_terminal_event_that_nobody_read_is_no_news_to_the_neighbour(
    observed: Observed, server: ScriptedServer
) -> None:
    """The application leaves when the whole stream has arrived: the call is completed, by a span of ours."""
    tracer = observed.tracer_provider.get_tracer("pydantic-ai")
    with client_of(server) as client, tracer.start_as_current_span("theirs", attributes=INFERENCE):
        with client.responses.create(**ASKED, metadata={"plan": "whole"}, stream=True) as stream:
            next(iter(stream))
            eventually(lambda: server.in_flight_of("POST") == 0, "the whole answer")
        settled(observed)
    assert names_of(observed) == ["theirs", f"usage {MODEL}"]
    assert observed.calls() == {"stream": 1}
    assert observed.tokens() == POINTS


@pytest.mark.parametrize("scope", ["pydantic-ai", "agent_framework"])
def test_points_that_the_neighbour_records_are_left_to_it(
    scope: str, observed: Observed, server: ScriptedServer
) -> None:
    """A neighbour with a token metric of its own records whole streams, and we record the others."""
    tracer = observed.tracer_provider.get_tracer(scope)
    with client_of(server) as client:
        with tracer.start_as_current_span("theirs", attributes=INFERENCE):
            drain(client)
        assert observed.tokens() == {}
        with tracer.start_as_current_span("theirs", attributes=INFERENCE):
            leave(client)
        settled(observed, 2)
    assert observed.tokens() == POINTS


def test_the_container_of_an_inference_is_filled(observed: Observed, server: ScriptedServer) -> None:
    """OpenTelemetry's own instrumentation reads the usage from a container in the context, and records it."""
    container = Container()
    token = context.attach(context.set_value(CONTAINER, container))
    try:
        with client_of(server) as client:
            drain(client)
    finally:
        context.detach(token)
    assert (container.usage_input_tokens, container.usage_output_tokens) == (7, 21)
    assert container.response_id is not None
    assert observed.finished == 0
    assert observed.tokens() == {}
    assert observed.calls() == {"stream": 1}


def test_a_span_belongs_to_the_first_call_in_it(observed: Observed, server: ScriptedServer) -> None:
    """A second call, and one of another model, have spans of their own."""
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client, tracer.start_as_current_span("theirs", attributes=INFERENCE):
        drain(client, model="another")
        drain(client)
        drain(client)
    assert names_of(observed) == ["chat another", f"chat {MODEL}", "theirs"]


def test_a_refused_call_gives_the_span_back(observed: Observed, server: ScriptedServer) -> None:
    """A framework that tries again makes one call of its span, and not two."""
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client, tracer.start_as_current_span("theirs", attributes=INFERENCE):
        with pytest.raises(openai.BadRequestError):
            drain(client, previous_response_id="resp_unknown")
        drain(client)
    assert names_of(observed) == ["theirs"]
    assert observed.calls() == {"no_response_id": 1, "stream": 1}


def test_an_exit_during_the_look_up_is_told_below_the_neighbour(
    observed: Observed, serve: Serve, api: Callable[..., ResponsesAPI]
) -> None:
    """The other instrumentation's span is exported at once, and the usage span says `shutdown` in the end."""
    server = serve(api(Plan(ANSWER, cut_after=3, end=Hold(), fate="stuck")))
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client:
        with tracer.start_as_current_span("theirs", attributes=INFERENCE):
            leave(client)
        assert names_of(observed) == ["theirs"]
        ResponsesUsageInstrumentor().uninstrument()
    assert names_of(observed) == ["theirs", f"usage {MODEL}"]
    attributes = span_of(observed, f"usage {MODEL}").attributes or {}
    assert attributes["openai_responses.usage.missing_reason"] == "shutdown"


def test_no_span_of_a_neighbour_is_kept(observed: Observed, server: ScriptedServer) -> None:
    """When the look-up has ended, nothing of ours holds the span."""
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client:
        with tracer.start_as_current_span("theirs", attributes=INFERENCE) as theirs:
            leave(client)
        settled(observed)
        kept = weakref.ref(theirs)
        del theirs
        eventually(lambda: gc.collect() is not None and kept() is None, "the span is dropped")


class _Wrapper:
    """The wrapper of a neighbour around the SDK's method."""

    def __call__(self, wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)


@pytest.fixture
def wrapped_method() -> Iterator[None]:
    """A neighbour that shows only by its wrapper."""
    wrapper = _Wrapper()
    wrapper.__module__ = "opentelemetry.instrumentation.openai.v1.responses_wrappers"
    method = responses_module.Responses.create
    wrapt.wrap_function_wrapper(responses_module, "Responses.create", wrapper)
    yield
    responses_module.Responses.create = method  # type: ignore[method-assign]


@pytest.mark.usefixtures("wrapped_method")
def test_a_neighbour_is_known_by_its_wrapper(observed: Observed, server: ScriptedServer) -> None:
    """Its span cannot be seen. A whole stream has none of ours, and an early end has a usage span."""
    with client_of(server) as client:
        drain(client)
        assert observed.finished == 0
        with client.responses.with_raw_response.create(
            **ASKED, metadata={"plan": "whole"}, stream=True
        ).parse():
            pass
        leave(client)
        settled(observed, 3)
    # It does not see raw streams.
    assert names_of(observed) == [f"chat {MODEL}", f"usage {MODEL}"]


# --- the setting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "names"),
    [
        ("auto", ["theirs", f"usage {MODEL}"]),
        ("always", [f"chat {MODEL}", f"chat {MODEL}", "theirs"]),
        ("never", ["theirs", f"usage {MODEL}"]),
    ],
)
def test_spans_are_made_as_the_setting_says(
    spans: Any, names: list[str], instrument: Instrument, server: ScriptedServer
) -> None:
    """The metrics are the same with each value."""
    observed = instrument(spans=spans)
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client:
        with tracer.start_as_current_span("theirs", attributes=INFERENCE):
            leave(client)
        with tracer.start_as_current_span("theirs", attributes=INFERENCE):
            drain(client)
        settled(observed, 2)
    names = [*names, "theirs"]
    assert names_of(observed) == sorted(names)
    assert observed.tokens() == {"input": (2, 14), "output": (2, 42)}


def test_without_spans_the_metrics_remain(instrument: Instrument, server: ScriptedServer) -> None:
    """`never`, and nobody else has a span: no span of ours."""
    observed = instrument(spans="never")
    with client_of(server) as client:
        drain(client)
        leave(client)
        settled(observed, 2)
    assert observed.finished == 0
    assert observed.tokens() == {"input": (2, 14), "output": (2, 42)}


def test_a_neighbour_that_breaks_is_none(
    observed: Observed, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """If another package's span cannot be read, calls have spans as without it. The fault is told once."""
    caplog.set_level(logging.DEBUG, "otel_responses_usage")

    class Broken(trace.NonRecordingSpan):
        def is_recording(self) -> bool:
            raise RuntimeError("broken")

    with client_of(server) as client, trace.use_span(Broken(trace.INVALID_SPAN_CONTEXT)):
        drain(client)
        drain(client)
    assert names_of(observed) == [f"chat {MODEL}"] * 2
    assert len([record for record in caplog.records if "fault" in record.getMessage()]) == 1


def test_the_applications_suppression_is_obeyed(observed: Observed, server: ScriptedServer) -> None:
    """Also inside of an inference span, and where another package stands before the SDK."""
    tracer = observed.tracer_provider.get_tracer("theirs")
    with client_of(server) as client, tracer.start_as_current_span("theirs", attributes=INFERENCE):
        token = context.attach(context.set_value("suppress_instrumentation", True))
        drain(client)
        leave(client)
        context.detach(token)
    assert names_of(observed) == ["theirs"]
    assert observed.calls() == {}
    assert not [exchange for exchange in server.exchanges if exchange.request.method == "GET"]


# --- between a client and the SDK's `request` ----------------------------------------------------------


@pytest.fixture
def original() -> Any:
    """The SDK's own `request`, as a package stores it that comes first."""
    return vars(SyncAPIClient)["request"]


def shadow_of(original: Any) -> Callable[..., Any]:
    def request(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    return request


@pytest.fixture
def shadowed_class(original: Any) -> type[openai.OpenAI]:
    """A client class whose `request` calls the stored one of the SDK."""
    return type("Shadowed", (openai.OpenAI,), {"request": shadow_of(original)})


def test_a_class_with_a_stored_request_is_seen(
    shadowed_class: type[openai.OpenAI], instrument: Instrument, server: ScriptedServer
) -> None:
    """The class is there before us: each call is seen once, whole, early and refused."""
    observed = instrument()
    with client_of(server, shadowed_class) as client:
        drain(client)
        leave(client)
        with pytest.raises(openai.BadRequestError):
            drain(client, previous_response_id="resp_unknown")
        settled(observed, 3)
    assert names_of(observed) == [f"chat {MODEL}"] * 3
    assert observed.calls() == {"stream": 1, "retrieval": 1, "no_response_id": 1}


def test_a_client_with_a_stored_request_is_seen(
    original: Any, instrument: Instrument, server: ScriptedServer
) -> None:
    """One client has been changed before us, and its methods were used before: nothing is missed."""
    client = client_of(server)
    client.request = types.MethodType(original, client)
    assert client.responses.create is not None
    observed = instrument()
    with pytest.raises(openai.BadRequestError):
        drain(client, previous_response_id="resp_unknown")
    drain(client)
    leave(client)
    settled(observed, 3)
    client.close()
    assert observed.calls() == {"stream": 1, "retrieval": 1, "no_response_id": 1}
    starts = [span.start_time or 0 for span in observed.spans(3)]
    ends = [span.end_time or 0 for span in observed.spans(3)]
    assert all(start < end for start, end in zip(starts, ends, strict=True))


def test_a_client_without_a_server_is_seen(original: Any, instrument: Instrument) -> None:
    """The first call of such a client gets no connection."""
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="k", max_retries=0)
    client.request = types.MethodType(original, client)  # type: ignore[method-assign]
    observed = instrument()
    with pytest.raises(openai.APIConnectionError):
        drain(client)
    span = observed.span()
    assert (span.attributes or {})["error.type"] == "APIConnectionError"


def test_a_stored_request_of_an_async_client_is_seen(instrument: Instrument, server: ScriptedServer) -> None:
    """As with the sync client."""
    stored = openai.AsyncOpenAI.request
    client = client_of(server, openai.AsyncOpenAI)
    client.request = types.MethodType(stored, client)
    observed = instrument()

    async def main() -> None:
        for _ in range(2):
            created = await client.responses.create(**ASKED, metadata={"plan": "whole"})
            assert created.usage is not None
            stream = await client.responses.create(**ASKED, metadata={"plan": "whole"}, stream=True)
            async for _ in stream:
                pass
        await client.close()

    asyncio.run(main())
    assert observed.calls() == {"response": 2, "stream": 2}


def test_the_request_of_a_subclass_counts_from_its_beginning(
    instrument: Instrument, server: ScriptedServer
) -> None:
    """A subclass that does something first: its calls begin when the application makes them, each once."""
    began: list[int] = []

    class Own(openai.OpenAI):
        def request(self, *args: Any, **kwargs: Any) -> Any:
            began.append(time.time_ns())
            time.sleep(0.05)
            return super().request(*args, **kwargs)

    observed = instrument()
    with client_of(server, Own) as client:
        drain(client)
    span = observed.span()
    assert span.start_time is not None
    assert abs(span.start_time - began[0]) < 40_000_000


def test_what_another_package_suppresses_is_not_what_the_application_suppresses(
    instrument: Instrument, server: ScriptedServer
) -> None:
    """A package that calls the SDK under suppression hides no call, and the application still can."""

    class Suppressing(openai.OpenAI):
        def request(self, *args: Any, **kwargs: Any) -> Any:
            with suppress_instrumentation():
                return super().request(*args, **kwargs)

    observed = instrument()
    with client_of(server, Suppressing) as client:
        drain(client)
        with suppress_instrumentation():
            drain(client)
    assert names_of(observed) == [f"chat {MODEL}"]
    assert observed.calls() == {"stream": 1}


def test_calls_that_cannot_be_seen_are_named_once(
    instrument: Instrument, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that does not use the SDK's `request` at all is named in one warning."""

    class Elsewhere(openai.OpenAI):
        def request(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            return None

    observed = instrument()
    with client_of(server, Elsewhere) as client:
        for _ in range(3):
            client.responses.create(**ASKED)
    (record,) = caplog.records
    assert f"{__name__}.{Elsewhere.__qualname__} does not use the SDK's request method" in record.getMessage()
    assert observed.calls() == {}


def test_a_method_that_was_stored_after_us_is_seen(instrument: Instrument, server: ScriptedServer) -> None:
    """What another package has stored is our wrapper then, and not bound to any client."""
    observed = instrument()
    stored = vars(SyncAPIClient)["request"]
    shadowed_class: type[openai.OpenAI] = type("Shadowed", (openai.OpenAI,), {"request": shadow_of(stored)})
    with client_of(server, shadowed_class) as client:
        drain(client)
    assert observed.calls() == {"stream": 1}


def test_all_classes_are_as_found_afterwards(
    original: Any, shadowed_class: type[openai.OpenAI], instrument: Instrument, server: ScriptedServer
) -> None:
    """`uninstrument()` leaves nothing of ours on any class. Another `instrument()` sees all calls again."""
    found = vars(shadowed_class)["request"]
    for _ in range(2):
        observed = instrument()
        with client_of(server, shadowed_class) as client:
            drain(client)
        assert observed.calls() == {"stream": 1}
        ResponsesUsageInstrumentor().uninstrument()
        assert vars(SyncAPIClient)["request"] is original
        assert vars(shadowed_class)["request"] is found

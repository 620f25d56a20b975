"""Calls that are not plain streams, what is told of them, and what the application gets."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import importlib
import inspect
import json
import logging
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from enum import Enum
from typing import Any

import openai
import pytest
import wrapt
from openai.types.responses import Response, ResponseTextDeltaEvent
from opentelemetry import trace
from opentelemetry.trace import StatusCode
from pydantic import BaseModel

from calls import CUT, HTTP, items, settle, since
from conftest import Instrument, Serve
from embedded.answer import OUT_OF_QUOTA, Answer, FunctionCall, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest, Send, Wait, frame
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import PATIENCE_S, Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage import ResponsesUsageInstrumentor

ANSWER = Answer(pieces=("one ", "two ", "three "), usage=usage(7, 21, cached=3, reasoning=11))
ASKED: dict[str, Any] = {"model": "gpt-5.4-mini", "input": "x"}
both = pytest.mark.parametrize("client_class", [openai.OpenAI, openai.AsyncOpenAI], ids=["sync", "async"])


def client_of(server: ScriptedServer, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": "k", "max_retries": 0, **options})


def attributes_of(observed: Observed) -> dict[str, Any]:
    return dict(observed.span().attributes or {})


def test_the_whole_span_of_a_drained_stream(observed: Observed, serve: Serve) -> None:
    """A span says what was asked, what was answered, and nothing else."""
    server = serve(lambda _: Reply.sse(ANSWER.events(), headers={"X-Request-Id": "req_1"}))
    with client_of(server) as client:
        stream = client.responses.create(
            **ASKED,
            stream=True,
            max_output_tokens=100,
            temperature=0.5,
            top_p=1,
            reasoning={"effort": "low"},
            previous_response_id="resp_before",
            text={"format": {"type": "text"}},
            extra_body={"conversation": {"id": "conv_1"}, "service_tier": "flex"},
        )
        events = list(stream)
    span = observed.span()
    attributes = attributes_of(observed)
    first_chunk_s = attributes.pop("gen_ai.response.time_to_first_chunk")
    assert span.start_time is not None
    assert span.end_time is not None
    assert 0 < first_chunk_s <= (span.end_time - span.start_time) / 1e9
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-5.4-mini",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 100,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.reasoning.level": "low",
        "gen_ai.request.previous_response.id": "resp_before",
        "gen_ai.conversation.id": "conv_1",
        "gen_ai.output.type": "text",
        "openai.request.service_tier": "flex",
        "openai.api.type": "responses",
        "server.address": "127.0.0.1",
        "server.port": int(server.url.rpartition(":")[2]),
        "gen_ai.response.id": ANSWER.id,
        "gen_ai.response.model": ANSWER.model,
        "gen_ai.response.finish_reasons": ("stop",),
        "openai.response.service_tier": attributes["openai.response.service_tier"],
        **usage_attributes(ANSWER.usage),
        "openai_responses.stream.outcome": "completed",
        "openai_responses.stream.events": len(events),
        "openai_responses.stream.deltas": 3,
        "openai_responses.stream.deltas_by_type.output_text": 3,
        "openai_responses.response.status": "completed",
        "openai_responses.usage.source": "stream",
        "openai_responses.request_id": "req_1",
    }
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "otel_responses_usage"
    assert span.instrumentation_scope.schema_url
    assert not span.events


def test_the_whole_of_the_metrics_of_a_drained_stream(observed: Observed, serve: Serve) -> None:
    """Each instrument has the points that one call makes, linked to its span."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    with client_of(server) as client:
        list(client.responses.create(**ASKED, stream=True))
    span = observed.span()
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-5.4-mini",
        "gen_ai.response.model": ANSWER.model,
        "server.address": "127.0.0.1",
        "server.port": int(server.url.rpartition(":")[2]),
    }
    tokens = {
        point.attributes["gen_ai.token.type"]: point for point in observed.points("gen_ai.client.token.usage")
    }
    with_tier = common | {"openai.response.service_tier": "default"}
    assert {kind: (dict(point.attributes), point.sum) for kind, point in tokens.items()} == {
        "input": (with_tier | {"gen_ai.token.type": "input"}, 7),
        "output": (with_tier | {"gen_ai.token.type": "output"}, 21),
    }
    (duration,) = observed.points("gen_ai.client.operation.duration")
    (first,) = observed.points("gen_ai.client.operation.time_to_first_chunk")
    (between,) = observed.points("gen_ai.client.operation.time_per_output_chunk")
    assert span.end_time is not None
    assert span.start_time is not None
    assert duration.sum == (span.end_time - span.start_time) / 1e9
    assert first.sum == attributes_of(observed)["gen_ai.response.time_to_first_chunk"]
    assert dict(duration.attributes) == with_tier
    assert [dict(point.attributes) for point in (first, between)] == [common] * 2
    assert [point.count for point in (duration, first, between)] == [1, 1, 2]
    assert first.explicit_bounds == duration.explicit_bounds
    assert tokens["input"].explicit_bounds[-1] == 67108864
    (calls,) = observed.points("openai_responses.calls")
    assert (calls.value, dict(calls.attributes)) == (
        1,
        {
            "openai_responses.stream.outcome": "completed",
            "openai_responses.usage.source": "stream",
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": "gpt-5.4-mini",
        },
    )
    assert observed.points("openai_responses.retrieval.duration") == []
    (exemplar,) = tokens["output"].exemplars
    assert span.context is not None
    assert exemplar.span_id == span.context.span_id


NEXT_TOKENS = {
    "usage.input_tokens": 7,
    "usage.output_tokens": 21,
    "usage.cache_read.input_tokens": 3,
    "usage.cache_write.input_tokens": 0,
    "usage.reasoning.output_tokens": 11,
    "operation.input_tokens": 7,
    "operation.output_tokens": 21,
}


@pytest.mark.parametrize(
    ("opted_in", "has_current", "has_next"),
    [
        ("", True, False),
        ("http", True, False),
        ("gen_ai_latest_experimental", False, True),
        ("http, gen_ai_latest_experimental/dup", True, True),
    ],
)
def test_the_next_generation_of_metrics_is_opted_in_to(
    opted_in: str,
    has_current: bool,
    has_next: bool,
    instrument: Instrument,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`OTEL_SEMCONV_STABILITY_OPT_IN` chooses which names are recorded; each generation says the same."""
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", opted_in)
    observed = instrument()
    with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client:
        list(client.responses.create(**ASKED, stream=True))
    prefix = "gen_ai.client.inference."
    sums: dict[str, int] = {}
    for name in NEXT_TOKENS:
        for point in observed.points(prefix + name):
            sums[name] = point.value if name.startswith("usage.") else point.sum
            modality = {"unknown"} if name.startswith("usage.") else {None}
            assert {point.attributes.get("gen_ai.token.modality")} == modality
            assert "gen_ai.token.type" not in point.attributes
    assert sums == (NEXT_TOKENS if has_next else {})
    assert observed.tokens() == ({"input": (1, 7), "output": (1, 21)} if has_current else {})
    for new, old in {
        "duration": "gen_ai.client.operation.duration",
        "time_to_first_chunk": "gen_ai.client.operation.time_to_first_chunk",
        "time_per_output_chunk": "gen_ai.client.operation.time_per_output_chunk",
    }.items():
        assert len(observed.points(prefix + new)) == has_next
        assert len(observed.points(old)) == has_current
    assert observed.calls() == {"stream": 1}


def test_a_response_that_is_not_streamed_is_metered(observed: Observed, serve: Serve) -> None:
    """`create` without `stream` is one span, with the usage of the body."""
    with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client:
        response = client.responses.create(**ASKED)
    attributes = attributes_of(observed)
    assert type(response) is Response
    assert attributes["openai_responses.usage.source"] == "response"
    assert attributes["openai_responses.stream.outcome"] == "completed"
    assert "gen_ai.request.stream" not in attributes
    assert "openai_responses.stream.events" not in attributes
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


def test_a_large_answer_is_metered(observed: Observed, serve: Serve) -> None:
    """An answer with an image in it, which the SDK holds whole anyway, is read like any other."""
    body = ANSWER.response()
    body["output"].append({"type": "image_generation_call", "id": "ig_1", "result": "A" * 17 * 2**20})
    server = serve(lambda _: Reply.json(body))
    with client_of(server) as client:
        client.responses.create(**ASKED)
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "completed"
    assert attributes["openai_responses.usage.source"] == "response"
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


class Sentence(BaseModel):
    words: list[str]


def test_parse_is_metered(observed: Observed, serve: Serve) -> None:
    """`responses.parse` is one span, and gives the application its own type."""
    answer = Answer(pieces=('{"words": ', '["one"]}'), usage=ANSWER.usage)
    with client_of(serve(ResponsesAPI(lambda _: Plan(answer)))) as client:
        parsed = client.responses.parse(**ASKED, text_format=Sentence)
    assert parsed.output_parsed == Sentence(words=["one"])
    assert attributes_of(observed)["gen_ai.output.type"] == "json"
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


def test_a_stream_the_sdk_cannot_parse_is_metered_all_the_same(observed: Observed, serve: Serve) -> None:
    """`parse(stream=True)` fails inside the SDK, after the tokens were spent: both is told."""
    with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client, pytest.raises(AttributeError):
        client.responses.parse(**ASKED, extra_body={"stream": True}, text_format=Sentence)
    attributes = attributes_of(observed)
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)
    assert attributes["openai_responses.usage.source"] == "stream"


def test_a_stream_that_comes_as_text_is_metered(observed: Observed, serve: Serve) -> None:
    """`extra_body={"stream": True}` gives the application a `str`, and the span its usage."""
    with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client:
        text: Any = client.responses.create(**ASKED, extra_body={"stream": True})
    assert isinstance(text, str)
    attributes = attributes_of(observed)
    assert attributes["gen_ai.request.stream"] is True
    assert attributes["openai_responses.stream.outcome"] == "completed"
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


def test_tool_calls_are_told_by_kind(observed: Observed, serve: Serve) -> None:
    """Deltas are counted by kind, and a call for a tool is the finish reason."""
    answer = Answer((), usage(3, 9), reasoning=("hm, ", "so"), calls=(FunctionCall("look_up", ("{", "}")),))
    with client_of(serve(ResponsesAPI(lambda _: Plan(answer)))) as client:
        events = list(client.responses.create(**ASKED, stream=True))
    kinds: dict[str, int] = {}
    for event in events:
        if event.type.endswith(".delta"):
            kind = event.type.removeprefix("response.").removesuffix(".delta")
            kinds[f"openai_responses.stream.deltas_by_type.{kind}"] = kinds.get(kind, 0) + 1
    attributes = attributes_of(observed)
    told = {name for name in attributes if name.startswith("openai_responses.stream.deltas_by_type.")}
    assert told == set(kinds)
    assert len(kinds) == 2
    assert attributes["openai_responses.stream.deltas"] == 4
    assert attributes["gen_ai.response.finish_reasons"] == ("tool_calls",)


@pytest.mark.parametrize(
    ("reply", "raised", "error_type"),
    [
        (error(400, "no", code="invalid_prompt"), openai.BadRequestError, "invalid_prompt"),
        (error(401, "no", code="invalid_api_key"), openai.AuthenticationError, "invalid_api_key"),
        (error(429, "no"), openai.RateLimitError, "RateLimitError"),
        (error(400, "no", code="x" * 500), openai.BadRequestError, "x" * 128),
        (Reply.json({"error": {"code": 404}}, 404), openai.NotFoundError, "404"),
        (
            Reply(404, {"content-type": "application/json"}, (Send(b'{"error": {"code": "\\ud83d no"}}'),)),
            openai.NotFoundError,
            "? no",
        ),
        (Reply(500), openai.InternalServerError, "InternalServerError"),
        (Reply(200, before=(Cut(),)), openai.APIConnectionError, "APIConnectionError"),
    ],
    ids=["400", "401", "429", "long", "number", "half a character", "500", "no answer"],
)
@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "plain"])
def test_a_refused_call_is_an_error(
    reply: Reply, raised: type[Exception], error_type: str, streams: bool, observed: Observed, serve: Serve
) -> None:
    """A call that is refused ends as `error`, with the API's code or the exception's name."""
    with client_of(serve(lambda _: reply)) as client, pytest.raises(raised):
        client.responses.create(**ASKED, stream=streams)
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "error"
    assert attributes["error.type"] == error_type
    assert attributes["openai_responses.usage.missing_reason"] == "no_response_id"
    assert attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert observed.span().status.status_code is StatusCode.ERROR
    assert observed.calls() == {"no_response_id": 1}


def test_the_sdk_s_own_retries_are_one_call(observed: Observed, serve: Serve) -> None:
    """Retries happen inside of one call, and make one span."""
    replies: list[Any] = [Reply(503, {"retry-after-ms": "1"}), Reply(503, {"retry-after-ms": "1"})]
    api = ResponsesAPI(lambda _: replies.pop() if replies else Plan(ANSWER))
    server = serve(api)
    with client_of(server, max_retries=2) as client:
        list(client.responses.create(**ASKED, stream=True))
    assert len(server.requests) == 3
    assert attributes_of(observed)["openai_responses.usage.source"] == "stream"


def read_until_it_raises(client: openai.OpenAI, expected: type[Exception]) -> None:
    """Read a stream that ends in an exception, and let go of it as an application does."""
    try:
        list(client.responses.create(**ASKED, stream=True))
    except expected:
        pass
    else:
        raise AssertionError(f"{expected.__name__} was not raised")
    gc.collect()  # older releases of the SDK close a stream only when nobody holds its traceback


def test_an_error_event_that_the_sdk_raises_on(observed: Observed, serve: Serve) -> None:
    """An `error` event that makes the SDK raise is the call's outcome, with its code."""
    events = [*ANSWER.events()[:5], {"type": "error", "error": {"code": "server_error", "message": "no"}}]
    server = serve(lambda request: Reply.sse(events) if request.method == "POST" else error(404, "no"))
    with client_of(server) as client:
        read_until_it_raises(client, openai.APIError)
        attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "error"
    assert attributes["error.type"] == "server_error"


def test_an_error_event_that_the_sdk_hands_on(observed: Observed, serve: Serve) -> None:
    """An `error` event that is yielded, before a clean end, is the call's outcome too."""
    events = [{"type": "error", "code": "overloaded", "message": "no", "param": None, "sequence_number": 0}]
    with client_of(serve(lambda _: Reply.sse(events))) as client:
        assert len(list(client.responses.create(**ASKED, stream=True))) == 1
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "error"
    assert attributes["error.type"] == "overloaded"


def test_an_error_event_before_a_failed_response(observed: Observed, serve: Serve) -> None:
    """`error` and then `response.failed`: whichever is read last, the code and the reason are the same."""
    answer = Answer((), None, ending=OUT_OF_QUOTA)  # type: ignore[arg-type]
    with client_of(serve(ResponsesAPI(lambda _: Plan(answer)))) as client:
        read_until_it_raises(client, openai.APIError)
        attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] in {"error", "failed"}
    assert attributes["error.type"] == "insufficient_quota"
    assert attributes["openai_responses.usage.missing_reason"] == "no_usage"


def test_an_event_that_is_no_json_is_the_sdk_s_error(observed: Observed, serve: Serve) -> None:
    """Where the SDK itself raises on an event, the call ends as `error` with that exception's name."""
    events = [*ANSWER.events()[:5], b"event: x\ndata: {\n\n", b": the stream goes on\n\n"]
    server = serve(lambda r: Reply.sse(events, end=Hold()) if r.method == "POST" else error(404, "no"))
    with client_of(server) as client:
        read_until_it_raises(client, ValueError)
        attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "error"
    assert attributes["error.type"] == "JSONDecodeError"


def test_the_terminal_event_ends_the_call(observed: Observed, serve: Serve) -> None:
    """An application that stops reading at the terminal event, and closes nothing, has its span."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER, end=Hold(), cut_after=len(ANSWER.events()))))
    with client_of(server) as client:
        stream = client.responses.create(**ASKED, stream=True)
        for event in stream:
            if event.type == "response.completed":
                break
        assert observed.finished == 1
        stream.close()
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "completed"
    assert attributes["openai_responses.usage.source"] == "stream"
    assert observed.tokens() == {"input": (1, 7), "output": (1, 21)}


def in_pieces(kind: str) -> Reply:
    """The whole answer in one go: as one chunk of HTTP, or a chunk for each event."""
    frames = [frame(event) for event in ANSWER.events()]
    if kind == "chunk":
        return Reply(steps=(Send(b"".join(frames)), Hold()))
    raw = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in frames)
    headers = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
    return Reply(headers=headers, steps=(Send(raw), Hold()), chunked=False)


@pytest.mark.parametrize("kind", ["chunk", "chunks"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "asyncio"])
def test_a_terminal_event_that_has_arrived_counts(
    kind: str, is_async: bool, observed: Observed, serve: Serve
) -> None:
    """A stream closed at its last delta may have its usage in the read buffer: it is found there."""
    server = serve(lambda _: in_pieces(kind))

    def sync() -> None:
        with client_of(server) as client, client.responses.create(**ASKED, stream=True) as stream:
            deltas = (event for event in stream if event.type.endswith(".delta"))
            for _ in ANSWER.pieces:
                next(deltas)

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
        async with await client.responses.create(**ASKED, stream=True) as stream:
            left = len(ANSWER.pieces)
            while left:
                left -= (await anext(stream)).type.endswith(".delta")
        await client.close()

    asyncio.run(main()) if is_async else sync()
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "completed"
    assert attributes["openai_responses.usage.source"] == "stream"
    assert attributes["openai_responses.stream.events"] == len(ANSWER.events())
    assert len(server.requests) == 1


def test_what_the_application_did_not_ask_for_does_not_count(observed: Observed, serve: Serve) -> None:
    """Events left in the buffer of a stream that is closed half-way are not events of the application's."""
    frames = [frame(event) for event in ANSWER.events()[:-1]]
    answers = ResponsesAPI(lambda _: Reply(steps=(*(Send(one) for one in frames), Hold())))
    with client_of(serve(answers)) as client, client.responses.create(**ASKED, stream=True) as stream:
        next(stream)
        time.sleep(0.1)
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "closed"
    assert attributes["openai_responses.stream.events"] < len(frames)


@pytest.mark.parametrize("kind", ["content", "bytes", "model", "extra"])
def test_a_body_of_the_application_s_own_is_described(kind: str, observed: Observed, serve: Serve) -> None:
    """`client.post` with a body that is not a dict is described as it is sent."""
    asked = {"model": "gpt-5.4-mini", "input": "x", "stream": True, "store": False}
    text = json.dumps(asked).encode()
    sent: dict[str, Any] = {
        "content": {"content": text},
        "bytes": {"body": text},
        "model": {"body": asked},
        "extra": {},
    }[kind]
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER, cut_after=5, end=Cut())))
    options: Any = {"headers": {"content-type": "application/json"}}
    if kind == "extra":
        options["extra_json"] = asked
    with client_of(server) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        kinds: Any = {"cast_to": object, "stream": True, "stream_cls": openai.Stream[object]}
        try:
            stream = client.post("/responses", options=options, **kinds, **sent)
        except TypeError:
            pytest.skip("not in this release of the SDK")
        with pytest.raises(CUT):
            list(stream)
    attributes = attributes_of(observed)
    assert attributes["gen_ai.request.model"] == "gpt-5.4-mini"
    assert attributes["openai_responses.usage.missing_reason"] == "not_stored"


def test_a_call_inside_of_a_call_is_told_apart(observed: Observed, serve: Serve) -> None:
    """An api_key callable that itself uses the SDK does not confuse the call that asked for the key."""
    api = ResponsesAPI(lambda _: Plan(ANSWER))
    server = serve(
        lambda request: (
            Reply.json({"data": [], "object": "list"}) if "models" in request.path else api(request)
        )
    )
    inner = client_of(server)

    def key() -> str:
        inner.models.list()
        return "k"

    try:
        client = client_of(server, api_key=key)
    except openai.OpenAIError:
        pytest.skip("not in this release of the SDK")
    with client, inner:
        list(client.responses.create(**ASKED, stream=True))
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


class Elsewhere(openai.OpenAI):
    """A client of an application's own that sends its calls somewhere else."""

    def _prepare_options(self, options: Any) -> Any:
        options = copy.copy(super()._prepare_options(options))
        options.url = f"/tenants/7{options.url}"
        return options


def test_a_client_that_rewrites_its_calls_is_metered(observed: Observed, serve: Serve) -> None:
    """The SDK lets a subclass change a request while it is made; the answer is that of the call."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    with Elsewhere(base_url=f"{server.url}/v1", api_key="k") as client:
        list(client.responses.create(**ASKED, stream=True))
    assert server.requests[0].path == "/v1/tenants/7/responses"
    assert attributes_of(observed)["openai_responses.stream.outcome"] == "completed"
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


class NoBudgetError(Exception):
    code = 402


class Refusing(openai.OpenAI):
    """A client of an application's own that makes no call."""

    def _prepare_options(self, _: Any) -> Any:
        raise NoBudgetError


def test_an_exception_of_the_application_s_own_is_told_by_its_name(observed: Observed, serve: Serve) -> None:
    """A `code` stands for the error only where the API has given it."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    with Refusing(base_url=f"{server.url}/v1", api_key="k") as client, pytest.raises(NoBudgetError):
        list(client.responses.create(**ASKED, stream=True))
    assert attributes_of(observed)["error.type"] == "NoBudgetError"


class Word(str, Enum):
    """What an application may have its models and tiers in."""

    MODEL = "gpt-5.4-mini"
    TIER = "flex"


def test_what_is_asked_for_is_told_as_it_is_sent(observed: Observed, serve: Serve) -> None:
    """The member of an enumeration is sent as its value; what is told of it is that text and no more."""
    with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client:
        list(
            client.responses.create(
                model=Word.MODEL, input="x", stream=True, extra_body={"service_tier": Word.TIER}
            )
        )
        list(client.responses.create(**ASKED, stream=True))
    asked, plain = observed.spans(2)
    assert asked.name == plain.name == "chat gpt-5.4-mini"
    words = [
        (asked.attributes or {})["openai.request.service_tier"],
        *((span.attributes or {})["gen_ai.request.model"] for span in (asked, plain)),
        *(point.attributes["gen_ai.request.model"] for point in observed.points("openai_responses.calls")),
    ]
    assert words == ["flex", "gpt-5.4-mini", "gpt-5.4-mini", "gpt-5.4-mini"]
    assert {type(word) for word in words} == {str}


def _by_wrapt(owner: Any, name: str, seen: list[str]) -> None:
    def other(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        seen.append(wrapped.__name__)
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(owner, name, other)


def _by_a_function(owner: Any, name: str, seen: list[str]) -> None:
    wrapped = getattr(owner, name)

    @functools.wraps(wrapped)
    def other(*args: Any, **kwargs: Any) -> Any:
        seen.append(wrapped.__name__)
        return wrapped(*args, **kwargs)

    setattr(owner, name, other)


def _of_ours(function: Any) -> int:
    """How many wrappers of ours are on a function."""
    found = 0
    while function is not None:
        found += "otel_responses_usage" in str(getattr(function, "_self_wrapper", ""))
        function = getattr(function, "__wrapped__", None)
    return found


# Below a function that is no proxy ours cannot be taken out, and does nothing.
@pytest.mark.parametrize(("wrap", "stay"), [(_by_wrapt, 0), (_by_a_function, 1)], ids=["wrapt", "function"])
def test_a_wrapper_of_somebody_else_s_stays(
    wrap: Callable[[Any, str, list[str]], None], stay: int, instrument: Instrument, serve: Serve
) -> None:
    """What another package has wrapped around ours is still there afterwards, and ours is not."""
    seen: list[str] = []
    from openai import _base_client

    client_class = _base_client.SyncAPIClient
    originals = {name: vars(client_class)[name] for name in ("request", "_process_response")}
    instrument()
    try:
        for name in originals:
            wrap(client_class, name, seen)
        ResponsesUsageInstrumentor().uninstrument()
        assert [_of_ours(vars(client_class)[name]) for name in originals] == [stay, stay]
        observed = instrument()
        with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client:
            events = list(client.responses.create(**ASKED, stream=True))
        assert attributes_of(observed)["openai_responses.stream.events"] == len(events)
        assert sorted(seen) == ["_process_response", "request"]
    finally:
        ResponsesUsageInstrumentor().uninstrument()
        for name, original in originals.items():
            setattr(client_class, name, original)


@since(1, 82, 0)
def test_a_resumed_stream_is_a_fetch_without_tokens(observed: Observed, serve: Serve) -> None:
    """A streamed `retrieve` says what it fetched; the tokens are those of the call that made them."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER, cut_after=4, get_replies=("in_progress",) * 99)))
    with client_of(server) as client:
        list(client.responses.create(**ASKED, stream=True, extra_body={"background": True}))
        list(client.responses.retrieve(ANSWER.id, stream=True, starting_after=3))
    created, fetched = sorted(observed.spans(2), key=lambda span: span.name)
    attributes = dict(fetched.attributes or {})
    assert fetched.name == "fetch_response"
    assert attributes["gen_ai.operation.name"] == "fetch_response"
    assert attributes["gen_ai.response.id"] == ANSWER.id
    assert attributes["gen_ai.request.stream_cursor"] == "3"
    assert attributes["openai_responses.response.status"] == "completed"
    assert token_attributes(fetched) == {}
    assert "openai_responses.usage.source" not in attributes
    assert token_attributes(created) == usage_attributes(ANSWER.usage)
    assert (created.attributes or {})["openai_responses.usage.source"] == "observation"
    assert observed.tokens() == {"input": (1, 7), "output": (1, 21)}


@since(1, 82, 0)
def test_a_resume_that_is_refused_names_its_response(observed: Observed, serve: Serve) -> None:
    """Whatever is in an id, the span says it as the application did and not as it is in the URL."""
    server = serve(lambda _: error(404, "no"))
    with client_of(server) as client, pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp a/b", stream=True)
    assert attributes_of(observed)["gen_ai.response.id"] == "resp a/b"


def test_an_azure_client_is_named_so(observed: Observed, serve: Serve) -> None:
    """`AzureOpenAI` is another provider, and its look-up carries its own kind of key and version."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER, cut_after=5, end=Cut())))
    client = openai.AzureOpenAI(
        azure_endpoint=server.url, api_key="azure-key", api_version="2026-01-01", max_retries=0
    )
    with client, pytest.raises(CUT):
        list(client.responses.create(**ASKED, stream=True))
    attributes = attributes_of(observed)
    get = server.requests[-1]
    assert attributes["gen_ai.provider.name"] == "azure.ai.openai"
    assert get.path == f"/openai/responses/{ANSWER.id}"
    assert get.query == {"api-version": "2026-01-01"}
    assert get.headers["api-key"] == "azure-key"
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


@since(1, 66, 5)
def test_the_module_level_client_is_covered(
    observed: Observed, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`openai.responses.create` is a call like any other."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    monkeypatch.setattr(openai, "api_key", "k")
    monkeypatch.setattr(openai, "base_url", f"{server.url}/v1/")
    monkeypatch.setattr(openai, "_client", None)
    list(openai.responses.create(**ASKED, stream=True))
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)
    openai._client.close()  # type: ignore[attr-defined]


def test_what_was_taken_before_is_covered(instrument: Instrument, serve: Serve) -> None:
    """Clients, methods and raw wrappers that were taken before `instrument()` make spans after it."""
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    with client_of(server) as client:
        create = client.responses.create
        raw = client.responses.with_raw_response.create
        streaming = client.responses.with_streaming_response.create
        observed = instrument()
        list(create(**ASKED, stream=True))
        list(raw(**ASKED, stream=True).parse())
        with streaming(**ASKED, stream=True) as response:
            list(response.parse())
    assert [span.name for span in observed.spans(3)] == ["chat gpt-5.4-mini"] * 3
    assert observed.tokens() == {"input": (3, 21), "output": (3, 63)}


def test_the_application_gets_the_sdk_s_own_objects(observed: Observed, serve: Serve) -> None:
    """The stream and its events are what the SDK makes without us."""
    with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client:
        stream = client.responses.create(**ASKED, stream=True)
        events = list(stream)
    observed.span()
    ResponsesUsageInstrumentor().uninstrument()
    with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client:
        plain = list(client.responses.create(**ASKED, stream=True))
    assert type(stream) is openai.Stream
    assert [type(event) for event in events] == [type(event) for event in plain]
    assert [event.type for event in events] == [event.type for event in plain]
    assert sum(type(event) is ResponseTextDeltaEvent for event in events) == 3


class DeepBody(HTTP.SyncByteStream, HTTP.AsyncByteStream):  # type: ignore[misc]
    """A body that notes how deep its readers stand in each other."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def _pieces(self) -> Iterator[bytes]:
        for event in ANSWER.events():
            yield frame(event)

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces():
            self.depths.append(len(inspect.stack(0)))
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces():
            self.depths.append(len(inspect.stack(0)))
            yield piece


def reader_of(client_class: type) -> type:
    """The HTTP library's own outermost reader of a body."""
    module = importlib.import_module(f"{HTTP.__name__}._client")
    return module.BoundAsyncStream if issubclass(client_class, openai.AsyncOpenAI) else module.BoundSyncStream


def read(client_class: Any, body: Any) -> Any:
    """Make a call whose answer has this body, read it, and return the raw response."""
    answer = HTTP.Response(200, headers={"content-type": "text/event-stream"}, stream=body)
    library = HTTP.AsyncClient if issubclass(client_class, openai.AsyncOpenAI) else HTTP.Client
    http_client = library(transport=HTTP.MockTransport(lambda _: answer))
    client = client_class(base_url="http://127.0.0.1/v1", api_key="k", http_client=http_client)

    async def main() -> Any:
        raw = await settle(client.responses.with_raw_response.create(**ASKED, stream=True))
        async for _ in items(raw.parse()):
            pass
        await settle(client.close())
        return raw

    return asyncio.run(main())


@both
def test_a_watched_body_passes_no_more_hands_than_another(client_class: Any, instrument: Instrument) -> None:
    """The tap stands in the place of a reader of the HTTP library's own that only hands on."""
    unwatched, watched = DeepBody(), DeepBody()
    read(client_class, unwatched)
    observed = instrument()
    read(client_class, watched)
    assert attributes_of(observed)["openai_responses.stream.events"] == len(ANSWER.events())
    assert watched.depths == unwatched.depths != []


@both
def test_how_long_an_answer_took_is_known_as_ever(client_class: Any, observed: Observed) -> None:
    """The HTTP library times an answer up to its close."""
    assert read(client_class, DeepBody()).elapsed.total_seconds() > 0
    observed.span()


def by_name(original: Any, note: Callable[..., Any]) -> Any:
    """A function of a module that has imported the class by its name."""
    names: dict[str, Any] = {cls.__name__: cls for cls in map(reader_of, (openai.OpenAI, openai.AsyncOpenAI))}
    names |= {"original": original, "note": note}
    exec("def read(self): return note(original, self)", names)  # noqa: S102
    return names["read"]


@pytest.mark.parametrize("wrapper", [wrapt.FunctionWrapper, by_name], ids=["wrapt", "function"])
@both
def test_a_reader_that_somebody_has_changed_is_left_in_place(
    client_class: Any, wrapper: Any, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another package may want to see the body at the same place."""
    name = "__aiter__" if issubclass(client_class, openai.AsyncOpenAI) else "__iter__"
    original = vars(reader_of(client_class))[name]
    seen: list[Any] = []

    def note(_: Any, instance: Any, *__: Any) -> Any:
        seen.append(instance)
        return original(instance)

    monkeypatch.setattr(reader_of(client_class), name, wrapper(original, note))
    read(client_class, DeepBody())
    assert len(seen) == 1
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


def test_the_span_is_current_only_while_the_request_is_made(observed: Observed, serve: Serve) -> None:
    """An HTTP client's span would be a child; what the application does with its stream is not."""
    inside = []
    transport = HTTP.HTTPTransport()
    hooks = {"request": [lambda _: inside.append(trace.get_current_span().get_span_context().span_id)]}
    tracer = observed.tracer_provider.get_tracer("application")
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    http_client = HTTP.Client(transport=transport, event_hooks=hooks)
    with (
        client_of(server, http_client=http_client) as client,
        tracer.start_as_current_span("application") as own,
    ):
        stream = client.responses.create(**ASKED, stream=True)
        around = trace.get_current_span()
        for _ in stream:
            assert trace.get_current_span() is own
    called, _ = observed.spans(2)
    assert around is own
    assert called.context is not None
    assert inside == [called.context.span_id]
    assert called.parent is not None
    assert called.parent.span_id == own.get_span_context().span_id


def test_suppressed_instrumentation_is_respected(observed: Observed, serve: Serve) -> None:
    """Where somebody suppresses instrumentation, a call makes no span."""
    from opentelemetry.instrumentation.utils import suppress_instrumentation

    with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER)))) as client, suppress_instrumentation():
        list(client.responses.create(**ASKED, stream=True))
    assert observed.finished == 0


def test_other_calls_of_the_api_are_left_alone(observed: Observed, serve: Serve) -> None:
    """Models, chat completions, deletes: no business of this package."""
    server = serve(lambda _: Reply.json({"id": "x", "object": "model", "data": [], "choices": []}))
    with client_of(server) as client:
        client.models.list()
        client.chat.completions.create(model="m", messages=[])
        client.responses.delete("resp_1")
        client.responses.input_items.list("resp_1")
    assert observed.finished == 0


def test_uninstrumenting_puts_everything_back(instrument: Instrument, serve: Serve) -> None:
    """Off means off, twice on is harmless, and on again works."""
    from openai import _base_client

    before = [vars(cls)[name] for cls, name in _patched(_base_client)]
    observed = instrument()
    ResponsesUsageInstrumentor().instrument()
    ResponsesUsageInstrumentor().uninstrument()
    ResponsesUsageInstrumentor().uninstrument()
    assert [vars(cls)[name] for cls, name in _patched(_base_client)] == before
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER)))
    with client_of(server) as client:
        list(client.responses.create(**ASKED, stream=True))
        assert observed.finished == 0
        again = instrument()
        list(client.responses.create(**ASKED, stream=True))
    assert again.tokens() == {"input": (1, 7), "output": (1, 21)}


def _patched(module: Any) -> list[tuple[type, str]]:
    clients = (module.SyncAPIClient, module.AsyncAPIClient)
    return [(client, name) for client in clients for name in ("request", "_process_response")]


def test_a_stream_open_when_the_instrumentation_goes_is_told(instrument: Instrument, serve: Serve) -> None:
    """`uninstrument()` in mid-stream ends the span as `exit`; the application reads on."""
    observed = instrument()
    half = Plan(ANSWER, pace=0.02)
    with client_of(serve(ResponsesAPI(lambda _: half))) as client:
        stream = client.responses.create(**ASKED, stream=True)
        next(stream)
        ResponsesUsageInstrumentor().uninstrument()
        assert list(stream)[-1].type == "response.completed"
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "exit"
    assert attributes["error.type"] == "process_exit"


def test_what_arrives_after_the_end_of_a_call_is_not_counted(instrument: Instrument, serve: Serve) -> None:
    """The application reads on while the usage of a call that has ended is looked up."""
    observed = instrument(exit_timeout=PATIENCE_S)
    api = ResponsesAPI(lambda _: Plan(Answer(pieces=("word ",) * 12)))
    has_ended, is_read = threading.Event(), threading.Event()

    def answer(request: SeenRequest) -> Reply:
        reply = api(request)
        if request.method == "GET":
            has_ended.set()
            return replace(reply, before=(Wait(is_read),))
        return replace(reply, steps=(*reply.steps[:8], Wait(has_ended), *reply.steps[8:]))

    seen: list[str] = []

    def read() -> None:
        for event in client.responses.create(**ASKED, stream=True):
            seen.append(event.type)  # noqa: PERF401  # watched meanwhile
        is_read.set()

    with client_of(serve(answer)) as client:
        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: len(seen) == 8, "half of the stream")
        ResponsesUsageInstrumentor().uninstrument()
        reader.join()
    attributes, deltas = attributes_of(observed), seen[:8].count("response.output_text.delta")
    assert seen[-1] == "response.completed"
    assert seen.count("response.output_text.delta") == 12 > deltas > 1
    assert attributes["openai_responses.stream.outcome"] == "exit"
    assert attributes["openai_responses.usage.source"] == "retrieval"
    assert attributes["openai_responses.stream.events"] == 8
    assert attributes["openai_responses.stream.deltas"] == deltas
    [between] = observed.points("gen_ai.client.operation.time_per_output_chunk")
    assert between.count == deltas - 1


def test_a_cancelled_call_is_told_before_it_was_answered(observed: Observed, serve: Serve) -> None:
    """A task cancelled while it waits for the head of the answer ends its span as `cancelled`."""
    server = serve(lambda _: Reply(200, before=(Hold(),)))

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
        call = asyncio.ensure_future(client.responses.create(**ASKED, stream=True))
        while not server.requests:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await client.close()

    asyncio.run(main())
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == "cancelled"
    assert "error.type" not in attributes
    assert observed.span().status.status_code is StatusCode.UNSET


def test_a_fault_of_ours_is_a_log_line(
    observed: Observed, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If reading the events breaks, the application reads on, and the usage is looked up."""
    from otel_responses_usage._answer import state as _state

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    caplog.set_level(logging.DEBUG, "otel_responses_usage")
    monkeypatch.setattr(_state.AnswerState, "_counted_kind", broken)
    with client_of(serve(ResponsesAPI(lambda _: Plan(ANSWER, pace=0.001)))) as client:
        events = list(client.responses.create(**ASKED, stream=True))
    assert events[-1].type == "response.completed"
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)
    assert attributes_of(observed)["openai_responses.usage.source"] == "retrieval"
    faults = [record for record in caplog.records if record.name == "otel_responses_usage"]
    assert len(faults) == 1
    assert faults[0].levelno == logging.DEBUG


def test_the_event_loop_is_never_held_up(observed: Observed, serve: Serve) -> None:
    """Closing streams whose look-up hangs takes the loop no time worth speaking of."""
    plan = Plan(ANSWER, cut_after=5, end=Hold(), get_replies=(Reply(200, before=(Hold(),)),) * 9)
    server = serve(ResponsesAPI(lambda _: plan))
    took_s: list[float] = []

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)

        async def one() -> None:
            stream = await client.responses.create(**ASKED, stream=True)
            await anext(stream)
            began = time.perf_counter()
            await stream.close()
            took_s.append(time.perf_counter() - began)

        for _ in range(20):
            await one()
        await client.close()

    asyncio.run(main())
    eventually(lambda: observed.pending() == 20, "twenty look-ups under way")
    assert sorted(took_s)[10] < 0.01

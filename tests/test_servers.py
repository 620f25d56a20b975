"""Servers of the Responses API as they really are: for each of their ways the span is right.

And the application gets what it gets without us. What the servers do is written down in
`server-facts.md`, seen on loopback; of OpenAI itself it is reports.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from openai.resources.responses import Responses
from opentelemetry.trace import StatusCode

from conftest import Instrument, Serve
from embedded.http_server import Hold, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import error
from observed import Observed
from otel_responses_usage._lookup import lookups as _lookup
from otel_responses_usage._lookup.retrieval import RetrievalPolicy

RELEASE = tuple(int(number) for number in openai.__version__.split(".")[:2])
KEY = "canary-of-the-key"
ID = "resp_1"
MODEL = "m-small"
ASKED: dict[str, Any] = {"model": "m", "input": "x"}
BACKGROUND: dict[str, Any] = {"extra_body": {"background": True}}  # early releases do not know it by name

Event = dict[str, Any]
Handler = Callable[[SeenRequest], Reply]

# --- what servers send ------------------------------------------------------------------------------


def counts(read: int, written: int, read_details: Any = None, written_details: Any = None) -> dict[str, Any]:
    """A usage object; details are left out unless given."""
    details = {"input_tokens_details": read_details, "output_tokens_details": written_details}
    given = {name: value for name, value in details.items() if value is not None}
    return {"input_tokens": read, "output_tokens": written, "total_tokens": read + written, **given}


def response(status: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": ID,
        "object": "response",
        "created_at": 1,
        "model": MODEL,
        "status": status,
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "error": None,
        "incomplete_details": None,
        "usage": None,
        **fields,
    }


def life(kind: str, status: str, **fields: Any) -> Event:
    return {"type": f"response.{kind}", "response": response(status, **fields)}


def deltas(number: int) -> list[Event]:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    return [{"type": "response.output_text.delta", **place, "delta": "word "}] * number


def numbered(events: Iterable[Event]) -> list[Event]:
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def shown(status: str, **fields: Any) -> Reply:
    """The answer to a GET."""
    return Reply.json(response(status, **fields))


CREATED = life("created", "in_progress")
PROGRESS = life("in_progress", "in_progress")
BEGUN = (CREATED, PROGRESS, *deltas(2))
NO_ROUTE = Reply.json({"detail": "Not Found"}, status=404)


def script(create: Reply | tuple[Reply, ...], *gets: Reply, cancel: Reply | None = None) -> Handler:
    """A server that answers creates, GETs and cancels: each in turn, the last answer for good."""
    creates = create if isinstance(create, tuple) else (create,)
    turns = {
        "create": itertools.chain(creates, itertools.repeat(creates[-1])),
        "get": itertools.chain(gets, itertools.repeat(gets[-1])) if gets else itertools.repeat(NO_ROUTE),
        "cancel": itertools.repeat(cancel or NO_ROUTE),
    }

    def handler(request: SeenRequest) -> Reply:
        if request.method == "GET":
            return next(turns["get"])
        return next(turns["cancel" if request.path.endswith("/cancel") else "create"])

    return handler


def sse(*events: Event | bytes, **how: Any) -> Reply:
    return Reply.sse(numbered(events) if all(isinstance(event, dict) for event in events) else events, **how)


# --- what applications do ---------------------------------------------------------------------------

Application = Callable[[openai.OpenAI], Any]


def drain(client: openai.OpenAI, **asked: Any) -> Any:
    """Read a stream to its end."""
    return list(client.responses.create(**ASKED, **asked, stream=True))


def drain_in_background(client: openai.OpenAI) -> Any:
    return drain(client, **BACKGROUND)


def close(client: openai.OpenAI, **asked: Any) -> Any:
    """Close a stream at its first delta."""
    seen = []
    with client.responses.create(**ASKED, **asked, stream=True) as stream:
        for event in stream:
            seen.append(event)
            if event.type.endswith(".delta"):
                return seen
    raise AssertionError("no delta has come")


def close_in_background(client: openai.OpenAI) -> Any:
    return close(client, **BACKGROUND)


def cancel(client: openai.OpenAI) -> Any:
    """Close a background stream and cancel its response."""
    return [*close(client, **BACKGROUND), client.responses.cancel(ID)]


def manage(client: openai.OpenAI) -> Any:
    """Read a stream by the SDK's helper."""
    with client.responses.stream(**ASKED) as stream:
        return list(stream)


def create(client: openai.OpenAI) -> Any:
    """Ask for a whole response."""
    return [client.responses.create(**ASKED)]


def try_again(client: openai.OpenAI) -> Any:
    """Call once more after a failed call, which is counted too."""
    with pytest.raises(openai.APIStatusError):
        client.responses.create(**ASKED, stream=True)
    return drain(client)


# --- what has to come of it -------------------------------------------------------------------------


def told(
    outcome: str,
    *,
    finish: str = "error",
    status: str | None = None,
    error: str | None = None,
    source: str | None = None,
    missing: str | None = None,
    usage: tuple[int, ...] = (),
    reasoning: int | None = None,
    events: int | None = None,
    texts: int = 0,
    gets: int | None = None,
    streams: bool = True,
    id: str | None = ID,  # noqa: A002
    model: str | None = MODEL,
) -> dict[str, Any]:
    """All attributes of a span but those of the request.

    `usage` is input, output, read from the cache, written to it: as many as were reported.
    """
    kinds = ("input", "output", "cache_read.input", "cache_write.input")
    attributes = {
        "gen_ai.request.stream": streams or None,
        "gen_ai.response.id": id,
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": (finish,),
        "error.type": error,
        "openai_responses.stream.outcome": outcome,
        "openai_responses.stream.events": events,
        "openai_responses.stream.deltas": None if events is None else texts,
        "openai_responses.stream.deltas_by_type.output_text": texts or None,
        "openai_responses.response.status": status,
        "openai_responses.usage.source": source,
        "openai_responses.usage.missing_reason": missing,
        "openai_responses.retrieval.attempts": gets,
        **{f"gen_ai.usage.{kind}_tokens": count for kind, count in zip(kinds[:2], usage, strict=False)},
        # The conventions leave out a detail of zero.
        **{
            f"gen_ai.usage.{kind}_tokens": count or None
            for kind, count in zip(kinds[2:], usage[2:], strict=False)
        },
        "gen_ai.usage.reasoning.output_tokens": reasoning or None,
    }
    return {name: value for name, value in attributes.items() if value is not None}


@dataclass(frozen=True)
class Row:
    """A server, what it does, what the application does, and the span that has to come of it."""

    server: str
    does: str
    script: Callable[[], Handler]
    application: Application
    span: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    spans: int = 1  # the last of them is looked at
    since: tuple[int, int] = (1, 66)  # release of the SDK

    def __str__(self) -> str:
        return f"{self.server}: {self.does}"


SOON = {"retrieval_timeout": 0.6, "background_timeout": 0.6}
LONG_ID = "resp_" + "bGl0ZWxsbTpjdXN0b21fbGxtX3Byb3ZpZGVy" * 11
LIGHT_CREATED: Event = {
    "type": "response.created",
    "response": {"id": ID, "object": "response", "status": "in_progress"},
}
LIGHT_DELTA: Event = {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "word"}

ROWS = (
    # OGX stores responses with their usage, but generation stops with the connection.
    Row(
        "OGX",
        "an error event before anything else",
        lambda: script(sse({"type": "error", "code": "server_error", "message": "no", "param": None})),
        drain,
        told("error", error="server_error", missing="no_response_id", events=1, id=None, model=None),
    ),
    Row(
        "OGX",
        "an error event in mid-stream",
        lambda: script(
            sse(*BEGUN, {"type": "error", "code": "server_error", "message": "no", "param": None}),
            shown("failed", error={"code": "server_error", "message": "no"}),
        ),
        drain,
        told("error", error="server_error", status="failed", missing="no_usage", events=5, texts=2, gets=1),
    ),
    Row(
        "OGX",
        "in_progress for good after a cut",
        lambda: script(sse(*BEGUN, end=Hold()), shown("in_progress")),
        close,
        told("closed", status="in_progress", missing="timeout", events=3, texts=1, gets=-1),
        SOON,
    ),
    Row(
        "OGX",
        "the reason `length`, and null for what was written to the cache",
        lambda: script(
            sse(
                *BEGUN,
                life(
                    "incomplete",
                    "incomplete",
                    incomplete_details={"reason": "length"},
                    usage=counts(
                        7, 2, {"cached_tokens": 3, "cache_write_tokens": None}, {"reasoning_tokens": 0}
                    ),
                ),
            )
        ),
        drain,
        told(
            "incomplete",
            finish="length",
            status="incomplete",
            source="stream",
            usage=(7, 2, 3),
            reasoning=0,
            events=5,
            texts=2,
        ),
    ),
    Row(
        "OGX",
        "no streams in the background",
        lambda: script(error(400, "background with stream is not supported", code="invalid_request")),
        drain_in_background,
        told("error", error="invalid_request", missing="no_response_id", events=0, id=None, model=None),
    ),
    # vLLM forgets a foreground response with its connection.
    Row(
        "vLLM",
        "404 after a foreground cut",
        lambda: script(sse(*BEGUN, end=Hold()), error(404, "Response with id not found")),
        close,
        told("closed", status="in_progress", missing="not_found", events=3, texts=1, gets=4),
    ),
    Row(
        "vLLM",
        "runs on in the background, queued by GET while in_progress by stream",
        lambda: script(
            sse(*BEGUN, end=Hold()),
            shown("queued"),
            shown("queued"),
            shown("completed", usage=counts(7, 40, {"cached_tokens": 0}, {"reasoning_tokens": 9})),
        ),
        close_in_background,
        told(
            "closed",
            status="completed",
            source="retrieval",
            usage=(7, 40, 0),
            reasoning=9,
            events=3,
            texts=1,
            gets=3,
        ),
    ),
    Row(
        "vLLM",
        "queued by GET for good",
        lambda: script(sse(*BEGUN, end=Hold()), shown("queued")),
        close_in_background,
        told("closed", status="queued", missing="timeout", events=3, texts=1, gets=-1),
        SOON,
    ),
    Row(
        "vLLM",
        "`response.completed` for what was cut by length, with fields of its own in the details",
        lambda: script(
            sse(
                *BEGUN,
                life(
                    "completed",
                    "incomplete",
                    incomplete_details={"reason": "max_output_tokens"},
                    usage=counts(
                        7,
                        2,
                        {"cached_tokens": 1, "input_tokens_per_turn": [7], "cached_tokens_per_turn": [1]},
                        {"reasoning_tokens": 0, "tool_output_tokens": 5, "output_tokens_per_turn": [2]},
                    ),
                ),
            )
        ),
        drain,
        told(
            "incomplete",
            finish="length",
            status="incomplete",
            source="stream",
            usage=(7, 2, 1),
            reasoning=0,
            events=5,
            texts=2,
        ),
    ),
    Row(
        "vLLM",
        "null usage for what was cancelled",
        lambda: script(sse(*BEGUN, end=Hold()), shown("cancelled"), cancel=shown("cancelled")),
        cancel,
        told("closed", status="cancelled", missing="no_usage", events=3, texts=1, gets=-1),
        SOON,
        since=(1, 81),
    ),
    # LiteLLM stands between the application and any provider.
    Row(
        "LiteLLM",
        "no event lines, one number, null details, [DONE], a very long id",
        lambda: script(
            sse(
                *(
                    Reply.sse([event], event_lines=False).steps[0].data  # type: ignore[union-attr]
                    for event in (
                        life("created", "in_progress", id=LONG_ID),
                        {**life("in_progress", "in_progress", id=LONG_ID), "sequence_number": 1},
                        *deltas(2),
                        life(
                            "completed",
                            "completed",
                            id=LONG_ID,
                            usage={
                                **counts(7, 2),
                                "input_tokens_details": None,
                                "output_tokens_details": None,
                            },
                        ),
                    )
                ),
                b"data: [DONE]\n\n",
            )
        ),
        drain,
        told(
            "completed",
            finish="stop",
            status="completed",
            source="stream",
            usage=(7, 2),
            events=5,
            texts=2,
            id=LONG_ID,
        ),
    ),
    Row(
        "LiteLLM",
        "a lone response.failed, and 400 for its id",
        lambda: script(
            sse(life("failed", "failed", error={"code": "rate_limit_exceeded", "message": "no"})),
            error(400, "Invalid response id"),
        ),
        drain,
        told("failed", error="rate_limit_exceeded", status="failed", missing="no_usage", events=1, gets=1),
    ),
    Row(
        "LiteLLM",
        "400 for an id it does not know",
        lambda: script(sse(*BEGUN, end=Hold()), error(400, "Invalid response id")),
        close,
        told("closed", status="in_progress", missing="unsupported", events=3, texts=1, gets=1),
    ),
    Row(
        "LiteLLM",
        "429 for the call after a failed one",
        lambda: script((error(500, "no"), error(429, "No deployments available", code="429"))),
        try_again,
        told("error", error="429", missing="no_response_id", events=0, id=None, model=None),
        spans=2,
    ),
    # transformers serve has no store.
    Row(
        "transformers",
        "created as queued, another model name, completed for what was cut by length",
        lambda: script(
            Reply.sse(
                numbered(
                    [
                        life("created", "queued", model="m-small@main"),
                        life("in_progress", "in_progress", model="m-small@main"),
                        *deltas(3),
                        life(
                            "completed",
                            "completed",
                            model="m-small@main",
                            usage=counts(7, 3, {"cached_tokens": 0}, {"reasoning_tokens": 0}),
                        ),
                    ]
                ),
                event_lines=False,
            )
        ),
        drain,
        told(
            "completed",
            finish="stop",
            status="completed",
            source="stream",
            usage=(7, 3, 0),
            reasoning=0,
            events=6,
            texts=3,
            model="m-small@main",
        ),
    ),
    Row(
        "transformers",
        "no such route for a GET",
        lambda: script(sse(life("created", "queued"), *deltas(2), end=Hold())),
        close,
        told("closed", status="queued", missing="not_found", events=2, texts=1, gets=4),
    ),
    Row(
        "transformers",
        "an event stream for a create that asked for none",
        lambda: script(sse(*BEGUN, life("completed", "completed", usage=counts(7, 2)))),
        create,
        told(
            "completed",
            finish="stop",
            status="completed",
            source="stream",
            usage=(7, 2),
            events=5,
            texts=2,
            streams=False,
        ),
    ),
    Row(
        "transformers",
        "an error event and then response.failed",
        lambda: script(
            sse(
                *BEGUN,
                {"type": "error", "code": None, "message": "no", "param": None},
                life("failed", "failed", error={"code": "server_error", "message": "no"}),
            )
        ),
        drain,
        told("failed", error="server_error", status="failed", missing="no_usage", events=6, texts=2, gets=1),
    ),
    # llama.cpp leaves out what it does not have.
    Row(
        "llama.cpp",
        "no numbers, a bare created, no details of the output",
        lambda: script(
            Reply.sse(
                [
                    LIGHT_CREATED,
                    {**LIGHT_CREATED, "type": "response.in_progress"},
                    LIGHT_DELTA,
                    life("completed", "completed", usage=counts(7, 1, {"cached_tokens": 4})),
                ]
            )
        ),
        drain,
        told(
            "completed",
            finish="stop",
            status="completed",
            source="stream",
            usage=(7, 1, 4),
            events=4,
            texts=1,
        ),
    ),
    Row(
        "llama.cpp",
        "a created event that the SDK's helper cannot read",
        lambda: script(
            Reply.sse(
                [
                    LIGHT_CREATED,
                    {"type": "response.output_item.added", "item": {"id": "msg_1", "type": "message"}},
                    LIGHT_DELTA,
                ],
                end=Hold(),
            )
        ),
        manage,
        told(
            "error",
            error="TypeError",
            status="in_progress",
            missing="not_found",
            events=3,
            texts=1,
            gets=4,
            model=None,
        ),
        since=(3, 54),  # others stumble over other events
    ),
    # open-responses-server never counts.
    Row(
        "open-responses-server",
        "null usage",
        lambda: script(sse(*BEGUN, life("completed", "completed"))),
        drain,
        told("completed", finish="stop", status="completed", missing="no_usage", events=5, texts=2, gets=1),
    ),
    Row(
        "open-responses-server",
        "no last event for what was cut by length, and no model",
        lambda: script(sse(life("created", "in_progress", model=""), *deltas(2))),
        drain,
        told(
            "truncated",
            error="stream_truncated",
            status="in_progress",
            missing="not_found",
            events=3,
            texts=2,
            gets=4,
            model=None,
        ),
    ),
    Row(
        "open-responses-server",
        "null for a whole response",
        lambda: script(Reply.json(None)),
        create,
        told(
            "error",
            error="empty_response",
            missing="no_response_id",
            streams=False,
            id=None,
            model=None,
        ),
    ),
    Row(
        "open-responses-server",
        "200 and not one event on a wrong base URL",
        lambda: script(sse()),
        drain,
        told("truncated", error="stream_truncated", missing="no_response_id", events=0, id=None, model=None),
    ),
    Row(
        "open-responses-server",
        "200 and an error without a code on a wrong base URL",
        lambda: script(Reply.json({"error": {"message": "no route"}})),
        drain,
        told("error", error="error", missing="no_response_id", events=0, id=None, model=None),
    ),
    Row(
        "open-responses-server",
        "200 and a document of another kind on a wrong base URL",
        lambda: script(Reply.json({"detail": "no route"})),
        drain,
        told("truncated", error="stream_truncated", missing="no_response_id", events=0, id=None, model=None),
    ),
    # aimock is for tests.
    Row(
        "aimock",
        "zeros",
        lambda: script(
            sse(
                life("created", "in_progress", id="resp-1"),
                *deltas(1),
                life("completed", "completed", id="resp-1", usage=counts(0, 0)),
            )
        ),
        drain,
        told(
            "completed",
            finish="stop",
            status="completed",
            source="stream",
            usage=(0, 0),
            events=3,
            texts=1,
            id="resp-1",
        ),
    ),
    Row(
        "aimock",
        "`response.completed` with the status failed",
        lambda: script(sse(*BEGUN, life("completed", "failed", usage=counts(0, 0)))),
        drain,
        told("failed", error="failed", status="failed", source="stream", usage=(0, 0), events=5, texts=2),
    ),
    Row(
        "aimock",
        "`response.completed` with the status incomplete and no reason",
        lambda: script(sse(*BEGUN, life("completed", "incomplete", usage=counts(0, 0)))),
        drain,
        told(
            "incomplete",
            finish="length",
            status="incomplete",
            source="stream",
            usage=(0, 0),
            events=5,
            texts=2,
        ),
    ),
    # OpenAI itself, as reported.
    Row(
        "OpenAI",
        "keepalives for a while before created",
        lambda: script(
            sse(
                *[{"type": "keepalive"}] * 5,
                *BEGUN,
                life("completed", "completed", usage=counts(7, 2)),
                pace=0.02,
            )
        ),
        drain_in_background,
        told(
            "completed", finish="stop", status="completed", source="stream", usage=(7, 2), events=10, texts=2
        ),
    ),
    Row(
        "OpenAI",
        "nothing but keepalives",
        lambda: script(sse(*[{"type": "keepalive"}] * 5)),
        drain_in_background,
        told("truncated", error="stream_truncated", missing="no_response_id", events=5, id=None, model=None),
    ),
    Row(
        "OpenAI",
        "null usage for what was cancelled, which then completes and is charged",
        lambda: script(
            sse(*BEGUN, end=Hold()),
            shown("in_progress"),
            shown("cancelled"),
            shown("completed", usage=counts(7, 31)),
            cancel=shown("cancelled"),
        ),
        cancel,
        told("closed", status="completed", source="retrieval", usage=(7, 31), events=3, texts=1, gets=3),
        since=(1, 81),
    ),
)


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look-ups wait as ever, in a tenth of the time."""
    policy = RetrievalPolicy(first_wait_s=0.01, longest_wait_s=0.1)
    monkeypatch.setattr(_lookup, "RetrievalPolicy", lambda: policy)


def client_of(server: ScriptedServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=20)


def run(application: Application, server: ScriptedServer) -> list[str]:
    """What the application sees: its events and responses, or what is raised to it."""
    with client_of(server) as client:
        try:
            return [f"{type(item).__qualname__} {item!r}" for item in application(client)]
        except Exception as error:
            return [type(error).__qualname__, str(error)]


REQUEST_ATTRIBUTES = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "m",
    "openai.api.type": "responses",
    "server.address": "127.0.0.1",
}
# Times, which are not compared but have to be there.
FIRST = "gen_ai.response.time_to_first_chunk"
LOOKED_UP = "openai_responses.retrieval.duration"
ATTEMPTS = "openai_responses.retrieval.attempts"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_server_of_its_own_kind_has_its_span(row: Row, instrument: Instrument, serve: Serve) -> None:
    """Whatever a server does, the whole span says so, and the application notices nothing of us."""
    if row.since > RELEASE:
        pytest.skip("not in this release of the SDK")
    alone = run(row.application, serve(row.script()))
    observed = instrument(**row.settings)
    server = serve(row.script())

    assert run(row.application, server) == alone

    span = observed.spans(row.spans)[-1]
    attributes = dict(span.attributes or {})
    wanted = row.span | REQUEST_ATTRIBUTES | {"server.port": int(server.url.rpartition(":")[2])}
    # The deltas of a body that the SDK reads as a whole have no times.
    has_deltas = "openai_responses.stream.deltas_by_type.output_text" in wanted
    assert (FIRST in attributes) == (has_deltas and "gen_ai.request.stream" in wanted)
    assert (LOOKED_UP in attributes) == (ATTEMPTS in wanted)
    attempts = attributes.get(ATTEMPTS, 0)
    assert attempts == len([request for request in server.requests if request.method == "GET"])
    if wanted.get(ATTEMPTS) == -1:  # as often as the time allows
        assert attempts > 1
        wanted[ATTEMPTS] = attempts
    left_out = {FIRST, LOOKED_UP, "openai_responses.request_id"}
    assert {name: attributes[name] for name in attributes if name not in left_out} == wanted
    assert span.name == "chat m"
    assert span.status.status_code is (StatusCode.ERROR if "error.type" in wanted else StatusCode.UNSET)

    source = wanted.get("openai_responses.usage.source")
    why = source or wanted["openai_responses.usage.missing_reason"]
    assert observed.calls()[why] == row.spans
    kinds = ("input", "output") if source else ()
    assert observed.tokens() == {kind: (1, wanted[f"gen_ai.usage.{kind}_tokens"]) for kind in kinds}
    assert observed.pending() == 0
    assert KEY not in "".join(text for _, text in observed.told())


@pytest.mark.skipif(
    "starting_after" not in inspect.signature(Responses.retrieve).parameters,
    reason="not in this release of the SDK",
)
def test_a_resume_that_is_refused_is_an_error_of_its_own(observed: Observed, serve: Serve) -> None:
    """OpenAI refuses to resume a stream some minutes after its start: the call still gets its usage."""
    refusal = error(400, "Streaming is no longer available for this response", code="stream_expired")
    lost = script(sse(*BEGUN, end=Hold()), shown("in_progress"), shown("completed", usage=counts(7, 31)))
    server = serve(lambda request: refusal if "stream" in request.query else lost(request))
    with client_of(server) as client:
        close(client, **BACKGROUND)
        with pytest.raises(openai.BadRequestError):
            client.responses.retrieve(ID, stream=True, starting_after=2)
    fetched, called = sorted(observed.spans(2), key=lambda span: span.name, reverse=True)
    assert fetched.name == "fetch_response"
    fetch_attributes = dict(fetched.attributes or {})
    assert fetch_attributes.pop("openai_responses.request_id")
    assert fetch_attributes == {
        "gen_ai.operation.name": "fetch_response",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.stream_cursor": "2",
        "gen_ai.response.id": ID,
        "gen_ai.response.finish_reasons": ("error",),
        "error.type": "stream_expired",
        "openai.api.type": "responses",
        "openai_responses.stream.outcome": "error",
        "openai_responses.stream.events": 0,
        "openai_responses.stream.deltas": 0,
        "server.address": "127.0.0.1",
        "server.port": int(server.url.rpartition(":")[2]),
    }
    assert (called.attributes or {})["openai_responses.usage.source"] == "retrieval"
    assert observed.tokens() == {"input": (1, 7), "output": (1, 31)}
    assert observed.calls() == {"retrieval": 1}

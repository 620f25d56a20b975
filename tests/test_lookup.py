"""Looking usage up afterwards, from servers that are well and servers that are not."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import time
import weakref
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from calls import CUT, HTTP, since
from conftest import Instrument, Serve
from embedded.answer import Answer, usage
from embedded.http_server import Cut, Hold, Pause, Reply, ScriptedServer, SeenRequest, Send
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import Observed, eventually, token_attributes, usage_attributes
from otel_responses_usage._lookup.worker import Pace
from otel_responses_usage._surfaces._connections import Connections, Destination

ANSWER = Answer(pieces=("one ", "two ", "three "), usage=usage(7, 21, cached=3, reasoning=11))
KEY = "canary-of-the-key"


def cut(**details: Any) -> Plan:
    """A stream that the network cuts after its fifth event, with the first delta."""
    return Plan(ANSWER, cut_after=5, end=Cut(), **details)


def client_of(server: ScriptedServer, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": KEY, "max_retries": 0, **options})


def read_cut(client: openai.OpenAI, **asked: Any) -> None:
    """Make one streamed call that is cut."""
    with pytest.raises(CUT):
        list(client.responses.create(model="m", input="x", stream=True, **asked))


def gets(server: ScriptedServer) -> list[SeenRequest]:
    return [request for request in server.requests if request.method == "GET"]


def outcome_of(observed: Observed) -> dict[str, Any]:
    """How the look-up of the one call ended."""
    attributes = dict(observed.span().attributes or {})
    names = ("usage.source", "usage.missing_reason", "retrieval.attempts", "response.status")
    return {name: attributes.get(f"openai_responses.{name}") for name in names}


def lookup(
    serve: Serve, instrument: Instrument, plan: Plan, asked: dict[str, Any] | None = None, **settings: Any
) -> tuple[Observed, ScriptedServer, ResponsesAPI]:
    """Cut one call as planned and wait for its span."""
    observed = instrument(**settings)
    api = ResponsesAPI(lambda _: plan)
    server = serve(api)
    with client_of(server) as client:
        read_cut(client, **(asked or {}))
    observed.span()
    return observed, server, api


def test_it_polls_until_the_response_is_terminal(serve: Serve, instrument: Instrument) -> None:
    """A response still under way is asked for again, and its counts are taken only when it has ended."""
    observed, server, _ = lookup(serve, instrument, cut(get_replies=("queued", "in_progress")))
    assert outcome_of(observed) == {
        "usage.source": "retrieval",
        "usage.missing_reason": None,
        "retrieval.attempts": 3,
        "response.status": "completed",
    }
    assert len(gets(server)) == 3
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


# Half of a response, after which the connection ends.
HALF = (Send(json.dumps(ANSWER.response()).encode()[:300]), Cut())
JSON = {"content-type": "application/json"}
HALVES = {
    "half a length": Reply(200, {**JSON, "content-length": "1000"}, HALF, chunked=False),
    "half the chunks": Reply(200, JSON, HALF),
}


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_a_response_that_breaks_off_is_asked_for_again(
    half: Reply, serve: Serve, instrument: Instrument
) -> None:
    """An answer that the network cuts says nothing about the server."""
    observed, server, _ = lookup(serve, instrument, cut(get_replies=(half,)))
    assert outcome_of(observed)["usage.source"] == "retrieval"
    assert len(gets(server)) == 2


def test_a_response_that_is_stored_a_moment_later_is_found(serve: Serve, instrument: Instrument) -> None:
    """A 404 is not believed at once."""
    observed, server, _ = lookup(serve, instrument, cut(get_replies=(error(404, "not yet"),)))
    assert outcome_of(observed)["usage.source"] == "retrieval"
    assert len(gets(server)) == 2


@pytest.mark.parametrize(
    ("reply", "reason", "requests"),
    [
        (error(401, "no"), "unauthorized", 1),
        (error(403, "no"), "unauthorized", 1),
        (error(400, "no"), "unsupported", 1),
        (error(405, "no"), "unsupported", 1),
        (error(501, "no"), "unsupported", 1),
        (error(404, "no"), "not_found", 4),
        (Reply(302, {"location": "http://127.0.0.2:9/"}), "unsupported", 1),
        (Reply(302, {"location": "http://[::"}), "unsupported", 1),
        (Reply(200, {"content-type": "text/html"}, ()), "unsupported", 1),
        (Reply(200, {"content-encoding": "gzip"}, (Send(b"not gzip"),)), "transport_error", 4),
        (Reply(200, {"content-encoding": "gzip"}, (Send(gzip.compress(bytes(65 << 20))),)), "unsupported", 1),
        (Reply.json({"object": "list", "data": [ANSWER.response()]}), "unsupported", 1),
        (Reply.json({"id": "resp_1", "object": "response.deleted", "deleted": True}), "unsupported", 1),
        (Reply.json({"error": {"message": "no", "code": "not_found"}}), "unsupported", 1),
        (Reply.json({"id": "model-1", "owned_by": "me"}), "unsupported", 1),
        (Reply(200, before=(Cut(),)), "transport_error", 4),
        (Reply(200, before=(Cut("rst"),)), "transport_error", 4),
        *((half, "transport_error", 4) for half in HALVES.values()),
    ],
    ids=[
        "401",
        "403",
        "400",
        "405",
        "501",
        "404",
        "elsewhere",
        "nowhere",
        "no json",
        "no gzip",
        "bomb",
        "a list",
        "a receipt",
        "an error with 200",
        "another object",
        "fin",
        "rst",
        *HALVES,
    ],
)
def test_a_server_that_has_no_answer_is_left_alone(
    reply: Reply, reason: str, requests: int, serve: Serve, instrument: Instrument
) -> None:
    """What can't be had is given up for its own reason, after no more requests than tell it."""
    observed, server, _ = lookup(serve, instrument, cut(get_replies=(reply,) * 9))
    assert outcome_of(observed)["usage.missing_reason"] == reason
    assert len(gets(server)) == requests
    assert token_attributes(observed.span()) == {}
    assert observed.tokens() == {}
    assert observed.calls() == {reason: 1}


@pytest.mark.parametrize("kind", [{"object": "response"}, {}], ids=["named", "bare"])
def test_a_response_under_another_id_is_the_one_asked_for(
    kind: dict[str, str], serve: Serve, instrument: Instrument
) -> None:
    """A proxy may encrypt ids anew in each answer. The usage is used, and the span keeps the first id."""
    shown = Reply.json({**kind, "id": "resp_again", "status": "completed", "usage": ANSWER.usage})
    observed, server, _ = lookup(serve, instrument, cut(get_replies=(shown,)))
    assert outcome_of(observed)["usage.source"] == "retrieval"
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)
    assert (observed.span().attributes or {})["gen_ai.response.id"] == ANSWER.id
    assert len(gets(server)) == 1


def test_counts_of_a_response_in_progress_are_not_used(serve: Serve, instrument: Instrument) -> None:
    """Usage of a response that has not ended is not final, and no server says when it is."""
    early = Reply.json({**ANSWER.response(), "status": "in_progress"})
    observed, _, _ = lookup(serve, instrument, cut(get_replies=(early,) * 9), retrieval_timeout=0.3)
    assert outcome_of(observed)["usage.missing_reason"] == "timeout"
    assert token_attributes(observed.span()) == {}


def test_a_server_that_fails_at_one_response_is_asked_to_the_deadline(
    serve: Serve, instrument: Instrument
) -> None:
    """A 500 each time ends at the deadline, with few requests and a reason."""
    replies = (error(500, "no"),) * 99
    observed, server, _ = lookup(serve, instrument, cut(get_replies=replies), retrieval_timeout=2.0)
    assert outcome_of(observed)["usage.missing_reason"] == "timeout"
    assert len(gets(server)) == 5


@pytest.mark.parametrize("response_id", [".", ".."])
def test_an_id_that_would_leave_the_path_is_not_asked_for(
    response_id: str, serve: Serve, instrument: Instrument
) -> None:
    """A dot as a path segment would lead the credentials to another path: no request is made."""
    created = {"type": "response.created", "response": {"id": response_id, "status": "in_progress"}}
    observed = instrument()
    server = serve(lambda _: Reply.sse([created], end=Cut()))
    with client_of(server) as client:
        read_cut(client)
        observed.span()
    assert outcome_of(observed)["usage.missing_reason"] == "unsupported"
    assert gets(server) == []


@pytest.mark.parametrize(
    "response_id", ["...", "%2e%2e", "\\..\\..", "a/../b", "//other/x", "x\r\nx: 1", "é 😀"]
)
def test_an_odd_id_is_asked_for_as_one_segment(
    response_id: str, serve: Serve, instrument: Instrument
) -> None:
    """Any other id is quoted, so that it can neither leave its path nor end the request line."""
    created = {"type": "response.created", "response": {"id": response_id, "status": "in_progress"}}
    shown = Reply.json({**ANSWER.response(), "id": response_id})
    observed = instrument()
    server = serve(lambda request: shown if request.method == "GET" else Reply.sse([created], end=Cut()))
    with client_of(server) as client:
        read_cut(client)
        assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)
    (get,) = gets(server)
    assert get.path == f"/v1/responses/{response_id}"
    assert "x" not in get.headers


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_a_server_in_passing_trouble_is_asked_again(
    status: int, serve: Serve, instrument: Instrument
) -> None:
    """A server that is busy or broken for a moment costs a wait, not the usage."""
    observed, _, _ = lookup(serve, instrument, cut(get_replies=(error(status, "later"),)))
    assert outcome_of(observed)["usage.source"] == "retrieval"


@pytest.mark.parametrize("header", [{"retry-after": "1"}, {"retry-after-ms": "1000"}], ids=str)
def test_it_waits_as_long_as_the_server_asks(
    header: dict[str, str], serve: Serve, instrument: Instrument
) -> None:
    """`Retry-After` is kept to."""
    busy = Reply.json({}, 429, headers=header)
    _, server, _ = lookup(serve, instrument, cut(get_replies=(busy,)))
    first, second = gets(server)
    assert second.at - first.at >= 0.99


def test_a_wait_beyond_the_deadline_is_not_begun(serve: Serve, instrument: Instrument) -> None:
    """A server that says `come back in an hour` is not asked again, and the span says why."""
    busy = Reply.json({}, 429, headers={"retry-after": "3600"})
    observed, server, _ = lookup(serve, instrument, cut(get_replies=(busy,) * 9), retrieval_timeout=0.3)
    assert outcome_of(observed)["usage.missing_reason"] == "timeout"
    assert len(gets(server)) == 1


def test_a_response_that_never_ends_is_given_up(serve: Serve, instrument: Instrument) -> None:
    """`in_progress` for good ends at the deadline."""
    observed, _, _ = lookup(serve, instrument, cut(fate="stuck"), retrieval_timeout=0.5)
    attributes = observed.span().attributes or {}
    assert outcome_of(observed)["usage.missing_reason"] == "timeout"
    assert outcome_of(observed)["response.status"] == "in_progress"
    assert 0.4 < attributes["openai_responses.retrieval.duration"] < 2


@pytest.mark.parametrize(
    "hang", [Reply(200, before=(Hold(),)), Reply(200, steps=(Hold(),))], ids=["head", "body"]
)
def test_a_look_up_that_hangs_holds_up_nobody(hang: Reply, serve: Serve, instrument: Instrument) -> None:
    """A GET that never answers adds nothing to the application's call, nor to the span's time."""
    observed = instrument(retrieval_timeout=0.4)
    server = serve(ResponsesAPI(lambda _: cut(get_replies=(hang,) * 9)))
    with client_of(server) as client:
        began = time.monotonic()
        read_cut(client)
        took_s = time.monotonic() - began
    span = observed.span()
    assert took_s < 0.3
    assert outcome_of(observed)["usage.missing_reason"] == "timeout"
    assert span.end_time is not None
    assert span.start_time is not None
    assert (span.end_time - span.start_time) / 1e9 < took_s + 0.05


def test_what_is_not_stored_is_not_asked_for(serve: Serve, instrument: Instrument) -> None:
    """`store=False` means that no GET is made, and the span says so."""
    observed, server, _ = lookup(serve, instrument, cut(), asked={"store": False})
    assert outcome_of(observed)["usage.missing_reason"] == "not_stored"
    assert gets(server) == []


def test_look_ups_can_be_switched_off(serve: Serve, instrument: Instrument) -> None:
    """With retrieval off no GET is made, and the span says so."""
    observed, server, _ = lookup(serve, instrument, cut(), retrieval=False)
    assert outcome_of(observed)["usage.missing_reason"] == "disabled"
    assert gets(server) == []


def test_a_stream_without_an_id_cannot_be_looked_up(serve: Serve, instrument: Instrument) -> None:
    """Cut before its first event, a stream has no id, and the span says so."""
    observed, server, _ = lookup(serve, instrument, Plan(ANSWER, cut_after=0, end=Cut()))
    assert outcome_of(observed)["usage.missing_reason"] == "no_response_id"
    assert gets(server) == []


def test_a_full_queue_closes_the_span_at_once(serve: Serve, instrument: Instrument) -> None:
    """Beyond the spans that may wait, a call ends as `overload` instead of waiting."""
    observed = instrument(max_pending=1)
    server = serve(ResponsesAPI(lambda _: cut(fate="stuck")))
    with client_of(server) as client:
        read_cut(client)
        assert observed.finished == 0
        read_cut(client)
        assert outcome_of(observed)["usage.missing_reason"] == "overload"
    eventually(lambda: observed.pending() == 1, "the other one waiting")


def test_a_background_response_has_longer_time(serve: Serve, instrument: Instrument) -> None:
    """A call with `background=True` is waited for by its own setting."""
    plan = cut(get_replies=("in_progress",) * 3)
    observed, _, _ = lookup(
        serve,
        instrument,
        plan,
        asked={"extra_body": {"background": True}},
        retrieval_timeout=0.1,
        background_timeout=30,
    )
    assert outcome_of(observed)["usage.source"] == "retrieval"


@since(1, 81, 0)
def test_a_cancelled_response_is_polled_for_its_late_charge(serve: Serve, instrument: Instrument) -> None:
    """`cancelled` without usage is not the last word: the charge may come later."""
    late = usage(7, 9)
    observed = instrument()
    plan = Plan(ANSWER, cut_after=5, end=Hold(), usage_after_cancel=late)
    server = serve(ResponsesAPI(lambda _: plan))
    with client_of(server) as client:
        with client.responses.create(
            model="m", input="x", stream=True, extra_body={"background": True}
        ) as stream:
            for event in stream:
                response_id = event.response.id  # type: ignore[union-attr]
                break
            client.responses.cancel(response_id)
        span = observed.span()
    assert token_attributes(span) == usage_attributes(late)
    assert outcome_of(observed)["response.status"] == "cancelled"


def test_a_redirect_within_the_origin_is_followed(serve: Serve, instrument: Instrument) -> None:
    """A server that moves a response on itself is followed there with the credentials."""
    api = ResponsesAPI(lambda _: cut())

    def moved(request: SeenRequest) -> Any:
        if request.method == "GET" and "moved" not in request.query:
            return Reply(307, {"location": f"{request.path}?moved=1"})
        return api(request)

    observed = instrument()
    server = serve(moved)
    with client_of(server) as client:
        read_cut(client)
        observed.span()
    assert outcome_of(observed)["usage.source"] == "retrieval"
    assert [get.headers["authorization"] for get in gets(server)] == [f"Bearer {KEY}"] * 2


def test_a_compressed_answer_is_read(serve: Serve, instrument: Instrument) -> None:
    """A server may compress what it answers."""
    api = ResponsesAPI(lambda _: cut())

    def compressed(request: SeenRequest) -> Any:
        reply = api(request)
        if request.method != "GET":
            return reply
        (document,) = reply.steps
        return Reply(200, {"content-encoding": "gzip"}, (Send(gzip.compress(document.data)),))

    observed = instrument()
    with client_of(serve(compressed)) as client:
        read_cut(client)
        assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)


def test_credentials_go_to_no_other_origin(serve: Serve, instrument: Instrument) -> None:
    """A redirect to somebody else is not followed."""
    thief = serve(lambda _: Reply.json({}))
    stolen = Reply(307, {"location": f"{thief.url}/v1/responses/x"})
    observed, _, _ = lookup(serve, instrument, cut(get_replies=(stolen,) * 9))
    assert outcome_of(observed)["usage.missing_reason"] == "unsupported"
    assert thief.requests == []


def test_the_request_carries_the_application_s_settings(serve: Serve, instrument: Instrument) -> None:
    """Key, organization, project, default headers, query and base path are those of the call."""
    observed = instrument()
    server = serve(ResponsesAPI(lambda _: cut(), key=KEY))
    with client_of(
        server,
        organization="org-1",
        project="proj-1",
        default_headers={"x-tenant": "t-1"},
        default_query={"api-version": "v1"},
    ) as client:
        read_cut(client, extra_headers={"x-call": "c-1"}, extra_query={"call": "1"})
        observed.span()
    (get,) = gets(server)
    assert outcome_of(observed)["usage.source"] == "retrieval"
    wanted = {
        "authorization": f"Bearer {KEY}",
        "openai-organization": "org-1",
        "openai-project": "proj-1",
        "x-tenant": "t-1",
        "accept": "application/json",
    }
    assert {name: get.headers.get(name) for name in wanted} == wanted
    assert get.query == {"api-version": "v1", "call": "1"}
    assert "x-call" not in get.headers  # it belongs to that one call
    assert "content-type" not in get.headers
    assert "content-length" not in get.headers


def test_any_id_stays_one_segment_of_the_path(serve: Serve, instrument: Instrument) -> None:
    """An id may be long and hold any character; it leads to no other path."""
    odd = "resp_" + "a/../b?c#d é" + "x" * 400
    seen = []

    def handler(request: SeenRequest) -> Any:
        seen.append(request)
        if request.method == "POST":
            created = {"type": "response.created", "response": {"id": odd, "status": "in_progress"}}
            return Reply.sse([created], end=Cut())
        return Reply.json({"id": odd, "status": "completed", "usage": ANSWER.usage})

    observed = instrument()
    with client_of(serve(handler)) as client:
        read_cut(client)
        observed.span()
    assert outcome_of(observed)["usage.source"] == "retrieval"
    assert (observed.span().attributes or {})["gen_ai.response.id"] == odd


def test_a_terminal_event_without_usage_is_asked_about_once(serve: Serve, instrument: Instrument) -> None:
    """A stream that ended without a bill may have one stored; if not, the span says `no_usage`."""
    observed = instrument()
    server = serve(ResponsesAPI(lambda _: Plan(Answer(ANSWER.pieces, usage=None))))  # type: ignore[arg-type]
    with client_of(server) as client:
        list(client.responses.create(model="m", input="x", stream=True))
        observed.span()
    assert outcome_of(observed)["usage.missing_reason"] == "no_usage"
    assert len(gets(server)) == 1


def test_two_hundred_streams_cut_at_once_are_all_accounted_for(serve: Serve, instrument: Instrument) -> None:
    """However many streams are cut at the same moment, each gets its usage, few requests at a time."""
    observed = instrument(max_concurrency=8)
    plan = cut(get_replies=(), pace=0.0)
    api = ResponsesAPI(lambda _: plan)

    def slowly(request: SeenRequest) -> Any:
        # Every response has an id of its own, so that none can be taken for another.
        if request.method == "POST":
            own = Answer(ANSWER.pieces, usage(7, len(api.stored) + 1))
            return ResponsesAPI.__call__(
                _with_plan(api, Plan(own, cut_after=5, end=Cut(), before=(Pause(0.2),))), request
            )
        return api(request)

    server = serve(slowly)

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)

        async def one() -> None:
            with pytest.raises(CUT):
                async for _ in await client.responses.create(model="m", input="x", stream=True):
                    pass

        await asyncio.gather(*(one() for _ in range(200)))
        await client.close()

    asyncio.run(main())
    spans = observed.spans(200)
    for span in spans:
        stored = api.stored[str((span.attributes or {})["gen_ai.response.id"])]
        assert token_attributes(span) == usage_attributes(stored["usage"])
    assert observed.tokens()["output"] == (200, sum(range(1, 201)))
    assert server.peak_of("GET") <= 8
    assert len(gets(server)) == 200
    eventually(lambda: observed.pending() == 0, "nothing pending")


def _with_plan(api: ResponsesAPI, plan: Plan) -> ResponsesAPI:
    api._plan = lambda _: plan
    return api


def test_requests_reuse_their_connections(serve: Serve, instrument: Instrument) -> None:
    """Look-ups after one another go over one connection of their own, not over the application's."""
    observed = instrument()
    server = serve(ResponsesAPI(lambda _: cut()))
    with client_of(server) as client:
        for done in range(1, 6):
            read_cut(client)
            observed.spans(done)
    assert len(gets(server)) == 5
    assert server.connections <= 5 + 1


def test_the_application_s_only_connection_is_never_waited_for(serve: Serve, instrument: Instrument) -> None:
    """With a pool of one connection, a look-up that hangs leaves that one to the application."""
    instrument(retrieval_timeout=5.0)
    hang = Reply(200, before=(Hold(),))
    server = serve(ResponsesAPI(lambda _: cut(get_replies=(hang,) * 9)))
    pool = HTTP.Client(limits=HTTP.Limits(max_connections=1))
    with client_of(server, http_client=pool) as client:
        read_cut(client)
        eventually(lambda: gets(server), "the look-up to begin")
        began = time.monotonic()
        read_cut(client)
        assert time.monotonic() - began < 1.0


def test_an_id_that_is_no_text_is_told_all_the_same(serve: Serve, instrument: Instrument) -> None:
    """Half a character in an id, which no exporter could write, costs neither the span nor its batch."""
    created = (
        b'data: {"type":"response.created","response":{"id":"resp_\\ud800x","status":"in_progress"}}\n\n'
    )
    observed = instrument()
    server = serve(
        lambda request: Reply.sse([created], end=Cut()) if request.method == "POST" else Reply(405)
    )
    with client_of(server) as client:
        read_cut(client)
        observed.span()
    assert outcome_of(observed)["usage.missing_reason"] == "unsupported"
    assert (observed.span().attributes or {})["gen_ai.response.id"] == "resp_?x"


def test_clients_that_come_and_go_leave_nothing_behind(serve: Serve, instrument: Instrument) -> None:
    """An application that makes a client for every call does not collect connections of ours."""
    observed = instrument()
    server = serve(ResponsesAPI(lambda _: cut()))
    for done in range(1, 21):
        with client_of(server) as client:
            read_cut(client)
        observed.spans(done)
    eventually(lambda: server.open_connections <= 5, "few connections")


def test_a_waiting_call_does_not_hold_its_prompt(serve: Serve, instrument: Instrument) -> None:
    """While a span waits for its usage, the request with its prompt can be forgotten."""
    sent = []
    hooks = {"request": [lambda request: sent.append(weakref.ref(request))]}
    observed = instrument()
    server = serve(ResponsesAPI(lambda _: Plan(ANSWER, cut_after=5, end=Hold(), fate="stuck")))
    with client_of(server, http_client=HTTP.Client(event_hooks=hooks)) as client:
        for _ in range(3):
            with client.responses.create(model="m", input="x", stream=True) as stream:
                next(stream)
            del stream
    eventually(lambda: observed.pending() == 3, "all look-ups under way")
    gc.collect()
    assert [request() for request in sent] == [None] * 3


@pytest.mark.filterwarnings("error")
def test_an_answer_that_comes_after_the_end_leaves_no_socket(serve: Serve) -> None:
    """A look-up may get its answer just when the instrumentation ends. Nobody uses its connection again."""
    server = serve(lambda _: Reply.json({}))
    address = urlsplit(server.url)
    connections = Connections(1024, Pace())
    connections.interrupt()
    connections.close()
    destination = Destination(str(address.hostname), int(address.port or 0), None, None, None)
    request = f"GET / HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
    assert connections.get(destination, request, 5.0).status == 200
    del connections
    gc.collect()  # a socket that is still open would raise here

"""Everything that is billed is counted, once: compactions, hosted tools, and by which tier and window."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import openai
import pytest
from opentelemetry.trace import StatusCode

from billing import (
    ASKED,
    BACKGROUND,
    COUNTS,
    SEARCHES,
    TOOL_ATTRIBUTES,
    TOOL_CALLS,
    TOOL_TOKENS,
    TOOLS,
    WINDOW,
    BilledAPI,
    answer,
    assert_tools_once,
    call_of,
    compaction,
    late,
    searches,
    tool_attributes,
    tool_calls,
    tool_tokens,
    tool_usage,
)
from calls import CUT, HTTP, entered, is_in_sdk, settle
from conftest import Instrument, Serve
from embedded.answer import FAILED, OUT_OF_TOKENS, Answer, Ending, Json, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest, Send
from embedded.responses_api import Plan, error
from observed import Observed, eventually, token_attributes, usage_attributes

COUNTED_ONCE = {"input": (1, 7), "output": (1, 21)}
KINDS = pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI], ids=["sync", "async"])


def client_of(server: ScriptedServer, kind: type[Any] = openai.OpenAI, **given: Any) -> Any:
    return kind(base_url=f"{server.url}/v1", api_key="k", **{"max_retries": 0, **given})


def attributes_of(observed: Observed) -> dict[str, Any]:
    """The attributes of the one span there is."""
    return dict(observed.span().attributes or {})


def run(server: ScriptedServer, kind: type[Any], way: Callable[[Any], Awaitable[Any]]) -> Any:
    """Make a call with a client of this kind."""

    async def main() -> Any:
        client = client_of(server, kind)
        try:
            return await way(client)
        finally:
            await settle(client.close())

    return asyncio.run(main())


# --- compactions -------------------------------------------------------------------------------------


async def compact(client: Any) -> Any:
    return (await settle(client.responses.compact(**ASKED))).id


async def compact_beta(client: Any) -> Any:
    return (await settle(client.beta.responses.compact(**ASKED))).id


async def compact_raw(client: Any) -> Any:
    return (await settle(client.responses.with_raw_response.compact(**ASKED))).parse().id


async def compact_streaming(client: Any) -> Any:
    async with entered(client.responses.with_streaming_response.compact(**ASKED)) as response:
        return (await settle(response.parse())).id


async def compact_bytes(client: Any) -> Any:
    async with entered(client.responses.with_streaming_response.compact(**ASKED)) as response:
        return json.loads(await settle(response.read()))["id"]


async def compact_by_post(client: Any) -> Any:
    return (await settle(client.post("/responses/compact", body=ASKED, cast_to=object)))["id"]


# Each with what of the SDK it takes.
COMPACTIONS = {
    compact: "responses.compact",
    compact_beta: "beta.responses.compact",
    compact_raw: "responses.compact",
    compact_streaming: "responses.compact",
    compact_bytes: "responses.compact",
    compact_by_post: "responses",
}


WAYS = pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.skipif(not is_in_sdk(needs), reason="not in this release"))
        for way, needs in COMPACTIONS.items()
    ],
)
needs_compact = pytest.mark.skipif(not is_in_sdk("responses.compact"), reason="not in this release")


@KINDS
@WAYS
def test_a_compaction_is_a_call_with_its_usage(
    way: Callable[[Any], Awaitable[Any]], kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """However it is asked for, a compaction is one span with the usage of its body, counted once."""
    made = compaction(service_tier="flex")
    server = serve(BilledAPI(compact=lambda _: Reply.json(made, headers={"x-request-id": "req_1"})))
    assert run(server, kind, way) == made["id"]

    span, attributes = observed.span(), attributes_of(observed)
    assert span.name == "compact m"
    assert token_attributes(span) == usage_attributes(COUNTS)
    expected = {
        "gen_ai.operation.name": "compact",
        "gen_ai.request.model": "m",
        "gen_ai.response.id": made["id"],
        "gen_ai.conversation.compacted": True,
        "openai.response.service_tier": "flex",
        "openai_responses.request_id": "req_1",
        "openai_responses.stream.outcome": "completed",
        "openai_responses.usage.source": "response",
    }
    assert {name: attributes.get(name) for name in expected} == expected
    assert observed.tokens() == COUNTED_ONCE
    assert observed.calls() == {"response": 1}
    operations = {point.attributes["gen_ai.operation.name"] for point in points_of_a_call(observed)}
    assert operations == {"compact"}
    assert [request.method for request in server.requests] == ["POST"]
    assert "canary-of-the-compaction" not in "".join(text for _, text in observed.told())


def points_of_a_call(observed: Observed) -> list[Any]:
    return [
        *observed.points("gen_ai.client.token.usage"),
        *observed.points("gen_ai.client.operation.duration"),
    ]


@KINDS
@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_a_refused_compaction_is_an_error_that_nobody_asks_about(
    status: int, kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """Refused with 4xx or 5xx, a compaction is one failed call, and no request follows."""
    server = serve(BilledAPI(compact=lambda _: error(status, "no", code="no_way")))
    with pytest.raises(openai.APIStatusError):
        run(server, kind, compact_by_post)
    span, attributes = observed.span(), attributes_of(observed)
    assert span.status.status_code is StatusCode.ERROR
    assert attributes["error.type"] == "no_way"
    assert attributes["openai_responses.usage.missing_reason"] == "no_response_id"
    assert observed.tokens() == {}
    assert observed.calls() == {"no_response_id": 1}
    assert len(server.requests) == 1


def cut_off(made: Json) -> Reply:
    """The first part of the body, and the end of the connection where more was promised."""
    whole = json.dumps(made).encode()
    return Reply(
        headers={"content-type": "application/json", "content-length": str(len(whole))},
        steps=(Send(whole[: len(whole) // 2]), Cut()),
        chunked=False,
    )


@KINDS
@pytest.mark.parametrize("way", [compact_by_post, pytest.param(compact_streaming, marks=needs_compact)])
def test_a_compaction_that_breaks_off_is_not_looked_up(
    way: Callable[[Any], Awaitable[Any]], kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """A compaction is not stored. Where its body breaks off, its usage is unknown, and no GET is made."""
    server = serve(BilledAPI(compact=lambda _: cut_off(compaction())))
    with pytest.raises(CUT):
        run(server, kind, way)
    attributes = attributes_of(observed)
    reason = "no_response_id" if way is compact_by_post else "not_stored"
    assert attributes["openai_responses.usage.missing_reason"] == reason
    assert "openai_responses.retrieval.attempts" not in attributes
    assert observed.tokens() == {}
    assert [request.method for request in server.requests] == ["POST"]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (compaction(None), "no_usage"),
        (compaction({}), "no_usage"),
        (compaction(id=None), None),
        (compaction(id="resp/with a space?"), None),
        (compaction(id=7), None),
        (compaction(status="in_progress"), "no_usage"),
        ({"object": "response.compaction"}, "no_response_id"),
        ([], "no_response_id"),
    ],
    ids=["null", "empty", "no id", "odd id", "a number as id", "still running", "nothing", "a list"],
)
def test_an_odd_compaction_is_never_asked_for(
    made: Any, reason: str | None, serve: Serve, observed: Observed
) -> None:
    """Without usage, or under an id of any kind: what the body says is counted, and no GET is made."""
    server = serve(BilledAPI(compact=lambda _: Reply.json(made)))
    with client_of(server) as client:
        client.post("/responses/compact", body=ASKED, cast_to=object)
    attributes = attributes_of(observed)
    assert attributes.get("openai_responses.usage.missing_reason") == reason
    assert observed.tokens() == ({} if reason else COUNTED_ONCE)
    assert [request.method for request in server.requests] == ["POST"]


def test_a_compaction_counts_no_tools_of_the_conversation(serve: Serve, observed: Observed) -> None:
    """The items in a compaction were made by earlier calls, which have counted them."""
    made = compaction()
    made["output"] += [call_of("web_search_call"), call_of("image_generation_call", svg_usage=COUNTS)]
    server = serve(BilledAPI(compact=lambda _: Reply.json(made)))
    with client_of(server) as client:
        client.post("/responses/compact", body=ASKED, cast_to=object)
    assert tool_attributes(attributes_of(observed)) == {}
    assert tool_calls(observed) == tool_tokens(observed) == {}


def test_a_compaction_within_another_s_span_has_a_span_of_its_own(serve: Serve, observed: Observed) -> None:
    """Where another instrumentation has a span of the call, it has none of the compaction inside."""
    server, tracer = serve(BilledAPI(Plan(TOOLS))), observed.tracer_provider.get_tracer("someone's")
    inference = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"}
    with client_of(server) as client, tracer.start_as_current_span("chat m", attributes=inference):
        client.post("/responses/compact", body=ASKED, cast_to=object)
    compacted, outer = observed.spans(2)
    assert (compacted.name, outer.name) == ("compact m", "chat m")
    assert compacted.parent is not None
    assert compacted.parent.span_id == outer.context.span_id
    assert token_attributes(compacted) == usage_attributes(COUNTS)
    assert token_attributes(outer) == {}
    assert observed.tokens() == COUNTED_ONCE


def test_a_compaction_without_spans_is_counted(serve: Serve, instrument: Instrument) -> None:
    """Where no spans of ours are wanted, the tokens of a compaction are counted all the same."""
    observed = instrument(spans="never")
    with client_of(serve(BilledAPI())) as client:
        client.post("/responses/compact", body=ASKED, cast_to=object)
    assert observed.tokens() == COUNTED_ONCE
    assert observed.finished == 0


def test_the_server_s_own_compaction_is_on_the_span(serve: Serve, observed: Observed) -> None:
    """A response whose output has a compaction says so."""
    compacts = answer({"id": "cmp_1", "type": "compaction", "encrypted_content": "x"})
    with client_of(serve(BilledAPI(Plan(compacts)))) as client:
        client.responses.create(**ASKED)
    attributes = attributes_of(observed)
    assert attributes["gen_ai.conversation.compacted"] is True
    assert attributes["gen_ai.operation.name"] == "chat"
    assert tool_attributes(attributes) == {}


# --- hosted tools ------------------------------------------------------------------------------------


async def plain(client: Any) -> None:
    await settle(client.responses.create(**ASKED))


async def streamed(client: Any) -> None:
    stream = await settle(client.responses.create(**ASKED, stream=True))
    if hasattr(stream, "__aiter__"):
        assert [event async for event in stream]
    else:
        assert list(stream)


async def read_raw(client: Any) -> None:
    async with entered(client.responses.with_streaming_response.create(**ASKED)) as response:
        await settle(response.read())


@KINDS
@pytest.mark.parametrize("way", [plain, streamed, read_raw])
def test_what_hosted_tools_did_is_counted(
    way: Callable[[Any], Awaitable[None]], kind: type[Any], serve: Serve, observed: Observed
) -> None:
    """Streamed or not, the span and the counters say what the server billed for its tools."""
    run(serve(BilledAPI(Plan(TOOLS))), kind, way)
    attributes = attributes_of(observed)
    assert tool_attributes(attributes) == TOOL_ATTRIBUTES
    assert attributes["gen_ai.response.finish_reasons"] == ("tool_calls",)
    assert_tools_once(observed)
    assert observed.tokens() == COUNTED_ONCE
    of_tools = [
        *observed.points("openai_responses.tool.calls"),
        *observed.points("openai_responses.tool.web_search.requests"),
        *observed.points("openai_responses.tool.tokens"),
    ]
    assert {point.attributes["gen_ai.request.model"] for point in of_tools} == {"m"}
    assert {point.attributes["gen_ai.provider.name"] for point in of_tools} == {"openai"}


def test_the_tools_of_a_cut_stream_come_with_its_look_up(serve: Serve, observed: Observed) -> None:
    """Where a stream breaks off, its response is asked for, and shows what its tools did."""
    server = serve(BilledAPI(Plan(TOOLS, cut_after=3, end=Cut())))
    with client_of(server) as client, pytest.raises(CUT):
        list(client.responses.create(**ASKED, stream=True))
    attributes = attributes_of(observed)
    assert attributes["openai_responses.usage.source"] == "retrieval"
    assert tool_attributes(attributes) == TOOL_ATTRIBUTES
    assert_tools_once(observed)


def test_the_tools_of_a_stream_closed_early_come_with_its_look_up(serve: Serve, observed: Observed) -> None:
    """A stream that the application closes in the middle is billed for the tools of the whole."""
    server = serve(BilledAPI(Plan(TOOLS, cut_after=3, end=Hold())))
    with client_of(server) as client, client.responses.create(**ASKED, stream=True) as stream:
        next(iter(stream))
    assert tool_attributes(attributes_of(observed)) == TOOL_ATTRIBUTES
    assert_tools_once(observed)


def test_the_tools_of_a_stream_closed_at_its_end_come_with_its_tail(
    serve: Serve, instrument: Instrument
) -> None:
    """Closed when its output was done, a stream is read on, and its last event says what its tools did."""
    observed = instrument(grace_timeout=5.0)
    server = serve(BilledAPI(Plan(TOOLS, pace=0.01)))
    with client_of(server) as client, client.responses.create(**ASKED, stream=True) as stream:
        last = len(TOOLS.events()) - 2
        for number, _ in enumerate(stream):
            if number == last:
                break
    attributes = attributes_of(observed)
    assert attributes["openai_responses.usage.source"] in {"tail", "stream"}
    assert tool_attributes(attributes) == TOOL_ATTRIBUTES
    assert_tools_once(observed)
    assert [request.method for request in server.requests] == ["POST"]


def test_the_tools_of_a_background_response_come_with_its_look_up(serve: Serve, observed: Observed) -> None:
    """A create that answers at once is billed for tools that run later."""
    with client_of(serve(BilledAPI(Plan(TOOLS, get_replies=("in_progress",))))) as client:
        client.responses.create(**ASKED, **BACKGROUND)
        assert tool_attributes(attributes_of(observed)) == TOOL_ATTRIBUTES
    assert_tools_once(observed)


def test_tools_are_counted_from_what_the_application_fetches(serve: Serve, instrument: Instrument) -> None:
    """A call without look-up is counted when the application fetches its response, tools and all, once."""
    observed = instrument(retrieval=False)
    with client_of(serve(BilledAPI(Plan(TOOLS, cut_after=3, end=Cut())))) as client:
        with pytest.raises(CUT):
            list(client.responses.create(**ASKED, stream=True))
        assert tool_calls(observed) == {}
        for _ in range(3):
            client.responses.retrieve(TOOLS.id)
    assert_tools_once(observed)
    assert observed.tokens() == COUNTED_ONCE
    assert late(observed) == {"disabled": 1}


@pytest.mark.parametrize("way", [plain, streamed])
@pytest.mark.parametrize("ending", [FAILED, OUT_OF_TOKENS], ids=["failed", "incomplete"])
def test_the_tools_of_a_response_that_did_not_complete_are_counted(
    ending: Ending, way: Callable[[Any], Awaitable[None]], serve: Serve, observed: Observed
) -> None:
    """A search is billed also if the answer fails after it, or gets too long."""
    run(serve(BilledAPI(Plan(replace(TOOLS, ending=ending)))), openai.OpenAI, way)
    attributes = attributes_of(observed)
    assert attributes["openai_responses.stream.outcome"] == ending.status
    assert tool_attributes(attributes) == TOOL_ATTRIBUTES
    assert_tools_once(observed)


def test_tool_usage_that_is_not_reported_is_unknown(serve: Serve, observed: Observed) -> None:
    """Without `tool_usage` the items are counted, and nothing is said of searches and image tokens."""
    with client_of(serve(BilledAPI(Plan(answer(call_of("web_search_call")))))) as client:
        client.responses.create(**ASKED)
    assert tool_attributes(attributes_of(observed)) == {"calls.web_search_call": 1}
    assert tool_calls(observed) == {"web_search_call": 1}
    assert observed.points("openai_responses.tool.web_search.requests") == []
    assert tool_tokens(observed) == {}


def test_tool_usage_of_zero_is_zero(serve: Serve, observed: Observed) -> None:
    """A reported zero is on the span. It makes no point."""
    with client_of(serve(BilledAPI(Plan(answer(tool_usage=tool_usage()))))) as client:
        client.responses.create(**ASKED)
    assert tool_attributes(attributes_of(observed)) == {
        "web_search.requests": 0,
        "image_generation.input_tokens": 0,
        "image_generation.output_tokens": 0,
    }
    assert tool_calls(observed) == tool_tokens(observed) == {}
    assert searches(observed) == 0


def test_a_response_without_tools_says_nothing_of_them(serve: Serve, observed: Observed) -> None:
    """No items and no `tool_usage`: no attributes, no points."""
    with client_of(
        serve(BilledAPI(Plan(answer(call_of("function_call", name="f", arguments="{}")))))
    ) as client:
        client.responses.create(**ASKED)
    assert tool_attributes(attributes_of(observed)) == {}
    assert tool_calls(observed) == {}


def test_images_in_svg_are_tokens_of_the_tool(serve: Serve, observed: Observed) -> None:
    """The tokens of an SVG image are in its item alone, and are added to those of other images."""
    made = answer(
        call_of("image_generation_call", result="x"),
        call_of(
            "image_generation_call", result="<svg/>", svg_usage={"input_tokens": 5, "output_tokens": 700}
        ),
        call_of("image_generation_call", result="<svg/>", svg_usage={"input_tokens": 2, "output_tokens": 30}),
        tool_usage=tool_usage(image=(40, 1056)),
    )
    with client_of(serve(BilledAPI(Plan(made)))) as client:
        client.responses.create(**ASKED)
    assert tool_tokens(observed) == {"input": 47, "output": 1786}
    attributes = tool_attributes(attributes_of(observed))
    assert attributes["image_generation.output_tokens"] == 1786
    assert attributes["calls.image_generation_call"] == 3
    assert observed.tokens() == COUNTED_ONCE


IMAGE = base64.b64encode(bytes(range(256)) * 24_000).decode()  # some 8 MB


@pytest.mark.parametrize("way", ["plain", "streamed", "by look-up", "by the application"])
def test_megabytes_of_an_image_hide_nothing(way: str, serve: Serve, instrument: Instrument) -> None:
    """A response with images of megabytes is counted like any other, wherever it is read."""
    observed = instrument(retrieval=way != "by the application")
    made = answer(call_of("image_generation_call", result=IMAGE), tool_usage=tool_usage(image=(40, 1056)))
    is_cut = way.startswith("by")
    server = serve(BilledAPI(Plan(made, cut_after=3 if is_cut else None, end=Cut() if is_cut else None)))
    with client_of(server) as client:
        if is_cut:
            with pytest.raises(CUT):
                list(client.responses.create(**ASKED, stream=True))
            if way == "by the application":
                client.responses.retrieve(made.id)
        elif way == "streamed":
            assert [event.type for event in client.responses.create(**ASKED, stream=True)][-1].endswith(
                "completed"
            )
        else:
            assert client.responses.create(**ASKED).id == made.id
        observed.span()
    assert observed.tokens() == COUNTED_ONCE
    assert tool_calls(observed) == {"image_generation_call": 1}
    assert tool_tokens(observed) == TOOL_TOKENS
    assert IMAGE[:64] not in "".join(text for _, text in observed.told())


ODD = {
    "items that are none": answer(None, 7, "web_search_call", [], {}, {"type": None}, {"type": ["x_call"]}),
    "tool_usage is a list": answer(tool_usage=[1]),
    "tool_usage is null": answer(tool_usage=None),
    "its parts are null": answer(tool_usage={"web_search": None, "image_gen": None}),
    "odd counts": answer(
        tool_usage={
            "web_search": {"num_requests": -1},
            "image_gen": {"input_tokens": "4", "output_tokens": True},
        }
    ),
    "too large": answer(tool_usage={"web_search": {"num_requests": 2**63}}),
    "fractions": answer(tool_usage={"web_search": {"num_requests": 1.5}}),
    "odd svg": answer(call_of("function_call", svg_usage={"input_tokens": 5})),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_tools_say_nothing_and_hurt_nothing(name: str, serve: Serve, observed: Observed) -> None:
    """What has not the API's shape is left out. The tokens of the call are counted."""
    with client_of(serve(BilledAPI(Plan(ODD[name])))) as client:
        client.post("/responses", body=ASKED, cast_to=object)
    assert observed.tokens() == COUNTED_ONCE
    assert tool_attributes(attributes_of(observed)) == {}
    assert tool_calls(observed) == tool_tokens(observed) == {}
    assert searches(observed) == 0
    assert observed.points("openai_responses.faults") == []


def test_tokens_of_a_tool_fit_into_64_bits(serve: Serve, observed: Observed) -> None:
    """Exporters cannot write more, and would lose the whole span."""
    most = 2**63 - 1
    made = answer(*(call_of("image_generation_call", svg_usage={"output_tokens": most}) for _ in range(3)))
    with client_of(serve(BilledAPI(Plan(made)))) as client:
        client.post("/responses", body=ASKED, cast_to=object)
    assert tool_attributes(attributes_of(observed))["image_generation.output_tokens"] == most
    assert tool_tokens(observed) == {"output": most}


def test_types_of_tools_are_bounded(serve: Serve, observed: Observed) -> None:
    """A server that invents types makes a bounded number of attributes and series, and loses no call."""
    server = serve(
        BilledAPI(
            lambda request: Plan(
                answer(*(call_of(f"t{request.json['input']}_{number}_call") for number in range(30)))
            )
        )
    )
    with client_of(server) as client:
        for number in range(20):
            client.post("/responses", body={"model": "m", "input": number}, cast_to=object)
    for span in observed.spans(20):
        attributes = tool_attributes(span.attributes or {})
        assert len(attributes) <= 17
        assert sum(attributes.values()) == 30
    counted = tool_calls(observed)
    assert len(counted) <= 102
    assert sum(counted.values()) == 600


@pytest.mark.parametrize(
    "kind", ["x" * 100 + "_call", "späte_call", "a b_call", "\ud800_call", 'q"_call', "_call"]
)
def test_a_type_that_is_no_name_is_other(kind: str, serve: Serve, observed: Observed) -> None:
    """A type of a server becomes part of a name only if it is a short word."""
    with client_of(serve(BilledAPI(lambda _: Reply.json(wire(answer(call_of(kind))))))) as client:
        client.post("/responses", body=ASKED, cast_to=object)
    expected = "_call" if kind == "_call" else "other"
    assert tool_calls(observed) == {expected: 1}
    assert tool_attributes(attributes_of(observed)) == {f"calls.{expected}": 1}


def wire(made: Answer) -> Any:
    """The response, so that what is no text to UTF-8 arrives as an escape."""
    return json.loads(json.dumps(made.response()).replace("\\ud800", "\\\\ud800"))


# --- what is told in parts ---------------------------------------------------------------------------


def test_tools_that_were_known_before_the_usage_count_once(serve: Serve, instrument: Instrument) -> None:
    """A response that ended without usage has told its tools. Its usage, seen later, adds only tokens."""
    observed = instrument()
    unbilled = replace(TOOLS, usage=None)
    api = BilledAPI(Plan(unbilled))
    with client_of(serve(api)) as client:
        client.responses.create(**ASKED)
        attributes = attributes_of(observed)
        assert attributes["openai_responses.usage.missing_reason"] == "no_usage"
        assert tool_attributes(attributes) == TOOL_ATTRIBUTES
        assert_tools_once(observed)
        assert observed.tokens() == {}
        api.api.stored[TOOLS.id]["usage"] = dict(COUNTS)
        for _ in range(2):
            client.responses.retrieve(TOOLS.id)
    assert observed.tokens() == COUNTED_ONCE
    assert_tools_once(observed)
    assert late(observed) == {"no_usage": 1}


def test_tools_that_became_known_after_the_call_was_recorded_count_once(
    serve: Serve, instrument: Instrument
) -> None:
    """Where a response told only its items at first, its billed searches count when they are seen."""
    observed = instrument()
    items = [item for item in TOOLS.response()["output"] if item["type"].endswith("_call")]
    api = BilledAPI(Plan(answer(*items, counts=None)))
    with client_of(serve(api)) as client:
        response = client.responses.create(**ASKED)
        observed.span()
        assert tool_calls(observed) == TOOL_CALLS
        assert searches(observed) == 0
        api.api.stored[response.id] |= {"usage": dict(COUNTS), "tool_usage": TOOLS.fields["tool_usage"]}
        for _ in range(2):
            client.responses.retrieve(response.id)
    assert observed.tokens() == COUNTED_ONCE
    assert tool_calls(observed) == TOOL_CALLS
    assert tool_tokens(observed) == TOOL_TOKENS
    assert searches(observed) == SEARCHES


# --- who pays what -----------------------------------------------------------------------------------


def test_the_service_tier_is_on_token_and_duration_points(serve: Serve, observed: Observed) -> None:
    """Two tiers of one model are two series, each with its own tokens."""
    tiers = {"default": usage(7, 21), "priority": usage(100, 200)}
    server = serve(
        BilledAPI(
            lambda request: Plan(
                answer(
                    counts=tiers[request.json["service_tier"]],
                    service_tier=request.json["service_tier"],
                )
            )
        )
    )
    with client_of(server) as client:
        for tier in ("default", "priority", "priority"):
            client.responses.create(**ASKED, extra_body={"service_tier": tier})
    tier_of = "openai.response.service_tier"
    totals = {
        (point.attributes[tier_of], point.attributes["gen_ai.token.type"]): point.sum
        for point in observed.points("gen_ai.client.token.usage")
    }
    assert totals == {
        ("default", "input"): 7,
        ("default", "output"): 21,
        ("priority", "input"): 200,
        ("priority", "output"): 400,
    }
    durations = observed.points("gen_ai.client.operation.duration")
    assert {point.attributes[tier_of]: point.count for point in durations} == {"default": 1, "priority": 2}


ASKED_WINDOWS = {"2h": "2h", "8h": "8h", "soonest": None, "": None, "7 days": None, "2h" * 99: None}


@pytest.mark.parametrize("window", ASKED_WINDOWS)
def test_the_completion_window_is_on_token_points(window: str, serve: Serve, observed: Observed) -> None:
    """What was asked for as a window is on the span and on the token points, and on no other."""
    asked = {"background": True, "background_options": {"completion_window": window}}
    api = BilledAPI(Plan(answer()))
    with client_of(serve(api)) as client:
        response = client.responses.create(**ASKED, extra_body=asked)
        observed.span()
        client.responses.retrieve(response.id)
    name, expected = "openai_responses.request.completion_window", ASKED_WINDOWS[window]
    assert attributes_of(observed).get(name) == expected
    points = observed.points("gen_ai.client.token.usage")
    assert [point.attributes.get(name) for point in points] == [expected] * 2
    assert observed.tokens() == COUNTED_ONCE
    (duration,) = observed.points("gen_ai.client.operation.duration")
    assert name not in duration.attributes


def test_a_window_by_name_is_a_window_too(serve: Serve, observed: Observed) -> None:
    """What the SDK takes by name arrives like what is put into the body."""
    if "background_options" not in openai.resources.responses.Responses.create.__code__.co_varnames:
        pytest.skip("not in this release of the SDK")
    with client_of(serve(BilledAPI(Plan(answer())))) as client:
        client.responses.create(**ASKED, background=True, background_options={"completion_window": "8h"})
    attributes = attributes_of(observed)
    assert attributes["openai_responses.request.completion_window"] == "8h"
    assert attributes["openai_responses.usage.missing_reason"] == "deferred"


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "streamed"])
def test_a_window_without_background_changes_nothing(streams: bool, serve: Serve, observed: Observed) -> None:
    """A server that ignores a window answers at once, and its answer is counted."""
    asked = {"background_options": {"completion_window": "2h"}}
    with client_of(serve(BilledAPI(Plan(answer())))) as client:
        made = client.responses.create(**ASKED, stream=streams, extra_body=asked)
        if streams:
            assert list(made)
    attributes = attributes_of(observed)
    assert attributes["openai_responses.request.completion_window"] == "2h"
    assert attributes["openai_responses.usage.source"] == ("stream" if streams else "response")
    assert observed.tokens() == COUNTED_ONCE


def test_a_window_that_is_answered_at_once_is_counted(serve: Serve, observed: Observed) -> None:
    """A server that knows no background has the answer in the create itself."""
    server = serve(BilledAPI(lambda _: Reply.json(answer().response())))
    with client_of(server) as client:
        client.responses.create(**ASKED, **WINDOW)
    assert attributes_of(observed)["openai_responses.usage.source"] == "response"
    assert observed.tokens() == COUNTED_ONCE


def test_a_background_response_that_is_not_stored_is_asked_for(serve: Serve, observed: Observed) -> None:
    """`background` with `store=False` is kept for some minutes, which is enough for its look-up."""
    server = serve(BilledAPI(Plan(answer(), get_replies=("in_progress",))))
    with client_of(server) as client:
        client.responses.create(**ASKED, store=False, **BACKGROUND)
        assert attributes_of(observed)["openai_responses.usage.source"] == "retrieval"
    assert observed.tokens() == COUNTED_ONCE


def test_a_response_in_the_foreground_that_is_not_stored_is_not_asked_for(
    serve: Serve, observed: Observed
) -> None:
    """Without `background` no GET can find it."""
    server = serve(BilledAPI(Plan(answer(), cut_after=3, end=Cut())))
    with client_of(server) as client, pytest.raises(CUT):
        list(client.responses.create(**ASKED, store=False, stream=True))
    assert attributes_of(observed)["openai_responses.usage.missing_reason"] == "not_stored"
    assert [request.method for request in server.requests] == ["POST"]


# --- the prompt cache --------------------------------------------------------------------------------

MISSES: dict[str, tuple[Any, str | None]] = {
    "a reason": ({"type": "cache_miss", "reason": "tools_changed"}, "tools_changed"),
    "a new reason": ({"type": "cache_miss", "reason": "the canary's prompt"}, "other"),
    "no reason": ({"type": "cache_miss"}, "other"),
    "a reason that is no text": ({"type": "cache_miss", "reason": {"text": "canary"}}, "other"),
    "a hit": ({"type": "cache_hit"}, None),
    "null": (None, None),
    "a list": (["cache_miss"], None),
}


@pytest.mark.parametrize("name", MISSES)
def test_why_the_prompt_cache_missed_is_one_of_a_few_words(
    name: str, serve: Serve, observed: Observed
) -> None:
    """The reason is a word of the API's, or `other`. What else a server writes is no attribute."""
    diagnostics, word = MISSES[name]
    with client_of(serve(BilledAPI(Plan(answer(prompt_cache_diagnostics=diagnostics))))) as client:
        client.post("/responses", body=ASKED, cast_to=object)
    assert attributes_of(observed).get("openai_responses.prompt_cache.miss_reason") == word
    assert "canary" not in "".join(text for _, text in observed.told())


# --- all of it ---------------------------------------------------------------------------------------


def test_the_counters_are_the_bill(serve: Serve, instrument: Instrument) -> None:
    """A day of calls of every kind, in every way: the sums are those of the server, to the last token."""
    observed = instrument(grace_timeout=0.0)
    bill: list[Json] = []

    def plan(request: SeenRequest) -> Plan:
        number = len(bill)
        made = answer(
            *[call_of("web_search_call") for _ in range(number % 4)],
            *[call_of("code_interpreter_call") for _ in range(number % 2)],
            counts=usage(10 + number, 20 + number, cached=number),
            tool_usage=tool_usage(searches=number % 3, image=(number, 2 * number)),
        )
        bill.append(made.response())
        is_cut = request.json["input"] == "cut"
        return Plan(made, cut_after=4 if is_cut else None, end=Cut() if is_cut else None)

    def compacted(_: SeenRequest) -> Reply:
        bill.append(compaction(usage(1000, len(bill))))
        return Reply.json(bill[-1])

    calls = 48
    with client_of(serve(BilledAPI(plan, compact=compacted)), http_client=HTTP.Client()) as client:
        for number in range(calls):
            match number % 6:
                case 0:
                    client.responses.create(**ASKED)
                case 1:
                    assert list(client.responses.create(**ASKED, stream=True))
                case 2:
                    with pytest.raises(CUT):
                        list(client.responses.create(model="m", input="cut", stream=True))
                case 3:
                    client.post("/responses/compact", body=ASKED, cast_to=object)
                case 4:
                    client.responses.create(**ASKED, **BACKGROUND)
                case 5:
                    response = client.responses.create(**ASKED, **WINDOW)
                    for _ in range(2):
                        client.responses.retrieve(response.id)
        observed.spans(calls)
        eventually(lambda: observed.pending() == 0, "all look-ups")
    tokens = observed.tokens()
    assert tokens == {
        kind: (calls, sum(made["usage"][f"{kind}_tokens"] for made in bill)) for kind in ("input", "output")
    }
    used = [made["tool_usage"] for made in bill if "tool_usage" in made]
    items = [item["type"] for made in bill for item in made["output"]]
    assert searches(observed) == sum(tools["web_search"]["num_requests"] for tools in used)
    assert tool_tokens(observed) == {
        kind: sum(tools["image_gen"][f"{kind}_tokens"] for tools in used) for kind in ("input", "output")
    }
    assert tool_calls(observed) == {
        kind: items.count(kind) for kind in ("web_search_call", "code_interpreter_call")
    }
    assert late(observed) == {"deferred": calls / 6}

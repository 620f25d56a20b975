"""What requests, responses and usage say about themselves is read as it is: nothing guessed, nothing kept."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from otel_responses_usage import Outcome, Usage
from otel_responses_usage._facts.headers import AnswerHeaders, RateLimit
from otel_responses_usage._facts.outcome import ABANDONED, CLOSED, EXIT, TRUNCATED, Ending, ending_of
from otel_responses_usage._facts.request import (
    Operation,
    Prompt,
    ResponsesRequest,
    Server,
    describe_fetch,
    describe_generation,
    fetched_response_id,
    generating_operation,
    returned_response_id,
)
from otel_responses_usage._facts.response import Response, error_code
from otel_responses_usage._facts.tools import OutputFacts, ToolUsage

OMIT = getattr(openai, "omit", openai.NOT_GIVEN)  # what newer lines of the SDK use instead

# --- usage ---------------------------------------------------------------------------------------------

USAGES: dict[str, tuple[Any, Usage | None]] = {
    "openai": (
        {
            "input_tokens": 75,
            "input_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 11},
            "output_tokens": 23,
            "output_tokens_details": {"reasoning_tokens": 20},
            "total_tokens": 98,
        },
        Usage(75, 23, 64, 11, 20),
    ),
    "zeros": (
        {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
        },
        Usage(0, 0, 0, None, 0),
    ),
    "without details": ({"input_tokens": 1, "output_tokens": 2}, Usage(1, 2)),
    "details are null": (
        {
            "input_tokens": 1,
            "output_tokens": 2,
            "input_tokens_details": None,
            "output_tokens_details": None,
        },
        Usage(1, 2),
    ),
    "details are something else": (
        {
            "input_tokens": 1,
            "output_tokens": 2,
            "input_tokens_details": [1],
            "output_tokens_details": "2",
        },
        Usage(1, 2),
    ),
    "one count": ({"output_tokens": 2}, Usage(None, 2)),
    "large counts": ({"input_tokens": 2**40, "output_tokens": 2**62}, Usage(2**40, 2**62)),
    "more than is known": ({"input_tokens": 1, "output_tokens": 2, "cost": 3.5}, Usage(1, 2)),
    "a bool is no count": ({"input_tokens": True, "output_tokens": 2}, Usage(None, 2)),
    "a negative number is no count": ({"input_tokens": 1, "output_tokens": -2}, Usage(1, None)),
    "a text is no count": ({"input_tokens": "1", "output_tokens": 2}, Usage(None, 2)),
    "a whole number with a decimal point": ({"input_tokens": 1.0, "output_tokens": 2}, Usage(1, 2)),
    "a whole number with an exponent": (
        json.loads('{"input_tokens": 1.1e1, "output_tokens": 4e1}'),
        Usage(11, 40),
    ),
    "whole numbers in the details": (
        {
            "input_tokens": 1.0,
            "output_tokens": 2.0,
            "input_tokens_details": {"cached_tokens": 1.0, "cache_write_tokens": 0.0},
            "output_tokens_details": {"reasoning_tokens": 2e0},
        },
        Usage(1, 2, 1, 0, 2),
    ),
    "a fraction is no count": ({"input_tokens": 1.5, "output_tokens": 2}, Usage(None, 2)),
    "no number is no count": ({"input_tokens": float("nan"), "output_tokens": 2}, Usage(None, 2)),
    "infinity is no count": ({"input_tokens": float("inf"), "output_tokens": 2}, Usage(None, 2)),
    "a whole number below zero is no count": ({"input_tokens": -1.0, "output_tokens": 2}, Usage(None, 2)),
    "more than can be exported is no count": ({"input_tokens": 1e30, "output_tokens": 2}, Usage(None, 2)),
    "no count at all": ({"input_tokens": None, "output_tokens": "2"}, None),
    "names of another API": ({"prompt_tokens": 1, "completion_tokens": 2}, None),
    "details alone": ({"input_tokens_details": {"cached_tokens": 1}}, None),
    "empty": ({}, None),
    "null": (None, None),
    "a list": ([1, 2], None),
}


@pytest.mark.parametrize("name", USAGES)
def test_usage_is_what_the_api_reported(name: str) -> None:
    """A count that was not reported is `None`, a zero stays zero, and what is no count is no count."""
    usage, read = USAGES[name]
    assert Usage.from_response({"usage": usage}) == read


def test_a_response_without_the_field_has_no_usage() -> None:
    """A field that is missing is like one that is null."""
    assert Usage.from_response({"id": "resp_1"}) is None


# --- response ------------------------------------------------------------------------------------------

WHOLE = {
    "id": "resp_1",
    "model": "gpt-5.4-mini-2026-03-17",
    "status": "incomplete",
    "service_tier": "flex",
    "usage": {"input_tokens": 1, "output_tokens": 2},
    "incomplete_details": {"reason": "max_output_tokens"},
    "error": {"code": "server_error", "message": "secret"},
    "output": [{"type": "message"}, {"type": "function_call"}],
}


def test_a_response_is_read_without_its_content() -> None:
    """All the facts of a response object, and nothing else of it."""
    assert Response.from_json(WHOLE) == Response(
        id="resp_1",
        model="gpt-5.4-mini-2026-03-17",
        status="incomplete",
        service_tier="flex",
        usage=Usage(1, 2),
        incomplete_reason="max_output_tokens",
        error_code="server_error",
        calls_tools=True,
    )


@pytest.mark.parametrize("junk", [None, "", 7, True, [], {}, [None], ["x"], {"a": 1}, 1.5])
def test_a_field_of_an_unexpected_type_counts_as_left_out(junk: object) -> None:
    """Whatever a server puts into a field, reading it raises nothing and invents nothing."""
    read = Response.from_json(dict.fromkeys(WHOLE, junk))
    assert read._replace(id=None, model=None, status=None, service_tier=None) == Response()
    assert read.id is None
    assert read.status is None


@pytest.mark.parametrize("response_id", ["resp-1", "resp_" + "x" * 400, "a/b?c#d", "ä"])
def test_an_id_is_kept_whole(response_id: str) -> None:
    """Some servers put 400 characters into an id; each of them is needed to ask for the response."""
    assert Response.from_json({"id": response_id}).id == response_id


@pytest.mark.parametrize("field", ["model", "status", "service_tier"])
def test_words_of_a_server_have_a_limit(field: str) -> None:
    """What is exported but not needed whole cannot be made very long by a server."""
    read = Response.from_json({field: "x" * 10_000})
    assert getattr(read, field) == "x" * 128


@pytest.mark.parametrize(
    ("status", "terminal"),
    [
        ("completed", True),
        ("incomplete", True),
        ("failed", True),
        ("cancelled", True),
        ("in_progress", False),
        ("queued", False),
        ("new", False),
        (None, False),
    ],
)
def test_four_statuses_are_final(status: str | None, terminal: bool) -> None:
    """A response is terminal when the API says so, and not before."""
    assert Response(status=status).is_terminal is terminal


def test_a_later_sight_outranks_an_earlier_one() -> None:
    """What the later sight says counts; what it leaves out is kept from before."""
    earlier = Response.from_json(WHOLE)
    later = Response(id="resp_1", model="m@main", status="completed", usage=Usage(0, 0))
    assert earlier.merged_with(later) == earlier._replace(
        model="m@main", status="completed", usage=Usage(0, 0)
    )
    assert earlier.merged_with(Response()) == earlier
    assert Response().merged_with(earlier) == earlier


@pytest.mark.parametrize(
    ("item", "calls"),
    [
        ("function_call", True),
        ("custom_tool_call", True),
        ("computer_call", True),
        ("shell_call", True),
        ("local_shell_call", True),
        ("apply_patch_call", True),
        ("web_search_call", False),
        ("file_search_call", False),
        ("code_interpreter_call", False),
        ("image_generation_call", False),
        ("mcp_call", False),
        ("message", False),
        ("reasoning", False),
    ],
)
def test_a_tool_call_is_one_that_the_application_has_to_answer(item: str, calls: bool) -> None:
    """Tools that the service runs itself are no reason to stop."""
    assert Response.from_json({"output": [{"type": "message"}, {"type": item}]}).calls_tools is calls


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"code": "rate_limit_exceeded", "type": "requests", "message": "secret"}, "rate_limit_exceeded"),
        ({"code": None, "type": "insufficient_quota"}, "insufficient_quota"),
        ({"code": "", "type": "insufficient_quota"}, "insufficient_quota"),
        ({"type": "error", "code": None, "message": "secret"}, None),
        ({"code": 500}, "500"),
        ({"code": True}, None),
        ({"code": {"a": 1}}, None),
        ({"code": "x" * 1000}, "x" * 128),
        ({"message": "secret"}, None),
        ({}, None),
        ("secret", None),
        (None, None),
    ],
)
def test_an_error_is_named_by_its_code_and_never_by_its_message(error: object, code: str | None) -> None:
    """The code, else the type; a message may hold anything and is not read."""
    assert error_code(error) == code


# --- outcome -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "is_error"),
    [
        (Outcome.COMPLETED, False),
        (Outcome.INCOMPLETE, False),
        (Outcome.CLOSED, False),
        (Outcome.FAILED, True),
        (Outcome.ERROR, True),
        (Outcome.CUT, True),
        (Outcome.TRUNCATED, True),
        (Outcome.CANCELLED, False),
        (Outcome.ABANDONED, True),
        (Outcome.EXIT, True),
    ],
)
def test_only_a_call_that_went_wrong_is_an_error(outcome: Outcome, is_error: bool) -> None:
    """An answer out of tokens is no error. A stream that the application closed or cancelled is no error."""
    assert Ending(outcome).is_error is is_error


def test_every_outcome_is_decided() -> None:
    """The table above leaves no outcome out, and the fixed endings say what the contract says."""
    assert len(Outcome) == 10
    assert {ending.outcome: ending.error_type for ending in (TRUNCATED, CLOSED, ABANDONED, EXIT)} == {
        Outcome.TRUNCATED: "stream_truncated",
        Outcome.CLOSED: None,
        Outcome.ABANDONED: "stream_abandoned",
        Outcome.EXIT: "process_exit",
    }


@pytest.mark.parametrize(
    ("outcome", "response", "reason"),
    [
        (Outcome.COMPLETED, Response(), "stop"),
        (Outcome.COMPLETED, Response(calls_tools=True), "tool_calls"),
        (Outcome.INCOMPLETE, Response(), "length"),
        (Outcome.INCOMPLETE, Response(incomplete_reason="max_output_tokens"), "length"),
        (Outcome.INCOMPLETE, Response(incomplete_reason="max_tokens"), "length"),
        (Outcome.INCOMPLETE, Response(incomplete_reason="length"), "length"),
        (Outcome.INCOMPLETE, Response(incomplete_reason="content_filter"), "content_filter"),
        (Outcome.INCOMPLETE, Response(incomplete_reason="new"), "new"),
        (Outcome.INCOMPLETE, Response(status="cancelled"), "cancelled"),
        (Outcome.INCOMPLETE, Response(status="incomplete"), "length"),
        *((outcome, Response(calls_tools=True), "error") for outcome in list(Outcome)[2:]),
    ],
)
def test_the_finish_reason_is_in_the_words_of_the_conventions(
    outcome: Outcome, response: Response, reason: str
) -> None:
    """Every outcome has one finish reason."""
    assert Ending(outcome).finish_reason(response) == reason


@pytest.mark.parametrize("said", ["completed", "incomplete", "failed", "cancelled"])
@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("completed", Outcome.COMPLETED),
        ("incomplete", Outcome.INCOMPLETE),
        ("failed", Outcome.FAILED),
        ("cancelled", Outcome.INCOMPLETE),
    ],
)
def test_the_status_outranks_the_type_of_the_event(said: str, status: str, outcome: Outcome) -> None:
    """Several servers end every answer with `response.completed`, whatever became of it."""
    assert ending_of(Response(status=status), said).outcome is outcome


@pytest.mark.parametrize("status", [None, "in_progress", "queued", "new"])
@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("completed", Outcome.COMPLETED),
        ("incomplete", Outcome.INCOMPLETE),
        ("failed", Outcome.FAILED),
        ("cancelled", Outcome.INCOMPLETE),
    ],
)
def test_the_type_of_the_event_decides_without_a_final_status(
    status: str | None, said: str, outcome: Outcome
) -> None:
    """Where the last sight of the response is not final, its terminal event says how it ended."""
    assert ending_of(Response(status=status), said).outcome is outcome


@pytest.mark.parametrize(("code", "error_type"), [("server_error", "server_error"), (None, "failed")])
def test_a_failure_has_a_type(code: str | None, error_type: str) -> None:
    """A response that failed without saying why has an `error.type` all the same."""
    assert ending_of(Response(error_code=code), "failed") == Ending(Outcome.FAILED, error_type)


# --- request -------------------------------------------------------------------------------------------

SERVER = Server("openai", "api.openai.com", 443)


@pytest.mark.parametrize(
    ("method", "path", "operation"),
    [
        ("post", "/responses", Operation.CHAT),
        ("POST", "/responses/", Operation.CHAT),
        ("post", "responses", Operation.CHAT),
        ("post", "https://host/v1/responses", Operation.CHAT),
        ("post", "/openai/deployments/d/responses", Operation.CHAT),
        ("post", "/responses/compact", Operation.COMPACT),
        ("POST", "https://host/v1/responses/compact/", Operation.COMPACT),
        ("get", "/responses", None),
        ("get", "/responses/compact", None),
        ("post", "/responses/resp_1/cancel", None),
        ("post", "/responses/resp_1/compact", None),
        ("post", "/compact", None),
        ("post", "/responses/input_tokens", None),
        ("post", "/myresponses", None),
        ("post", "/chat/completions", None),
    ],
)
def test_a_call_is_recognised_by_method_and_path(method: str, path: str, operation: Operation | None) -> None:
    """What generates tokens is a call; cancelling, counting and other operations are none."""
    assert generating_operation(method, path) is operation


@pytest.mark.parametrize(
    ("method", "path", "response_id"),
    [
        ("get", "/responses/resp_1", "resp_1"),
        ("GET", "/responses/resp_1/", "resp_1"),
        ("get", "https://host/v1/responses/resp-1", "resp-1"),
        ("get", "/responses/a%2Fb", "a%2Fb"),
        ("get", "/responses/resp_1/input_items", None),
        ("get", "/responses", None),
        ("get", "/responses/", None),
        ("delete", "/responses/resp_1", None),
        ("post", "/responses/resp_1", None),
        ("get", "/responses/resp_1/input_items/responses_1", None),
    ],
)
def test_a_fetch_names_its_response(method: str, path: str, response_id: str | None) -> None:
    """The id of the response is read from the path of a GET, and of nothing else."""
    assert fetched_response_id(method, path) == response_id


@pytest.mark.parametrize(
    ("method", "path", "response_id"),
    [
        ("get", "/responses/resp_1", "resp_1"),
        ("post", "/responses/resp_1/cancel", "resp_1"),
        ("POST", "https://host/v1/responses/resp_1/cancel/", "resp_1"),
        ("get", "/responses/resp_1/cancel", None),
        ("post", "/responses/resp_1/compact", None),
        ("post", "/responses", None),
        ("delete", "/responses/resp_1", None),
    ],
)
def test_fetching_and_cancelling_show_a_response(method: str, path: str, response_id: str | None) -> None:
    """These are the requests whose answer is a response that an earlier call made."""
    assert returned_response_id(method, path) == response_id


ASKED = {
    "model": "gpt-5.4",
    "input": "secret",
    "instructions": "secret",
    "stream": True,
    "store": False,
    "background": True,
    "max_output_tokens": 100,
    "temperature": 1,
    "top_p": 0.5,
    "reasoning": {"effort": "high", "summary": "auto"},
    "previous_response_id": "resp_0",
    "conversation": {"id": "conv_1"},
    "text": {"format": {"type": "json_schema", "schema": {}}},
    "service_tier": "flex",
    "background_options": {"completion_window": "8h", "continuation_id": "secret"},
    "prompt": {"id": "pmpt_1", "version": "2", "variables": {"name": "secret"}},
}


def test_a_request_is_described_without_its_content() -> None:
    """All that a request asks for, except what it says."""
    request = describe_generation(Operation.CHAT, ASKED, SERVER)
    assert request == ResponsesRequest(
        operation=Operation.CHAT,
        server=SERVER,
        streams=True,
        model="gpt-5.4",
        stored=False,
        background=True,
        max_output_tokens=100,
        temperature=1.0,
        top_p=0.5,
        reasoning_effort="high",
        previous_response_id="resp_0",
        conversation_id="conv_1",
        output_type="json",
        service_tier="flex",
        completion_window="8h",
        prompt=Prompt("pmpt_1", "2"),
    )
    assert "secret" not in repr(request)


def test_what_is_not_asked_for_is_unknown() -> None:
    """An empty request has the defaults of the API and no value of our own making."""
    assert describe_generation(Operation.CHAT, {}, SERVER) == ResponsesRequest(
        Operation.CHAT, SERVER, streams=False
    )
    assert describe_generation(Operation.CHAT, {}, SERVER).stored, (
        "the API stores a response unless told not to"
    )


@pytest.mark.parametrize("junk", [None, openai.NOT_GIVEN, OMIT, object(), "", [], {}, b"x"])
def test_what_an_application_may_pass_by_mistake_is_unknown(junk: object) -> None:
    """The SDK's sentinels and values of a wrong type count as not given, and nothing is raised."""
    request = describe_generation(Operation.CHAT, dict.fromkeys(ASKED, junk), SERVER)
    # The SDK streams whatever is true, so that is no mistake.
    assert request == describe_generation(Operation.CHAT, {}, SERVER)._replace(streams=bool(junk))


def test_a_bool_is_no_number_in_a_request() -> None:
    """`True` is an int to Python, but nobody asks for one token with it."""
    request = describe_generation(
        Operation.CHAT, {"max_output_tokens": True, "temperature": True, "top_p": False}, SERVER
    )
    assert (request.max_output_tokens, request.temperature, request.top_p) == (None, None, None)


def test_zero_is_a_value() -> None:
    """A temperature of zero is asked for, and not left out."""
    request = describe_generation(
        Operation.CHAT, {"temperature": 0, "top_p": 0.0, "max_output_tokens": 0}, SERVER
    )
    assert (request.temperature, request.top_p, request.max_output_tokens) == (0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("text", "output_type"),
    [
        ({"format": {"type": "text"}}, "text"),
        ({"format": {"type": "json_object"}}, "json"),
        ({"format": {"type": "json_schema"}}, "json"),
        ({"format": {"type": "grammar"}}, None),
        ({"verbosity": "low"}, None),
    ],
)
def test_the_output_type_is_a_word_of_the_conventions(text: Any, output_type: str | None) -> None:
    """A format that the conventions have no word for is left out."""
    assert describe_generation(Operation.CHAT, {"text": text}, SERVER).output_type == output_type


@pytest.mark.parametrize("conversation", ["conv_1", {"id": "conv_1"}])
def test_a_conversation_is_an_id_or_an_object(conversation: object) -> None:
    """Both ways of naming a conversation name the same one."""
    assert (
        describe_generation(Operation.CHAT, {"conversation": conversation}, SERVER).conversation_id
        == "conv_1"
    )


@pytest.mark.parametrize(
    ("query", "cursor"),
    [
        ({"starting_after": 0}, "0"),
        ({"starting_after": "17"}, "17"),
        ({}, None),
        ({"starting_after": OMIT}, None),
    ],
)
def test_a_fetch_is_described_by_its_response_and_cursor(query: dict[str, Any], cursor: str | None) -> None:
    """A fetch knows where it starts; event 0 is a place to start from."""
    request = describe_fetch("resp_1", query, SERVER)
    assert request.operation is Operation.FETCH_RESPONSE
    assert (request.response_id, request.stream_cursor, request.model) == ("resp_1", cursor, None)
    assert request.span_name == "fetch_response"


def test_a_span_is_named_after_the_model() -> None:
    """The name holds the operation and the model, nothing of higher cardinality."""
    assert describe_generation(Operation.CHAT, ASKED, SERVER).span_name == "chat gpt-5.4"
    assert describe_generation(Operation.CHAT, {}, SERVER).span_name == "chat"


@pytest.mark.parametrize(
    ("host", "provider"),
    [
        ("api.openai.com", "openai"),
        ("eu.api.openai.com", "openai"),
        ("mine.openai.azure.com", "azure.ai.openai"),
        ("mine.cognitiveservices.azure.com", "azure.ai.openai"),
        ("mine.services.ai.azure.com", "azure.ai.inference"),
        ("bedrock-mantle.us-east-1.api.amazonaws.com", "aws.bedrock"),
        ("api.x.ai", "x_ai"),
        ("x.ai", "x_ai"),
        ("notx.ai", "openai"),
        ("api.openai.com.evil.example", "openai"),
        ("openrouter.ai", "openrouter"),
        ("api.deepseek.com", "deepseek"),
        ("127.0.0.1", "openai"),
        ("", "openai"),
    ],
)
def test_the_provider_is_known_by_its_host(host: str, provider: str) -> None:
    """A host is matched by its whole domain; an unknown one speaks OpenAI's protocol."""
    assert Server.from_url_parts(host, 443, "https").provider == provider


@pytest.mark.parametrize(
    ("port", "scheme", "known"),
    [(8080, "http", 8080), (None, "http", 80), (None, "https", 443), (None, "x", None)],
)
def test_the_port_is_known_by_the_scheme(port: int | None, scheme: str, known: int | None) -> None:
    """A URL without a port has that of its scheme."""
    server = Server.from_url_parts("host", port, scheme, azure=True)
    assert server == Server("azure.ai.openai", "host", known)


def test_a_host_that_is_not_known_is_left_out() -> None:
    """An empty address is no address."""
    assert Server.from_url_parts(None, None, "https").address is None
    assert Server.from_url_parts("", None, "https").address is None


def test_facts_cannot_be_changed() -> None:
    """A fact that was handed over stays what it was."""
    facts: list[tuple[Any, str]] = [
        (Usage(), "input_tokens"),
        (Response(), "id"),
        (CLOSED, "outcome"),
        (SERVER, "port"),
        (describe_generation(Operation.CHAT, {}, SERVER), "model"),
    ]
    for fact, name in facts:
        with pytest.raises(AttributeError):
            setattr(fact, name, "changed")
    assert json.dumps(Usage(1)._asdict()) == (
        '{"input_tokens": 1, "output_tokens": null, "cache_read_input_tokens": null,'
        ' "cache_write_input_tokens": null, "reasoning_output_tokens": null}'
    )


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({"completion_window": "2h"}, "2h"),
        ({"completion_window": "24h"}, "24h"),
        ({"completion_window": "soonest"}, None),
        ({"completion_window": "h"}, None),
        ({"completion_window": "\u0664h"}, None),
        ({"completion_window": "1" * 99 + "h"}, None),
        ({"completion_window": 2}, None),
        ({}, None),
        ("2h", None),
    ],
)
def test_a_completion_window_is_a_number_of_hours(options: object, window: str | None) -> None:
    """A response with a window may take hours. `soonest` and anything else is no window."""
    request = describe_generation(Operation.CHAT, {"background_options": options}, SERVER)
    assert request.completion_window == window


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ({"id": "pmpt_1"}, Prompt("pmpt_1", None)),
        ({"id": "pmpt_1", "version": 2}, Prompt("pmpt_1", None)),
        ({"version": "3"}, Prompt(None, "3")),
        ({}, None),
        ("pmpt_1", None),
    ],
)
def test_a_stored_prompt_has_a_name_and_a_version(prompt: object, expected: Prompt | None) -> None:
    """Its variables are content, and are not read."""
    assert describe_generation(Operation.CHAT, {"prompt": prompt}, SERVER).prompt == expected


# --- tools ---------------------------------------------------------------------------------------------

ZERO_TOOL_USAGE = {"image_gen": {"input_tokens": 0, "output_tokens": 0}, "web_search": {"num_requests": 0}}
SVG = {"model": "svg-1", "input_tokens": 7, "output_tokens": 900, "reasoning_tokens": 5, "total_tokens": 907}
TOOLS: dict[str, tuple[Any, ToolUsage | None]] = {
    "nothing": ({}, None),
    "null": ({"tool_usage": None, "output": None}, None),
    "junk": ({"tool_usage": [1], "output": [None, 3, {"type": 4}, "web_search_call"]}, None),
    "zeros": ({"tool_usage": ZERO_TOOL_USAGE}, ToolUsage((), 0, 0, 0)),
    "only searches": ({"tool_usage": {"web_search": {"num_requests": 3}}}, ToolUsage((), 3, None, None)),
    "no numbers": ({"tool_usage": {"web_search": {"num_requests": "3"}, "image_gen": 5}}, None),
    "items": (
        {"output": [{"type": "web_search_call"}, {"type": "message"}, {"type": "web_search_call"}]},
        ToolUsage((("web_search_call", 2),)),
    ),
    "a tool of tomorrow": ({"output": [{"type": "moon_call"}]}, ToolUsage((("moon_call", 1),))),
    "no name": (
        {"output": [{"type": "\u043e_call"}, {"type": "x" * 70 + "_call"}]},
        ToolUsage((("other", 2),)),
    ),
    "images": (
        {"output": [{"type": "image_generation_call"}], "tool_usage": {"image_gen": {"input_tokens": 4}}},
        ToolUsage((("image_generation_call", 1),), None, 4, None),
    ),
    "svg": (
        {
            "output": [
                {"type": "image_generation_call", "svg_usage": SVG},
                {"type": "image_generation_call", "svg_usage": SVG},
            ],
            "tool_usage": ZERO_TOOL_USAGE,
        },
        ToolUsage((("image_generation_call", 2),), 0, 14, 1800),
    ),
    "svg alone": (
        {"output": [{"type": "image_generation_call", "svg_usage": SVG}]},
        ToolUsage((("image_generation_call", 1),), None, 7, 900),
    ),
    "of the application": (
        {
            "output": [
                {"type": kind}
                for kind in (
                    "function_call",
                    "custom_tool_call",
                    "computer_call",
                    "local_shell_call",
                    "apply_patch_call",
                )
            ]
        },
        None,
    ),
    "hosted shell": (
        {"output": [{"type": "shell_call", "environment": {"type": "container_reference"}}]},
        ToolUsage((("shell_call", 1),)),
    ),
    "local shell": ({"output": [{"type": "shell_call", "environment": {"type": "local"}}]}, None),
    "shell": ({"output": [{"type": "shell_call", "environment": None}]}, None),
    "tool search": (
        {"output": [{"type": "tool_search_call", "execution": "server"}]},
        ToolUsage((("tool_search_call", 1),)),
    ),
    "tool search here": ({"output": [{"type": "tool_search_call", "execution": "client"}]}, None),
}


@pytest.mark.parametrize(("response", "tools"), TOOLS.values(), ids=TOOLS)
def test_the_use_of_hosted_tools_is_read(response: Any, tools: ToolUsage | None) -> None:
    """What hosted tools made and used, as reported: absent is unknown, zero is zero."""
    assert OutputFacts.from_response(response).tools == tools


def test_a_server_cannot_make_us_keep_many_tool_types() -> None:
    """Past some types the others are counted together."""
    output = [{"type": f"tool{number}_call"} for number in range(50)]
    tools = OutputFacts.from_response({"output": output}).tools
    assert tools is not None
    assert sum(count for _, count in tools.calls) == 50
    assert len(tools.calls) == 17
    assert dict(tools.calls)["other"] == 34


def test_a_call_for_the_application_is_no_call_of_a_hosted_tool() -> None:
    """The finish reason `tool_calls` means that the application has something to run."""
    hosted = [{"type": "web_search_call"}, {"type": "mcp_call"}, {"type": "code_interpreter_call"}]
    assert not OutputFacts.from_response({"output": hosted}).calls_application
    assert OutputFacts.from_response({"output": [*hosted, {"type": "function_call"}]}).calls_application


@pytest.mark.parametrize(
    ("diagnostics", "reason"),
    [
        ({"type": "cache_miss", "reason": "tools_changed", "cache_missed_tokens": 5}, "tools_changed"),
        ({"type": "cache_miss", "reason": "the secret prompt"}, "other"),
        ({"type": "cache_miss"}, "other"),
        ({"type": "cache_hit"}, None),
        ({"type": "unavailable", "reason": "tools_changed"}, None),
        (None, None),
    ],
)
def test_a_cache_miss_has_a_reason_of_a_closed_set(diagnostics: object, reason: str | None) -> None:
    """No text of a server gets through."""
    response = Response.from_json({"prompt_cache_diagnostics": diagnostics})
    assert response.cache_miss_reason == reason


def test_a_running_response_has_no_final_tool_usage() -> None:
    """Neither its tokens nor what its tools have used so far."""
    response = Response.from_json({"tool_usage": {"web_search": {"num_requests": 3}}})
    assert response.tools is not None
    assert response.without_usage().tools is None


# --- headers -------------------------------------------------------------------------------------------


def test_the_headers_of_the_api_are_read() -> None:
    """The request id and the rate limits, whatever the case of their names."""
    headers = [
        (b"content-type", b"application/json"),
        (b"X-Request-ID", b"req_1"),
        (b"x-ratelimit-limit-requests", b"10000"),
        (b"x-ratelimit-limit-tokens", b"2000000"),
        (b"X-RateLimit-Remaining-Requests", b"9999"),
        (b"x-ratelimit-remaining-tokens", b"1999990"),
        (b"x-ratelimit-reset-tokens", b"17ms"),
    ]
    limits = (RateLimit("tokens", 2_000_000, 1_999_990), RateLimit("requests", 10_000, 9_999))
    assert AnswerHeaders.from_raw(headers) == AnswerHeaders("req_1", limits)


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b"many", b"9" * 30, "\u0664".encode()])
def test_a_rate_limit_that_is_no_count_is_unknown(value: bytes) -> None:
    """Some servers send -1 where there is no limit."""
    assert AnswerHeaders.from_raw([(b"x-ratelimit-remaining-tokens", value)]).rate_limits == ()


def test_a_request_id_is_short_text() -> None:
    """Whatever a server sends there."""
    request_id = AnswerHeaders.from_raw([(b"x-request-id", b"\xff" + b"a" * 1000)]).request_id
    assert request_id is not None
    assert len(request_id) == 128
    assert AnswerHeaders.from_raw([(b"x-request-id", b"")]) == AnswerHeaders()
    assert AnswerHeaders.from_raw([]) == AnswerHeaders()

"""Where usage cannot be known, the API can be asked what the input was, if that is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from conftest import Instrument, Serve
from embedded.answer import Answer
from embedded.http_server import Hold, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI
from observed import Observed, eventually, token_attributes
from otel_responses_usage import Config
from otel_responses_usage._call.input_count import PARAMETERS

COUNT = "openai_responses.usage.input_count"
KEY = "sk-canary-of-the-key"
PROMPT = "canary-of-the-prompt"
ASKED: dict[str, Any] = {
    "model": "gpt-5.4-mini",
    "input": [{"role": "user", "content": PROMPT}],
    "instructions": "be brief",
    "temperature": 0.5,
    "metadata": {"a": "b"},
    "store": False,
}
COUNTED = {"object": "response.input_tokens", "input_tokens": 77}


def api(count: Callable[[], Reply], plan: Plan | None = None) -> Callable[[SeenRequest], Any]:
    """The Responses API, with a route that counts input tokens."""
    plan = plan or Plan(Answer(), cut_after=4, end=Hold())
    answers = ResponsesAPI(lambda _: plan)

    def answer(request: SeenRequest) -> Any:
        return count() if request.path.endswith("/input_tokens") else answers(request)

    return answer


def counts(server: ScriptedServer) -> list[SeenRequest]:
    """The requests for a count that the server has seen."""
    return [request for request in server.requests if request.path.endswith("/input_tokens")]


def leave(server: ScriptedServer, **asked: Any) -> None:
    """Make a call and close its stream after the first event."""
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
        client.responses.create(**{**ASKED, **asked}, stream=True) as stream,
    ):
        next(iter(stream))


def value_of(observed: Observed) -> list[tuple[int, dict[str, Any]]]:
    return [(point.value, dict(point.attributes)) for point in observed.points(COUNT)]


def test_the_input_of_a_call_without_usage_is_counted(instrument: Instrument, serve: Serve) -> None:
    """One request with the call's credentials and what it takes; the count is never in the usage."""
    observed = instrument(input_count=True)
    server = serve(api(lambda: Reply.json(COUNTED)))
    leave(server)
    span = observed.span()
    attributes = dict(span.attributes or {})
    assert attributes[COUNT] == 77
    assert attributes["openai_responses.usage.missing_reason"] == "not_stored"
    assert token_attributes(span) == {}
    assert observed.tokens() == {}
    assert value_of(observed) == [
        (
            77,
            {
                "gen_ai.provider.name": "openai",
                "gen_ai.request.model": "gpt-5.4-mini",
                "openai_responses.usage.missing_reason": "not_stored",
            },
        )
    ]
    (request,) = counts(server)
    assert request.method == "POST"
    assert request.path == "/v1/responses/input_tokens"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.json == {name: ASKED[name] for name in ("model", "input", "instructions")}
    assert observed.pending() == 0
    told = "".join(text for _, text in observed.told())
    assert PROMPT not in told
    assert KEY not in told


def test_a_call_that_is_looked_up_in_vain_is_counted(instrument: Instrument, serve: Serve) -> None:
    """First the look-up, and then one request for the count. The span keeps the time of its stream."""
    observed = instrument(input_count=True)
    plan = Plan(Answer(), cut_after=4, end=Hold(), fate="lost")
    server = serve(api(lambda: Reply.json(COUNTED), plan))
    leave(server, store=True)
    attributes = dict(observed.span().attributes or {})
    assert attributes[COUNT] == 77
    assert attributes["openai_responses.usage.missing_reason"] == "not_found"
    assert attributes["openai_responses.retrieval.attempts"] == 4
    assert len(counts(server)) == 1
    assert observed.pending() == 0


@pytest.mark.parametrize(
    "answer",
    [
        Reply.json({"error": {"message": "no such route"}}, status=404),
        Reply.json({"error": {"message": "busy"}}, status=503),
        Reply.json({"input_tokens": "many"}),
        Reply.json([]),
    ],
    ids=["404", "503", "no number", "no object"],
)
def test_a_server_that_does_not_count_is_asked_once(
    answer: Reply, instrument: Instrument, serve: Serve
) -> None:
    """Then there is no count, and the call has its reason as before."""
    observed = instrument(input_count=True)
    server = serve(api(lambda: answer))
    leave(server)
    attributes = dict(observed.span().attributes or {})
    assert COUNT not in attributes
    assert attributes["openai_responses.usage.missing_reason"] == "not_stored"
    assert value_of(observed) == []
    assert len(counts(server)) == 1


def test_a_server_without_that_route_is_left_alone(instrument: Instrument, serve: Serve) -> None:
    """After five failed counts in a row its circuit opens. It says nothing about responses."""
    observed = instrument(input_count=True, max_concurrency=1)
    server = serve(api(lambda: Reply.json({}, status=404)))
    for number in range(8):
        leave(server)
        observed.spans(number + 1)
    assert len(counts(server)) == 5
    assert observed.calls() == {"not_stored": 8}


@pytest.mark.parametrize("stored", [True, False])
def test_nothing_is_counted_unless_it_is_wanted(stored: bool, instrument: Instrument, serve: Serve) -> None:
    """By default nothing is sent."""
    observed = instrument()
    server = serve(api(lambda: Reply.json(COUNTED), Plan(Answer(), cut_after=4, end=Hold(), fate="lost")))
    leave(server, store=stored)
    assert COUNT not in (observed.span().attributes or {})
    assert counts(server) == []


def test_a_call_with_usage_is_not_counted(instrument: Instrument, serve: Serve) -> None:
    """Neither if its stream tells the usage, nor if a look-up does."""
    observed = instrument(input_count=True)
    server = serve(api(lambda: Reply.json(COUNTED), Plan(Answer())))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        list(client.responses.create(**ASKED, stream=True))
    leave(server, store=True)
    observed.spans(2)
    assert all(token_attributes(span) for span in observed.spans(2))
    assert counts(server) == []


def test_a_refused_call_is_not_counted(instrument: Instrument, serve: Serve) -> None:
    """It is not billed."""
    observed = instrument(input_count=True)
    refusal = Reply.json({"error": {"message": "no", "code": "bad"}}, status=400)
    server = serve(lambda _: refusal)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.BadRequestError),
    ):
        client.responses.create(**ASKED)
    observed.span()
    assert counts(server) == []


def test_a_list_that_the_application_goes_on_with_is_counted_as_sent(
    instrument: Instrument, serve: Serve
) -> None:
    """Agents add to their list of messages. What was sent counts."""
    observed = instrument(input_count=True)
    server = serve(api(lambda: Reply.json(COUNTED)))
    messages = [{"role": "user", "content": PROMPT}]
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client,
        client.responses.create(**{**ASKED, "input": messages}, stream=True) as stream,
    ):
        messages.append({"role": "user", "content": "later"})
        next(iter(stream))
    observed.span()
    assert [request.json["input"] for request in counts(server)] == [messages[:1]]


def test_a_stored_prompt_is_not_counted(instrument: Instrument, serve: Serve) -> None:
    """The API takes no stored prompt for a count, so the count would be too low."""
    observed = instrument(input_count=True)
    server = serve(api(lambda: Reply.json(COUNTED)))
    for number in range(6):
        leave(server, extra_body={"prompt": {"id": "pmpt_1", "version": "2"}})
        attributes = dict(observed.spans(number + 1)[-1].attributes or {})
        assert COUNT not in attributes
        assert attributes["openai_responses.usage.missing_reason"] == "not_stored"
    assert counts(server) == []
    assert observed.pending() == 0
    # It says nothing about the server.
    leave(server)
    assert dict(observed.spans(7)[-1].attributes or {})[COUNT] == 77


def test_an_exit_does_not_wait_for_a_count(instrument: Instrument, serve: Serve) -> None:
    """A server that does not answer costs the exit timeout at most, and no call."""
    observed = instrument(input_count=True, exit_timeout=0.2)
    server = serve(api(lambda: Reply.sse([], end=Hold())))
    leave(server)
    eventually(lambda: counts(server), "the count is asked for")
    from otel_responses_usage import ResponsesUsageInstrumentor

    ResponsesUsageInstrumentor().uninstrument()
    attributes = dict(observed.span().attributes or {})
    assert attributes["openai_responses.usage.missing_reason"] == "not_stored"
    assert COUNT not in attributes


def test_the_parameters_are_those_of_the_sdk() -> None:
    """What the SDK takes for a count is what is sent, and nothing else of a call."""
    try:
        from openai.types.responses.input_token_count_params import InputTokenCountParams
    except ImportError:
        pytest.skip("this release of the SDK counts no tokens")
    known = set(InputTokenCountParams.__annotations__)
    assert known <= PARAMETERS
    assert "store" not in PARAMETERS
    assert json.dumps(sorted(PARAMETERS))


def test_the_setting_is_off_by_default() -> None:
    """It sends content once more, so it has to be asked for."""
    assert not Config().input_count

"""The embedded Responses API is one to the openai client, and it knows the truth."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import openai
import pytest

from embedded.answer import (
    FAILED,
    FILTERED,
    OUT_OF_QUOTA,
    OUT_OF_TOKENS,
    Answer,
    Ending,
    FunctionCall,
    usage,
)
from embedded.http_server import Cut, Reply, ScriptedServer
from embedded.responses_api import Plan, ResponsesAPI, error

if TYPE_CHECKING:
    from collections.abc import Iterator

RICH = Answer(
    reasoning=("**Think", "ing**"),
    pieces=("It ", "is ", "👩🏽‍🚀", "."),
    calls=(FunctionCall("weather", ('{"city"', ':"Bern"}')), FunctionCall("time", ("{}",))),
    usage=usage(20, 50, cached=8, reasoning=32),
)


@contextmanager
def served(*plans: Plan | Reply, key: str | None = None) -> Iterator[tuple[ResponsesAPI, openai.OpenAI]]:
    queue = list(plans)
    api = ResponsesAPI(lambda _: queue.pop(0), key=key)
    with (
        ScriptedServer(api) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client,
    ):
        yield api, client


def create(client: openai.OpenAI, **more: Any) -> Any:
    return client.responses.create(model="gpt-5.4-mini", input="?", **more)


def test_a_compaction_has_an_item_and_its_own_bill() -> None:
    """`responses.compact` gets one item in place of the conversation, and the usage that is billed for it."""
    with served(Plan(Answer(usage=usage(3120, 187)))) as (api, client):
        compacted = client.responses.compact(model="gpt-5.4-mini", input="?")
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(compacted.id)
    assert compacted.object == "response.compaction"
    assert [item.type for item in compacted.output] == ["compaction"]
    assert compacted.usage.to_dict() == api.stored[compacted.id]["usage"]


def test_the_sdk_assembles_what_was_answered() -> None:
    """The helper that follows a stream ends with the very response the server stored."""
    with (
        served(Plan(RICH)) as (api, client),
        client.responses.stream(model="gpt-5.4-mini", input="?") as stream,
    ):
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert Counter(event.type for event in events if event.type.endswith(".delta")) == {
        "response.reasoning_summary_text.delta": 2,
        "response.output_text.delta": 4,
        "response.function_call_arguments.delta": 3,
    }
    assert final.output_text == RICH.text
    assert final.to_dict(exclude_unset=True, mode="json").keys() >= api.stored[RICH.id].keys()
    assert [item.id for item in final.output] == [item["id"] for item in api.stored[RICH.id]["output"]]
    assert final.usage is not None
    assert final.usage.output_tokens_details.reasoning_tokens == 32


def test_the_async_client_reads_the_same() -> None:
    """The async client sees the events of the answer, in their order."""

    async def main(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="key") as client:
            stream = await client.responses.create(model="gpt-5.4-mini", input="?", stream=True)
            return [event.type async for event in stream]

    with ScriptedServer(ResponsesAPI(lambda _: Plan(RICH))) as server:
        assert asyncio.run(main(f"{server.url}/v1")) == [event["type"] for event in RICH.events()]


@pytest.mark.parametrize("ending", [OUT_OF_TOKENS, FILTERED, FAILED])
def test_an_answer_ends_as_planned(ending: Ending) -> None:
    """The last event and the stored response tell the same ending."""
    answer = Answer(ending=ending)
    with served(Plan(answer)) as (_, client):
        *_, last = create(client, stream=True)
        stored = client.responses.retrieve(answer.id)
    assert last.type == f"response.{ending.status}"
    assert last.response == stored
    assert stored.status == ending.status
    assert (stored.incomplete_details and stored.incomplete_details.reason) == ending.reason
    assert (stored.error and stored.error.code) == ending.code


def test_an_error_event_is_an_error_of_the_client() -> None:
    """The event that precedes a failure is raised by the client."""
    with (
        served(Plan(Answer((), None, ending=OUT_OF_QUOTA))) as (_, client),
        pytest.raises(openai.APIError, match="quota"),
    ):
        list(create(client, stream=True))


def test_a_cut_stream_can_be_looked_up() -> None:
    """After a cut the stored response has the exact usage of the whole answer."""
    with served(Plan(RICH, cut_after=6, end=Cut())) as (api, client):
        with pytest.raises(openai.APIConnectionError):
            list(create(client, stream=True))
        stored = client.responses.retrieve(RICH.id)
    assert stored.status == "completed"
    assert stored.usage is not None
    assert stored.usage.to_dict() == api.stored[RICH.id]["usage"] == RICH.usage


@pytest.mark.parametrize(
    ("plan", "store"), [(Plan(cut_after=4, fate="lost"), True), (Plan(cut_after=4), False)]
)
def test_what_was_not_kept_is_not_found(plan: Plan, store: bool) -> None:
    """A lost response and one made with `store=False` answer 404."""
    with served(plan) as (api, client):
        list(create(client, stream=True, store=store))
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(plan.answer.id)
    assert api.stored[plan.answer.id]["usage"] == plan.answer.usage


def test_a_background_response_is_kept_without_store() -> None:
    """A background response can be fetched, also with `store=False`: the service keeps it for minutes."""
    plan = Plan(cut_after=4)
    with served(plan) as (_, client):
        list(create(client, stream=True, store=False, background=True))
        assert client.responses.retrieve(plan.answer.id).usage is not None


def test_gets_are_answered_in_turn() -> None:
    """Planned replies come first, then the truth, as often as asked."""
    plan = Plan(get_replies=("queued", error(500, "later"), "in_progress"))
    with served(plan) as (_, client):
        assert create(client, background=True).status == "queued"
        assert client.responses.retrieve(plan.answer.id).usage is None
        with pytest.raises(openai.InternalServerError):
            client.responses.retrieve(plan.answer.id)
        statuses = [client.responses.retrieve(plan.answer.id).status for _ in range(3)]
    assert statuses == ["in_progress", "completed", "completed"]


def test_a_stuck_response_is_in_progress_for_good() -> None:
    """Some servers stop generating when the client leaves and never say so."""
    with served(Plan(cut_after=4, fate="stuck")) as (api, client):
        list(create(client, stream=True))
        [response_id] = api.stored
        assert {client.responses.retrieve(response_id).status for _ in range(5)} == {"in_progress"}


def test_a_background_stream_is_resumed() -> None:
    """A streamed GET continues after the event it names, to the end."""
    with served(Plan(RICH, cut_after=5, end=Cut())) as (_, client):
        seen: list[str] = []
        with pytest.raises(openai.APIConnectionError):
            seen.extend(event.type for event in create(client, stream=True, background=True))
        rest = client.responses.retrieve(RICH.id, stream=True, starting_after=4)
        seen.extend(event.type for event in rest)
    assert seen == [event["type"] for event in RICH.events({"background": True})]
    assert "response.queued" in seen


def test_a_cancelled_response_is_charged_later() -> None:
    """A cancel answers without usage, which a later GET then has."""
    charged = usage(11, 2)
    plan = Plan(usage_after_cancel=charged)
    with served(plan, Plan()) as (api, client):
        create(client, background=True)
        cancelled = client.responses.cancel(plan.answer.id)
        assert (cancelled.status, cancelled.usage) == ("cancelled", None)
        later = client.responses.retrieve(plan.answer.id)
        assert later.usage is not None
        assert later.usage.to_dict() == charged == api.stored[plan.answer.id]["usage"]
        with pytest.raises(openai.BadRequestError, match="synchronous"):
            client.responses.cancel(create(client).id)


def test_a_limit_cuts_the_answer() -> None:
    """`max_output_tokens` ends an answer as incomplete, billed up to the limit."""
    with served(Plan(RICH)) as (_, client):
        response = create(client, max_output_tokens=41)
    assert response.status == "incomplete"
    assert response.output_text == "It is "
    assert response.usage is not None
    assert (response.usage.output_tokens, response.usage.output_tokens_details.reasoning_tokens) == (41, 32)


def test_keys_are_checked() -> None:
    """A wrong key and no key are refused, on every route; Azure's header is as good as OpenAI's."""
    with served(Plan(), key="right") as (_, client):
        with pytest.raises(openai.AuthenticationError, match="Incorrect"):
            create(client)
        with pytest.raises(openai.AuthenticationError, match="Incorrect"):
            client.responses.retrieve("resp_x")
        headers = {"authorization": openai.Omit(), "api-key": "right"}
        assert create(client, extra_headers=headers).status == "completed"


def test_refusals_are_worded_as_the_service_words_them() -> None:
    """An unknown predecessor, an unknown route and a planned refusal are errors of the client."""
    with served(error(429, "Slow down.", code="rate_limit_exceeded")) as (_, client):
        with pytest.raises(openai.RateLimitError) as limit:
            create(client)
        with pytest.raises(openai.BadRequestError, match="resp_unknown"):
            create(client, previous_response_id="resp_unknown")
        with pytest.raises(openai.NotFoundError, match="Invalid URL"):
            client.models.list()
    assert limit.value.code == "rate_limit_exceeded"


def test_deltas_hide_their_length() -> None:
    """Deltas are padded unless the request asks for bare ones."""
    padded, bare = RICH.events(), RICH.events({"stream_options": {"include_obfuscation": False}})
    assert {(len(e["delta"]) + len(e["obfuscation"])) % 16 for e in padded if "delta" in e} == {0}
    assert not any("obfuscation" in event for event in bare)

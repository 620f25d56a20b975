"""The ledger of the chat service keeps each call once, whatever records come, and in whatever order."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry import baggage, context

from chat_service.ledger import Ledger
from embedded.answer import Answer, usage
from embedded.http_server import Cut, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI, error
from otel_responses_usage import CallRecord, Config, MissingReason, ResponsesUsageInstrumentor, Usage

BILL = usage(40, 913, cached=8, reasoning=128)
TOKENS = {"input_tokens": 40, "cached_tokens": 8, "output_tokens": 913, "reasoning_tokens": 128}
NO_TOKENS = dict.fromkeys(TOKENS)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path / "ledger.db")) as ledger:
        yield ledger


def plan(request: SeenRequest) -> Any:
    if request.json["input"] == "Refuse.":
        return error(400, "No.")
    if request.json["input"] == "Stop.":
        # It runs when it is looked up, and has ended when the application asks later.
        return Plan(Answer(usage=BILL), cut_after=5, end=Cut(), get_replies=("in_progress",) * 2)
    return Plan(Answer(usage=BILL))


@contextmanager
def recorded(on_call: Any, **settings: Any) -> Iterator[openai.OpenAI]:
    """A client, with the instrumentation on. What it has recorded is there afterwards."""
    config = Config(on_call=on_call, baggage_keys=("enduser.id",), **settings)
    with ScriptedServer(ResponsesAPI(plan)) as server:
        ResponsesUsageInstrumentor().instrument(config=config)
        token = context.attach(baggage.set_baggage("enduser.id", "ada"))
        try:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
                yield client
        finally:
            context.detach(token)
            ResponsesUsageInstrumentor().uninstrument()


@pytest.fixture(scope="module")
def records() -> dict[str, CallRecord]:
    """The records of a call that is cut, once more with late usage, of a finished and of a refused call."""
    told: list[CallRecord] = []
    with recorded(told.append, retrieval_timeout=0.0) as client:
        with pytest.raises(openai.APIError):
            list(client.responses.create(model="m", input="Stop.", stream=True))
        ResponsesUsageInstrumentor().flush()
        response_id = told[0].response_id
        while client.responses.retrieve(str(response_id)).status != "completed":
            pass
        client.responses.create(model="m", input="Finish.")
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="m", input="Refuse.")
        ResponsesUsageInstrumentor().flush()
    first, late, finished, refused = told
    assert (first.usage, first.is_late, late.is_late) == (None, False, True)
    assert late.response_id == first.response_id
    assert refused.response_id is None
    return {"first": first, "late": late, "finished": finished, "refused": refused}


def rows(ledger: Ledger, user: str = "ada") -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in ledger.of_user(user)["latest"]}


def test_a_call_is_kept_with_its_user_and_its_tokens(ledger: Ledger, records: dict[str, CallRecord]) -> None:
    """A row has the user from the baggage, the tokens, and where they were read."""
    record = records["finished"]
    ledger.record(record)
    row = rows(ledger)[str(record.response_id)]
    assert (
        row.items() >= {**TOKENS, "user": "ada", "outcome": "completed", "usage_source": "response"}.items()
    )
    assert row["missing_reason"] is None


@pytest.mark.parametrize("order", sorted(set(itertools.permutations(["first", "late", "late", "first"], 3))))
def test_records_can_come_twice_and_in_any_order(
    ledger: Ledger, records: dict[str, CallRecord], order: tuple[str, ...]
) -> None:
    """Of one call, records with and without usage lead to one row. Known usage stays."""
    for name in order:
        ledger.record(records[name])
        ledger.begin(str(records[name].response_id), question="q" * 32, user="ada", model="m")
    told = ledger.of_user("ada")
    assert (told["calls"], told["unmetered"], told["open"]) == (1, 0, 0)
    assert (told["input_tokens"], told["output_tokens"]) == (40, 913)
    call = ledger.of_question("q" * 32, "ada")
    assert call is not None
    assert call["usage_source"] == "observation"


def test_late_usage_replaces_the_reason(ledger: Ledger, records: dict[str, CallRecord]) -> None:
    """A call is unmetered until its late record."""
    ledger.record(records["first"])
    assert ledger.of_user("ada")["missing_reasons"] == {"timeout": 1}
    ledger.record(records["late"])
    assert ledger.of_user("ada")["missing_reasons"] == {}


def test_calls_without_a_response_are_unmetered(ledger: Ledger, records: dict[str, CallRecord]) -> None:
    """A call without a response id has a row, once, with the reason and no tokens."""
    refused = records["refused"]
    ledger.record(refused)
    ledger.record(refused)
    ledger.record(replace(refused, start_time_ns=refused.start_time_ns + 1))
    told = ledger.of_user("ada")
    assert (told["calls"], told["missing_reasons"]) == (2, {"no_response_id": 2})
    assert all(row.items() >= NO_TOKENS.items() for row in told["latest"])


def test_a_call_without_user_is_kept(ledger: Ledger, records: dict[str, CallRecord]) -> None:
    """A record without baggage keeps the user that was noted at the beginning, if any."""
    record = replace(records["finished"], baggage={})
    ledger.record(record)
    assert [row["user"] for row in ledger.by_user()] == ["(unknown)"]
    begun = replace(record, response_id="resp_1")
    ledger.begin("resp_1", question="q" * 32, user="bob", model="m")
    ledger.record(begun)
    assert [row["user"] for row in ledger.by_user()] == ["(unknown)", "bob"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            (Usage(40, 913, 8, None, 128), None),
            {**TOKENS, "usage_source": "retrieval", "missing_reason": None},
        ),
        ((None, "not_found"), {**NO_TOKENS, "usage_source": None, "missing_reason": "not_found"}),
    ],
)
def test_a_call_of_a_killed_process_is_settled_once(
    ledger: Ledger, records: dict[str, CallRecord], found: tuple[Usage | None, str | None], expected: Any
) -> None:
    """An open call is settled with what a later look-up finds. A call that has ended is left as it is."""
    ledger.begin("resp_1", question="q" * 32, user="ada", model="m")
    ledger.record(records["finished"])
    before = rows(ledger)[str(records["finished"].response_id)]
    assert ledger.left_open() == ["resp_1"]
    for response_id in ("resp_1", str(records["finished"].response_id)):
        ledger.settle(response_id, *found)
        ledger.settle(response_id, None, "no_usage")
    assert ledger.left_open() == []
    after = rows(ledger)
    assert after["resp_1"].items() >= {**expected, "outcome": "killed"}.items()
    assert after[before["id"]] == before
    # Its process lives after all: its record says how the call really ended.
    ledger.record(replace(records["late"], response_id="resp_1"))
    assert rows(ledger)["resp_1"].items() >= {**TOKENS, "outcome": "cut"}.items()


def test_many_threads_and_connections_write_at_once(
    ledger: Ledger, records: dict[str, CallRecord], tmp_path: Path
) -> None:
    """Two ledgers of one file, as in two processes, are written by many threads, and nothing is lost."""
    start = threading.Barrier(8)

    def write(thread: int) -> None:
        start.wait()
        for number in range(25):
            record = replace(records["finished"], response_id=f"resp_{thread // 2}_{number}")
            (ledger, other)[thread % 2].record(record)

    with closing(Ledger(tmp_path / "ledger.db")) as other, ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert ledger.of_user("ada")["calls"] == 100
    assert ledger.of_user("ada")["output_tokens"] == 91_300


def test_a_ledger_that_cannot_be_written_harms_no_call(tmp_path: Path) -> None:
    """If a record cannot be kept, the call succeeds all the same, and its row stays open."""
    broken = Ledger(tmp_path / "missing" / "ledger.db")
    with recorded(broken.record) as client:
        assert client.responses.create(model="m", input="Finish.").status == "completed"


def test_the_page_has_words_for_each_reason() -> None:
    """Each missing reason that a chat can have is said in plain words."""
    words = (Path(__file__).parents[2] / "examples/chat_service/static/tokens.js").read_text("utf-8")
    missing = [reason.value for reason in MissingReason if f"  {reason.value}: " not in words]
    assert missing == ["deferred"]  # for background responses with a completion window, which a chat has not

"""The events of an answer are folded into facts, of a size that does not depend on the answer."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from otel_responses_usage import MissingReason, Outcome, Usage, UsageSource
from otel_responses_usage._answer.sse import EventReader
from otel_responses_usage._answer.state import AnswerState
from otel_responses_usage._facts.outcome import Ending

Event = dict[str, Any]

ID = "resp_1"
USAGE = {
    "input_tokens": 11,
    "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
    "output_tokens": 7,
    "output_tokens_details": {"reasoning_tokens": 5},
    "total_tokens": 18,
}
BILLED = Usage(11, 7, 3, 0, 5)
TEXT = "response.output_text.delta"
REFUSAL = "response.refusal.delta"


def framed(event: Event) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def fold(*events: Event) -> AnswerState:
    state = AnswerState()
    reader = EventReader(state)
    for event in events:
        reader.feed(framed(event))
    return state


def life(kind: str, **response: Any) -> Event:
    """An event that carries the response; what is `...` is left out."""
    whole = {"id": ID, "object": "response", "model": "m", "status": kind, "usage": None, **response}
    return {
        "type": f"response.{kind}",
        "response": {name: value for name, value in whole.items() if value is not ...},
    }


def delta(kind: str = TEXT) -> Event:
    return {"type": kind, "item_id": "msg_1", "delta": "x"}


CREATED = life("created", status="in_progress")


@dataclass
class Told:
    """What a list of events comes to; the defaults are those of an ordinary answer."""

    ending: Ending | None = field(default_factory=lambda: Ending(Outcome.COMPLETED))
    finish_reason: str = "stop"
    usage: Usage | None = BILLED
    status: str | None = "completed"
    model: str | None = "m"
    response_id: str | None = ID
    stream_error: str | None = None
    service_tier: str | None = None


FAILED = Ending(Outcome.FAILED, "server_error")
ERROR = {"code": "server_error", "message": "text that must not be kept"}

ANSWERS: dict[str, tuple[list[Event], Told]] = {
    "openai": (
        [CREATED, life("in_progress"), delta(), life("completed", usage=USAGE, service_tier="flex")],
        Told(service_tier="flex"),
    ),
    "openai, a function is called": (
        [CREATED, life("completed", usage=USAGE, output=[{"type": "reasoning"}, {"type": "function_call"}])],
        Told(finish_reason="tool_calls"),
    ),
    "openai, the service searches the web itself": (
        [CREATED, life("completed", usage=USAGE, output=[{"type": "web_search_call"}, {"type": "message"}])],
        Told(finish_reason="stop"),
    ),
    "openai, out of tokens": (
        [CREATED, life("incomplete", usage=USAGE, incomplete_details={"reason": "max_output_tokens"})],
        Told(Ending(Outcome.INCOMPLETE), "length", status="incomplete"),
    ),
    "openai, filtered": (
        [CREATED, life("incomplete", usage=USAGE, incomplete_details={"reason": "content_filter"})],
        Told(Ending(Outcome.INCOMPLETE), "content_filter", status="incomplete"),
    ),
    "openai, failed": (
        [CREATED, life("failed", error=ERROR, usage=USAGE)],
        Told(FAILED, "error", status="failed"),
    ),
    "openai, failed without usage": (
        [CREATED, life("failed", error=ERROR)],
        Told(FAILED, "error", usage=None, status="failed"),
    ),
    "openai, an error event and then failed": (
        [CREATED, {"type": "error", "error": {"type": "insufficient_quota"}}, life("failed", error=ERROR)],
        Told(FAILED, "error", usage=None, status="failed", stream_error="insufficient_quota"),
    ),
    "openai, in the background": (
        [
            life("created", status="queued"),
            life("queued"),
            life("in_progress"),
            life("completed", usage=USAGE),
        ],
        Told(),
    ),
    "openai, kept waiting in the background": (
        [{"type": "keepalive"}, {"type": "keepalive"}, CREATED, life("completed", usage=USAGE)],
        Told(),
    ),
    "openai, picked up in the middle": (
        [life("queued"), delta(), life("completed", usage=USAGE)],
        Told(),
    ),
    "cut": (
        [CREATED, delta(), delta()],
        Told(ending=None, usage=None, status="in_progress"),
    ),
    "cut while queued": (
        [life("created", status="queued"), life("queued")],
        Told(ending=None, usage=None, status="queued"),
    ),
    "cut after it was queued": (
        [life("created", status="queued"), life("queued"), life("in_progress")],
        Told(ending=None, usage=None, status="in_progress"),
    ),
    "cancelled": (
        [CREATED, delta(), life("cancelled")],
        Told(Ending(Outcome.INCOMPLETE), "cancelled", usage=None, status="cancelled"),
    ),
    "ogx, out of tokens": (
        [CREATED, life("incomplete", usage=USAGE, incomplete_details={"reason": "length"})],
        Told(Ending(Outcome.INCOMPLETE), "length", status="incomplete"),
    ),
    "ogx, cache writes are null": (
        [CREATED, life("completed", usage={**USAGE, "input_tokens_details": {"cache_write_tokens": None}})],
        Told(usage=Usage(11, 7, None, None, 5)),
    ),
    "ogx, an error before everything": (
        [{"type": "error", "code": "500", "message": "secret", "sequence_number": 0}],
        Told(None, usage=None, status=None, model=None, response_id=None, stream_error="500"),
    ),
    "ogx, an error in the middle": (
        [CREATED, delta(), {"type": "error", "code": None, "message": "secret"}],
        Told(None, usage=None, status="in_progress", stream_error="error"),
    ),
    "vllm, out of tokens": (
        [CREATED, life("completed", status="incomplete", usage=USAGE)],
        Told(Ending(Outcome.INCOMPLETE), "length", status="incomplete"),
    ),
    "vllm, more details than known": (
        [
            CREATED,
            life(
                "completed",
                usage=USAGE | {"output_tokens_details": {"reasoning_tokens": 5, "tool_output_tokens": 9}},
            ),
        ],
        Told(),
    ),
    "litellm, a lone failed": (
        [life("failed", error={"code": "server_error"}, model="")],
        Told(FAILED, "error", usage=None, status="failed", model=None),
    ),
    "litellm, details are null, the id is long": (
        [
            life("created", id="resp_" + "b" * 400, status="in_progress"),
            life(
                "completed",
                id="resp_" + "b" * 400,
                usage=USAGE | {"input_tokens_details": None, "output_tokens_details": None},
            ),
        ],
        Told(usage=Usage(11, 7), response_id="resp_" + "b" * 400),
    ),
    "transformers, queued, then another name": (
        [life("created", status="queued"), life("completed", model="m@main", usage=USAGE)],
        Told(model="m@main"),
    ),
    "transformers, an error and then failed": (
        [CREATED, {"type": "error", "message": "secret"}, life("failed", error={"code": "server_error"})],
        Told(FAILED, "error", usage=None, status="failed", stream_error="error"),
    ),
    "llama.cpp, a bare beginning": (
        [
            life("created", model=..., status="in_progress"),
            life("completed", usage={"input_tokens": 4, "output_tokens": 2}),
        ],
        Told(usage=Usage(4, 2)),
    ),
    "no status at all": (
        [life("created", status=...), life("completed", status=..., usage=USAGE)],
        Told(status=None),
    ),
    "open-responses-server, no model, usage null": (
        [life("created", model="", status="in_progress"), life("completed", model="m")],
        Told(usage=None),
    ),
    "aimock, usage of zeros": (
        [CREATED, life("completed", usage={"input_tokens": 0, "output_tokens": 0, "total_tokens": 0})],
        Told(usage=Usage(0, 0)),
    ),
    "aimock, completed is failed": (
        [CREATED, life("completed", status="failed")],
        Told(Ending(Outcome.FAILED, "failed"), "error", usage=None, status="failed"),
    ),
    "aimock, completed is incomplete": (
        [CREATED, life("completed", status="incomplete", usage=USAGE)],
        Told(Ending(Outcome.INCOMPLETE), "length", status="incomplete"),
    ),
    "the end carries no response": (
        [CREATED, {"type": "response.completed"}],
        Told(usage=None, status="in_progress"),
    ),
    "usage before the end": (
        [life("created", status="in_progress", usage={"input_tokens": 0, "output_tokens": 0}), delta()],
        Told(None, usage=None, status="in_progress"),
    ),
    "an error in an event of another kind": (
        [CREATED, {"error": {"code": 429, "message": "secret"}}],
        Told(None, usage=None, status="in_progress", stream_error="429"),
    ),
    "nothing": ([], Told(None, usage=None, status=None, model=None, response_id=None)),
    "nothing that is known": (
        [{"type": "response.output_item.added", "item": {}}, {"type": "new"}, {}],
        Told(None, usage=None, status=None, model=None, response_id=None),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_events_are_folded_into_facts(name: str) -> None:
    """What servers send, as seen from the running programs, and what it says of the answer."""
    events, told = ANSWERS[name]
    state = fold(*events)
    assert state.events == len(events)
    assert state.ending == told.ending
    if state.ending is not None:
        assert state.ending.finish_reason(state.response) == told.finish_reason
    assert state.response.usage == told.usage
    assert state.response.status == told.status
    assert state.response.model == told.model
    assert state.response.id == told.response_id
    assert state.response.service_tier == told.service_tier
    assert state.stream_error == told.stream_error
    assert state.source is UsageSource.STREAM


def test_nothing_of_the_content_is_kept() -> None:
    """No text of the answer, of its errors or its instructions is anywhere in the state."""
    canary = "canary-of-the-answer"
    state = fold(
        life("created", status="in_progress", instructions=canary, metadata={"a": canary}),
        {"type": TEXT, "delta": canary},
        {"delta": canary, "type": TEXT},
        {"type": "error", "code": "c", "message": canary},
        life("failed", error={"code": "c", "message": canary}, output=[{"type": "message", "text": canary}]),
    )
    held = repr([getattr(state, name) for name in AnswerState.__slots__])
    assert "resp_1" in held
    assert canary not in held


# --- counting ------------------------------------------------------------------------------------------


def test_deltas_are_counted_by_kind() -> None:
    """A delta is counted under its type without `response.` and `.delta`, however the kinds alternate."""
    state = fold(
        CREATED,
        delta(),
        delta(),
        delta("response.function_call_arguments.delta"),
        delta(),
        {"type": "response.output_text.done", "text": "x"},
        {"type": "response.output_text.done", "text": "x"},
        delta("response.function_call_arguments.delta"),
        delta("audio.delta"),
    )
    assert state.deltas == {"output_text": 3, "function_call_arguments": 2, "audio": 1}
    assert state.events == 9


def test_a_repeated_event_that_is_no_delta_is_no_delta() -> None:
    """Events of the same type in a run are counted as what they are."""
    state = fold(CREATED, delta(), *[{"type": "keepalive"}] * 5)
    assert state.deltas == {"output_text": 1}
    assert state.events == 7


def test_the_number_of_kinds_is_bounded() -> None:
    """A server of very many kinds of deltas has the later ones counted together; none is lost."""
    kinds = [f"response.kind_{number}.delta" for number in range(1000)]
    state = fold(*(delta(kind) for kind in kinds * 2))
    assert len(state.deltas) <= 33
    assert sum(state.deltas.values()) == 2000
    assert state.deltas["kind_0"] == 2
    assert state.deltas["other"] > 1900


TERMINAL = ["completed", "incomplete", "failed", "cancelled"]


@pytest.mark.parametrize("kind", TERMINAL)
def test_what_follows_the_end_is_not_part_of_the_call(kind: str) -> None:
    """Events after the terminal one change nothing: not the counts, not the usage, not the ending."""
    events = [CREATED, delta(), life(kind, usage=USAGE)]
    ended, more = fold(*events), fold(*events, delta(), delta(), life("completed", id="resp_2", usage=None))
    assert (more.events, more.deltas) == (3, {"output_text": 1})
    assert more.response == ended.response
    assert more.ending == ended.ending


def test_an_event_that_nobody_can_read_is_an_error() -> None:
    """What is no JSON is counted, and named as the SDK names it when it raises; a code told before stays."""
    for events, error in ((CREATED,), "JSONDecodeError"), ((CREATED, {"type": "error", "code": "c"}), "c"):
        state = fold(*events)
        EventReader(state).feed(b"data: {nonsense}\n\n")
        assert (state.events, state.stream_error, state.ending) == (len(events) + 1, error, None)


# --- time ----------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time in nanoseconds that the state sees: the first element."""
    now = [1_000_000_000]
    monkeypatch.setattr("otel_responses_usage._answer.state.time.perf_counter_ns", lambda: now[0])
    return now


def repeat(state: AnswerState) -> None:
    """Count one more delta as `EventReader` does."""
    state.repeats += 1
    if state.repeats >= state.notify_at:
        state.on_repeats()


def deltas_at(clock: list[int], times_ms: list[int]) -> AnswerState:
    state = AnswerState()
    for number, time_ms in enumerate(times_ms):
        clock[0] = time_ms * 1_000_000
        repeat(state) if number else state.on_event(TEXT, None)
    return state


def test_gaps_are_those_between_deltas(clock: list[int]) -> None:
    """Each gap of a short stream is kept, in seconds, and the first delta's time beside them."""
    state = deltas_at(clock, [5, 7, 7, 1007])
    assert state.first_delta_at == 5_000_000
    assert state.gaps_s == [0.002, 0.0, 1.0]


def test_events_between_deltas_do_not_divide_a_gap(clock: list[int]) -> None:
    """The time between two deltas is one gap, whatever came between them."""
    state = AnswerState()
    for time_ms, kind in ((1, TEXT), (2, "response.output_item.added"), (4, REFUSAL)):
        clock[0] = time_ms * 1_000_000
        state.on_event(kind, None)
    assert state.gaps_s == [0.003]


def test_a_frozen_state_learns_and_does_not_count(clock: list[int]) -> None:
    """What is read after the application has left is not its own: only the response is still observed."""
    state = AnswerState()
    reader = EventReader(state)
    for event in (CREATED, delta(), delta(), delta()):
        clock[0] += 1_000_000
        reader.feed(framed(event))
    state.stop_counting()
    for event in (delta(), delta(), delta(REFUSAL), delta(REFUSAL), life("completed", usage=USAGE)):
        clock[0] += 1_000_000
        reader.feed(framed(event))
    assert (state.events, state.deltas, state.gaps_s) == (4, {"output_text": 3}, [0.001, 0.001])
    assert state.response.usage == BILLED
    assert state.ending == Ending(Outcome.COMPLETED)


@pytest.mark.parametrize("count", [1, 2, 23, 24, 25, 26, 100, 300, 10_000])
def test_gaps_stand_for_the_whole_stream(clock: list[int], count: int) -> None:
    """Of a long stream a part of the gaps is kept, spread evenly over it from its first to its last."""
    # The n-th gap is n milliseconds long, so a gap tells its place.
    state = deltas_at(clock, [number * (number + 1) // 2 for number in range(count)])
    places = [round(gap * 1000) for gap in state.gaps_s]
    assert len(places) <= 24
    assert places[:1] == [1][: count - 1]
    strides = [after - before for before, after in itertools.pairwise(places)]
    assert max(strides, default=0) <= 2 * min(strides, default=0), "evenly"
    assert len(places) >= min(count - 1, 12)
    assert count - 1 - max(places, default=0) <= max(strides, default=0), "to its last"


def test_a_million_deltas_take_the_memory_of_a_few() -> None:
    """Nothing in the state grows with the number of deltas."""

    def size(state: AnswerState) -> int:
        return sum(sys.getsizeof(getattr(state, name)) for name in AnswerState.__slots__)

    state = fold(CREATED, *[delta()] * 200)
    before = size(state)
    largest = 0
    for number in range(1_000_000):
        repeat(state)
        if number % 1000 == 0:
            largest = max(largest, len(state.gaps_s), len(state._gaps_us))
    assert state.deltas == {"output_text": 1_000_200}
    assert largest <= 24
    assert size(state) <= before + 1024


# --- a body that was not streamed ----------------------------------------------------------------------

BODIES: dict[str, tuple[Event, Ending, Usage | None]] = {
    "completed": (
        {"id": ID, "status": "completed", "usage": USAGE},
        Ending(Outcome.COMPLETED),
        BILLED,
    ),
    "incomplete": (
        {"id": ID, "status": "incomplete", "usage": USAGE},
        Ending(Outcome.INCOMPLETE),
        BILLED,
    ),
    "failed": (
        {"id": ID, "status": "failed", "error": ERROR, "usage": None},
        FAILED,
        None,
    ),
    "goes on in the background": (
        {"id": ID, "status": "queued", "usage": None},
        Ending(Outcome.COMPLETED),
        None,
    ),
    "goes on, with the usage so far": (
        {"id": ID, "status": "in_progress", "usage": USAGE},
        Ending(Outcome.COMPLETED),
        None,
    ),
    "no status, with usage": (
        {"id": ID, "usage": USAGE},
        Ending(Outcome.COMPLETED),
        BILLED,
    ),
    "an error object": (
        {"error": {"code": "model_not_found", "message": "secret"}},
        Ending(Outcome.ERROR, "model_not_found"),
        None,
    ),
    "nothing known": ({}, Ending(Outcome.COMPLETED), None),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_whole_body_says_the_same_as_a_stream(name: str) -> None:
    """A body that was not streamed has an ending, and its usage is from the response itself."""
    body, ending, usage = BODIES[name]
    state = AnswerState()
    state.on_document(body)
    assert state.ending == ending
    assert state.response.usage == usage
    assert state.source is UsageSource.RESPONSE


WANTED: dict[str, Callable[[], bool]] = {
    "the first event": lambda: AnswerState().needs_data("response.created", b""),
    "the end": lambda: all(AnswerState().needs_data(f"response.{status}", b"") for status in TERMINAL),
    "an error": lambda: AnswerState().needs_data("error", b""),
    "progress without a first event": lambda: AnswerState().needs_data("response.in_progress", b""),
    "progress under another id": lambda: fold(CREATED).needs_data(
        "response.in_progress", framed(life("in_progress", id="resp_2"))
    ),
    "a life-cycle event of the future": lambda: AnswerState().needs_data("response.paused", b""),
    "a life-cycle event of two words": lambda: AnswerState().needs_data("response.run.completed", b""),
    "an event of another API": lambda: AnswerState().needs_data("done", b""),
}
UNWANTED: dict[str, Callable[[], bool]] = {
    "a delta": lambda: AnswerState().needs_data(TEXT, b""),
    "an item": lambda: AnswerState().needs_data("response.output_item.done", b""),
    "progress that repeats the first event": lambda: fold(CREATED).needs_data(
        "response.in_progress", framed(CREATED)
    ),
    "a large item": lambda: AnswerState().needs_data("response.image_generation_call.partial_image", b""),
    "a delta of the future": lambda: AnswerState().needs_data("response.video.delta", b""),
    "something else": lambda: AnswerState().needs_data("keepalive", b""),
}


@pytest.mark.parametrize("name", [*WANTED, *UNWANTED])
def test_only_events_that_carry_facts_are_decoded(name: str) -> None:
    """Large events without facts, the content, are never decoded."""
    assert {**WANTED, **UNWANTED}[name]() is (name in WANTED)


def test_reasons_are_no_sources() -> None:
    """A value never says both where usage came from and why it is missing."""
    assert not {source.value for source in UsageSource} & {reason.value for reason in MissingReason}

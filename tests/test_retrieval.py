"""A response is looked up until it is terminal or will never be had: the flow, without clock and network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_responses_usage import MissingReason, Usage
from otel_responses_usage._facts.response import Response
from otel_responses_usage._lookup.job import LookupResult
from otel_responses_usage._lookup.retrieval import (
    Answer,
    Attempt,
    DeadlinePassed,
    Failure,
    RetrievalPolicy,
    Wait,
    retrieval_flow,
)
from otel_responses_usage._surfaces._retrieve import _retry_after_s

ID = "resp_1"
BILLED = Usage(11, 7)
POLICY = RetrievalPolicy()


def ok(status: str | None, usage: Usage | None = None, response_id: str = ID) -> Answer:
    return Answer(200, Response(id=response_id, status=status, usage=usage))


def http(status: int, retry_after_s: float | None = None) -> Answer:
    return Answer(status, retry_after_s=retry_after_s)


BROKEN = Answer(failure=Failure.TRANSPORT)
REFUSED = Answer(failure=Failure.UNREACHABLE)
SILENT = Answer(failure=Failure.TIMEOUT)
DONE = ok("completed", BILLED)


class Run:
    """A flow driven to its end, or until there are no more answers and its time is up."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        self.steps: list[Attempt | Wait] = []
        left = iter(answers)
        flow = retrieval_flow(ID, POLICY)
        try:
            step = next(flow)
            while True:
                self.steps.append(step)
                if isinstance(step, Wait):
                    step = flow.send(None)
                elif (answer := next(left, None)) is not None:
                    step = flow.send(answer)
                else:
                    step = flow.throw(DeadlinePassed())
        except StopIteration as end:
            self.result: LookupResult = end.value

    @property
    def attempts(self) -> int:
        return sum(isinstance(step, Attempt) for step in self.steps)

    @property
    def waits_s(self) -> list[float]:
        return [step.seconds for step in self.steps if isinstance(step, Wait)]


AT_ONCE: dict[str, tuple[Answer, Usage | MissingReason]] = {
    "completed": (DONE, BILLED),
    "incomplete": (ok("incomplete", BILLED), BILLED),
    "failed, charged": (ok("failed", BILLED), BILLED),
    "cancelled, charged": (ok("cancelled", BILLED), BILLED),
    "no status, with usage": (ok(None, BILLED), BILLED),
    "a status of the future, with usage": (ok("finished", BILLED), BILLED),
    "zero tokens": (ok("completed", Usage(0, 0)), Usage(0, 0)),
    "completed without usage": (ok("completed"), MissingReason.NO_USAGE),
    "incomplete without usage": (ok("incomplete"), MissingReason.NO_USAGE),
    "failed without usage": (ok("failed"), MissingReason.NO_USAGE),
    "neither status nor usage": (ok(None), MissingReason.NO_USAGE),
    "under another id": (ok("completed", BILLED, "resp_2"), BILLED),
    "no response in the body": (Answer(200), MissingReason.UNSUPPORTED),
    **{str(status): (http(status), MissingReason.UNAUTHORIZED) for status in (401, 403)},
    **{
        str(status): (http(status), MissingReason.UNSUPPORTED)
        for status in (201, 204, 302, 304, 400, 402, 405, 406, 410, 413, 415, 422, 451, 501)
    },
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_an_answer_that_settles_it_is_the_last(name: str) -> None:
    """Usage, or the certainty that there will be none, takes one request and no waiting."""
    answer, outcome = AT_ONCE[name]
    run = Run([answer, *[DONE] * 3])
    assert run.steps == [Attempt(POLICY.attempt_timeout_s)]
    assert (run.result.usage or run.result.reason) == outcome


# A final response without usage is asked for once.
LAST_IN_ANY_CASE = {
    "in progress": (ok("in_progress"), MissingReason.TIMEOUT),
    "not found": (http(404), MissingReason.NOT_FOUND),
    "busy": (http(503), MissingReason.TIMEOUT),
    "no connection": (REFUSED, MissingReason.TRANSPORT_ERROR),
    "no answer": (SILENT, MissingReason.TIMEOUT),
    "cancelled": (ok("cancelled"), MissingReason.NO_USAGE),
    "charged": (DONE, None),
}


@pytest.mark.parametrize("name", LAST_IN_ANY_CASE)
def test_a_look_up_that_asks_once_sends_one_request(name: str) -> None:
    """Whatever the answer is, no other request follows."""
    answer, reason = LAST_IN_ANY_CASE[name]
    flow = retrieval_flow(ID, POLICY, asks_once=True)
    assert isinstance(next(flow), Attempt)
    with pytest.raises(StopIteration) as end:
        flow.send(answer)
    assert end.value.value.reason == reason


ASKED_AGAIN: dict[str, Answer] = {
    "in progress": ok("in_progress"),
    "queued": ok("queued"),
    "a status of the future": ok("paused"),
    "in progress with the usage so far": ok("in_progress", Usage(1, 1)),
    "cancelled, not charged yet": ok("cancelled"),
    "not found": http(404),
    "a broken connection": BROKEN,
    "a refused connection": REFUSED,
    "no answer": SILENT,
    **{str(status): http(status) for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)},
}


@pytest.mark.parametrize("name", ASKED_AGAIN)
def test_an_answer_that_can_change_is_asked_for_again(name: str) -> None:
    """What may be over in a moment is waited for; then the usage is had."""
    run = Run([ASKED_AGAIN[name], ASKED_AGAIN[name], DONE])
    assert run.result == LookupResult(BILLED, None, DONE.response)
    assert [type(step) for step in run.steps] == [Attempt, Wait, Attempt, Wait, Attempt]


GIVES_UP: dict[str, tuple[Answer, int, MissingReason]] = {
    "not found": (http(404), 4, MissingReason.NOT_FOUND),
    "a broken connection": (BROKEN, 4, MissingReason.TRANSPORT_ERROR),
}


@pytest.mark.parametrize("name", GIVES_UP)
def test_some_answers_are_believed_after_four_times(name: str) -> None:
    """A response that is never stored and a server that is never there are given up, not polled on."""
    answer, tries, reason = GIVES_UP[name]
    run = Run([answer] * 20)
    assert run.attempts == tries
    assert run.result == LookupResult(None, reason)


def test_tries_are_counted_each_for_itself() -> None:
    """A server that comes up late and has not stored the response yet is not given up too early."""
    answers = [http(404), BROKEN, http(404), BROKEN, http(404), BROKEN, http(503), DONE]
    assert Run(answers).result.usage == BILLED


def test_waits_grow_and_stay_short() -> None:
    """The first question is asked at once, the next ones after ever longer waits, up to a limit."""
    run = Run([ok("in_progress")] * 8)
    assert run.waits_s == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


UP_TO_EIGHT = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 8.0, 8.0]
PAUSES: dict[str, tuple[Answer, list[float]]] = {
    "a refused connection": (REFUSED, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]),
    "a server that is away for a moment": (http(503), [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 2.0]),
    "a server that fails at this response": (http(500), UP_TO_EIGHT),
    "cancelled, not charged yet": (ok("cancelled"), UP_TO_EIGHT),
}


@pytest.mark.parametrize("name", PAUSES)
def test_pauses_are_as_long_as_a_change_is_unlikely(name: str) -> None:
    """A server that may be back any moment is asked each second. Where nothing will change, pauses grow."""
    answer, waits_s = PAUSES[name]
    run = Run([answer] * 9)
    assert run.waits_s == waits_s
    assert run.attempts == 10  # the last one is not answered any more


def test_a_cancelled_response_is_asked_for_30_seconds_more() -> None:
    """The first answer that says `cancelled` sets a time limit. Before it only the caller has one."""
    run = Run([ok("in_progress"), ok("cancelled"), ok("cancelled")])
    limits = [step.time_limit_s for step in run.steps if isinstance(step, Wait)]
    assert limits == [None, 30.0, 30.0]
    assert run.result.reason is MissingReason.NO_USAGE


def test_a_response_keeps_the_id_that_was_asked_for() -> None:
    """A proxy that encrypts ids anew in each answer shows another one each time: the call keeps its own."""
    response = Run([ok("in_progress", response_id="enc_1"), ok("completed", BILLED, "enc_2")]).result.response
    assert response is not None
    assert (response.id, response.status) == (ID, "completed")


def test_an_unknown_response_is_given_twice_the_time() -> None:
    """The waits for a response to be stored are longer than those for one to end."""
    assert Run([http(404)] * 20).waits_s == [0.2, 0.4, 0.8]


@pytest.mark.parametrize(
    ("retry_after_s", "waited_s"),
    [(3.0, 3.0), (60.0, 60.0), (0.0, 0.1), (0.05, 0.1), (None, 0.1)],
)
@pytest.mark.parametrize("status", [429, 503, 200])
def test_a_server_may_ask_for_a_longer_wait(
    status: int, retry_after_s: float | None, waited_s: float
) -> None:
    """`Retry-After` is respected where it asks for more patience than there would be without it."""
    answer = Answer(status, Response(id=ID, status="in_progress"), retry_after_s)
    assert Run([answer]).waits_s == [waited_s]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    """A header that says nothing sensible says nothing: it does not end the look-up."""
    assert _retry_after_s(headers) == seconds


def paused_at_attempt(*answers: Answer) -> Any:
    """A flow that is waiting for the answer to its next request."""
    flow = retrieval_flow(ID, POLICY)
    next(flow)
    for answer in answers:
        assert isinstance(flow.send(answer), Wait)
        assert isinstance(flow.send(None), Attempt)
    return flow


def paused_at_wait(*answers: Answer) -> Any:
    """A flow that waits after the last of these answers."""
    flow = paused_at_attempt(*answers[:-1])
    assert isinstance(flow.send(answers[-1]), Wait)
    return flow


DEADLINES: dict[str, tuple[list[Answer], MissingReason]] = {
    "in progress for ever": ([ok("in_progress")], MissingReason.TIMEOUT),
    "queued for ever": ([ok("in_progress"), ok("queued")], MissingReason.TIMEOUT),
    "silent": ([SILENT, SILENT], MissingReason.TIMEOUT),
    "busy": ([http(429), http(503)], MissingReason.TIMEOUT),
    "not found until now": ([http(404)], MissingReason.NOT_FOUND),
    "not reached until now": ([BROKEN, BROKEN], MissingReason.TRANSPORT_ERROR),
    "refused until now": ([REFUSED] * 9, MissingReason.TRANSPORT_ERROR),
    "an error for this response each time": ([http(500)] * 9, MissingReason.TIMEOUT),
    "cancelled and never charged": ([ok("in_progress"), ok("cancelled")], MissingReason.NO_USAGE),
    "the last answer counts": ([http(404), BROKEN, ok("in_progress")], MissingReason.TIMEOUT),
}


@pytest.mark.parametrize("pause", [paused_at_attempt, paused_at_wait])
@pytest.mark.parametrize("name", DEADLINES)
def test_a_deadline_ends_it_with_what_is_known(name: str, pause: Callable[..., Any]) -> None:
    """Whenever the time is up, while asking or while waiting, the last answer gives the reason."""
    answers, reason = DEADLINES[name]
    with pytest.raises(StopIteration) as end:
        pause(*answers).throw(DeadlinePassed())
    result: LookupResult = end.value.value
    assert (result.usage, result.reason) == (None, reason)


def test_a_deadline_before_any_answer_is_a_timeout() -> None:
    """A server that never answered is no server without the response."""
    assert Run([]).result == LookupResult(None, MissingReason.TIMEOUT)


def test_the_last_sight_of_the_response_is_kept() -> None:
    """What was seen of the response is handed on, also when its usage never came."""
    queued = ok("in_progress")
    assert Run([ok("queued"), queued, http(404)]).result.response == queued.response


STATUSES = [None, "queued", "in_progress", "completed", "incomplete", "failed", "cancelled", "new"]
responses = st.none() | st.builds(
    Response,
    id=st.sampled_from([ID, ID, ID, "resp_2", None]),
    status=st.sampled_from(STATUSES),
    usage=st.sampled_from([None, None, BILLED, Usage(0, 0)]),
)
answers = st.one_of(
    st.builds(Answer, st.just(200), responses, st.none() | st.floats(0, 1e6)),
    st.builds(Answer, st.integers(100, 599), responses, st.none() | st.floats(0, 1e6)),
    st.sampled_from([BROKEN, REFUSED, SILENT, http(404), ok("in_progress")]),
)


@given(st.lists(answers, max_size=30))
def test_every_look_up_ends_in_usage_or_a_reason(sequence: list[Answer]) -> None:
    """Whatever a server answers: one result, never two requests without a wait, never a wait too short."""
    run = Run(sequence)
    assert (run.result.usage is None) is (run.result.reason is not None)
    assert [type(step) for step in run.steps] == ([Attempt, Wait] * len(run.steps))[: len(run.steps)]
    for answer, wait_s in zip(sequence, run.waits_s, strict=False):
        assert wait_s >= POLICY.first_wait_s
        assert wait_s >= (answer.retry_after_s or 0.0)
    assert run.result.response is None or run.result.response.id == ID

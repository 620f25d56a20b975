"""A server that has no answers is asked only now and then, and one that has them again is asked again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import openai
import pytest

from calls import CUT
from conftest import Instrument, Serve
from embedded.answer import Answer, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest, Wait
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import Observed
from otel_responses_usage import ResponsesUsageInstrumentor
from otel_responses_usage._facts.request import Server
from otel_responses_usage._facts.response import Response
from otel_responses_usage._facts.usage import MissingReason, Usage
from otel_responses_usage._lookup import lookups as _lookup
from otel_responses_usage._lookup.circuit import Change, Circuit, CircuitPolicy, Verdict, verdict_of
from otel_responses_usage._lookup.job import Endpoint, Job, LookupRequest, LookupResult
from otel_responses_usage._lookup.lookups import Admission, Circuits, LookUp
from otel_responses_usage._lookup.retrieval import RetrievalPolicy

ALIVE, ENDED, UNFINISHED = Verdict.ALIVE, Verdict.ENDED, Verdict.UNFINISHED
NOT_FOUND, FUTILE, NOTHING = Verdict.NOT_FOUND, Verdict.FUTILE, Verdict.NOTHING

POLICY = CircuitPolicy(failures=3, first_pause_s=10.0, longest_pause_s=30.0)
SEEN = Response(id="resp_1", status="in_progress")
OVER = Response(id="resp_1", status="cancelled")

# --- the circuit itself, its clock in the test's hand ------------------------------------------------


def learn(circuit: Circuit, *verdicts: Verdict, now: float = 0.0) -> list[Change]:
    """What each of these verdicts, of look-ups that are no trial, does to a circuit."""
    return [circuit.learn(verdict, now, is_trial=False) for verdict in verdicts]


def opened() -> Circuit:
    """A circuit that was opened at 0."""
    circuit = Circuit(POLICY)
    assert learn(circuit, *[FUTILE] * 3) == [Change.NONE, Change.NONE, Change.OPENED]
    return circuit


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (LookupResult(Usage(1, 1), None, OVER), ENDED),
        (LookupResult(None, MissingReason.NO_USAGE, OVER), ENDED),
        (LookupResult(None, MissingReason.TIMEOUT, OVER), ENDED),
        (LookupResult(None, MissingReason.TIMEOUT, SEEN), UNFINISHED),
        (LookupResult(None, MissingReason.NOT_FOUND, SEEN), ALIVE),
        (LookupResult(None, MissingReason.TRANSPORT_ERROR, SEEN), ALIVE),
        (LookupResult(None, MissingReason.NOT_FOUND), NOT_FOUND),
        (LookupResult(None, MissingReason.TIMEOUT), FUTILE),
        (LookupResult(None, MissingReason.TRANSPORT_ERROR), FUTILE),
        (LookupResult(None, MissingReason.UNAUTHORIZED), FUTILE),
        (LookupResult(None, MissingReason.UNSUPPORTED), FUTILE),
        (LookupResult(None, MissingReason.CIRCUIT_OPEN), NOTHING),
        (LookupResult(None, MissingReason.DISABLED), NOTHING),
        (LookupResult(None, MissingReason.NOT_STORED), NOTHING),
        (LookupResult(None, MissingReason.NO_RESPONSE_ID), NOTHING),
        (LookupResult(None, MissingReason.OVERLOAD), NOTHING),
        (LookupResult(None, MissingReason.SHUTDOWN), NOTHING),
    ],
    ids=lambda value: "" if isinstance(value, LookupResult) else value.value,
)
def test_what_a_look_up_says_of_its_server(result: LookupResult, verdict: Verdict) -> None:
    """A response that was seen proves its server well, no answer proves it ill; not to ask proves nothing."""
    assert verdict_of(result) is verdict


def test_it_opens_after_some_look_ups_in_a_row_in_vain() -> None:
    """Until then it is closed, and after that nothing passes until the pause is over."""
    circuit = Circuit(POLICY)
    for _ in range(POLICY.failures):
        assert not circuit.is_open
        learn(circuit, FUTILE)
    assert circuit.is_open
    assert [circuit.begin_trial(now) for now in (0.0, 5.0, 9.99)] == [False, False, False]


@pytest.mark.parametrize("verdict", [FUTILE, NOT_FOUND])
def test_what_opens_it(verdict: Verdict) -> None:
    """No answer opens it, and so does 404 while the server has had nothing yet."""
    assert learn(Circuit(POLICY), *[verdict] * 4) == [Change.NONE, Change.NONE, Change.OPENED, Change.NONE]


def test_one_success_in_between_begins_the_count_anew() -> None:
    """Only look-ups in vain that follow one another open it."""
    circuit = Circuit(POLICY)
    assert learn(circuit, FUTILE, FUTILE, ALIVE, FUTILE, FUTILE) == [Change.NONE] * 5
    assert learn(circuit, FUTILE) == [Change.OPENED]


def test_a_server_that_has_once_had_a_response_may_say_404() -> None:
    """Once the server has had one, 404 speaks of one response; what is no answer opens it all the same."""
    circuit = Circuit(POLICY)
    assert learn(circuit, ALIVE, *[NOT_FOUND] * 9) == [Change.NONE] * 10
    assert learn(circuit, *[FUTILE] * 3)[-1] is Change.OPENED


def test_responses_that_never_end_are_counted_in_a_row() -> None:
    """After five in a row that never ended, nothing is expected of the next. One that ends resets that."""
    circuit = Circuit(CircuitPolicy())
    learn(circuit, *[ALIVE, UNFINISHED] * 4)  # a look-up first sees its response
    assert not circuit.never_ends
    learn(circuit, ALIVE, ENDED, *[ALIVE, UNFINISHED] * 4)
    assert not circuit.never_ends
    learn(circuit, NOT_FOUND, NOTHING, FUTILE, UNFINISHED)
    assert circuit.never_ends
    assert not circuit.is_open
    learn(circuit, ENDED)
    assert not circuit.never_ends


def test_connections_are_spaced_while_they_are_refused() -> None:
    """All look-ups share the pauses between connections, and the one whose turn it is connects."""
    circuit = Circuit(CircuitPolicy())
    assert circuit.reconnect_wait_s(0.0) == 0.0
    for _ in range(3):  # refused at the same time: one pause
        circuit.learn_connection(0.0, is_refused=True)
    times = []
    now = 0.0
    while len(times) < 6:
        now += circuit.reconnect_wait_s(now)
        assert circuit.reconnect_wait_s(now) == 0.0
        assert circuit.reconnect_wait_s(now) > 0.0  # the turn is taken
        circuit.learn_connection(now, is_refused=True)
        times.append(round(now, 3))
    assert times == [0.1, 0.3, 0.7, 1.5, 2.5, 3.5]


def test_the_first_connection_lets_all_look_ups_connect() -> None:
    """When the server is back, none waits for a turn, and the next pause is a short one again."""
    circuit = Circuit(CircuitPolicy())
    for now in (0.0, 1.0, 2.0, 3.0):
        circuit.learn_connection(now, is_refused=True)
    circuit.learn_connection(3.1, is_refused=False)
    assert [circuit.reconnect_wait_s(3.1)] * 3 == [0.0] * 3
    circuit.learn_connection(4.0, is_refused=True)
    assert circuit.reconnect_wait_s(4.0) == pytest.approx(0.1)


def test_what_says_nothing_is_no_success_in_between() -> None:
    """What was never asked neither opens a circuit nor closes it, nor begins the count anew."""
    circuit = Circuit(POLICY)
    assert learn(circuit, FUTILE, NOTHING, FUTILE, NOTHING) == [Change.NONE] * 4
    assert learn(circuit, FUTILE, NOTHING) == [Change.OPENED, Change.NONE]
    assert circuit.is_open


def test_one_trial_closes_it() -> None:
    """After the pause one look-up passes and no second; if the server has the response, all pass again."""
    circuit = opened()
    assert circuit.begin_trial(10.0)
    assert not circuit.begin_trial(10.0)
    assert not circuit.begin_trial(1000.0)
    assert circuit.learn(ALIVE, 11.0, is_trial=True) is Change.CLOSED
    assert not circuit.is_open


def test_a_closed_circuit_begins_anew() -> None:
    """Once closed, it opens after as many look-ups in vain as at first, for as long as at first."""
    circuit = opened()
    assert circuit.begin_trial(10.0)
    circuit.learn(FUTILE, 10.0, is_trial=True)  # the pause is 20 s now
    assert circuit.begin_trial(30.0)
    circuit.learn(ALIVE, 30.0, is_trial=True)
    assert learn(circuit, *[FUTILE] * 3, now=40.0) == [Change.NONE, Change.NONE, Change.OPENED]
    assert not circuit.begin_trial(49.9)
    assert circuit.begin_trial(50.0)


def test_each_trial_in_vain_doubles_the_pause_up_to_the_longest() -> None:
    """10, 20, then 30 seconds for good: counted from the end of the trial."""
    circuit = opened()
    now = 0.0
    for pause_s in (10.0, 20.0, 30.0, 30.0):
        assert not circuit.begin_trial(now + pause_s - 0.1)
        now += pause_s
        assert circuit.begin_trial(now)
        now += 2.0  # a trial takes its time
        assert circuit.learn(FUTILE, now, is_trial=True) is Change.NONE
        assert circuit.is_open


def test_a_trial_that_came_to_nothing_is_followed_by_another() -> None:
    """A trial that somebody else has settled says nothing: the next look-up is the trial."""
    circuit = opened()
    assert circuit.begin_trial(10.0)
    assert circuit.learn(NOTHING, 10.0, is_trial=True) is Change.NONE
    assert circuit.is_open
    assert circuit.begin_trial(10.0)


@pytest.mark.parametrize("verdict", [FUTILE, NOT_FOUND, NOTHING])
def test_look_ups_under_way_when_it_opened_change_nothing(verdict: Verdict) -> None:
    """Results that come in while it is open, and are no trial's, neither prolong a pause nor end a trial."""
    circuit = opened()
    assert learn(circuit, *[verdict] * 5, now=9.0) == [Change.NONE] * 5
    assert circuit.begin_trial(10.0)
    assert learn(circuit, *[verdict] * 5, now=11.0) == [Change.NONE] * 5
    assert not circuit.begin_trial(11.0)


def test_a_late_success_closes_it() -> None:
    """A look-up that was under way when it opened, and brings usage, proves the server well."""
    circuit = opened()
    assert learn(circuit, ALIVE) == [Change.CLOSED]
    assert not circuit.is_open


# --- over sockets ------------------------------------------------------------------------------------

COUNTS = usage(7, 21)
OPEN = "openai_responses.retrieval.open_circuits"
KEPT, LOST = "kept", "lost"


class Luck:
    """What becomes of the responses of a server that cuts every stream, as it is set now."""

    def __init__(self, foreground: Any = LOST, background: Any = LOST) -> None:
        self.foreground = foreground
        self.background = background

    def plan(self, request: SeenRequest) -> Plan:
        luck = self.background if request.json.get("background") else self.foreground
        how = {"fate": luck} if isinstance(luck, str) else {"get_replies": (luck,) * 9}
        return Plan(Answer(usage=COUNTS), cut_after=5, end=Cut(), **how)


class Clock:
    """The time of all circuits, in seconds; it stands still until the test sets it on."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Circuits go by this clock; look-ups wait as ever, a tenth of the time."""
    clock = Clock()

    class Timed(Circuit):
        def begin_trial(self, now: float) -> bool:  # noqa: ARG002
            return super().begin_trial(clock.now)

        def learn(self, verdict: Verdict, now: float, *, is_trial: bool) -> Change:  # noqa: ARG002
            return super().learn(verdict, clock.now, is_trial=is_trial)

    retrieval = RetrievalPolicy(first_wait_s=0.01, longest_wait_s=0.2)
    monkeypatch.setattr(_lookup, "Circuit", Timed)
    monkeypatch.setattr(_lookup, "RetrievalPolicy", lambda: retrieval)
    return clock


@pytest.fixture
def watched(clock: Clock, instrument: Instrument) -> Observed:  # noqa: ARG001
    """The instrumentation on, with that clock."""
    return instrument()


PAUSE_S = CircuitPolicy().first_pause_s


class Caller:
    """An application that makes one cut call after the other."""

    def __init__(self, observed: Observed, *servers: ScriptedServer) -> None:
        self._observed = observed
        self._calls = 0
        self._clients = [
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) for server in servers
        ]

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def call(self, at: int = 0, **asked: Any) -> None:
        """Make a call to the server of this number."""
        self._calls += 1
        with pytest.raises(CUT):
            list(self._clients[at].responses.create(model="m", input="cut", stream=True, **asked))

    def results(self, calls: int, at: int = 0, **asked: Any) -> list[str]:
        """Make calls, wait for the span of each, and return where its usage came from, or why it did not."""
        told = []
        for _ in range(calls):
            self.call(at, **asked)
            span = self._observed.spans(self._calls)[-1]
            attributes = span.attributes or {}
            source = attributes.get("openai_responses.usage.source")
            told.append(str(source or attributes["openai_responses.usage.missing_reason"]))
        return told


def gets(server: ScriptedServer) -> int:
    return sum(request.method == "GET" for request in server.requests)


def open_circuits(observed: Observed) -> dict[int, int]:
    """Open circuits by the port of their server; closed ones are left out."""
    return {
        point.attributes["server.port"]: point.value for point in observed.points(OPEN) if point.value != 0
    }


def port_of(server: ScriptedServer) -> int:
    return int(server.url.rpartition(":")[2])


def test_a_server_without_stored_responses_costs_a_handful_of_requests(
    serve: Serve, watched: Observed
) -> None:
    """Of 40 calls cut one after the other, the first five are asked about, and no other."""
    server = serve(ResponsesAPI(Luck().plan))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(40) == ["not_found"] * 5 + ["circuit_open"] * 35
    assert gets(server) == 5 * 4
    assert watched.calls() == {"not_found": 5, "circuit_open": 35}
    assert watched.tokens() == {}
    (point,) = watched.points(OPEN)
    assert (point.value, dict(point.attributes)) == (
        1,
        {"server.address": "127.0.0.1", "server.port": port_of(server)},
    )


def test_calls_in_quick_succession_cost_no_more(serve: Serve, watched: Observed) -> None:
    """An application does not wait for our look-ups: also then the first five tell enough."""
    made = threading.Event()
    luck = Luck(error(400, "no"))
    server = serve(ResponsesAPI(luck.plan))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(1) == ["unsupported"]
        luck.foreground = replace(error(404, "no"), before=(Wait(made),))
        for _ in range(40):
            caller.call()
        made.set()
        watched.spans(41)
    assert gets(server) == 1 + 4 * 4
    assert watched.calls() == {"unsupported": 1, "not_found": 4, "circuit_open": 36}


@pytest.mark.parametrize(
    ("reply", "reason", "requests"),
    [
        (error(401, "no"), "unauthorized", 1),
        (error(400, "no"), "unsupported", 1),
        (error(405, "no"), "unsupported", 1),
        (Reply(200, {"content-type": "text/html"}), "unsupported", 1),
        (Reply.json({"detail": "no"}), "unsupported", 1),
        (Reply.json({"object": "list", "data": []}), "unsupported", 1),
        (Reply(200, before=(Cut(),)), "transport_error", 4),
        (Reply(200, before=(Hold(),)), "timeout", 1),
        (error(503, "no"), "timeout", None),
    ],
    ids=["401", "400", "405", "no JSON", "no response", "a list", "no answer", "silence", "503"],
)
def test_every_kind_of_futile_server_is_left_alone(
    reply: Any,
    reason: str,
    requests: int | None,
    serve: Serve,
    instrument: Instrument,
    clock: Clock,  # noqa: ARG001
) -> None:
    """After five calls about which nothing was to be had, the sixth and seventh cost no request."""
    observed = instrument(retrieval_timeout=0.5 if reason == "timeout" else 10.0)
    server = serve(ResponsesAPI(Luck(reply).plan))
    with closing(Caller(observed, server)) as caller:
        assert caller.results(5) == [reason] * 5
        before = gets(server)
        assert before == 5 * requests if requests else before >= 5
        assert caller.results(2) == ["circuit_open"] * 2
    assert gets(server) == before
    assert open_circuits(observed) == {port_of(server): 1}


def test_a_server_that_has_responses_but_no_counts_is_asked_on(serve: Serve, watched: Observed) -> None:
    """`no_usage` is an answer: it never opens a circuit."""
    empty = Reply.json({"id": "resp_1", "status": "completed", "usage": None})
    created = {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}}
    server = serve(lambda request: empty if request.method == "GET" else Reply.sse([created], end=Cut()))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(12) == ["no_usage"] * 12
    assert gets(server) == 12
    assert watched.points(OPEN) == []


def test_a_server_that_comes_back_is_used_again(serve: Serve, watched: Observed, clock: Clock) -> None:
    """After the pause one call is a trial; if that brings usage, all are looked up again."""
    luck = Luck()
    server = serve(ResponsesAPI(luck.plan))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(5) == ["not_found"] * 5
        luck.foreground = KEPT
        assert caller.results(3) == ["circuit_open"] * 3
        assert open_circuits(watched) == {port_of(server): 1}
        clock.now += PAUSE_S
        assert caller.results(4) == ["retrieval"] * 4
    assert gets(server) == 5 * 4 + 4
    assert open_circuits(watched) == {}
    assert watched.tokens() == {"input": (4, 28), "output": (4, 84)}


def test_a_trial_in_vain_costs_one_look_up_for_a_longer_pause(
    serve: Serve, watched: Observed, clock: Clock
) -> None:
    """While a server stays as it is, each pause, twice as long as the last, ends in one look-up."""
    server = serve(ResponsesAPI(Luck().plan))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(5) == ["not_found"] * 5
        for pause_s in (PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S):
            clock.now += pause_s - 1
            assert caller.results(1) == ["circuit_open"]
            clock.now += 1
            assert caller.results(3) == ["not_found", "circuit_open", "circuit_open"]
    assert gets(server) == (5 + 3) * 4
    assert open_circuits(watched) == {port_of(server): 1}


def test_one_of_many_calls_at_once_is_the_trial(serve: Serve, watched: Observed, clock: Clock) -> None:
    """When the pause is over and ten calls end together, one look-up is made and nine are refused."""
    server = serve(ResponsesAPI(Luck().plan))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(5) == ["not_found"] * 5
        clock.now += PAUSE_S
        for _ in range(10):
            caller.call()
        watched.spans(15)
    assert watched.calls() == {"not_found": 6, "circuit_open": 9}
    assert gets(server) == 6 * 4


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_background_calls_have_a_circuit_of_their_own(
    background: bool, serve: Serve, watched: Observed
) -> None:
    """A server may keep background responses and no others, or the other way round."""
    server = serve(ResponsesAPI(Luck(*((LOST, KEPT) if not background else (KEPT, LOST))).plan))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(6, extra_body={"background": background}) == ["not_found"] * 5 + [
            "circuit_open"
        ]
        assert caller.results(6, extra_body={"background": not background}) == ["retrieval"] * 6
        assert caller.results(1, extra_body={"background": background}) == ["circuit_open"]
    assert open_circuits(watched) == {port_of(server): 1}


def test_another_origin_is_not_affected(serve: Serve, watched: Observed) -> None:
    """Each server has a circuit of its own, and the metric says which are open."""
    servers = [serve(ResponsesAPI(Luck(luck).plan)) for luck in (LOST, KEPT, LOST)]
    with closing(Caller(watched, *servers)) as caller:
        assert caller.results(6, at=0) == ["not_found"] * 5 + ["circuit_open"]
        assert caller.results(6, at=1) == ["retrieval"] * 6
        assert caller.results(6, at=2) == ["not_found"] * 5 + ["circuit_open"]
        assert caller.results(1, at=1) == ["retrieval"]
    assert open_circuits(watched) == {port_of(servers[0]): 1, port_of(servers[2]): 1}


def test_a_server_that_has_had_one_response_is_asked_for_every_other(serve: Serve, watched: Observed) -> None:
    """A server that stores responses may have lost many of them: each is asked for."""
    luck = Luck(KEPT)
    server = serve(ResponsesAPI(luck.plan))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(1) == ["retrieval"]
        luck.foreground = LOST
        assert caller.results(8) == ["not_found"] * 8
    assert gets(server) == 1 + 8 * 4
    assert watched.points(OPEN) == []


def test_another_key_has_a_circuit_of_its_own(serve: Serve, watched: Observed) -> None:
    """A server may let one key see its responses and not another."""
    api = ResponsesAPI(Luck(KEPT).plan)
    other = {"Authorization": "Bearer other"}

    def handler(request: SeenRequest) -> Reply:
        unwelcome = request.method == "GET" and request.headers["authorization"] == other["Authorization"]
        return error(401, "no") if unwelcome else api(request)

    server = serve(handler)
    with closing(Caller(watched, server)) as caller:
        assert caller.results(6, extra_headers=other) == ["unauthorized"] * 5 + ["circuit_open"]
        assert caller.results(2) == ["retrieval"] * 2
        assert caller.results(1, extra_headers=other) == ["circuit_open"]
    assert open_circuits(watched) == {port_of(server): 1}


def test_a_response_that_is_under_way_is_asked_for_to_its_end(
    serve: Serve,
    instrument: Instrument,
    clock: Clock,  # noqa: ARG001
) -> None:
    """Five long responses that outlast our patience are no reason to lose a sixth that the server has."""
    observed = instrument(background_timeout=1.5)
    luck = Luck(background="stuck")
    api = ResponsesAPI(luck.plan)
    server = serve(api)
    with closing(Caller(observed, server)) as caller:
        for _ in range(5):
            caller.call(extra_body={"background": True})
        time.sleep(0.9)
        caller.call(extra_body={"background": True})
        observed.spans(5)
        sixth = list(api._records.values())[-1]
        sixth.plan = replace(sixth.plan, fate=KEPT)
        observed.spans(6)
    assert observed.calls() == {"timeout": 5, "retrieval": 1}


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_server_whose_responses_never_end_is_asked_once_for_each(
    background: bool,
    serve: Serve,
    instrument: Instrument,
    clock: Clock,  # noqa: ARG001
) -> None:
    """After five that were in progress until their time was up, one request each. No circuit opens."""
    observed = instrument(retrieval_timeout=0.3, background_timeout=0.3)
    luck = Luck("stuck", "stuck")
    server = serve(ResponsesAPI(luck.plan))
    asked = {"extra_body": {"background": background}}
    with closing(Caller(observed, server)) as caller:
        assert caller.results(5, **asked) == ["timeout"] * 5
        before = gets(server)
        assert before >= 5 * 3
        assert caller.results(4, **asked) == ["timeout"] * 4
        assert gets(server) == before + 4
        # Background responses are judged apart.
        assert caller.results(1, extra_body={"background": not background}) == ["timeout"]
        assert gets(server) >= before + 4 + 3
        luck.foreground = luck.background = KEPT
        assert caller.results(1, **asked) == ["retrieval"]
        luck.foreground = luck.background = "stuck"
        before = gets(server)
        assert caller.results(1, **asked) == ["timeout"]
        assert gets(server) >= before + 3
    assert observed.points(OPEN) == []


def test_a_response_that_has_ended_is_asked_for_at_once(serve: Serve, instrument: Instrument) -> None:
    """Where responses never end, the one request of a response whose stream told its end is not sent late."""
    observed = instrument(retrieval_timeout=2.0)
    luck = Luck("stuck")
    answer = Answer(usage=None)
    ended = Plan(answer, get_replies=(Reply.json({**answer.response(), "usage": COUNTS}),))
    server = serve(
        ResponsesAPI(lambda request: ended if request.json["input"] == "ended" else luck.plan(request))
    )
    with closing(Caller(observed, server)) as caller:
        for _ in range(5):
            caller.call()
        observed.spans(5)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
        for _ in client.responses.create(model="m", input="ended", stream=True):
            pass
    attributes = observed.spans(6)[-1].attributes or {}
    assert attributes["openai_responses.usage.source"] == "retrieval"
    assert attributes["openai_responses.retrieval.duration"] < 1.0


def test_a_response_that_takes_long_is_found_by_the_one_request(
    serve: Serve,
    instrument: Instrument,
    clock: Clock,  # noqa: ARG001
) -> None:
    """The one request comes near the end of the time limit, so a response that ends until then is found."""
    observed = instrument(background_timeout=1.0)
    luck = Luck(background="stuck")
    api = ResponsesAPI(luck.plan)
    server = serve(api)
    with closing(Caller(observed, server)) as caller:
        for _ in range(5):
            caller.call(extra_body={"background": True})
        observed.spans(5)
        before = gets(server)
        caller.call(extra_body={"background": True})
        time.sleep(0.5)
        assert gets(server) == before
        sixth = list(api._records.values())[-1]
        sixth.plan = replace(sixth.plan, fate=KEPT)
        observed.spans(6)
    assert gets(server) == before + 1
    assert observed.calls() == {"timeout": 5, "retrieval": 1}


def holding(server: ScriptedServer, calls: int) -> tuple[openai.OpenAI, list[Any]]:
    """A client with some open streams that have begun."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
    streams = [client.responses.create(model="m", input="x", stream=True) for _ in range(calls)]
    for stream in streams:
        next(stream)
    return client, streams


def break_off(server: ScriptedServer, client: openai.OpenAI, streams: list[Any]) -> None:
    """Stop the server while streams are read."""
    server.stop()
    for stream in streams:
        with pytest.raises(CUT):
            list(stream)
    client.close()


@pytest.mark.parametrize("was_known", [False, True], ids=["new", "known"])
def test_a_server_that_restarts_loses_nothing(was_known: bool, serve: Serve, instrument: Instrument) -> None:
    """Connections are refused for some seconds. Then every call gets its usage."""
    observed = instrument()
    api = ResponsesAPI(lambda request: Plan(Answer(usage=COUNTS), cut_after=5, end=end_of(request)))
    server = serve(api)
    if was_known:
        with closing(Caller(observed, server)) as caller:
            assert caller.results(1) == ["retrieval"]
    client, streams = holding(server, 6)
    break_off(server, client, streams)
    time.sleep(1.8)  # four tries would be over after 0.7 s
    assert observed.finished == was_known
    with ScriptedServer(api, port_of(server)) as again:
        observed.spans(6 + was_known)
        assert gets(again) == 6
    assert observed.calls() == {"retrieval": 6 + was_known}


def end_of(request: SeenRequest) -> Any:
    return Cut() if request.json["input"] == "cut" else Hold()


def test_a_dead_server_gets_few_connections(serve: Serve, instrument: Instrument) -> None:
    """While connections are refused, look-ups share their tries. Then they fail, and the circuit opens."""
    observed = instrument(retrieval_timeout=1.2)
    api = ResponsesAPI(lambda request: Plan(Answer(usage=COUNTS), cut_after=5, end=end_of(request)))
    server = serve(api)
    with closing(Caller(observed, server)) as caller:
        assert caller.results(1) == ["retrieval"]
    client, streams = holding(server, 60)
    break_off(server, client, streams)
    spans = observed.spans(61)
    attempts = [(span.attributes or {})["openai_responses.retrieval.attempts"] for span in spans[1:]]
    assert sum(attempts) < 8 + 8 + 6  # type: ignore[arg-type]  # at once on each thread, then by turns
    told = observed.calls()
    assert told.pop("retrieval") == 1
    assert told.keys() <= {"transport_error", "circuit_open"}
    assert told["transport_error"] >= 5
    assert open_circuits(observed) == {port_of(server): 1}


def test_a_look_up_that_has_seen_nothing_is_broken_off(serve: Serve, watched: Observed) -> None:
    """Under way when the circuit opens, and without a sight of its response, it asks no more."""
    luck = Luck(KEPT)
    server = serve(ResponsesAPI(luck.plan))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(1) == ["retrieval"]  # so none has to wait for another
        luck.foreground = Reply.json({"error": {"message": "no"}}, 404, headers={"retry-after-ms": "1000"})
        caller.call()
        luck.foreground = error(400, "no")
        for _ in range(5):
            caller.call()
        watched.spans(7)
    assert watched.calls() == {"retrieval": 1, "unsupported": 5, "circuit_open": 1}
    assert gets(server) == 1 + 1 + 5


def test_what_is_not_looked_up_does_not_count(serve: Serve, watched: Observed) -> None:
    """Calls that are answered, or not stored, neither open a circuit nor close it."""
    server = serve(ResponsesAPI(Luck().plan))
    with closing(Caller(watched, server)) as caller:
        assert caller.results(8, store=False) == ["not_stored"] * 8
        assert caller.results(4) == ["not_found"] * 4
        assert caller.results(2, store=False) == ["not_stored"] * 2
        assert caller.results(2) == ["not_found", "circuit_open"]


def test_no_circuit_is_open_when_nobody_looks(
    serve: Serve, watched: Observed, instrument: Instrument
) -> None:
    """`uninstrument()` takes what it counted as open back; the next `instrument()` begins anew."""
    luck = Luck()
    server = serve(ResponsesAPI(luck.plan))
    with closing(Caller(watched, server)) as caller:
        caller.results(5)
        assert open_circuits(watched) == {port_of(server): 1}
        ResponsesUsageInstrumentor().uninstrument()
        instrument(watched)
        luck.foreground = KEPT
        assert caller.results(1) == ["retrieval"]
    assert open_circuits(watched) == {}


class Queue:
    """Circuits as look-ups use them, and what these would do next."""

    def __init__(self) -> None:
        self.advanced: list[LookUp] = []
        self.circuits = Circuits(lambda *_: None, self._put)

    def _put(self, callback: Callable[[], float | None], after_s: float = 0.0) -> None:
        assert after_s == 0
        self.advanced.append(callback.__self__)  # type: ignore[attr-defined]

    def admit(self, address: str, lookup: LookUp | None = None) -> tuple[LookUp, Admission]:
        lookup = lookup or a_lookup()
        return lookup, self.circuits.admit(at(address), lookup)

    def touch_others(self) -> None:
        for number in range(300):
            self.circuits.learn(at(f"other-{number}"), a_lookup(), NOTHING)


def at(address: str) -> Endpoint:
    return Endpoint(address, 443, background=False, tenant=0)


def a_lookup() -> LookUp:
    job = Job(Server("openai", None, None), "resp_1", 10.0, cast("Any", None))
    lookups = SimpleNamespace(policy=RetrievalPolicy())
    return LookUp(cast("Any", lookups), job, LookupRequest(at("any"), SimpleNamespace(tenant=0)))


def test_an_endpoint_that_was_forgotten_gets_its_slots_anew() -> None:
    """Look-ups that fail now and then, among those of very many endpoints, are still made."""
    queue = Queue()
    for _ in range(12):
        lookup, admission = queue.admit("seldom")
        assert admission is Admission.ADMITTED
        queue.circuits.leave(at("seldom"), lookup, NOT_FOUND)
        queue.touch_others()


def test_look_ups_queued_at_an_endpoint_that_is_forgotten_are_advanced() -> None:
    """None of them waits for ever; the first ones get the slots."""
    queue = Queue()
    assert [queue.admit("slow")[1] for _ in range(5)] == [Admission.ADMITTED] * 5
    waiting = [queue.admit("slow") for _ in range(6)]
    assert {admission for _, admission in waiting} == {Admission.QUEUED}
    queue.touch_others()
    assert queue.advanced == [lookup for lookup, _ in waiting]
    again = [queue.admit("slow", lookup)[1] for lookup in queue.advanced]
    assert again == [Admission.ADMITTED] * 5 + [Admission.QUEUED]


def test_a_look_up_from_which_nothing_is_learned_leaves_its_slot_to_the_next() -> None:
    """One that was settled otherwise makes room for one other."""
    queue = Queue()
    first, *_ = [queue.admit("slow")[0] for _ in range(5)]
    second, third = queue.admit("slow")[0], queue.admit("slow")[0]
    queue.circuits.leave(at("slow"), first, NOTHING)
    assert queue.advanced == [second]
    assert queue.admit("slow", second)[1] is Admission.ADMITTED
    queue.circuits.learn(at("slow"), second, ALIVE)
    assert queue.advanced == [second, third]
    assert queue.admit("slow", third)[1] is Admission.ADMITTED

"""Bad networks between the application and the API, made by toxiproxy, and by a server over HTTP/2.

Each call is made twice over networks of the same kind: without the instrumentation, then with it. All calls
of a round run side by side, because they mostly wait. What is compared is compared within one run.
`scripts/test tests/test_networks.py -s` prints the figures that docs/reliability.md has.
"""

from __future__ import annotations

import os
import signal
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import openai
import pytest

from calls import CUT, HTTP, entered, items, settle
from embedded.answer import Answer, new_id, usage
from embedded.http_server import Reply, ScriptedServer, SeenRequest, Send, Wait
from embedded.responses_api import Plan, ResponsesAPI
from http2_server import Fault, Http2Server
from observed import Observed, token_attributes, usage_attributes
from otel_responses_usage import Config, ResponsesUsageInstrumentor
from programs import Proxy, Toxiproxy
from sockets import HAS_WEBSOCKET, TERMINAL, client_of, kind, needs_websocket, send
from test_matrix import ASYNCIO, SYNC, Runtime
from traffic import show

if HAS_WEBSOCKET:
    import websockets

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan

RUNTIMES = (SYNC, ASYNCIO)
PACE_S = 0.01
MET_AFTER = 6  # events: the id is known, and the output is not done
READ_TIMEOUT_S = 1.0
LOOKUP_TIMEOUT_S = 7.0  # more than one request of a look-up may take, which is 5 s
# What a busy machine adds to a call. A look-up that gets no answer takes 5 s at least.
MOST_DELAY_S = 4.0
COUNTS = usage(31, 245, cached=16, reasoning=128)
EVENTS = len(Answer().events())

Toxic = tuple[str, Mapping[str, int]]
NEVER_ANSWERS: Toxic = ("timeout", {"timeout": 0})
RESETS: Toxic = ("reset_peer", {"timeout": 0})
SLOW: Toxic = ("bandwidth", {"rate": 1})
IN_PIECES: Toxic = ("slicer", {"average_size": 40, "size_variation": 20, "delay": 100})
CLOSES_LATE: Toxic = ("slow_close", {"delay": 400})
LIMITED: Toxic = ("limit_data", {"bytes": 3500})  # less than a stream, more than a response
LIMITED_GET: Toxic = ("limit_data", {"bytes": 600})  # less than a response, more than its head


def latency(milliseconds: int, jitter: int = 0) -> Toxic:
    return ("latency", {"latency": milliseconds, "jitter": jitter})


@dataclass(frozen=True)
class Case:
    """A network, and what has to come of a call over it.

    Attributes:
        name: What is bad about the network.
        outcome: The outcome of the call.
        known: The source of its usage, or the reason why it is not known.
        toxic: What is bad from the beginning.
        meets: What becomes bad when the application has read some events.
        heals_after_s: How long after the end of the stream the network is good again, if ever.
        leaves: Whether the application leaves the stream when it has read some events.
        has_length: Whether the body says where it ends. Otherwise it ends with the connection.
        lookup_s: How long the look-up takes, at least and at most.

    """

    name: str
    outcome: str = "completed"
    known: str = "stream"
    toxic: Toxic | None = None
    meets: Toxic | None = None
    heals_after_s: float | None = None
    leaves: bool = False
    has_length: bool = True
    lookup_s: tuple[float, float] = (0.0, 4.0)

    def __str__(self) -> str:
        return f"{'look-up' if self.leaves else 'stream'}: {self.name}"


# A look-up that gets no answer takes its whole time. One request of it takes 5 s.
WHOLE_TIME = (LOOKUP_TIMEOUT_S - 0.2, LOOKUP_TIMEOUT_S + 3)
SECOND_TRY = (0.0, LOOKUP_TIMEOUT_S)

STREAMS = (
    Case("good"),
    Case("latency", toxic=latency(200)),
    Case("jitter", toxic=latency(100, 90)),
    Case("1 KB/s", toxic=SLOW),
    Case("small pieces", toxic=IN_PIECES),
    Case("slow close", toxic=CLOSES_LATE),
    Case("slow close, no length", toxic=CLOSES_LATE, has_length=False),
    Case("never answers", "error", "no_response_id", toxic=NEVER_ANSWERS),
    Case("falls silent", "cut", "timeout", meets=NEVER_ANSWERS, lookup_s=WHOLE_TIME),
    Case(
        "falls silent, heals", "cut", "retrieval", meets=NEVER_ANSWERS, heals_after_s=0, lookup_s=SECOND_TRY
    ),
    Case("reset at once", "error", "no_response_id", toxic=RESETS),
    Case("reset in mid-body", "cut", "transport_error", meets=RESETS),
    Case("reset in mid-body, heals", "cut", "retrieval", meets=RESETS, heals_after_s=0.3),
    Case("ends in mid-body", "cut", "retrieval", toxic=LIMITED),
)
LOOKUPS = (
    Case("good"),
    Case("latency", meets=latency(200), lookup_s=(0.2, 4.0)),
    Case("jitter", meets=latency(100, 90)),
    Case("1 KB/s", meets=SLOW, lookup_s=(0.5, 5.0)),
    Case("small pieces", meets=IN_PIECES),
    Case("slow close", meets=CLOSES_LATE),
    Case("never answers", known="timeout", meets=NEVER_ANSWERS, lookup_s=WHOLE_TIME),
    Case("never answers, heals", meets=NEVER_ANSWERS, heals_after_s=1, lookup_s=SECOND_TRY),
    Case("reset at once", known="transport_error", meets=RESETS),
    Case("reset at once, heals", meets=RESETS, heals_after_s=0.3),
    Case("ends in mid-body", known="transport_error", meets=LIMITED_GET),
    Case("ends in mid-body, heals", meets=LIMITED_GET, heals_after_s=0.3),
)
LOOKUPS = tuple(
    replace(case, leaves=True, outcome="closed", known="retrieval" if case.known == "stream" else case.known)
    for case in LOOKUPS
)


# --- one call ------------------------------------------------------------------------------------------


@dataclass
class Played:
    """What a call was for the application."""

    seen: list[str] = field(default_factory=list)
    raised: str = ""
    took_s: float = 0.0


def causes(error: BaseException) -> str:
    """An exception and what it was raised from, as the application sees them."""
    return f"{type(error).__name__}({error})" + (
        f" from {causes(error.__cause__)}" if error.__cause__ else ""
    )


async def read(client: Any, model: str, on_event: Callable[[int], bool]) -> Played:
    """Read one stream as an application does, until `on_event` returns true."""
    played, began = Played(), time.monotonic()
    try:
        async with entered(
            await settle(client.responses.create(model=model, input="canary", stream=True))
        ) as stream:
            async for event in items(stream):
                played.seen.append(event.type)
                if on_event(len(played.seen)):
                    break
    except (openai.APIError, *CUT) as error:
        played.raised = causes(error)
    played.took_s = time.monotonic() - began
    return played


def instrumented(config: Config) -> Observed:
    """Switch the instrumentation on."""
    observed = Observed()
    ResponsesUsageInstrumentor().instrument(
        tracer_provider=observed.tracer_provider, meter_provider=observed.meter_provider, config=config
    )
    return observed


def by_model(spans: Iterable[ReadableSpan]) -> dict[str, ReadableSpan]:
    return {str((span.attributes or {})["gen_ai.request.model"]): span for span in spans}


def how(span: ReadableSpan) -> tuple[Any, Any]:
    """The outcome, and the source or the missing reason."""
    attributes = span.attributes or {}
    known = attributes.get("openai_responses.usage.source")
    return (
        attributes["openai_responses.stream.outcome"],
        known or attributes["openai_responses.usage.missing_reason"],
    )


def assert_same(without: Played, watched: Played) -> None:
    """The application has seen the same, and has not waited for a look-up."""
    assert (watched.seen, watched.raised) == (without.seen, without.raised)
    assert watched.took_s < 1.3 * without.took_s + MOST_DELAY_S


def assert_usage(span: ReadableSpan, known: str) -> None:
    """The span has the server's counts if they are known, and otherwise none."""
    has_usage = known in ("stream", "retrieval")
    assert token_attributes(span) == (usage_attributes(COUNTS) if has_usage else {}), span.attributes


def figures(
    without: Mapping[str, Played],
    watched: Mapping[str, Played],
    spans: Mapping[str, ReadableSpan],
    title: str = "",
) -> str:
    """Return a row for each call, for the documents."""
    rows = []
    for name, played in watched.items():
        asked = (spans[name].attributes or {}).get("openai_responses.retrieval.duration")
        looked_up = "" if asked is None else f"; look-up {asked:.2f} s"
        rows.append(
            f"{title}{name}: {', '.join(how(spans[name]))}; {len(played.seen)} events; "
            f"{without[name].took_s:.2f} s without, {played.took_s:.2f} s with{looked_up}"
        )
    return "\n".join(rows)


def assert_accounted(observed: Observed, calls: int) -> None:
    """Each call is counted once, each token that a span has is in the metric, and nothing is pending."""
    spans = observed.spans(calls, 30)
    known = [token_attributes(span) for span in spans if token_attributes(span)]
    assert sum(observed.calls().values()) == calls
    assert observed.calls() == dict(Counter(str(how(span)[1]) for span in spans))
    assert observed.tokens() == {
        kind: (len(known), sum(counts[f"gen_ai.usage.{kind}_tokens"] for counts in known))
        for kind in ("input", "output")
    }
    assert observed.pending() == 0
    assert observed.points("openai_responses.faults") == []
    assert "canary" not in "".join(text for _, text in observed.told())


# --- toxics --------------------------------------------------------------------------------------------


class GatedAPI:
    """The Responses API. A stream waits after some events until the network is as bad as it is to be."""

    def __init__(self) -> None:
        self.api = ResponsesAPI(lambda _: Plan(Answer(usage=COUNTS), pace=PACE_S))
        self._cases = {str(case): case for case in (*STREAMS, *LOOKUPS)}
        self._gates: dict[str, threading.Event] = {}

    def gate(self, model: str) -> threading.Event:
        return self._gates.setdefault(model, threading.Event())

    def __call__(self, request: SeenRequest) -> Reply:
        reply = self.api(request)
        if request.method == "GET":
            return reply
        model = request.json["model"]
        case = self._cases[model.rpartition(", ")[0]]
        if case.meets:
            reply = gated(reply, self.gate(model))
        return replace(reply, chunked=case.has_length)


def gated(stream: Reply, gate: threading.Event) -> Reply:
    """Return the stream with a wait after some events."""
    begun, steps = 2 * MET_AFTER - 1, stream.steps  # a pause between two events
    return replace(stream, steps=(*steps[:begun], Wait(gate), *steps[begun:]))


# One for all clients. To make one takes longer than what is measured here.
TLS = ssl.create_default_context()


def one(case: Case, runtime: Runtime, proxy: Proxy, api: GatedAPI, after_s: float) -> Played:
    """Make one call over one network."""
    model, played = f"{case}, {runtime}", Played()
    if case.toxic:
        proxy.add(case.toxic[0], **case.toxic[1])
    time.sleep(after_s)

    def on_event(number: int) -> bool:
        if number == MET_AFTER and case.meets:
            proxy.add(case.meets[0], **case.meets[1])
            api.gate(model).set()
        return number == MET_AFTER and case.leaves

    async def main() -> None:
        nonlocal played
        library = HTTP.Client if runtime.is_sync else HTTP.AsyncClient
        client = runtime.client(
            base_url=f"{proxy.url}/v1",
            api_key="key",
            max_retries=0,
            timeout=READ_TIMEOUT_S,
            http_client=library(verify=TLS),
        )
        played = await read(client, model, on_event)
        await settle(client.close())

    runtime.drive(main)
    if case.heals_after_s is not None:
        time.sleep(case.heals_after_s)
        proxy.heal()
    return played


CASES = {f"{case}, {runtime}": (case, runtime) for case in (*STREAMS, *LOOKUPS) for runtime in RUNTIMES}


def play(toxiproxy: Toxiproxy, server: ScriptedServer, api: GatedAPI) -> dict[str, Played]:
    """Make all calls side by side, one begun after the other, each over a network of its own."""
    with ThreadPoolExecutor(len(CASES)) as pool:
        calls = {}
        for number, (model, case) in enumerate(CASES.items()):
            proxy = toxiproxy.proxy(server.url.removeprefix("http://"))
            calls[model] = pool.submit(one, *case, proxy, api, 0.02 * number)
        return {model: call.result(60) for model, call in calls.items()}


@dataclass
class Rounds:
    """The same calls without the instrumentation and with it."""

    without: dict[str, Played]
    watched: dict[str, Played]
    observed: Observed
    spans: dict[str, ReadableSpan]


@pytest.fixture(scope="module")
def toxiproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toxiproxy]:
    """A toxiproxy for all tests."""
    with Toxiproxy(tmp_path_factory.mktemp("toxiproxy")) as toxiproxy:
        yield toxiproxy


@pytest.fixture(scope="module")
def rounds(toxiproxy: Toxiproxy) -> Rounds:
    """Both rounds."""
    api = GatedAPI()
    with ScriptedServer(api) as server:
        warm_up(server.url)
        without = play(toxiproxy, server, api)
    api = GatedAPI()
    with ScriptedServer(api) as server:
        observed = instrumented(Config(retrieval_timeout=LOOKUP_TIMEOUT_S, max_concurrency=len(CASES)))
        try:
            watched = play(toxiproxy, server, api)
            spans = observed.spans(len(CASES), 30)
        finally:
            ResponsesUsageInstrumentor().uninstrument()
    return Rounds(without, watched, observed, by_model(spans))


def warm_up(url: str) -> None:
    """The SDK builds its models at first use, which takes longer than what is measured here."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="key") as client:
        list(client.responses.create(model="stream: good, sync", input="x", stream=True))


@pytest.mark.parametrize("model", CASES)
def test_the_application_sees_the_network_as_it_is(rounds: Rounds, model: str) -> None:
    """Events, exceptions and waiting are those without the instrumentation."""
    without, watched = rounds.without[model], rounds.watched[model]
    assert_same(without, watched)
    case = CASES[model][0]
    assert bool(watched.raised) == (case.outcome in ("error", "cut"))
    if case.outcome == "completed":
        assert len(watched.seen) == EVENTS


@pytest.mark.parametrize("model", CASES)
def test_each_call_has_its_usage_or_the_reason(rounds: Rounds, model: str) -> None:
    """The span says how the call ended, and has the server's counts or why they are not known."""
    case, span = CASES[model][0], rounds.spans[model]
    attributes = span.attributes or {}
    assert how(span) == (case.outcome, case.known)
    assert_usage(span, case.known)
    assert attributes["openai_responses.stream.events"] == len(rounds.watched[model].seen)
    assert span.start_time
    assert span.end_time
    duration_s = (span.end_time - span.start_time) / 1e9
    # The span ends with the stream, however long the look-up takes.
    assert 0 < duration_s < rounds.watched[model].took_s + 0.1
    if case.known not in ("stream", "no_response_id"):
        least_s, most_s = case.lookup_s
        assert least_s <= attributes["openai_responses.retrieval.duration"] <= most_s


def test_everything_is_accounted_for(rounds: Rounds) -> None:
    """Calls, tokens and pending look-ups add up over all networks."""
    assert_accounted(rounds.observed, len(CASES))
    show(figures(rounds.without, rounds.watched, rounds.spans))


# --- a server that vanishes ----------------------------------------------------------------------------


@contextmanager
def vanished(toxiproxy: Toxiproxy) -> Iterator[None]:
    """Meanwhile the other side sends nothing at all, and ends no connection."""
    os.kill(toxiproxy.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(toxiproxy.pid, signal.SIGCONT)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_a_server_that_vanishes_for_a_while_costs_nothing(runtime: Runtime, tmp_path: Path) -> None:
    """No FIN arrives. The application sees its own timeout. The look-up waits until the server is back."""
    played: list[Played] = []
    with (
        Toxiproxy(tmp_path) as toxiproxy,
        ScriptedServer(ResponsesAPI(lambda _: Plan(Answer(usage=COUNTS), pace=0.2))) as server,
    ):
        proxy = toxiproxy.proxy(server.url.removeprefix("http://"))

        def play() -> None:
            with ExitStack() as away:

                def on_event(number: int) -> bool:
                    if number == MET_AFTER:
                        away.enter_context(vanished(toxiproxy))
                    return False

                async def main() -> None:
                    client = runtime.client(
                        base_url=f"{proxy.url}/v1", api_key="key", max_retries=0, timeout=READ_TIMEOUT_S
                    )
                    played.append(await read(client, "vanishes", on_event))
                    await settle(client.close())

                runtime.drive(main)
                time.sleep(0.5)

        play()
        observed = instrumented(Config())
        try:
            play()
            span = observed.span()
        finally:
            ResponsesUsageInstrumentor().uninstrument()
    without, watched = played
    assert_same(without, watched)
    assert watched.raised
    assert len(watched.seen) == MET_AFTER
    assert how(span) == ("cut", "retrieval")
    assert token_attributes(span) == usage_attributes(COUNTS)
    assert_accounted(observed, 1)


# --- a network that becomes bad in the middle of a call: over HTTP/2, and over a WebSocket ---------------


@dataclass(frozen=True)
class Met:
    """What the network does when some events were read, and what has to come of the call.

    Attributes:
        name: What is bad.
        outcome: The outcome of the call. After `closed` the application has left the stream.
        known: The source of its usage, or the reason why it is not known.
        toxic: What the network does.
        heals_after_s: How long after the end of the stream the network is good again, if ever.
        fault: What a server of HTTP/2 does then.
        lookup_fault: What a server of HTTP/2 does in the middle of its first answer to the look-up.

    """

    name: str
    outcome: str = "cut"
    known: str = "retrieval"
    toxic: Toxic | None = None
    heals_after_s: float | None = 0.0
    fault: Fault | None = None
    lookup_fault: Fault | None = None


def whole(name: str, toxic: Toxic | None) -> Met:
    """Return a stream that is read to its end."""
    return Met(name, "completed", "stream", toxic)


def left(
    name: str, toxic: Toxic | None = None, known: str = "retrieval", *, heals_after_s: Any = None
) -> Met:
    """Return a stream that the application leaves: the network is bad for the look-up."""
    return Met(f"look-up: {name}", "closed", known, toxic, heals_after_s)


# Networks that let everything through.
SLOW_NETWORKS: dict[str, Toxic | None] = {
    "good": None,
    "latency": latency(200),
    "jitter": latency(100, 90),
    "1 KB/s": SLOW,
    "small pieces": IN_PIECES,
    "slow close": CLOSES_LATE,
}
ALL_MEET = (
    *(whole(name, toxic) for name, toxic in SLOW_NETWORKS.items()),
    Met("reset", toxic=RESETS),
    Met("reset, heals late", toxic=RESETS, heals_after_s=0.3),
    Met("reset for good", known="transport_error", toxic=RESETS, heals_after_s=None),
    *(left(name, toxic) for name, toxic in SLOW_NETWORKS.items()),
    left("reset", RESETS, "transport_error"),
    left("reset, heals", RESETS, heals_after_s=0.3),
)
# The SDK has no timeout for a message over a WebSocket.
HTTP2_MEETS = (
    *ALL_MEET,
    Met("falls silent", toxic=NEVER_ANSWERS),
    Met("falls silent for good", known="timeout", toxic=NEVER_ANSWERS, heals_after_s=None),
    left("never answers", NEVER_ANSWERS, "timeout"),
    left("never answers, heals", NEVER_ANSWERS, heals_after_s=1.0),
    Met("RST_STREAM", fault="rst_stream"),
    # The HTTP library reads no further, although the server sends the rest.
    Met("GOAWAY, goes on", fault="goaway"),
    Met("GOAWAY, ends", fault="goaway, close"),
    Met("look-up: RST_STREAM", "closed", lookup_fault="rst_stream"),
    Met("look-up: GOAWAY, goes on", "closed", lookup_fault="goaway"),
    Met("look-up: GOAWAY, ends", "closed", lookup_fault="goaway, close"),
)


@dataclass(frozen=True)
class Meeting:
    """Where the calls of a test meet their networks: the servers go on when the networks are bad."""

    gates: dict[str, threading.Event] = field(default_factory=dict)

    def begin(self, model: str) -> threading.Event:
        """Return what the server of a call waits for after some events."""
        gate = self.gates[model] = threading.Event()
        return gate

    def on_event(self, number: int, case: Met, proxy: Proxy) -> bool:
        """Do what is to be done when so many events were read, and return whether the application leaves."""
        if number != MET_AFTER:
            return False
        if case.toxic:
            proxy.add(case.toxic[0], **case.toxic[1])
        self.gates.pop(case.name).set()
        return case.outcome == "closed"


async def over_http2(
    runtime: Runtime, server: Http2Server, meeting: Meeting, proxy: Proxy, case: Met
) -> Played:
    """Make one call over HTTP/2."""
    library = HTTP.Client if runtime.is_sync else HTTP.AsyncClient
    client = runtime.client(
        base_url=f"https://{proxy.address}/v1",
        api_key="key",
        max_retries=0,
        # At 1 KB/s the last event takes longer, and TLS shows it when it is whole.
        timeout=5 * READ_TIMEOUT_S if case.toxic is SLOW else READ_TIMEOUT_S,
        http_client=library(http2=True, verify=server.client_context),
    )
    played = await read(client, case.name, lambda number: meeting.on_event(number, case, proxy))
    await settle(client.close())
    return played


async def over_websocket(runtime: Runtime, meeting: Meeting, proxy: Proxy, case: Met) -> Played:
    """Make one call over a WebSocket."""
    played, began = Played(), time.monotonic()
    client = client_of(runtime, proxy, base_url=f"{proxy.url}/v1")
    try:
        async with entered(client.responses.connect()) as connection:
            await send(connection, model=case.name)
            while not played.seen or played.seen[-1] not in TERMINAL:
                played.seen.append(kind(await settle(connection.recv())))
                if meeting.on_event(len(played.seen), case, proxy):
                    break
    except websockets.ConnectionClosed as error:
        played.raised = causes(error)
    played.took_s = time.monotonic() - began
    await settle(client.close())
    return played


def met(
    toxiproxy: Toxiproxy,
    address: str,
    runtime: Runtime,
    cases: Iterable[Met],
    call: Callable[[Runtime, Proxy, Met], Awaitable[Played]],
) -> dict[str, Played]:
    """Make a call for each case, side by side, each over a network of its own."""

    def one(case: Met, after_s: float) -> Played:
        proxy, played = toxiproxy.proxy(address), Played()
        time.sleep(after_s)

        async def main() -> None:
            nonlocal played
            played = await call(runtime, proxy, case)

        runtime.drive(main)
        if case.heals_after_s is not None:
            time.sleep(case.heals_after_s)
            proxy.heal()
        return played

    with ThreadPoolExecutor(len(HTTP2_MEETS)) as pool:
        calls = {case.name: pool.submit(one, case, 0.05 * number) for number, case in enumerate(cases)}
        return {name: call.result(60) for name, call in calls.items()}


def assert_met(title: str, cases: Iterable[Met], play: Callable[[], dict[str, Played]]) -> None:
    """Make all calls without the instrumentation, then with it, and compare."""
    without = play()
    observed = instrumented(Config(retrieval_timeout=LOOKUP_TIMEOUT_S, max_concurrency=len(without)))
    try:
        watched = play()
        spans = by_model(observed.spans(len(without), 30))
    finally:
        ResponsesUsageInstrumentor().uninstrument()
    show(figures(without, watched, spans, f"{title}, "))
    for case in cases:
        assert_same(without[case.name], watched[case.name])
        assert how(spans[case.name]) == (case.outcome, case.known), case.name
        assert_usage(spans[case.name], case.known)
    assert_accounted(observed, len(without))


class Http2API:
    """The Responses API, with bodies of several pieces, and the faults of the cases."""

    def __init__(self) -> None:
        self.meeting = Meeting()
        self.api = ResponsesAPI(
            lambda request: Plan(Answer(usage=COUNTS, model=request.json["model"]), pace=PACE_S)
        )
        self._cases = {case.name: case for case in HTTP2_MEETS}
        self._asked: Counter[str] = Counter()

    def __call__(self, request: SeenRequest) -> Reply:
        reply = self.api(request)
        if request.method == "POST":
            return gated(reply, self.meeting.begin(request.json["model"]))
        (body,) = reply.steps
        assert isinstance(body, Send)
        half = len(body.data) // 2
        return replace(reply, steps=(Send(body.data[:half]), Send(body.data[half:])))

    def fault(self, request: SeenRequest) -> tuple[int, Fault] | None:
        if request.method == "POST":
            fault = self._cases[request.json["model"]].fault
            return (MET_AFTER, fault) if fault else None
        response_id = request.path.rpartition("/")[2]
        self._asked[response_id] += 1
        fault = self._cases[self.api.stored[response_id]["model"]].lookup_fault
        return (1, fault) if fault and self._asked[response_id] == 1 else None


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_http_2_over_bad_networks_is_accounted_for(runtime: Runtime, toxiproxy: Toxiproxy) -> None:
    """RST_STREAM, GOAWAY and broken connections are cuts. The usage is looked up, over HTTP/2 as well."""
    api = Http2API()
    with Http2Server(api, api.fault) as server:

        def call(runtime: Runtime, proxy: Proxy, case: Met) -> Awaitable[Played]:
            return over_http2(runtime, server, api.meeting, proxy, case)

        assert_met(
            f"HTTP/2, {runtime}",
            HTTP2_MEETS,
            lambda: met(toxiproxy, server.address, runtime, HTTP2_MEETS, call),
        )
        assert server.seen["POST"] == 2 * len(HTTP2_MEETS)
        assert server.seen["GET"] >= len([case for case in HTTP2_MEETS if case.known == "retrieval"])


@needs_websocket
@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_websockets_over_bad_networks_are_accounted_for(runtime: Runtime, toxiproxy: Toxiproxy) -> None:
    """The messages and the look-ups meet the same networks."""
    from embedded.websocket_api import Turn, WebSocketAPI

    meeting = Meeting()

    def turn(asked: Any) -> Turn:
        answer = Answer(usage=COUNTS, model=asked["model"], id=new_id())
        return Turn(answer, cut_after=MET_AFTER, end=Wait(meeting.begin(asked["model"])), pace=PACE_S)

    def call(runtime: Runtime, proxy: Proxy, case: Met) -> Awaitable[Played]:
        return over_websocket(runtime, meeting, proxy, case)

    with WebSocketAPI(turn) as server:
        address = server.url.removeprefix("http://").removesuffix("/v1")
        assert_met(
            f"WebSocket, {runtime}",
            ALL_MEET,
            lambda: met(toxiproxy, address, runtime, ALL_MEET, call),
        )

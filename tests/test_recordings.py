"""Recorded traffic of OpenAI and others, replayed: what is told of it is what the recordings say."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import openai
import pytest
from openai._streaming import SSEDecoder
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from calls import CALLS as CALL_KINDS
from calls import CUT, HTTP, Call, Reader, resume, since
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest, Send, Step
from otel_responses_usage import Config, ResponsesUsageInstrumentor, Usage
from otel_responses_usage._answer.body import body_reader
from otel_responses_usage._answer.state import AnswerState
from test_matrix import drive_sync

ROOT = Path(os.environ.get("RECORDINGS") or Path(__file__).parents[1] / "../shared/recordings")
MANIFEST = ROOT / "manifest.json"

Row = dict[str, Any]
ROWS: list[Row] = json.loads(MANIFEST.read_text(encoding="utf-8"))["recordings"] if MANIFEST.exists() else []

EVENT = re.compile(rb"^data:(?! ?\[DONE\]).*\n\n", re.MULTILINE)
# Two bytes that a border comes between at the worst moment: of a character, and of the end of a line.
TENDER = (re.compile(rb"[\xc0-\xff][\x80-\xbf]"), re.compile(rb"\r\n"))

# The turns of a conversation in one recording: the body is two answers, one after the other.
TWO_ANSWERS = "streams/ai-openai-shell-tool-1-0-8dc9879e.json"

STREAMS = [row for row in ROWS if row["kind"] == "sse" and row["file"] != TWO_ANSWERS]
CALLS = [row for row in STREAMS if row["method"] == "POST"]
FETCHES = [row for row in STREAMS if row["method"] == "GET"]
DOCUMENTS = [row for row in ROWS if row["kind"] == "json"]


def name(row: Row) -> str:
    return Path(row["file"]).stem


@dataclass(frozen=True)
class Recording:
    """A recorded stream, taken apart as the SDK does it."""

    body: bytes
    events: list[dict[str, Any]]
    frames: list[bytes]  # the body, one event each; a comment is part of the event behind it
    closing: bytes  # what follows the last event
    asked: dict[str, Any]

    @classmethod
    def of(cls, row: Row) -> Recording:
        text = json.loads((ROOT / row["file"]).read_text(encoding="utf-8"))
        body = text["sse"].encode()
        events = [
            json.loads(sse.data)
            for sse in SSEDecoder().iter_bytes(iter([body]))
            if not sse.data.startswith("[DONE]")
        ]
        # Every recording ends its lines with LF, and its events with a blank line.
        borders = [0, *(match.end() for match in EVENT.finditer(body))]
        frames = [body[start:end] for start, end in itertools.pairwise(borders)]
        assert len(frames) == len(events)
        return cls(body, events, frames, body[borders[-1] :], text["request"]["body"] or {})

    @property
    def whole(self) -> list[bytes]:
        """The body in pieces of one event."""
        return [*self.frames, self.closing]

    @property
    def before_the_end(self) -> int:
        """How many events come before the one that ends the call."""
        types = [event["type"] for event in self.events]
        return types.index("error" if "error" in types else types[-1])

    def is_kept(self, passing: list[dict[str, Any]]) -> bool:
        """Whether a GET can find the response, by the request and by the events that arrived."""
        told = [event["response"] for event in passing if isinstance(event.get("response"), dict)]
        if any(request.get("background") is True for request in (self.asked, *told)):
            return True
        return all(request.get("store") is not False for request in (self.asked, *told))

    @property
    def last_response(self) -> dict[str, Any]:
        """The response object of the terminal event."""
        response: dict[str, Any] = self.events[-1]["response"]
        return response


def usage_of(row: Row) -> Usage | None:
    """The manifest's usage, put down count by count."""
    told = row["usage"]
    if told is None:
        return None
    return Usage(
        told["input_tokens"],
        told["output_tokens"],
        (told.get("input_tokens_details") or {}).get("cached_tokens"),
        (told.get("input_tokens_details") or {}).get("cache_write_tokens"),
        (told.get("output_tokens_details") or {}).get("reasoning_tokens"),
    )


def kinds_of(deltas: Mapping[str, int]) -> dict[str, int]:
    return {kind.removeprefix("response.").removesuffix(".delta"): count for kind, count in deltas.items()}


# --- without a network ---------------------------------------------------------------------------------


def fold(pieces: Iterable[bytes]) -> AnswerState:
    state = AnswerState()
    reader = None
    for piece in pieces:
        reader = reader or body_reader(piece, state)
        taken = reader.feed(piece)
        if taken:
            reader.feed(piece[taken:])
    return state


def assert_tells(state: AnswerState, row: Row) -> None:
    response, ending = state.response, state.ending
    assert ending is not None
    assert ending.outcome.value == row["response_status"]
    assert row["terminal"] == f"response.{ending.outcome.value}"
    assert response.usage == usage_of(row)
    assert response.model == row["model"]
    assert response.id == row["response_id"]
    assert response.status == row["response_status"]
    assert response.incomplete_reason == row["incomplete_reason"]
    assert ending.error_type == row["error_code"]
    assert response.service_tier == row["service_tier"]
    assert state.events == row["event_total"]
    assert sum(state.deltas.values()) == row["delta_total"]
    assert state.deltas == kinds_of(row["deltas"])


def test_the_recordings_are_there() -> None:
    """The recordings are beside the repository, or where `RECORDINGS` says; a CI run never goes without."""
    if not ROWS:
        reason = f"no recordings at {MANIFEST}; set RECORDINGS to their folder"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    assert len(STREAMS) == 241


@pytest.mark.parametrize("row", STREAMS, ids=name)
def test_a_recorded_stream_tells_what_the_manifest_says(row: Row) -> None:
    """Whole, event by event or in any pieces: usage, model, id, ending and counts are those recorded."""
    recording = Recording.of(row)
    assert_tells(fold([recording.body]), row)
    assert_tells(fold(recording.whole), row)
    rng = random.Random(row["body_sha256"])  # noqa: S311
    for most in (60, 3000):
        borders = [0]
        while borders[-1] < len(recording.body):
            borders.append(borders[-1] + rng.randint(1, most))
        assert_tells(fold([recording.body[start:end] for start, end in itertools.pairwise(borders)]), row)


@pytest.mark.parametrize("row", STREAMS[::12], ids=name)
def test_a_recorded_stream_tells_the_same_byte_by_byte(row: Row) -> None:
    """A border between any two bytes changes nothing."""
    body = Recording.of(row).body
    assert_tells(fold(body[i : i + 1] for i in range(len(body))), row)


@pytest.mark.parametrize("row", STREAMS[::12], ids=name)
def test_a_recorded_stream_tells_the_same_with_other_line_ends(row: Row) -> None:
    """A server or a proxy that writes CR LF, or CR, says the same."""
    pieces = Recording.of(row).whole
    for newline in (b"\r\n", b"\r"):
        assert_tells(fold([piece.replace(b"\n", newline) for piece in pieces]), row)


@pytest.mark.parametrize("row", DOCUMENTS, ids=name)
def test_a_recorded_document_tells_what_the_manifest_says(row: Row) -> None:
    """Answers that were not streamed, of fetches, cancels, background starts and refusals."""
    body = json.loads(json.loads((ROOT / row["file"]).read_text(encoding="utf-8"))["body"])
    state = AnswerState()
    state.on_document(body)
    assert state.response.usage == usage_of(row)
    assert state.response.id == row["response_id"]
    assert state.response.model == row["model"]
    assert state.response.status == row["response_status"]
    assert state.response.error_code == (row["error_code"] or (body.get("error") or {}).get("type"))


@pytest.mark.skipif(not ROWS, reason="no recordings")
def test_of_two_answers_in_one_body_the_first_is_the_call() -> None:
    """The terminal event ends the call: one recording goes on with the next turn's answer."""
    [row] = [row for row in ROWS if row["file"] == TWO_ANSWERS]
    recording = Recording.of(row)
    ends = [number for number, event in enumerate(recording.events, 1) if event["type"] == row["terminal"]]
    state = fold(recording.frames)
    assert state.events == ends[0] < ends[1] == row["event_total"]
    first = recording.events[ends[0] - 1]["response"]
    assert state.response.id == first["id"] != row["response_id"]
    assert state.response.usage == usage_of({"usage": first["usage"]})
    # The second answer, which the manifest describes, in a body of its own:
    second = fold(recording.frames[ends[0] :])
    assert second.response.id == row["response_id"]
    assert second.response.usage == usage_of(row)
    assert state.events + second.events == row["event_total"]
    assert sum(state.deltas.values()) + sum(second.deltas.values()) == row["delta_total"]


# --- through the SDK -----------------------------------------------------------------------------------


class Spans(SpanExporter):
    """Hands over each span when it ends."""

    def __init__(self) -> None:
        self._ended: Queue[ReadableSpan] = Queue()

    def export(self, spans: Any) -> SpanExportResult:
        for span in spans:
            self._ended.put(span)
        return SpanExportResult.SUCCESS

    def next(self) -> dict[str, Any]:
        """The attributes of the next span to end."""
        return dict(self._ended.get(timeout=10).attributes or {})

    def none_left(self) -> bool:
        return self._ended.empty()


class Replay:
    """A server that answers with the recording that is on, and clients with the instrumentation."""

    def __init__(
        self,
        server: ScriptedServer,
        client: openai.OpenAI,
        async_client: openai.AsyncOpenAI,
        loop: asyncio.AbstractEventLoop,
        spans: Spans,
    ) -> None:
        self._server = server
        self.client = client
        self._runtimes: dict[str, tuple[Any, Any]] = {
            "sync": (client, drive_sync),
            "asyncio": (async_client, lambda main: loop.run_until_complete(main())),
        }
        self._spans = spans
        self.on: Reply = Reply()
        self.stored: dict[str, Any] | None = None

    def answer(self, request: SeenRequest) -> Reply:
        if request.method == "GET" and "stream" not in request.query:
            if self.stored is None:
                return Reply.json({"error": {"message": "not stored", "code": "not_found"}}, status=404)
            # Some servers give every event another id; asked for one of them, they answer with that one.
            return Reply.json({**self.stored, "id": request.path.rpartition("/")[2]})
        return self.on

    def call(self, recording: Recording, cut_after: int | None = None) -> dict[str, Any]:
        """Make the recorded request, read its answer, perhaps cut after so many events; return the span."""
        if cut_after is None:
            self.on = Reply(steps=tuple(Send(piece) for piece in recording.whole if piece))
        else:
            self.on = Reply(steps=(*(Send(frame) for frame in recording.frames[:cut_after]), Cut()))

        def read() -> None:
            with self.client.responses.create(
                model="m", input="x", stream=True, extra_body={**recording.asked, "stream": True}
            ) as stream:
                list(stream)

        return self._span_of(recording, read)

    def call_by(
        self,
        way: Way,
        recording: Recording,
        steps: tuple[Step, ...],
        act: Callable[[Reader], Awaitable[None]],
        **asked: Any,
    ) -> dict[str, Any]:
        """Make the call in some way, do something with what the steps bring; return the span."""
        self.on = Reply(steps=steps)
        client, drive = self._runtimes[way.runtime]

        async def main() -> None:
            async with way.call.open(client, **asked) as reader:
                self.reader = reader
                await act(reader)

        return self._span_of(recording, lambda: drive(main))

    def _span_of(self, recording: Recording, read: Callable[[], None]) -> dict[str, Any]:
        self.stored = recording.last_response
        self.raised: Exception | None = None
        before = len(self._server.requests)
        try:
            read()
        except (openai.APIError, *CUT) as error:
            self.raised = error
        attributes = self._spans.next()
        assert self._spans.none_left(), "one span for each call"
        self.gets = [request.path for request in self._server.requests[before:] if request.method == "GET"]
        return attributes


@pytest.fixture(scope="module")
def replay() -> Iterator[Replay]:
    """One server and a client of each kind for all recordings, with the instrumentation on."""
    spans = Spans()
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    ResponsesUsageInstrumentor().instrument(
        tracer_provider=tracers, meter_provider=MeterProvider(shutdown_on_exit=False), config=Config()
    )
    loop = asyncio.new_event_loop()
    try:
        with ScriptedServer(lambda request: made.answer(request)) as server:
            how: Any = {"api_key": "k", "base_url": f"{server.url}/v1", "max_retries": 0, "timeout": 20}
            client, async_client = openai.OpenAI(**how), openai.AsyncOpenAI(**how)
            made = Replay(server, client, async_client, loop, spans)
            yield made
            client.close()
            loop.run_until_complete(async_client.close())
    finally:
        ResponsesUsageInstrumentor().uninstrument()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def usage_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What a span tells of usage: the counts, and where they come from or why there are none."""
    return {
        key: value
        for key, value in attributes.items()
        if key.startswith(("gen_ai.usage.", "openai_responses.usage."))
    }


def known(row: Row, source: str) -> dict[str, Any]:
    """The attributes for the manifest's usage."""
    usage = usage_of(row)
    if usage is None:
        return {"openai_responses.usage.missing_reason": "no_usage"}
    counts = {
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        # The conventions leave out a detail of zero.
        "gen_ai.usage.cache_read.input_tokens": usage.cache_read_input_tokens or None,
        "gen_ai.usage.cache_write.input_tokens": usage.cache_write_input_tokens or None,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_output_tokens or None,
        "openai_responses.usage.source": source,
    }
    return {key: value for key, value in counts.items() if value is not None}


def counted(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The attributes that count these events."""
    kinds = [event["type"] for event in events if event["type"].endswith(".delta")]
    return {
        "openai_responses.stream.events": len(events),
        "openai_responses.stream.deltas": len(kinds),
        **{
            f"openai_responses.stream.deltas_by_type.{kind}": count
            for kind, count in kinds_of({kind: kinds.count(kind) for kind in kinds}).items()
        },
    }


def counts(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in attributes.items()
        if key.startswith(("openai_responses.stream.events", "openai_responses.stream.deltas"))
    }


@pytest.mark.parametrize("row", [row for row in CALLS if not row["features"]["error_event"]], ids=name)
def test_a_replayed_call_is_a_span_with_the_recorded_usage(replay: Replay, row: Row) -> None:
    """Read to its end through the SDK, a recorded stream is one span that says what the manifest says."""
    recording = Recording.of(row)
    attributes = replay.call(recording)
    assert replay.raised is None
    assert usage_attributes(attributes) == known(row, "stream")
    assert counts(attributes) == counted(recording.events)
    assert attributes["openai_responses.stream.outcome"] == row["response_status"]
    assert attributes["openai_responses.response.status"] == row["response_status"]
    assert attributes["gen_ai.response.id"] == row["response_id"]
    assert attributes["gen_ai.response.model"] == row["model"]
    assert attributes.get("openai.response.service_tier") == row["service_tier"]
    assert attributes.get("error.type") == row["error_code"]
    assert not replay.gets


@pytest.mark.parametrize("row", [row for row in CALLS if row["features"]["error_event"]], ids=name)
def test_a_replayed_error_event_is_the_end_of_the_call(replay: Replay, row: Row) -> None:
    """The SDK raises on an `error` event, so the `response.failed` behind it is never asked for."""
    recording = Recording.of(row)
    attributes = replay.call(recording)
    assert isinstance(replay.raised, openai.APIError)
    assert attributes["openai_responses.stream.outcome"] in {"error", "failed"}
    assert attributes["error.type"] == row["error_code"]
    assert usage_attributes(attributes) == known(row, "retrieval")


@pytest.mark.parametrize("where", ["after the first event", "before the last event"])
@pytest.mark.parametrize("row", CALLS, ids=name)
def test_a_cut_call_has_the_recorded_usage_by_retrieval(replay: Replay, row: Row, where: str) -> None:
    """The server goes away at a border of events; the span has the exact usage, or says why it has none."""
    recording = Recording.of(row)
    cut_after = 1 if where == "after the first event" else recording.before_the_end
    attributes = replay.call(recording, cut_after)
    assert isinstance(replay.raised, CUT)
    assert attributes["openai_responses.stream.outcome"] == "cut"
    assert counts(attributes) == counted(recording.events[:cut_after])
    if not recording.is_kept(recording.events[:cut_after]):
        assert usage_attributes(attributes) == {"openai_responses.usage.missing_reason": "not_stored"}
        assert not replay.gets
    else:
        assert usage_attributes(attributes) == known(row, "retrieval")
        assert replay.gets == [f"/v1/responses/{attributes['gen_ai.response.id']}"]
        assert attributes["openai_responses.retrieval.attempts"] == 1


# --- in every way --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A kind of call, by a kind of client."""

    call: Call
    runtime: str

    def suits(self, row: Row) -> bool:
        """Whether the SDK itself gets through the recording in this way."""
        return self.call.name != "manager" or accumulates(row)

    def __str__(self) -> str:
        return f"{self.call}-{self.runtime}"


def accumulates(row: Row) -> bool:
    """Whether the SDK's manager can put the answer together; older ones do not know every kind of item."""
    answer = HTTP.Response(200, headers={"content-type": "text/event-stream"}, content=Recording.of(row).body)
    transport = HTTP.MockTransport(lambda _: answer)
    with (
        suppress_instrumentation(),
        openai.OpenAI(
            api_key="k", base_url="http://127.0.0.1/v1", http_client=HTTP.Client(transport=transport)
        ) as client,
    ):
        try:
            with client.responses.stream(model="m", input="x") as stream:
                list(stream)
        except openai.APIError:
            return bool(row["features"]["error_event"])  # it has read that event, and says so
        except Exception:  # its own, of many types
            return False
    return True


async def read_to_the_end(reader: Reader, _: int) -> None:
    await reader.rest()


async def close_after(reader: Reader, events: int) -> None:
    await reader.take(events)
    await reader.close()


@dataclass(frozen=True)
class Ending:
    """What the application does, and what the server does when it has sent its part."""

    name: str
    act: Callable[[Reader, int], Awaitable[None]]
    last: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return self.name


WHOLE = Ending("whole", read_to_the_end)
SERVER_CUT = Ending("cut", read_to_the_end, (Cut(),))
CLOSED = Ending("closed", close_after, (Hold(),))
ENDINGS = (WHOLE, SERVER_CUT, CLOSED)

WAYS = [Way(call, runtime) for runtime in ("sync", "asyncio") for call in CALL_KINDS if call.is_in_sdk()]


@functools.cache
def way_of(row_number: int, ending: Ending) -> Way:
    """The ways take turns: every recording ends in each way of ending, in three ways of calling."""
    first = row_number + ENDINGS.index(ending) * len(WAYS) // len(ENDINGS)
    turns = (WAYS[(first + turn) % len(WAYS)] for turn in range(len(WAYS)))
    return next(way for way in turns if way.suits(CALLS[row_number]))


# The way of each is found by its test: every process of the tests would do it when it collects them.
CELLS = list(itertools.product(range(len(CALLS)), ENDINGS))


def in_any_pieces(body: bytes, rng: random.Random) -> Iterator[bytes]:
    """The body cut at random places, some of them inside a character and inside the end of a line."""
    most = max(rng.choice((60, 600, 3000)), len(body) // 100)
    borders = {0, len(body)}
    border = 0
    while (border := border + rng.randint(1, most)) < len(body):
        borders.add(border)
    for tender in TENDER:
        places = [match.start() + 1 for match in tender.finditer(body)]
        borders.update(rng.sample(places, min(len(places), 10)))
    for start, end in itertools.pairwise(sorted(borders)):
        yield body[start:end]


@pytest.mark.skipif(not ROWS, reason="no recordings")
def test_every_way_of_calling_meets_many_recordings() -> None:
    """The ways that follow do not miss one: each meets ten recordings and more, and every ending."""
    met = Counter(way_of(*cell) for cell in CELLS)
    assert set(met) == set(WAYS)
    assert min(met.values()) >= 10
    assert len({(ending, way_of(number, ending)) for number, ending in CELLS}) == len(ENDINGS) * len(WAYS)


def as_sent(row: Row, recording: Recording, ending: Ending) -> tuple[list[dict[str, Any]], tuple[Step, ...]]:
    """The events that get through before this ending, and how the server sends them."""
    rng = random.Random(f"{name(row)} {ending}")  # noqa: S311
    events, body = recording.events, recording.body
    if ending is not WHOLE:
        events = events[: rng.randint(1, recording.before_the_end)]
        # And some of the next event, but not enough of it to be one.
        following = recording.frames[len(events)]
        body = b"".join(recording.frames[: len(events)]) + following[: rng.randrange(len(following) // 2)]
    body = body.replace(b"\n", rng.choice((b"\n", b"\r\n")))
    return events, (*(Send(piece) for piece in in_any_pieces(body, rng)), *ending.last)


def last_id(events: list[dict[str, Any]]) -> str:
    """The last id that these events gave the response; some servers give it another in every event."""
    ids: list[str] = [event["response"]["id"] for event in events if "response" in event]
    return ids[-1]


@pytest.mark.parametrize(
    ("row_number", "ending"), CELLS, ids=[f"{name(CALLS[number])}-{ending}" for number, ending in CELLS]
)
def test_a_recording_in_any_pieces_is_told_in_every_way(
    replay: Replay, row_number: int, ending: Ending
) -> None:
    """Whole, cut or closed, however called and read: one span, what has passed, and the recorded usage."""
    row, way = CALLS[row_number], way_of(row_number, ending)
    recording = Recording.of(row)
    passing, steps = as_sent(row, recording, ending)
    stored = {"store": recording.asked["store"]} if "store" in recording.asked else {}
    attributes = replay.call_by(
        way, recording, steps, lambda reader: ending.act(reader, len(passing)), model="m", input="x", **stored
    )
    outcome = attributes["openai_responses.stream.outcome"]
    if ending is WHOLE and row["features"]["error_event"] and way.call.reads_events:
        # The SDK raises on an `error` event, whatever follows.
        assert isinstance(replay.raised, openai.APIError)
        assert outcome in {"error", "failed"}
        assert usage_attributes(attributes) == known(row, "retrieval")
        return
    assert outcome == (row["response_status"] if ending is WHOLE else ending.name)
    assert isinstance(replay.raised, CUT if ending is SERVER_CUT else type(None))
    assert replay.reader.passed == len(passing)
    assert counts(attributes) == counted(passing)
    assert attributes["gen_ai.response.id"] == last_id(passing)
    asked_for = [f"/v1/responses/{last_id(passing)}"]
    if ending is not WHOLE and not recording.is_kept(passing):
        assert usage_attributes(attributes) == {"openai_responses.usage.missing_reason": "not_stored"}
        assert not replay.gets
    else:
        assert usage_attributes(attributes) == known(row, "stream" if ending is WHOLE else "retrieval")
        assert replay.gets == ([] if ending is WHOLE and row["usage"] else asked_for)


@since(1, 82, 0)
@pytest.mark.parametrize("runtime", ["sync", "asyncio"])
@pytest.mark.parametrize("ending", ENDINGS, ids=str)
@pytest.mark.parametrize("row", FETCHES, ids=name)
def test_a_replayed_fetch_has_no_tokens(replay: Replay, row: Row, ending: Ending, runtime: str) -> None:
    """A resumed stream is a span of its own; its tokens belong to the call that made the response."""
    recording = Recording.of(row)
    passing, steps = as_sent(row, recording, ending)
    attributes = replay.call_by(
        Way(Call("retrieve", resume), runtime),
        recording,
        steps,
        lambda reader: ending.act(reader, len(passing)),
        response_id=row["response_id"],
        starting_after=0,
    )
    assert attributes["gen_ai.operation.name"] == "fetch_response"
    assert attributes["gen_ai.response.id"] == row["response_id"]
    assert attributes["gen_ai.request.stream_cursor"] == "0"
    assert attributes["openai_responses.stream.outcome"] == (
        row["response_status"] if ending is WHOLE else ending.name
    )
    assert replay.reader.passed == len(passing)
    assert counts(attributes) == counted(passing)
    assert not usage_attributes(attributes)
    assert replay.gets == [f"/v1/responses/{row['response_id']}"]  # its own

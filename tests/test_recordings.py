"""Recorded traffic of OpenAI and others, replayed: what is told of it is what the recordings say."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import openai
import pytest
from openai._streaming import SSEDecoder
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from calls import CUT, since
from embedded.http_server import Cut, Reply, ScriptedServer, SeenRequest, Send
from otel_responses_usage import Config, ResponsesUsageInstrumentor, Usage
from otel_responses_usage._body import body_reader
from otel_responses_usage._state import AnswerState

ROOT = Path(os.environ.get("RECORDINGS") or Path(__file__).parents[1] / "../shared/recordings")
MANIFEST = ROOT / "manifest.json"

Row = dict[str, Any]
ROWS: list[Row] = json.loads(MANIFEST.read_text(encoding="utf-8"))["recordings"] if MANIFEST.exists() else []

EVENT = re.compile(rb"^data:(?! ?\[DONE\]).*\n\n", re.MULTILINE)

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
    state.on_body(body)
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
    """A server that answers with the recording that is on, and a client with the instrumentation."""

    def __init__(self, server: ScriptedServer, client: openai.OpenAI, spans: Spans) -> None:
        self._server = server
        self.client = client
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
        self.stored = recording.last_response
        self.raised: Exception | None = None
        before = len(self._server.requests)
        try:
            with self.client.responses.create(
                model="m", input="x", stream=True, extra_body={**recording.asked, "stream": True}
            ) as stream:
                list(stream)
        except (openai.APIError, *CUT) as error:
            self.raised = error
        attributes = self._spans.next()
        assert self._spans.none_left(), "one span for each call"
        self.gets = [request.path for request in self._server.requests[before:] if request.method == "GET"]
        return attributes

    def fetch(self, recording: Recording, response_id: str) -> dict[str, Any]:
        """Resume the recorded stream, and return the span."""
        self.on = Reply(steps=tuple(Send(frame) for frame in recording.frames))
        with self.client.responses.retrieve(response_id, stream=True, starting_after=0) as stream:
            list(stream)
        return self._spans.next()


@pytest.fixture(scope="module")
def replay() -> Iterator[Replay]:
    """One server and one client for all recordings, with the instrumentation on."""
    spans = Spans()
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    ResponsesUsageInstrumentor().instrument(
        tracer_provider=tracers, meter_provider=MeterProvider(shutdown_on_exit=False), config=Config()
    )
    try:
        with (
            ScriptedServer(lambda request: made.answer(request)) as server,
            openai.OpenAI(api_key="k", base_url=f"{server.url}/v1", max_retries=0) as client,
        ):
            made = Replay(server, client, spans)
            yield made
    finally:
        ResponsesUsageInstrumentor().uninstrument()


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
        "gen_ai.usage.cache_read.input_tokens": usage.cache_read_input_tokens,
        "gen_ai.usage.cache_write.input_tokens": usage.cache_write_input_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_output_tokens,
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
    types = [event["type"] for event in recording.events]
    cut_after = (
        1
        if where == "after the first event"
        else types.index("error" if row["features"]["error_event"] else row["terminal"])
    )
    attributes = replay.call(recording, cut_after)
    assert isinstance(replay.raised, CUT)
    assert attributes["openai_responses.stream.outcome"] == "cut"
    assert counts(attributes) == counted(recording.events[:cut_after])
    if recording.asked.get("store") is False:
        assert usage_attributes(attributes) == {"openai_responses.usage.missing_reason": "not_stored"}
        assert not replay.gets
    else:
        assert usage_attributes(attributes) == known(row, "retrieval")
        assert replay.gets == [f"/v1/responses/{attributes['gen_ai.response.id']}"]
        assert attributes["openai_responses.retrieval.attempts"] == 1


@since(1, 82, 0)
@pytest.mark.parametrize("row", FETCHES, ids=name)
def test_a_replayed_fetch_has_no_tokens(replay: Replay, row: Row) -> None:
    """A resumed stream is a span of its own; its tokens belong to the call that made the response."""
    recording = Recording.of(row)
    attributes = replay.fetch(recording, row["response_id"])
    assert attributes["gen_ai.operation.name"] == "fetch_response"
    assert attributes["gen_ai.response.id"] == row["response_id"]
    assert attributes["gen_ai.request.stream_cursor"] == "0"
    assert attributes["openai_responses.response.status"] == row["response_status"]
    assert counts(attributes) == counted(recording.events)
    assert not usage_attributes(attributes)

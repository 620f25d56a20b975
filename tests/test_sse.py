"""An event stream is told apart as the SDK does it, in whatever pieces it arrives, and none of it is kept."""

from __future__ import annotations

import gc
import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from otel_responses_usage._answer import sse as _sse
from otel_responses_usage._answer.sse import EventReader
from otel_responses_usage._answer.state import AnswerState

# How many bodies the long comparison with the SDK generates.
BODIES = int(os.environ.get("FUZZ_BODIES", "20000"))

KEPT = frozenset({"response.created", "response.completed", "response.failed", "error"})

Event = tuple["str | None", Any]


class Seen:
    """A sink that keeps everything, and knows which events went by without being parsed."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.garbled = 0
        self.repeats = 0
        self.notify_at = 1

    def needs_data(self, kind: str, _: bytes | bytearray) -> bool:
        return kind in KEPT

    def on_event(self, kind: str | None, data: Mapping[str, Any] | None) -> None:
        self.events.append((kind, data))

    def on_invalid_json(self) -> None:
        self.garbled += 1
        self.events.append((None, None))

    def on_repeats(self) -> None:
        kind = self.events[-1][0]
        assert kind is not None, "only an event of a known type repeats"
        assert kind not in KEPT, "an event that is wanted is never skipped"
        self.notify_at += 1
        self.events.append((kind, None))


class Tally:
    """A sink that keeps nothing but a count."""

    def __init__(self) -> None:
        self.count = 0
        self.repeats = 0
        self.notify_at = 1

    def needs_data(self, kind: str, _: bytes | bytearray) -> bool:
        return kind in KEPT

    def on_event(self, _kind: str | None, _data: Mapping[str, Any] | None) -> None:
        self.count += 1

    def on_invalid_json(self) -> None:
        self.count += 1

    def on_repeats(self) -> None:
        self.count += 1
        self.notify_at += 1


def feed(reader: EventReader, piece: bytes) -> None:
    """Feed a piece as its owner does: on the fast path first; what is not taken is handed in once more."""
    if reader.feed_repeat(piece):
        return
    taken = reader.feed(piece)
    assert 0 <= taken < max(1, len(piece))
    if taken:
        assert reader.feed(piece[taken:]) == 0, "nobody feeds a third time"


def read(pieces: Iterable[bytes]) -> Seen:
    seen = Seen()
    reader = EventReader(seen)
    for piece in pieces:
        feed(reader, piece)
    return seen


def sdk_reads(body: bytes) -> tuple[list[Event], bool]:
    """What the SDK makes of a body, and whether it reads it to its end or raises on the way."""
    events: list[Event] = []
    try:
        for sse in SSEDecoder().iter_bytes(iter([body])):
            if sse.data.startswith("[DONE]"):
                break
            data = sse.json()
            kind = data.get("type") if isinstance(data, dict) else None
            events.append((kind if isinstance(kind, str) else None, data))
    except ValueError:  # bad JSON, bad UTF-8
        return events, False
    return events, True


def check(pieces: list[bytes]) -> Seen:
    """Compare with the SDK, and with itself reading the same body in one piece."""
    body = b"".join(pieces)
    seen = read(pieces)
    truth, to_its_end = sdk_reads(body)
    # An application's stream is over where the SDK raises; until then every event agrees.
    found = seen.events if to_its_end else seen.events[: len(truth)]
    assert [kind for kind, _ in found] == [kind for kind, _ in truth], pieces
    for (kind, data), (_, told) in zip(found, truth, strict=True):
        if kind in KEPT or data is not None:
            assert data == told, pieces
    assert seen.events == read([body]).events, pieces
    return seen


def frame(
    *kinds: str, newline: bytes = b"\n", event_lines: bool = True, type_last: bool = False
) -> list[bytes]:
    """One piece for each event, as the API writes them, or as the SDK's models have the fields."""
    framed = []
    for kind in kinds:
        fields = {"type": kind, "delta": "né🙂", "sequence_number": 1}
        if type_last:
            fields["type"] = fields.pop("type")
        data = json.dumps(fields, ensure_ascii=False).encode()
        lines = [b"event: " + kind.encode()] if event_lines else []
        framed.append(newline.join([*lines, b"data: " + data, b"", b""]))
    return framed


type_places = pytest.mark.parametrize("type_last", [False, True], ids=["type first", "type last"])

TEXT = "response.output_text.delta"
ARGUMENTS = "response.function_call_arguments.delta"
CREATED, COMPLETED = "response.created", "response.completed"

DATA = b'data: {"type":"%s","a":1}'
CREATED_LINE = DATA % CREATED.encode()
COMPLETED_LINE = DATA % COMPLETED.encode()
TEXT_LINE = DATA % TEXT.encode()
CREATED_EVENT: Event = (CREATED, {"type": CREATED, "a": 1})
TEXT_EVENT: Event = (TEXT, None)

BODIES_BY_NAME: dict[str, tuple[bytes, list[Event]]] = {
    "lf": (TEXT_LINE + b"\n\n" + CREATED_LINE + b"\n\n", [TEXT_EVENT, CREATED_EVENT]),
    "crlf": (TEXT_LINE + b"\r\n\r\n" + CREATED_LINE + b"\r\n\r\n", [TEXT_EVENT, CREATED_EVENT]),
    "cr": (TEXT_LINE + b"\r\r" + CREATED_LINE + b"\r\r", [TEXT_EVENT, CREATED_EVENT]),
    "mixed line ends": (TEXT_LINE + b"\r\n\n" + CREATED_LINE + b"\n\r", [TEXT_EVENT, CREATED_EVENT]),
    "blank lines between": (b"\n\r\n\r" + CREATED_LINE + b"\n\n\n\n\r\n", [CREATED_EVENT]),
    "event line": (b"event: response.created\n" + CREATED_LINE + b"\n\n", [CREATED_EVENT]),
    "event line that lies": (b"event: " + TEXT.encode() + b"\n" + CREATED_LINE + b"\n\n", [CREATED_EVENT]),
    "event line last": (CREATED_LINE + b"\nevent: response.created\n\n", [CREATED_EVENT]),
    "event line looks like data": (
        b'event: data: {"type":"%s"}\n' % TEXT.encode() + CREATED_LINE + b"\n\n",
        [CREATED_EVENT],
    ),
    "comments": (b": hello\n\n:\n" + CREATED_LINE + b"\n:data: {}\n\n", [CREATED_EVENT]),
    "id and retry": (b"id: 7\nretry: 100\n" + CREATED_LINE + b"\n\n", [CREATED_EVENT]),
    "unknown field": (b"date: {}\ndatabase: 1\ndat\n" + CREATED_LINE + b"\n\n", [CREATED_EVENT]),
    "field name with a space": (b"data : {}\n" + CREATED_LINE + b"\n\n", [CREATED_EVENT]),
    "no space after the colon": (CREATED_LINE.replace(b"data: ", b"data:") + b"\n\n", [CREATED_EVENT]),
    "spaces in the data": (
        b'data:  {  "type" : "response.created" , "a" : 1 }  \n\n',
        [CREATED_EVENT],
    ),
    "tab in the data": (b'data:\t{\t"type"\t:\t"%s"}\n\n' % TEXT.encode(), [TEXT_EVENT]),
    "several data lines": (
        b'data: {\ndata: "type": "response.created",\ndata: "a":\ndata: 1}\n\n',
        [CREATED_EVENT],
    ),
    "several data lines, crlf": (
        b'data: {\r\ndata: "type": "response.created",\r\ndata: "a":1}\r\n\r\n',
        [CREATED_EVENT],
    ),
    "a type in a later line": (b"data: [\n" + CREATED_LINE + b"\ndata: ]\n\n", [(None, None)]),
    "unwanted, several data lines": (
        TEXT_LINE.removesuffix(b"}") + b',\ndata: "b": 2\ndata:}\n\n' + CREATED_LINE + b"\n\n",
        [TEXT_EVENT, CREATED_EVENT],
    ),
    "empty data line first": (b"data\n" + CREATED_LINE + b"\ndata:\n\n", [CREATED_EVENT]),
    "type last": (
        b'data: {"a":1,"type":"response.created"}\n\n',
        [CREATED_EVENT],
    ),
    "unwanted type last": (
        b'data: {"delta":"x","type":"%s"}\n\n' % TEXT.encode(),
        [TEXT_EVENT],
    ),
    "type last, of what is in the event": (
        b'data: {"a":{"b":1,"type":"%s"}}\n\n' % TEXT.encode(),
        [(None, {"a": {"b": 1, "type": TEXT}})],
    ),
    "type last in a text": (
        b'data: {"type":"response.created","a":",\\"type\\":\\"%s\\"}"}\n\n' % TEXT.encode(),
        [(CREATED, {"type": CREATED, "a": f',"type":"{TEXT}"}}'})],
    ),
    "type last, in a later line": (
        b'data: {"a":1\ndata: ,"type":"%s"}\n\n' % TEXT.encode(),
        [(TEXT, {"a": 1, "type": TEXT})],
    ),
    "type also further down": (
        b'data: {"response":{"type":"error"},"type":"response.created"}\n\n',
        [(CREATED, {"response": {"type": "error"}, "type": CREATED})],
    ),
    "escapes in the type": (
        b'data: {"type":"response\\u002ecreated","a":1}\n\ndata: {"type":"a\\"b.delta"}\n\n',
        [CREATED_EVENT, ('a"b.delta', {"type": 'a"b.delta'})],
    ),
    "very long type": (
        b'data: {"type":"%s"}\n\n' % (b"x" * 1000),
        [("x" * 1000, {"type": "x" * 1000})],
    ),
    "far from the type": (
        b'data: {%s"type":"%s"}\n\n' % (b" " * 1000, TEXT.encode()),
        [(TEXT, {"type": TEXT})],
    ),
    "type no string": (b'data: {"type":null}\n\n', [(None, {"type": None})]),
    "no type": (b'data: {"delta":1}\n\n', [(None, {"delta": 1})]),
    "no object": (b'data: [{"type":"response.created"}]\n\ndata: 1\n\n', [(None, None), (None, None)]),
    "no ascii": (
        '\ufeffdata: 1\ndata: {"type":"response.created","é":"🙂"}\n\n'.encode(),
        [(CREATED, {"type": CREATED, "é": "🙂"})],
    ),
    "byte order mark before the first event": (b"\xef\xbb\xbf" + TEXT_LINE + b"\n\n", []),
    "no closing blank line": (CREATED_LINE + b"\n\n" + TEXT_LINE + b"\n", [CREATED_EVENT]),
    "no line end at all": (CREATED_LINE, []),
    "done": (TEXT_LINE + b"\n\ndata: [DONE]\n\n" + CREATED_LINE + b"\n\n", [TEXT_EVENT]),
    "done and more on its line": (b"data:[DONE] bye\r\n\r\n" + CREATED_LINE + b"\r\n\r\n", []),
    "done inside other data": (b'data: "[DONE]"\n\n' + CREATED_LINE + b"\n\n", [(None, None), CREATED_EVENT]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize("name", BODIES_BY_NAME)
def test_a_body_says_what_the_sdk_reads_in_it(name: str) -> None:
    """Each peculiarity of the format has a body here, with the events that the SDK yields for it."""
    body, events = BODIES_BY_NAME[name]
    assert check([body]).events == events


@pytest.mark.parametrize("name", BODIES_BY_NAME)
def test_borders_of_pieces_do_not_matter(name: str) -> None:
    """A body says the same byte by byte, and cut in two anywhere: in UTF-8, in CRLF, in a type."""
    body, events = BODIES_BY_NAME[name]
    assert read([body[i : i + 1] for i in range(len(body))]).events == events
    for border in range(len(body) + 1):
        assert read([body[:border], b"", body[border:]]).events == events, border


@pytest.mark.parametrize(
    "line",
    [
        b"data: {",
        b"data: nothing",
        b"data:",
        b"data",
        b"data:  [DONE]",
        b'data: {"type":"response.created",}',
        b'data: {"type":"response.created","a":1\ndata: 2}',
        b'data: {"type":"response.created","a":"\xff"}',
        b"data: " + b"[" * 100_000,
    ],
)
def test_data_that_cannot_be_decoded_is_a_garbled_event(line: bytes) -> None:
    """Data on which the SDK raises is told of as what it is, and what follows it is read."""
    seen = read([line + b"\n\n" + CREATED_LINE + b"\n\n"])
    assert seen.garbled == 1
    assert seen.events == [(None, None), CREATED_EVENT]


def test_an_event_without_data_is_none() -> None:
    """The SDK raises on a lone `event:` line; here it is not counted."""
    assert read([b"event: response.created\n\n" + CREATED_LINE + b"\n\n"]).events == [CREATED_EVENT]


def test_done_says_that_nothing_follows() -> None:
    """`done` turns true with the closing mark and not before."""
    reader = EventReader(Seen())
    reader.feed(TEXT_LINE + b"\n\ndata: [DO")
    assert not reader.done
    reader.feed(b"NE]\n\n")
    assert reader.done


@type_places
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("event_lines", [True, False], ids=["event lines", "data only"])
def test_a_piece_like_the_last_is_not_parsed_again(
    newline: bytes, event_lines: bool, type_last: bool
) -> None:
    """Of a run of deltas, one event a piece, only the first is parsed; a wanted event never is skipped."""
    kinds = [CREATED, *[TEXT] * 50, *[ARGUMENTS] * 50, *[TEXT] * 50, COMPLETED]
    seen = check(frame(*kinds, newline=newline, event_lines=event_lines, type_last=type_last))
    assert [kind for kind, _ in seen.events] == kinds
    assert seen.repeats == 3 * 49


@type_places
@pytest.mark.parametrize("size", [7, 100, 1460, 65536])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("event_lines", [True, False], ids=["event lines", "data only"])
def test_a_run_is_not_parsed_wherever_its_pieces_begin(
    newline: bytes, event_lines: bool, size: int, type_last: bool
) -> None:
    """In pieces of any size only the wanted events of a stream are decoded."""
    kinds = [CREATED, *[TEXT] * 200, COMPLETED]
    body = b"".join(frame(*kinds, newline=newline, event_lines=event_lines, type_last=type_last))
    seen = check(cut(body, range(size, len(body), size)))
    assert [kind for kind, _ in seen.events] == kinds
    assert [kind for kind, data in seen.events if data is not None] == [CREATED, COMPLETED]
    assert seen.repeats >= 160  # all but those where a piece ends between CR and LF


def test_wanted_events_are_each_decoded() -> None:
    """However alike the pieces are, an event that is wanted is handed over with its data."""
    seen = check(frame(*[CREATED] * 5))
    assert seen.repeats == 0
    assert [data["delta"] for _, data in seen.events] == ["né🙂"] * 5


LOOKALIKES: dict[str, Callable[[bytes], list[bytes]]] = {
    "two events": lambda delta: [delta + delta],
    "an event and a wanted one": lambda delta: [delta + frame(COMPLETED)[0]],
    "a wanted event inside": lambda delta: [delta.removesuffix(b"\n") + b"\n" + frame(COMPLETED)[0]],
    "another type with the same beginning": lambda delta: [delta.replace(b".delta", b".delta.done")],
    "one more line end": lambda delta: [delta + b"\n"],
    "one line end less": lambda delta: [delta.removesuffix(b"\n"), b"\n"],
    "no line end": lambda delta: [delta.removesuffix(b"\n\n"), delta],
    "a cr before the end": lambda delta: [delta.removesuffix(b"\n\n") + b"\r\n\n"],
    "a cr after": lambda delta: [delta + b"\r"],
    "a cr in the middle": lambda delta: [delta.replace(b', "', b',\rdata: "', 1)],
    "a lf in the middle": lambda delta: [delta.replace(b', "', b',\ndata: "', 1)],
    "a wanted event behind a cr": lambda delta: [
        delta.removesuffix(b"\n\n") + b"\r\r" + CREATED_LINE + b"\n\n",
    ],
    "an unfinished event before": lambda delta: [CREATED_LINE + b"\n", delta],
    "an unfinished line before": lambda delta: [b": ", delta],
    "done before": lambda delta: [b"data: [DONE]\n\n", delta],
    "a comment before": lambda delta: [b": ping\n\n", delta],
    "nothing before": lambda delta: [b"", delta],
    "cr before": lambda delta: [b"\r", delta],
}


@type_places
@pytest.mark.parametrize("name", LOOKALIKES)
@pytest.mark.parametrize("event_lines", [True, False], ids=["event lines", "data only"])
def test_a_piece_almost_like_the_last_is_parsed(name: str, event_lines: bool, type_last: bool) -> None:
    """A run of deltas is interrupted by a piece that only looks like one more, and goes on after it."""
    deltas = frame(*[TEXT] * 5, event_lines=event_lines, type_last=type_last)
    seen = check([*deltas, *LOOKALIKES[name](deltas[0]), *deltas, *frame(COMPLETED, type_last=type_last)])
    assert seen.repeats >= 4, "the first run repeats"


BEFORE = b"".join(frame(TEXT, ARGUMENTS))

DIVISIBLE: dict[str, tuple[bytes, bytes]] = {
    "events and the last": (BEFORE, frame("response.completed")[0]),
    "without event lines": (BEFORE, frame("response.failed", event_lines=False)[0]),
    "crlf": (frame(TEXT, newline=b"\r\n")[0], frame("response.incomplete", newline=b"\r\n")[0]),
    "compact": (BEFORE, COMPLETED_LINE + b"\n\n"),
    "type last": (BEFORE, b'data: {"a":1,"type":"response.completed"}\n\n'),
    "the last is unfinished": (BEFORE, COMPLETED_LINE),
    "line ends of both kinds": (BEFORE + frame(TEXT, newline=b"\r\n")[0], frame("response.completed")[0]),
    "the last alone": (b"", frame("response.completed")[0]),
    "none that ends the response": (BEFORE * 2, b""),
    "one that speaks of the end": (
        BEFORE + b'data: {"delta":"\\"type\\":\\"response.completed\\""}\n\n',
        b"",
    ),
}


@pytest.mark.parametrize("name", DIVISIBLE)
def test_the_end_is_left_for_when_somebody_asks_for_it(name: str) -> None:
    """Of a piece in which events precede the one that ends the response, only those are taken at first."""
    before, last = DIVISIBLE[name]
    reader = EventReader(Seen())
    assert reader.feed(before + last) == (len(before) if last else 0)


def test_an_event_line_never_stands_for_the_data() -> None:
    """A run that begins with a wanted event is parsed to its end, whatever its `event:` lines pretend."""
    piece = b'event: data: {"type":"a.delta"}\n' + CREATED_LINE + b"\n\n"
    seen = check([piece] * 3)
    assert seen.events == [CREATED_EVENT] * 3


# --- comparison with the SDK ---------------------------------------------------------------------------

TOKENS = [
    b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n", b"\r\r", b" ", b":", b": comment",
    b"data", b"data:", b"data: ", b"event: ", b"event: " + TEXT.encode() + b"\n", b"id: 1\n", b"retry: 5\n",
    TEXT_LINE, TEXT_LINE + b"\n\n", TEXT_LINE + b"\r\n\r\n", CREATED_LINE, CREATED_LINE + b"\n\n",
    *frame(TEXT, COMPLETED), *frame(TEXT, newline=b"\r\n"),
    b'data: {"type":"', TEXT.encode(), b'"', b",", b'"a":1', b"}", b"{", b"\\", b"[DONE]",
    b"data: [DONE]\n\n",
    b'data: {"a":"\xc3\xa9\xf0\x9f\x99\x82","type":"error"}\n\n', b"\xef\xbb\xbf", b"\xf0\x9f", b"\xff",
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.lists(st.lists(st.sampled_from(TOKENS), max_size=6).map(b"".join), max_size=8))
def test_soup_is_read_as_the_sdk_reads_it(pieces: list[bytes]) -> None:
    """Any sequence of the format's building blocks says what the SDK reads in it."""
    check(pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=12).map(b"".join), st.lists(st.integers(0, 400)))
def test_soup_is_read_the_same_however_it_is_cut(body: bytes, borders: list[int]) -> None:
    """The borders of the pieces lie where no building block ends."""
    check(cut(body, borders))


def cut(body: bytes, borders: Iterable[int]) -> list[bytes]:
    inside = sorted({border for border in borders if border < len(body)})
    return [body[start:end] for start, end in zip([0, *inside], [*inside, len(body)], strict=True)]


KINDS = [TEXT, TEXT, ARGUMENTS, "response.output_item.added", "keepalive", CREATED, COMPLETED, "error"]
VALUES = [
    "",
    "Hello",
    "naïve → 🙂🙃",
    'a "quoted" \\ word',
    "two\nlines\r\n",
    "data: {}",
    "[DONE]",
    "x" * 300,
]


def an_event(rng: random.Random, newline: bytes) -> bytes:
    """One event, of whatever layout a server may choose."""
    fields: dict[str, Any] = {
        "type": rng.choice(KINDS),
        "delta": rng.choice(VALUES),
        "n": [1, None, {"type": "x"}],
    }
    if rng.random() < 0.3:
        fields["type"] = fields.pop("type")
    if rng.random() < 0.15:
        fields = dict(rng.sample(list(fields.items()), len(fields)))
    text = json.dumps(
        fields,
        ensure_ascii=rng.random() < 0.5,
        separators=rng.choice([(",", ":"), (", ", ": ")]),
        indent=rng.choice([None] * 9 + [1]),
    )
    colon = rng.choice([b"data: ", b"data: ", b"data:"])
    lines = [colon + line.encode() for line in text.split("\n")]
    if rng.random() < 0.6:
        lines.insert(0, b"event: " + str(fields["type"]).encode())
    if rng.random() < 0.05:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice([b": ping", b"id: 4", b"data", b"nonsense"]))
    return newline.join([*lines, b"", b""])


NOISE = [b"\n", b"\r", b"\r\n", b"\r", b"\n", b" ", b'"', b"}", b"\xc3", b": p\n\n", b"data: [DONE]\n\n"]


def a_body(rng: random.Random, events: Mapping[bytes, list[bytes]]) -> list[bytes]:
    """A body of one event a piece, some in runs, some with a flaw; then perhaps cut anew."""
    newline = rng.choice([b"\n", b"\n", b"\r\n", b"\r"])
    pieces: list[bytes] = []
    for _ in range(rng.randrange(1, 5)):
        event = rng.choice(events[newline])
        pieces += [event] * rng.choice([1, 1, 2, 6])
    for _ in range(rng.choice([0, 0, 1, 2])):
        place = rng.randrange(len(pieces))
        piece = pieces[place]
        at = rng.choice([0, rng.randrange(len(piece) + 1), len(piece) - len(newline), len(piece)])
        pieces[place] = piece[:at] + rng.choice(NOISE) + piece[at + rng.choice([0, 0, 1, 2]) :]
    how = rng.random()
    if how < 0.6:
        return pieces
    body = b"".join(pieces)
    if how < 0.65:
        return [body[i : i + 1] for i in range(len(body))]
    return cut(body, [rng.randrange(len(body) + 1) for _ in range(rng.choice([0, 1, 2, 5, 20]))])


def test_generated_bodies_are_read_as_the_sdk_reads_them() -> None:
    """Thousands of bodies, cut anywhere, with stray line ends and broken bytes, say what the SDK reads.

    `FUZZ_BODIES` sets how many. Each has its own seed, so the number in a failure makes it again.
    """
    shapes = random.Random(7)  # noqa: S311
    events = {newline: [an_event(shapes, newline) for _ in range(500)] for newline in (b"\n", b"\r\n", b"\r")}
    total = repeats = 0
    for number in range(BODIES):
        try:
            seen = check(a_body(random.Random(number), events))  # noqa: S311
        except AssertionError as error:
            raise AssertionError(f"body {number}") from error
        total += len(seen.events)
        repeats += seen.repeats
    assert total > 3 * BODIES, "the bodies hold events"
    assert repeats > BODIES // 2, "many of them are never parsed"


# --- memory and time -----------------------------------------------------------------------------------


def growth_in_bytes(act: Callable[[], object]) -> int:
    """How much more memory is held at any moment of `act` than before it."""
    gc.collect()  # what earlier tests left behind must not be cleared away meanwhile
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        act()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_nothing_is_kept_of_how_an_event_begins_but_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that writes the text before the type leaves none of it behind in what all streams share."""
    monkeypatch.setattr(_sse, "_kinds", {})
    reader = EventReader(AnswerState())
    for number in range(100):
        reader.feed(b'data: {"delta":"secret %d","type":"response.output_text.delta"}\n\n' % number)
        reader.feed(b'data: {"type":"response.kind_%d","delta":"secret"}\n\n' % number)
    assert "secret" not in repr(_sse._kinds)
    assert 0 < len(_sse._kinds) <= 64


@pytest.mark.parametrize("shift", [0, 7], ids=["one event a piece", "borders inside events"])
def test_memory_does_not_grow_with_the_number_of_events(shift: int) -> None:
    """100,000 deltas take the memory of a few."""
    [delta] = frame(TEXT)
    piece = delta[shift:] + delta[:shift]
    tally = Tally()
    reader = EventReader(tally)
    reader.feed(delta[:shift])

    def feed() -> None:
        for _ in range(100_000):
            reader.feed(piece)

    assert growth_in_bytes(feed) < 50_000
    assert tally.count == 100_000


@pytest.mark.parametrize(
    "head", [b'data: {"type":"response.image.partial","b64":"', b"event: x", b"date: ", b": "]
)
def test_memory_does_not_grow_with_an_event_that_nobody_wants(head: bytes) -> None:
    """Of an unwanted event, or a line without data, of 20 MB nothing is kept."""
    size = 64 * 1024
    piece = b"a" * size
    reader = EventReader(Tally())

    def feed() -> None:
        reader.feed(head)
        for _ in range(20 * 1024 * 1024 // size):
            reader.feed(piece)

    assert growth_in_bytes(feed) < 4 * size


def test_memory_does_not_grow_with_the_lines_of_an_unwanted_event() -> None:
    """An unwanted event may have any number of data lines."""
    tally = Tally()
    reader = EventReader(tally)
    lines = b"data: " + b"a" * 1000 + b"\n"

    def feed() -> None:
        reader.feed(b'data: {"type":"response.image.partial",\n')
        for _ in range(20_000):
            reader.feed(lines)
        reader.feed(b"data: 0}\n\n")

    assert growth_in_bytes(feed) < 50_000
    assert tally.count == 1


def test_nothing_of_a_wanted_event_is_kept_after_it() -> None:
    """What a large terminal event took is free again when the event is over."""
    tally = Tally()
    reader = EventReader(tally)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for piece in (b'data: {"type":"response.completed","a":"', b"a" * 5_000_000, b'"}\n\n'):
            reader.feed(piece)
        del piece
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tally.count == 1
    assert after - before < 50_000


def test_a_large_wanted_event_takes_time_in_proportion_to_its_size() -> None:
    """A terminal event of 8 MB in small pieces, pictures in it, costs some 8 times as much as one of 1 MB."""

    def seconds(megabytes: int) -> float:
        piece = b"a" * 1000
        reader = EventReader(Tally())
        began = time.process_time()
        reader.feed(b'data: {"type":"response.completed","picture":"')
        for _ in range(megabytes * 1000):
            reader.feed(piece)
        reader.feed(b'"}\n\n')
        return time.process_time() - began

    small = min(seconds(1) for _ in range(3))
    assert seconds(8) < 8 * 3 * small

"""Server-sent events, told apart while their bytes pass."""

from __future__ import annotations

import json
import re
from typing import Any, Final, Protocol, TypeAlias

_DATA: Final = b"data:"
_LF: Final = 10
_CR: Final = 13
_BLANK_LINES: Final = (b"\r\n\r\n", b"\n\n")
# Most servers write the type first; then an event is known by its first few bytes.
_LEADING_TYPE: Final = re.compile(rb'data:\s*\{\s*"type"\s*:\s*"([^"\\]{1,128})"')
_LEADING_LINES: Final = re.compile(
    rb'(?:event:[^\r\n]{0,128}\r?\n)?data: ?(\{"type": ?"([^"\\\r\n]{1,128})")'
)
_LONGEST_LEAD: Final = 256
# How the type of a life-cycle event is written. Inside of a JSON string its quotes would be escaped.
_LIFE_TYPES: Final = (b'"type":"response.', b'"type": "response.')
_LAST_WORDS: Final = (b'completed"', b'incomplete"', b'failed"')

# How an event begins that has its type in front, how it ends, and what is between, each with its place.
_Frame: TypeAlias = tuple[slice, "bytes | None", slice, bytes, slice]
_NO_FRAME: Final[_Frame] = (slice(0), None, slice(0), b"", slice(0))

# The type that an event has in front, where its data begin, and its frames with LF and with CR LF. There are
# not many, and all streams share theirs. What begins otherwise may have content in it, and is not kept.
_Lead: TypeAlias = tuple[str, int, tuple[_Frame, _Frame]]
_MOST_LEADS: Final = 64
_leads: Final[dict[bytes, _Lead]] = {}


class EventSink(Protocol):
    """Where an `EventReader` hands its events.

    Attributes:
        repeats: The reader adds 1 for each further event of the last one's type which was not wanted.
        due: How many repeats there are when it calls `on_due`.

    """

    repeats: int
    due: int

    def wants(self, kind: str) -> bool:
        """Whether the data of events of this type is worth decoding."""
        ...

    def on_event(self, kind: str | None, data: dict[str, Any] | None) -> None:
        """Take one event; `data` is there where it was wanted, or had to be decoded to know the type."""
        ...

    def on_garbled(self) -> None:
        """Take one event whose data is no JSON."""
        ...

    def on_due(self) -> None:
        """Take note of the repeat that just passed."""
        ...


class EventReader:
    """Reads an event stream in whatever pieces it arrives, and keeps none of it.

    An event is told apart as the SDK does, by the `type` in its data; `event:` lines are optional. Held
    between two pieces is at most the unfinished event, and only if it is wanted or not yet known, so the
    memory of a stream does not grow with its events. An event without its closing blank line is dropped,
    as the SDK drops it; so is what follows `[DONE]`.
    """

    __slots__ = (
        "_after_cr",
        "_data",
        "_frame",
        "_kind",
        "_line",
        "_sink",
        "_skips_line",
        "_unwanted",
        "done",
    )

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self.done = False  # the stream's closing mark, `[DONE]`, has been read
        self._line: bytes | bytearray = b""  # the unfinished line
        self._skips_line = False  # the rest of the unfinished line is of no interest
        self._after_cr = False  # the last piece ended in CR: a leading LF belongs to it
        # The unfinished event:
        self._kind: str | None = None  # its type, where that is known already
        self._data: list[bytes] | None = None  # its data lines
        self._unwanted = False  # its data lines are not kept
        self._frame = _NO_FRAME  # of a piece that is one more event of the last one's type

    def feed(self, piece: bytes) -> int:
        """Take the next bytes of the stream, and say how many of them, 0 for all. Try `repeats` first.

        Not taken are those from the event on that ends the response, if other events of the same piece
        come before it. They are to be fed when somebody asks for them, or never will: so a reader who is
        still busy with the events before has not reached the end yet.
        """
        if self._read_whole(piece):
            return 0
        border = _before_last_event(piece)
        self._read(piece[:border] if border else piece)
        return border

    def repeats(self, piece: bytes) -> bool:
        """Take a piece that is one more event of the last one's type, and say whether it was one.

        Servers write one event a piece, and most events are deltas like the one before: the same
        beginning, the same end, and no further line between them.
        """
        # All that most events cost is here. Slicing takes half of the time that methods of bytes take.
        head_part, head, tail_part, tail, middle_part = self._frame
        if piece[head_part] == head and piece[tail_part] == tail:
            middle = piece[middle_part]
            if _LF not in middle and _CR not in middle:
                sink = self._sink
                sink.repeats = repeats = sink.repeats + 1
                if repeats >= sink.due:
                    sink.on_due()
                return True
        return False

    def _read_whole(self, piece: bytes) -> bool:
        """Take a piece that is one event from its first to its last line, and say whether it was one."""
        self._frame = _NO_FRAME
        in_an_event = self._line or self._skips_line or self._after_cr or self._data or self._unwanted
        lead_ends = -1 if in_an_event or self.done else piece.find(b",", 0, _LONGEST_LEAD)
        lead = _lead(piece[:lead_ends]) if lead_ends > 0 else None
        if lead is None:
            return False
        kind, data_begins, frames = lead
        frame = frames[piece.endswith(b"\r\n")]
        _, _, tail_part, tail, middle_part = frame
        middle = piece[middle_part]
        if piece[tail_part] != tail or _LF in middle or _CR in middle:
            return False
        if self._sink.wants(kind):
            self._decode(piece[data_begins : -len(tail)])
        else:
            self._sink.on_event(kind, None)
            self._frame = frame
        return True

    def _read(self, piece: bytes) -> None:
        if not piece:
            return
        if self._after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        self._after_cr = piece.endswith(b"\r")
        lines = piece.splitlines()  # of bytes, so at LF, CR and CRLF and nowhere else
        rest = b"" if piece.endswith((b"\n", b"\r")) or not lines else lines.pop()
        for line in lines:
            self._end_line(line)
        if rest:
            self._continue_line(rest)

    def _continue_line(self, rest: bytes) -> None:
        if self._skips_line:
            return
        self._line = self._line or bytearray()
        self._line += rest
        if self._line[: len(_DATA)] != _DATA[: len(self._line)]:
            self._skips_line = True  # an `event:` line or a comment: nothing in it is needed
        elif len(self._line) > len(_DATA):
            self._skips_line = self._is_unwanted(self._line)
        if self._skips_line:
            self._line = b""

    def _end_line(self, rest: bytes) -> None:
        if self._skips_line:
            self._skips_line = False
            return
        line = rest
        if self._line:
            self._line += rest
            line = bytes(self._line)
            self._line = b""
        if not line:
            self._end_event()
        elif line.startswith(_DATA):
            if not self._is_unwanted(line):
                self._keep(line[len(_DATA) :].removeprefix(b" "))
        elif line == b"data":  # a field without a value
            self._keep(b"")

    def _keep(self, line: bytes) -> None:
        self._data = self._data or []
        self._data.append(line)

    def _is_unwanted(self, line: bytes | bytearray) -> bool:
        """Whether a data line, of which at least the beginning is there, need not be kept."""
        if self._kind is None and not self._data:
            self._kind = _leading_type(line)
            self._unwanted = self._kind is not None and not self._sink.wants(self._kind)
        return self._unwanted

    def _end_event(self) -> None:
        kind, lines, unwanted = self._kind, self._data, self._unwanted
        self._kind, self._data, self._unwanted = None, None, False
        if self.done:
            return
        if unwanted:
            self._sink.on_event(kind, None)
            return
        if not lines:
            return
        data = b"\n".join(lines)
        if data.startswith(b"[DONE]"):
            self.done = True
            return
        self._decode(data)

    def _decode(self, data: bytes) -> None:
        try:
            # Decoded as `json.loads` does it, which would try four encodings first.
            event = json.loads(data.decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            self._sink.on_garbled()
            return
        kind = event.get("type") if isinstance(event, dict) else None
        self._sink.on_event(
            kind if isinstance(kind, str) else None, event if isinstance(event, dict) else None
        )


def _lead(head: bytes) -> _Lead | None:
    """Return what is known of an event that begins like this, if that is with its type."""
    known = _leads.get(head)
    if known is None and (lead := _LEADING_LINES.fullmatch(head)):
        frames = _frame(head, b"\n\n"), _frame(head, b"\r\n\r\n")
        known = lead[2].decode("utf-8", "replace"), lead.start(1), frames
        if len(_leads) < _MOST_LEADS:
            _leads[head] = known
    return known


def _frame(head: bytes, tail: bytes) -> _Frame:
    return slice(len(head)), head, slice(-len(tail), None), tail, slice(len(head), -len(tail))


def _before_last_event(piece: bytes) -> int:
    """Return where the event begins that ends the response, if it is the last of several; else 0."""
    if not any(0 <= piece.find(blank_line) < len(piece) - len(blank_line) for blank_line in _BLANK_LINES):
        return 0  # there is one event, or a part of one
    at = max(piece.rfind(life_type) for life_type in _LIFE_TYPES)
    if at < 0 or not piece.startswith(_LAST_WORDS, piece.index(b".", at) + 1):
        return 0
    # Without any blank line before it, a place where no event begins.
    border = max(piece.rfind(blank_line, 0, at) + len(blank_line) for blank_line in _BLANK_LINES)
    return border if piece.startswith((b"event:", _DATA), border) else 0


def _leading_type(line: bytes | bytearray) -> str | None:
    lead = _LEADING_TYPE.match(line, 0, _LONGEST_LEAD)
    return lead[1].decode("utf-8", "replace") if lead else None

"""Server-sent events, told apart while their bytes pass."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, Protocol

_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
_DATA: Final = b"data:"
# Most servers write the type first; then an event is known by its first few bytes.
_LEADING_TYPE: Final = re.compile(rb'data:\s*\{\s*"type"\s*:\s*"([^"\\]{1,128})"')
_LEADING_LINES: Final = re.compile(rb'(?:event:[^\r\n]*\r?\n)?data: ?\{"type": ?"([^"\\\r\n]{1,128})"')
_LONGEST_LEAD: Final = 256
# How the type of a life-cycle event is written. Inside of a JSON string its quotes would be escaped.
_LIFE_TYPES: Final = (b'"type":"response.', b'"type": "response.')
_LAST_WORDS: Final = (b'completed"', b'incomplete"', b'failed"')
_NEVER: Final[tuple[bytes, ...]] = ()  # no piece begins with one of these


class EventSink(Protocol):
    """Where an `EventReader` hands its events."""

    def wants(self, kind: str) -> bool:
        """Whether the data of events of this type is worth decoding."""
        ...

    def on_event(self, kind: str | None, data: Mapping[str, Any] | None) -> None:
        """Take one event; `data` is there where it was wanted, or had to be decoded to know the type."""
        ...

    def on_garbled(self) -> None:
        """Take one event whose data is no JSON."""
        ...

    def on_repeat(self) -> None:
        """Take one more event of the last one's type, which was not wanted."""
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
        "_head",
        "_head_size",
        "_kind",
        "_line",
        "_sink",
        "_skips_line",
        "_tail",
        "_tail_size",
        "_unwanted",
        "done",
    )

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self.done = False  # the stream's closing mark, `[DONE]`, has been read
        self._line = bytearray()  # the unfinished line
        self._skips_line = False  # the rest of the unfinished line is of no interest
        self._after_cr = False  # the last piece ended in CR: a leading LF belongs to it
        # The unfinished event:
        self._kind: str | None = None  # its type, where that is known already
        self._data: list[bytes] = []  # its data lines
        self._unwanted = False  # its data lines are not kept
        # How a piece begins and ends that is one more event of the last one's type:
        self._head: bytes | tuple[bytes, ...] = _NEVER
        self._head_size = 0
        self._tail = b""
        self._tail_size = 0

    def feed(self, piece: bytes) -> int:
        """Take the next bytes of the stream, and say how many of them, 0 for all.

        Not taken are those from the event on that ends the response, if other events of the same piece
        come before it. They are to be fed when somebody asks for them, or never will: so a reader who is
        still busy with the events before has not reached the end yet.
        """
        if self.repeats(piece):
            return 0
        border = _before_last_event(piece)
        self._read(piece[:border] if border else piece)
        return border

    def repeats(self, piece: bytes) -> bool:
        """Take a piece that is one more event of the last one's type, and say whether it was one.

        Servers write one event a piece, and most events are deltas like the one before: the same
        beginning, the same end, and no further line between them.
        """
        border = len(piece) - self._tail_size
        if (
            piece.startswith(self._head)
            and piece.endswith(self._tail)
            and piece.find(b"\n", self._head_size, border) < 0
            and piece.find(b"\r", self._head_size, border) < 0
        ):
            self._sink.on_repeat()
            return True
        return False

    def _read(self, piece: bytes) -> None:
        self._head = _NEVER
        begins_event = self._at_border()
        start = 0
        if self._after_cr and piece:
            self._after_cr = False
            start = 1 if piece.startswith(b"\n") else 0
        for end in _LINE_END.finditer(piece, start):
            self._end_line(piece[start : end.start()])
            start = end.end()
        if start < len(piece):
            self._continue_line(piece[start:])
        elif piece.endswith(b"\r"):
            self._after_cr = True
        if begins_event and self._at_border():
            self._learn(piece)

    def _at_border(self) -> bool:
        return not (self._line or self._skips_line or self._after_cr or self._data or self._unwanted)

    def _learn(self, piece: bytes) -> None:
        """Remember how a piece begins and ends that is one event which is not wanted."""
        lead = _LEADING_LINES.match(piece)
        if lead is None or self.done:
            return
        tail = b"\r\n\r\n" if piece.endswith(b"\r\n") else b"\n\n"
        if (
            piece.endswith(tail)
            and _LINE_END.search(piece, lead.end(), len(piece) - len(tail)) is None
            and not self._sink.wants(lead[1].decode("utf-8", "replace"))
        ):
            self._head, self._head_size = lead[0], lead.end()
            self._tail, self._tail_size = tail, len(tail)

    def _continue_line(self, rest: bytes) -> None:
        if self._skips_line:
            return
        self._line += rest
        if self._line[: len(_DATA)] != _DATA[: len(self._line)]:
            self._skips_line = True  # an `event:` line or a comment: nothing in it is needed
        elif len(self._line) > len(_DATA):
            self._skips_line = self._is_unwanted(self._line)
        if self._skips_line:
            self._line.clear()

    def _end_line(self, rest: bytes) -> None:
        if self._skips_line:
            self._skips_line = False
            return
        line = rest
        if self._line:
            self._line += rest
            line = bytes(self._line)
            self._line.clear()
        if not line:
            self._end_event()
        elif line.startswith(_DATA):
            if not self._is_unwanted(line):
                self._data.append(line[len(_DATA) :].removeprefix(b" "))
        elif line == b"data":  # a field without a value
            self._data.append(b"")

    def _is_unwanted(self, line: bytes | bytearray) -> bool:
        """Whether a data line, of which at least the beginning is there, need not be kept."""
        if self._kind is None and not self._data:
            self._kind = _leading_type(line)
            self._unwanted = self._kind is not None and not self._sink.wants(self._kind)
        return self._unwanted

    def _end_event(self) -> None:
        kind, lines, unwanted = self._kind, self._data, self._unwanted
        self._kind, self._data, self._unwanted = None, [], False
        if self.done or not (lines or unwanted):
            return
        if unwanted:
            self._sink.on_event(kind, None)
            return
        text = b"\n".join(lines)
        if text.startswith(b"[DONE]"):
            self.done = True
            return
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            self._sink.on_garbled()
            return
        if isinstance(data, Mapping):
            stated = data.get("type")
            self._sink.on_event(stated if isinstance(stated, str) else None, data)
        else:
            self._sink.on_event(kind, None)


def _before_last_event(piece: bytes) -> int:
    at = max(piece.rfind(life_type) for life_type in _LIFE_TYPES)
    if at < 0 or not piece.startswith(_LAST_WORDS, piece.index(b".", at) + 1):
        return 0
    ends = (piece.rfind(blank_line, 0, at) + len(blank_line) for blank_line in (b"\n\n", b"\r\n\r\n"))
    border = max(ends)  # without any, a place where no event begins
    return border if piece.startswith((b"event:", _DATA), border) else 0


def _leading_type(line: bytes | bytearray) -> str | None:
    lead = _LEADING_TYPE.match(line, 0, _LONGEST_LEAD)
    return lead[1].decode("utf-8", "replace") if lead else None

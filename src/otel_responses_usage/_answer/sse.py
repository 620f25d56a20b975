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
_DATA_LINE_TYPE: Final = re.compile(rb'data:\s*\{\s*"type"\s*:\s*"([^"\\]{1,128})"')
_EVENT_PREFIX: Final = re.compile(rb'(?:event:[^\r\n]{0,128}\r?\n)?data: ?(\{"type": ?"([^"\\\r\n]{1,128})")')
_MAX_PREFIX_BYTES: Final = 256
# How the type of a life-cycle event is written. Inside of a JSON string its quotes would be escaped.
_LIFECYCLE_TYPES: Final = (b'"type":"response.', b'"type": "response.')
_TERMINAL_NAMES: Final = (b'completed"', b'incomplete"', b'failed"')

# How an event begins that has its type in front, how it ends, and what is between, each with its place.
_Frame: TypeAlias = tuple[slice, "bytes | None", slice, bytes, slice]
_NO_FRAME: Final[_Frame] = (slice(0), None, slice(0), b"", slice(0))

# The type that an event has in front, where its data begin, and its frames with LF and with CR LF. There are
# not many, and all streams share theirs. What begins otherwise may have content in it, and is not kept.
_Prefix: TypeAlias = tuple[str, int, tuple[_Frame, _Frame]]
_MAX_PREFIXES: Final = 64
_prefixes: Final[dict[bytes, _Prefix]] = {}


class EventSink(Protocol):
    """Where an `EventReader` hands its events.

    Attributes:
        repeats: The reader adds 1 for each further event of the last one's type which was not wanted.
        notify_at: How many repeats there are when it calls `on_repeats`.

    """

    repeats: int
    notify_at: int

    def needs_data(self, event_type: str) -> bool:
        """Whether the data of events of this type is worth decoding."""
        ...

    def on_event(self, event_type: str | None, data: dict[str, Any] | None) -> None:
        """Take one event; `data` is there where it was wanted, or had to be decoded to know the type."""
        ...

    def on_invalid_json(self) -> None:
        """Take one event whose data is no JSON."""
        ...

    def on_repeats(self) -> None:
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
        "_event_type",
        "_frame",
        "_line",
        "_sink",
        "_skips_data",
        "_skips_line",
        "done",
    )

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self.done = False  # the stream's closing mark, `[DONE]`, has been read
        self._line: bytes | bytearray = b""  # the unfinished line
        self._skips_line = False  # the rest of the unfinished line is of no interest
        self._after_cr = False  # the last piece ended in CR: a leading LF belongs to it
        # The unfinished event:
        self._event_type: str | None = None  # its type, where that is known already
        self._data: list[bytes] | None = None  # its data lines
        self._skips_data = False  # its data lines are not kept
        self._frame = _NO_FRAME  # of a piece that is one more event of the last one's type

    def feed(self, piece: bytes) -> int:
        """Take the next bytes of the stream, and say how many of them, 0 for all. Try `feed_repeat` first.

        Not taken are those from the event on that ends the response, if other events of the same piece
        come before it. They are to be fed when somebody asks for them, or never will: so a reader who is
        still busy with the events before has not reached the end yet.
        """
        if self._read_single_event(piece):
            return 0
        split_at = _terminal_event_start(piece)
        self._read(piece[:split_at] if split_at else piece)
        return split_at

    def feed_repeat(self, piece: bytes) -> bool:
        """Take a piece that is one more event of the last one's type, and say whether it was one.

        Servers write one event a piece, and most events are deltas like the one before: the same
        beginning, the same end, and no further line between them.
        """
        # All that most events cost is here. Slicing takes half of the time that methods of bytes take.
        prefix_slice, prefix, suffix_slice, suffix, middle_slice = self._frame
        if piece[prefix_slice] == prefix and piece[suffix_slice] == suffix:
            middle = piece[middle_slice]
            if _LF not in middle and _CR not in middle:
                sink = self._sink
                sink.repeats = repeats = sink.repeats + 1
                if repeats >= sink.notify_at:
                    sink.on_repeats()
                return True
        return False

    def _read_single_event(self, piece: bytes) -> bool:
        """Take a piece that is one event from its first to its last line, and say whether it was one."""
        self._frame = _NO_FRAME
        is_inside_event = self._line or self._skips_line or self._after_cr or self._data or self._skips_data
        prefix_end = -1 if is_inside_event or self.done else piece.find(b",", 0, _MAX_PREFIX_BYTES)
        match = _prefix_of(piece[:prefix_end]) if prefix_end > 0 else None
        if match is None:
            return False
        event_type, data_start, frames = match
        frame = frames[piece.endswith(b"\r\n")]
        _, _, suffix_slice, suffix, middle_slice = frame
        middle = piece[middle_slice]
        if piece[suffix_slice] != suffix or _LF in middle or _CR in middle:
            return False
        if self._sink.needs_data(event_type):
            self._decode(piece[data_start : -len(suffix)])
        else:
            self._sink.on_event(event_type, None)
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
            self._skips_line = self._is_skipped(self._line)
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
            if not self._is_skipped(line):
                self._keep_data(line[len(_DATA) :].removeprefix(b" "))
        elif line == b"data":  # a field without a value
            self._keep_data(b"")

    def _keep_data(self, line: bytes) -> None:
        self._data = self._data or []
        self._data.append(line)

    def _is_skipped(self, line: bytes | bytearray) -> bool:
        """Whether a data line, of which at least the beginning is there, need not be kept."""
        if self._event_type is None and not self._data:
            self._event_type = _type_of_data_line(line)
            self._skips_data = self._event_type is not None and not self._sink.needs_data(self._event_type)
        return self._skips_data

    def _end_event(self) -> None:
        event_type, lines, is_skipped = self._event_type, self._data, self._skips_data
        self._event_type, self._data, self._skips_data = None, None, False
        if self.done:
            return
        if is_skipped:
            self._sink.on_event(event_type, None)
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
            self._sink.on_invalid_json()
            return
        event_type = event.get("type") if isinstance(event, dict) else None
        self._sink.on_event(
            event_type if isinstance(event_type, str) else None, event if isinstance(event, dict) else None
        )


def _prefix_of(prefix: bytes) -> _Prefix | None:
    """Return what is known of an event that begins like this, if that is with its type."""
    known = _prefixes.get(prefix)
    if known is None and (match := _EVENT_PREFIX.fullmatch(prefix)):
        frames = _frame(prefix, b"\n\n"), _frame(prefix, b"\r\n\r\n")
        known = match[2].decode("utf-8", "replace"), match.start(1), frames
        if len(_prefixes) < _MAX_PREFIXES:
            _prefixes[prefix] = known
    return known


def _frame(prefix: bytes, suffix: bytes) -> _Frame:
    return slice(len(prefix)), prefix, slice(-len(suffix), None), suffix, slice(len(prefix), -len(suffix))


def _terminal_event_start(piece: bytes) -> int:
    """Return where the event begins that ends the response, if it is the last of several; else 0."""
    if not any(0 <= piece.find(blank_line) < len(piece) - len(blank_line) for blank_line in _BLANK_LINES):
        return 0  # there is one event, or a part of one
    type_at = max(piece.rfind(lifecycle_type) for lifecycle_type in _LIFECYCLE_TYPES)
    if type_at < 0 or not piece.startswith(_TERMINAL_NAMES, piece.index(b".", type_at) + 1):
        return 0
    # Without any blank line before it, a place where no event begins.
    split_at = max(piece.rfind(blank_line, 0, type_at) + len(blank_line) for blank_line in _BLANK_LINES)
    return split_at if piece.startswith((b"event:", _DATA), split_at) else 0


def _type_of_data_line(line: bytes | bytearray) -> str | None:
    match = _DATA_LINE_TYPE.match(line, 0, _MAX_PREFIX_BYTES)
    return match[1].decode("utf-8", "replace") if match else None

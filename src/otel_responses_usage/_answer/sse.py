"""Splits a stream of bytes into server-sent events."""

from __future__ import annotations

import copy
import re
from typing import Final, TypeAlias

from .lines import EventSink, LineReader, pass_on, tail_of, type_in

_DATA: Final = b"data:"
_LF: Final = 10
_CR: Final = 13
_LF_BLANK_LINE: Final = b"\n\n"
_CRLF_BLANK_LINE: Final = b"\r\n\r\n"
_BLANK_LINES: Final = (_CRLF_BLANK_LINE, _LF_BLANK_LINE)
_EVENT_START: Final = rb"(?:event:[^\r\n]{0,128}\r?\n)?data: ?"
_EVENT_PREFIX: Final = re.compile(_EVENT_START + rb'(\{"type": ?"([^"\\\r\n]{1,128})")')
_MAX_PREFIX_BYTES: Final = 256
# How an event begins whose data begin with another field.
_EVENT_HEAD: Final = re.compile(_EVENT_START + rb'(\{)(?!\s*"type"\s*:)')
# So much of an unfinished event is kept as it is. The rest of a longer one is read line by line.
_MAX_BEGINNING_BYTES: Final = 4096
# The type of a life-cycle event as it is written. Inside a JSON string the quotes would be escaped.
_LIFECYCLE_TYPES: Final = (b'"type":"response.', b'"type": "response.')
_TERMINAL_NAMES: Final = (b'completed"', b'incomplete"', b'failed"', b'cancelled"', b'done"')


# What the repeats of an event have in common. If one piece is one event: where the prefix is, the prefix,
# where the suffix is, the suffix, and where the content is. Then what they have in common in a longer text.
# A plain tuple: a named one takes twice as long to unpack.
_Frame: TypeAlias = tuple[slice, "bytes | None", slice, bytes, slice, "_Run"]
# The prefix, its length, the first byte after the data, whether that is CR, the end of one event with the
# prefix of the next, how much of that is data, how much follows the data, and the blank line.
_Run: TypeAlias = tuple[bytes, int, bytes, bool, bytes, int, int, bytes]
_NO_FRAME: Final[_Frame] = (slice(0), None, slice(0), b"", slice(0), (b"", 0, b"", False, b"", 0, 0, b""))

# The facts about events that begin alike, or begin and end alike: their type, the start of the data, and the
# frames with LF and CR LF. All streams share one cache, since there are few of them. Other parts of an event
# may contain content and are not cached.
_Kind: TypeAlias = tuple[str, int, tuple[_Frame, _Frame]]
_MAX_KINDS: Final = 64
_kinds: Final[dict[bytes | tuple[bytes, bytes], _Kind]] = {}


class EventReader:
    """Reads an event stream in pieces of any size, and keeps no events.

    The type of an event is the `type` in its data, as in the SDK. `event:` lines are optional. The
    memory of a stream does not grow: between two pieces the reader keeps at most the unfinished event. It
    keeps this event only if its data is needed or its type is unknown. Like the SDK, the reader ignores an
    event without its blank line, and everything after `[DONE]`.
    """

    __slots__ = ("_after_cr", "_beginning", "_frame", "_lines", "_repeated", "_sink", "done")

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self.done = False  # `[DONE]` has been read
        self._repeated = _NO_FRAME  # the frame that a repeat of the last event must match
        self._frame = _NO_FRAME  # the same, if the next piece begins with an event
        self._beginning = b""  # the first bytes of an unfinished event, if they are few
        self._after_cr = False  # the last piece ended with CR: a first LF belongs to that line break
        self._lines: LineReader | None = None  # reads an unfinished event line by line

    def feed(self, piece: bytes) -> int:
        """Read the next bytes of the stream. Call `feed_repeat` first.

        A piece can contain several events, with the terminal event last. Then the bytes of that event are not
        read: the application may still stop at an earlier event of the piece. The caller feeds them later,
        when the application asks for more bytes or has stopped reading.

        Returns:
            The number of bytes that were read, 0 for all.

        """
        self._frame = _NO_FRAME
        if self._lines is not None:
            split_at = _terminal_event_start(piece)
            self._read_lines(piece[:split_at] if split_at else piece)
            return split_at
        known = len(self._beginning)
        if known:
            piece, self._beginning = self._beginning + piece, b""
        elif self._after_cr:
            self._after_cr = False
            if piece.startswith(b"\n"):
                piece, known = piece[1:], -1
        elif self._read_single_event(piece):
            return 0
        read = self._read_repeats(piece, 0)
        if read == len(piece):
            return 0
        split_at = _terminal_event_start(piece, read)
        if split_at <= known:
            split_at = 0  # the application has got its first bytes already
        self._read_events(piece[:split_at] if split_at else piece, read)
        return split_at and split_at - known

    def feed_repeat(self, piece: bytes) -> bool:
        """Read a piece whose events have the type of the last event. Return false for other pieces.

        Nothing of another piece is read. Most events are deltas like the one before. Servers send one event
        per piece, and what lies between joins and divides these pieces.
        """
        # This is the only code that runs for most events. Slicing is twice as fast as the methods of `bytes`.
        prefix_slice, prefix, suffix_slice, suffix, middle_slice, _ = self._frame
        if piece[prefix_slice] == prefix:
            if piece[suffix_slice] == suffix:
                middle = piece[middle_slice]
                if _LF not in middle and _CR not in middle:
                    sink = self._sink
                    sink.repeats = repeats = sink.repeats + 1
                    if repeats >= sink.notify_at:
                        sink.on_repeats()
                    return True
        elif prefix is not None:
            return False  # a whole event came before, so the piece begins with an event of another type
        repeated = self._repeated
        if repeated is _NO_FRAME or self._after_cr:
            return False
        text = self._beginning + piece
        number, end, is_rest_alike = _find_repeats(repeated, text, 0)
        if not is_rest_alike:
            return False
        self._beginning = rest = text[end:]
        self._frame = _NO_FRAME if rest else repeated
        sink = self._sink
        if sink.repeats + number < sink.notify_at:
            sink.repeats += number
        else:
            self._add_repeats(number)
        return True

    def copied(self, sink: EventSink) -> EventReader:
        """Return a copy that passes its events to the given sink."""
        duplicate = copy.copy(self)
        duplicate._sink = sink  # noqa: SLF001  # of this class
        if self._lines is not None:
            duplicate._lines = self._lines.copied(sink)  # noqa: SLF001
        return duplicate

    def _read_single_event(self, piece: bytes) -> bool:
        """Read a piece that is exactly one event. Return false for other pieces."""
        known = None if self.done else _kind_of(piece)
        if known is None:
            return False
        event_type, data_start, frames = known
        frame = frames[piece.endswith(b"\r\n")]
        content = piece[frame[4]]
        if piece[frame[2]] != frame[3] or _LF in content or _CR in content:
            return False
        if self._sink.needs_data(event_type, piece):
            self._repeated = _NO_FRAME
            pass_on(piece[data_start : -len(frame[5][-1])], self._sink)
        else:
            self._sink.on_event(event_type, None)
            self._repeated = self._frame = frame
        return True

    def _read_events(self, text: bytes, start: int) -> None:
        """Read text that has an event at `start`, and may end inside of one."""
        blank_line = _LF_BLANK_LINE
        if text.find(b"\r", start) >= 0:
            end = len(text) - text.endswith(b"\r")  # the LF may follow in the next piece
            breaks = text.count(b"\r\n", start, end)
            if breaks != text.count(b"\r", start, end) or breaks != text.count(b"\n", start, end):
                self._read_lines(text[start:])  # line breaks of several kinds
                return
            blank_line = _CRLF_BLANK_LINE
            if text.endswith(b"\n\r"):  # the last event is complete already
                text += b"\n"
                self._after_cr = True
        while start < len(text):
            end = text.find(blank_line, start)
            if end < 0:
                rest = text[start:]
                if len(rest) <= _MAX_BEGINNING_BYTES:
                    self._beginning = rest
                else:
                    self._read_lines(rest)
                return
            if not self.done:
                self._read_block(text[start:end], blank_line)
            start = self._read_repeats(text, end + len(blank_line))
        if not self._beginning and not self._after_cr:
            self._frame = self._repeated

    def _read_repeats(self, text: bytes, start: int) -> int:
        """Read the events from `start` on that are like the last one, and return where they end.

        If the text ends inside of such an event, its first bytes become `_beginning`, and count as read.
        """
        if self._repeated is _NO_FRAME:
            return start
        number, end, is_rest_alike = _find_repeats(self._repeated, text, start)
        self._add_repeats(number)
        if is_rest_alike:
            self._beginning = text[end:]
            return len(text)
        return end

    def _add_repeats(self, number: int) -> None:
        sink = self._sink
        while number and sink.repeats + number >= sink.notify_at:
            number -= max(1, sink.notify_at - sink.repeats)
            sink.repeats = max(sink.repeats + 1, sink.notify_at)
            sink.on_repeats()
        sink.repeats += number

    def _read_block(self, block: bytes, blank_line: bytes) -> None:
        """Read a complete event that is not like the last one."""
        self._repeated = _NO_FRAME
        known = _kind_of(block)
        if known is None:
            self._read_lines(block + blank_line)
            return
        event_type, data_start, frames = known
        if not self._sink.needs_data(event_type, block):
            self._sink.on_event(event_type, None)
            self._repeated = frames[blank_line is not _LF_BLANK_LINE]
        elif block.find(b"\n", data_start) < 0:
            pass_on(block[data_start:], self._sink)
        else:
            self._read_lines(block + blank_line)  # its data is in several lines

    def _read_lines(self, text: bytes) -> None:
        """Read text line by line."""
        self._repeated = _NO_FRAME
        if not text or self.done:
            return
        lines = self._lines or LineReader(self._sink, after_cr=self._after_cr)
        lines.read(text)
        self.done, self._after_cr = lines.done, lines.after_cr
        self._lines = lines if lines.is_inside_event else None


def _kind_of(event: bytes) -> _Kind | None:
    """Return the facts about an event, given with or without its blank line.

    `None` if its type is neither the first nor the last field of its data.
    """
    prefix_end = event.find(b",", 0, _MAX_PREFIX_BYTES)
    prefix = event[:prefix_end] if prefix_end > 0 else b""
    return _kinds.get(prefix) or _kind_by_prefix(prefix) or _kind_by_tail(event.rstrip(b"\r\n"))


def _kind_by_prefix(prefix: bytes) -> _Kind | None:
    """Return the facts about an event whose type is the first field of its data."""
    match = _EVENT_PREFIX.fullmatch(prefix)
    return _keep_kind(prefix, type_in(match, 2), match.start(1), prefix, b"") if match else None


def _kind_by_tail(block: bytes) -> _Kind | None:
    """Return the facts about an event whose type is the last field of its data."""
    tail = tail_of(block)
    head = _EVENT_HEAD.match(block)
    if tail is None or head is None:
        return None
    data = block[head.end() :]
    if _LF in data or _CR in data:
        return None  # in several lines
    key = head[0], tail[0]
    return _kinds.get(key) or _keep_kind(key, type_in(tail), head.start(1), *key)


def _keep_kind(
    key: bytes | tuple[bytes, bytes], event_type: str, data_start: int, prefix: bytes, tail: bytes
) -> _Kind:
    frames = _frame(prefix, tail, _LF_BLANK_LINE), _frame(prefix, tail, _CRLF_BLANK_LINE)
    known = event_type, data_start, frames
    if len(_kinds) < _MAX_KINDS:
        _kinds[key] = known
    return known


def _frame(prefix: bytes, tail: bytes, blank_line: bytes) -> _Frame:
    """Return what events with this prefix and this end of their data have in common."""
    suffix, after = tail + blank_line, blank_line + prefix
    has_cr = blank_line == _CRLF_BLANK_LINE
    run = prefix, len(prefix), blank_line[:1], has_cr, tail + after, len(tail), len(after), blank_line
    content = slice(len(prefix), -len(suffix))
    return slice(len(prefix)), prefix, slice(-len(suffix), None), suffix, content, run


def _find_repeats(frame: _Frame, text: bytes, start: int) -> tuple[int, int, bool]:
    """Find the events of a text, from `start` on, that have this frame.

    Returns:
        Their number, where they end, and whether the rest of the text is empty or the beginning of one more.

    """
    prefix, prefix_size, line_break, has_cr, border, tail_size, after_size, blank_line = frame[5]
    first = text[start : start + prefix_size]
    if first != prefix:
        return 0, start, prefix.startswith(first)
    if not has_cr and _CR in text:
        return 0, start, False  # line breaks of several kinds
    # The line break that ends the data of an event is found much faster than a blank line.
    find, number, content = text.find, 0, start + prefix_size
    line_end = find(line_break, content)
    while text[line_end - tail_size : line_end + after_size] == border:
        number += 1
        content = line_end + after_size
        line_end = find(line_break, content)
    end = content - prefix_size
    if line_end < 0:
        is_rest_alike = len(text) - end <= _MAX_BEGINNING_BYTES and not (has_cr and find(b"\n", content) >= 0)
    elif is_rest_alike := text.startswith(frame[3], line_end - tail_size):
        number += 1
        end = line_end + len(blank_line)
        is_rest_alike = prefix.startswith(text[end : end + prefix_size])
    if has_cr and text.count(b"\n", start, end) != number * border.count(b"\n"):
        return 0, start, False
    return number, end, is_rest_alike


def _terminal_event_start(piece: bytes, start: int = 0) -> int:
    """Return the index of the terminal event if it is the last of several events, and otherwise 0.

    Args:
        piece: The events.
        start: Where the first event begins that may be the terminal one.

    """
    type_at = piece.rfind(_LIFECYCLE_TYPES[0], start)
    if type_at < 0:
        type_at = piece.rfind(_LIFECYCLE_TYPES[1], start)
    if type_at < 0 or not piece.startswith(_TERMINAL_NAMES, piece.index(b".", type_at) + 1):
        return 0
    if not any(0 <= piece.find(blank_line) < len(piece) - len(blank_line) for blank_line in _BLANK_LINES):
        return 0  # there is at most one event
    # If no blank line precedes the type, this index is not the start of an event.
    split_at = max(piece.rfind(blank_line, 0, type_at) + len(blank_line) for blank_line in _BLANK_LINES)
    return split_at if piece.startswith((b"event:", _DATA), split_at) else 0

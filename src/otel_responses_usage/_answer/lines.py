"""Reads an event stream line by line: slower than `EventReader`, but with line breaks of any kind."""

from __future__ import annotations

import copy
import json
import re
from typing import Any, Final, Protocol

_DATA: Final = b"data:"
_MAX_TYPE_BYTES: Final = 256
# Most servers write the type first. Then the first bytes of an event are enough to find it.
_DATA_LINE_TYPE: Final = re.compile(rb'data:\s*\{\s*"type"\s*:\s*"([^"\\]{1,128})"')
# Servers that write the fields in the order of the SDK's models have the type at the end. A quote that is
# followed by `type` begins a string, and the last brace ends the whole object: the type is that of the event.
_TAIL: Final = re.compile(rb', ?"type": ?"([^"\\\r\n]{1,128})"\}\Z')
_MAX_TAIL_BYTES: Final = 160


class EventSink(Protocol):
    """Receives the events of an `EventReader`.

    Attributes:
        repeats: The reader adds 1 for each event that has the type of the last one and needs no data.
        notify_at: The reader calls `on_repeats` when `repeats` reaches this number.

    """

    repeats: int
    notify_at: int

    def needs_data(self, event_type: str, event: bytes | bytearray) -> bool:
        """Whether to decode the data of an event of this type.

        Args:
            event_type: The type.
            event: The event, as far as it has been read.

        """
        ...

    def on_event(self, event_type: str | None, data: dict[str, Any] | None) -> None:
        """Receive one event.

        `data` is decoded if it is needed, or if the type could not be found without decoding. Otherwise it
        is `None`.
        """
        ...

    def on_invalid_json(self) -> None:
        """Receive an event with invalid JSON."""
        ...

    def on_repeats(self) -> None:
        """Receive the notice that `repeats` has reached `notify_at`."""
        ...


class LineReader:
    """Reads text line by line until an event is complete, and keeps its data only if that is needed.

    Attributes:
        is_inside_event: Whether an event has begun and is not complete.
        after_cr: The text ended with CR: a first LF of the next text belongs to that line break.
        done: `[DONE]` has been read. All events after it are ignored.

    """

    __slots__ = (
        "_data",
        "_event_type",
        "_line",
        "_sink",
        "_skips_data",
        "_skips_line",
        "after_cr",
        "done",
        "is_inside_event",
    )

    def __init__(self, sink: EventSink, *, after_cr: bool) -> None:
        self._sink = sink
        self.after_cr = after_cr
        self.done = False
        self.is_inside_event = False
        self._line: bytes | bytearray = b""  # the unfinished line
        self._skips_line = False  # the rest of the unfinished line is not needed
        # State of the unfinished event:
        self._event_type: str | None = None  # its type, if known
        self._data: list[bytes] | None = None  # its data lines
        self._skips_data = False  # its data lines are not needed

    def read(self, text: bytes) -> None:
        """Read more text."""
        if self.after_cr and text.startswith(b"\n"):
            text = text[1:]
        self.after_cr = text.endswith(b"\r")
        lines = text.splitlines()  # `bytes.splitlines` splits at LF, CR and CR LF only
        rest = b"" if text.endswith((b"\n", b"\r")) or not lines else lines.pop()
        for line in lines:
            self._end_line(line)
        if rest:
            self._continue_line(rest)
        has_begun = self._event_type is not None or self._data or self._skips_data
        self.is_inside_event = bool(has_begun or self._line or self._skips_line)

    def copied(self, sink: EventSink) -> LineReader:
        """Return a copy that passes its events to the given sink."""
        duplicate = copy.copy(self)
        duplicate._sink = sink  # noqa: SLF001  # of this class
        duplicate._line = copy.copy(self._line)  # noqa: SLF001
        duplicate._data = copy.copy(self._data)  # noqa: SLF001
        return duplicate

    def _continue_line(self, rest: bytes) -> None:
        if self._skips_line:
            return
        self._line = self._line or bytearray()
        self._line += rest
        if self._line[: len(_DATA)] != _DATA[: len(self._line)]:
            self._skips_line = True  # an `event:` line or a comment: not needed
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
        """Whether a data line is not needed. At least the start of the line must be there."""
        if self._event_type is None and not self._data:
            self._event_type = event_type = _type_of_data_line(line)
            self._skips_data = event_type is not None and not self._sink.needs_data(event_type, line)
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
        if len(lines) == 1 and lines[0].startswith(b"{") and (tail := tail_of(lines[0])) is not None:
            event_type = type_in(tail)
            if not self._sink.needs_data(event_type, lines[0]):
                self._sink.on_event(event_type, None)
                return
        data = b"\n".join(lines)
        if data.startswith(b"[DONE]"):
            self.done = True
            return
        pass_on(data, self._sink)


def pass_on(data: bytes, sink: EventSink) -> None:
    """Decode the data of an event, and pass it to the sink."""
    try:
        # Same result as `json.loads(data)`, which first tests for four encodings.
        event = json.loads(data.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        sink.on_invalid_json()
        return
    event_type = event.get("type") if isinstance(event, dict) else None
    sink.on_event(
        event_type if isinstance(event_type, str) else None, event if isinstance(event, dict) else None
    )


def tail_of(data: bytes) -> re.Match[bytes] | None:
    """Return the last field of an object if it is the type; see `type_in`."""
    return _TAIL.search(data, max(0, len(data) - _MAX_TAIL_BYTES))


def type_in(match: re.Match[bytes], group: int = 1) -> str:
    """Return the type of an event, which is a group of a match."""
    return match[group].decode("utf-8", "replace")


def _type_of_data_line(line: bytes | bytearray) -> str | None:
    match = _DATA_LINE_TYPE.match(line, 0, _MAX_TYPE_BYTES)
    return type_in(match) if match else None

"""A reader for an answer that arrives as whole events: each piece is one JSON message of a WebSocket."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Final

from .lines import EventSink, type_in

# Servers write the type first. Then the first bytes of a message are enough to find it.
_PREFIX: Final = re.compile(rb'\s*\{\s*"type"\s*:\s*"([^"\\]{1,128})"\s*,?')
_NO_PREFIX: Final[tuple[slice, bytes | None]] = (slice(0), None)


class MessageReader:
    """Reads messages, and keeps none of them."""

    __slots__ = ("_end", "_repeated", "_sink", "done")

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self.done = False  # a message has no end marker
        self._repeated = _NO_PREFIX  # how a message of the same type as the last one begins
        self._end = _NO_PREFIX  # see `feed_repeat_of`

    def feed_repeat(self, piece: bytes) -> bool:
        """Read a message of the same type as the last one. Return false for other messages."""
        # This is the only code that runs for most messages.
        where, prefix = self._repeated
        if piece[where] != prefix:
            return False
        sink = self._sink
        sink.repeats = repeats = sink.repeats + 1
        if repeats >= sink.notify_at:
            sink.on_repeats()
        return True

    def feed_repeat_of(self, end: bytes) -> Callable[[bytes], bool]:
        """Return a `feed_repeat` that reads only messages with this end, and returns false for others."""
        self._end = slice(-len(end), None), end
        return self._feed_repeat_with_end

    def _feed_repeat_with_end(self, piece: bytes) -> bool:
        # Repeats the code of `feed_repeat`: a call of it would cost a third of what a message costs.
        # Two slices are compared, since that takes half the time of `startswith` and `endswith`.
        where, prefix = self._repeated
        at_end, end = self._end
        if piece[where] != prefix or piece[at_end] != end:
            return False
        sink = self._sink
        sink.repeats = repeats = sink.repeats + 1
        if repeats >= sink.notify_at:
            sink.on_repeats()
        return True

    def feed(self, piece: bytes) -> int:
        """Read a message."""
        self._repeated = _NO_PREFIX
        match = _PREFIX.match(piece)
        event_type = type_in(match) if match else None
        if match and event_type is not None and not self._sink.needs_data(event_type, piece):
            self._sink.on_event(event_type, None)
            self._repeated = slice(match.end()), match[0]
        else:
            self._decode(piece)
        return 0

    def copied(self, sink: EventSink) -> MessageReader:
        """Return a copy that passes its events to the given sink."""
        duplicate = copy.copy(self)
        duplicate._sink = sink  # noqa: SLF001  # of this class
        return duplicate

    def _decode(self, message: bytes) -> None:
        event = decoded(message)
        if event is None:
            self._sink.on_invalid_json()
        else:
            event_type = event.get("type")
            self._sink.on_event(event_type if isinstance(event_type, str) else None, event)


def type_of(message: bytes) -> str | None:
    """Return the type of a message, or `None` if it has none."""
    match = _PREFIX.match(message)
    if match:
        return type_in(match)
    event_type = (decoded(message) or {}).get("type")
    return event_type if isinstance(event_type, str) else None


def decoded(message: bytes | str) -> dict[str, object] | None:
    """Return the JSON object in a message, or `None` if it contains none."""
    try:
        event = json.loads(message)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None

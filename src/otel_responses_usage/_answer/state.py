"""What is known of one call's answer: events folded into facts while they pass."""

from __future__ import annotations

import functools
import json
import sys
import time
from array import array
from typing import Any, Final

from .._facts.outcome import Ending, Outcome, ending_of
from .._facts.response import TERMINAL_STATUSES, Response, error_code, utf8_safe
from .._facts.usage import UsageSource

_EMPTY_RESPONSE: Final = Response()
_DELTA: Final = ".delta"
_LIFECYCLE_PREFIX: Final = "response."
# Sent right after `response.created` with the same object: the type says all that is new.
_PROGRESS_TYPES: Final = frozenset({"response.in_progress", "response.queued"})

_MAX_KINDS: Final = 32
_OTHER_KIND: Final = "other"
# Each is a point to be recorded, which costs the SDK twenty times what an event costs us.
_MAX_GAPS: Final = 24
_MAX_GAP_US: Final = 2**32 - 1

_NEVER: Final = sys.maxsize


class AnswerState:
    """The facts of one answer, of a size that does not depend on how much was answered.

    Attributes:
        response: The latest sight of the response object.
        ending: How the response ended, once a terminal event or a whole body has said so.
        source: Where `response.usage` was read.
        first_delta_at: When the first delta arrived, by `time.perf_counter_ns`.
        repeats: Events like the last one that are not in the counts yet; whoever reads events adds to it.
        notify_at: The number of repeats that asks for `on_repeats`.

    """

    __slots__ = (
        "_deltas",
        "_events",
        "_gap_stride",
        "_gaps_us",
        "_is_counting",
        "_kind",
        "_last_delta_at",
        "_starts_gap",
        "_until_timed",
        "ending",
        "first_delta_at",
        "notify_at",
        "repeats",
        "response",
        "source",
        "stream_error",
    )

    def __init__(self) -> None:
        self.response = _EMPTY_RESPONSE
        self.ending: Ending | None = None
        self.stream_error: str | None = None  # the code of an `error` event
        self.source = UsageSource.STREAM
        self.first_delta_at: int | None = None
        self._is_counting = True
        self._events = 0
        self._deltas: dict[str, int] = {}
        self._kind: str | None = None  # of the last event, if that was a delta
        self.repeats = 0
        self.notify_at = _NEVER
        self._until_timed = 1  # deltas until the next one whose time is taken
        self._starts_gap = True  # that one begins a gap and ends none
        self._last_delta_at = 0
        self._gaps_us = array("I")
        self._gap_stride = 1

    @property
    def events(self) -> int:
        """Events received."""
        self._count_repeats()
        return self._events

    @property
    def deltas(self) -> dict[str, int]:
        """Events that carry a piece of the answer, by their kind: the type without `response.` and `.delta`.

        A server of very many kinds has the rest of them counted as `other`.
        """
        self._count_repeats()
        return self._deltas

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between deltas: every one of a short stream, each n-th one of a long stream."""
        return [gap / 1e6 for gap in self._gaps_us]

    def stop_counting(self) -> None:
        """Count no event any more, but go on to learn of the response."""
        self._count_repeats()
        self._is_counting = False
        self._until_timed = self.notify_at = _NEVER

    def needs_data(self, event_type: str) -> bool:
        """Whether the data of events of this type is worth decoding: it carries the response, or an error."""
        if event_type in _PROGRESS_TYPES:
            return self.response.id is None
        # Life-cycle events are those of one word: `response.created`, `response.completed`.
        return event_type == "error" or (
            event_type.startswith(_LIFECYCLE_PREFIX) and "." not in event_type[len(_LIFECYCLE_PREFIX) :]
        )

    def on_event(self, event_type: str | None, data: dict[str, Any] | None) -> None:
        """Fold one event in. What follows the event that ended the response is not part of the call."""
        if self.ending is not None:
            return
        self._count_repeats()
        if event_type is not None and event_type.endswith(_DELTA):
            self._kind = self._counted_kind(event_type)
            self.repeats, self.notify_at = 1, self._until_timed
            if self.notify_at == 1:
                self.on_repeats()
            return
        self._kind, self.notify_at = None, _NEVER
        self._events += self._is_counting
        if data is not None:
            self._read_event(event_type or "", data)
        elif event_type in _PROGRESS_TYPES and event_type[len(_LIFECYCLE_PREFIX) :] != self.response.status:
            self.response = self.response.merged_with(Response(status=event_type[len(_LIFECYCLE_PREFIX) :]))

    def on_repeats(self) -> None:
        """Take the time of a delta: one at which a gap begins, or ends, or both."""
        now = time.perf_counter_ns()
        skipped = 0
        if self._starts_gap:
            self._starts_gap = False
            if self.first_delta_at is None:
                self.first_delta_at = now
        else:
            self._gaps_us.append(min((now - self._last_delta_at) // 1000, _MAX_GAP_US))
            if len(self._gaps_us) >= _MAX_GAPS:
                self._gaps_us = self._gaps_us[::2]
                self._gap_stride *= 2
            if self._gap_stride > 1:
                self._starts_gap = True
                skipped = self._gap_stride - 2
        self._last_delta_at = now
        self.notify_at = self.repeats + skipped + 1

    def on_invalid_json(self) -> None:
        """Count an event that nobody can read, and on which the SDK raises."""
        self.on_event(None, None)
        self.stream_error = self.stream_error or json.JSONDecodeError.__name__

    def on_document(self, data: dict[str, Any]) -> None:
        """Take the whole body of an answer that was not streamed."""
        response = Response.from_json(data)
        self.response = response.without_usage() if response.is_running else response
        self.source = UsageSource.RESPONSE
        code = error_code(data.get("error"))
        if self.response.id is None and code is not None:
            self.ending = Ending(Outcome.ERROR, code)
        else:
            # An answer whose work goes on in the background is a call that did what it was asked.
            self.ending = ending_of(self.response, "completed")

    def on_partial_document(self, response_id: str | None, *, is_complete: bool) -> None:
        """Take the id of a body that was not streamed and cannot be read: it broke off, or is too large."""
        if response_id is not None and self.response is _EMPTY_RESPONSE:
            self.response = Response(id=response_id)
        if is_complete:
            self.source = UsageSource.RESPONSE
            self.ending = ending_of(self.response, "completed")

    def _read_event(self, event_type: str, data: dict[str, Any]) -> None:
        status = event_type.removeprefix(_LIFECYCLE_PREFIX)
        is_terminal = event_type.startswith(_LIFECYCLE_PREFIX) and status in TERMINAL_STATUSES
        response = data.get("response")
        if isinstance(response, dict):
            newer = Response.from_json(response)
            newer = newer if is_terminal else newer.without_usage()
            self.response = newer if self.response is _EMPTY_RESPONSE else self.response.merged_with(newer)
        # The SDK raises on any event with an `error`, whatever its type.
        error = data.get("error")
        if event_type == "error" or error:
            self.stream_error = error_code(error if isinstance(error, dict) else data) or "error"
        if is_terminal:
            self.ending = ending_of(self.response, status)

    def _counted_kind(self, event_type: str) -> str:
        kind = _delta_kind(event_type)
        return kind if kind in self._deltas or len(self._deltas) < _MAX_KINDS else _OTHER_KIND

    def _count_repeats(self) -> None:
        repeats, self.repeats = self.repeats, 0
        if self._kind is not None:
            self._until_timed = self.notify_at = self.notify_at - repeats
        if repeats and self._is_counting and self.ending is None:
            self._events += repeats
            if self._kind is not None:
                self._deltas[self._kind] = self._deltas.get(self._kind, 0) + repeats


@functools.lru_cache(maxsize=_MAX_KINDS)
def _delta_kind(event_type: str) -> str:
    return utf8_safe(event_type.removeprefix(_LIFECYCLE_PREFIX).removesuffix(_DELTA))

"""What is known of one call's answer: events folded into facts while they pass."""

from __future__ import annotations

import functools
import json
import sys
import time
from array import array
from typing import Any, Final

from .._facts.outcome import Ending, Outcome, ending_of
from .._facts.response import TERMINAL_STATUSES, Response, error_code, exportable
from .._facts.usage import UsageSource

_NOTHING: Final = Response()
_DELTA: Final = ".delta"
_LIFE: Final = "response."
# Sent right after `response.created` with the same object: the type says all that is new.
_PROGRESS: Final = frozenset({"response.in_progress", "response.queued"})

_MOST_KINDS: Final = 32
_OTHER_KIND: Final = "other"
# Each is a point to be recorded, which costs the SDK twenty times what an event costs us.
_MOST_GAPS: Final = 24
_LONGEST_GAP_US: Final = 2**32 - 1

_NEVER: Final = sys.maxsize


class AnswerState:
    """The facts of one answer, of a size that does not depend on how much was answered.

    Attributes:
        response: The latest sight of the response object.
        ending: How the response ended, once a terminal event or a whole body has said so.
        source: Where `response.usage` was read.
        first_delta_at: When the first delta arrived, by `time.perf_counter_ns`.
        repeats: Events like the last one that are not in the counts yet; whoever reads events adds to it.
        due: The number of repeats that asks for `on_due`.

    """

    __slots__ = (
        "_begins_gap",
        "_counts",
        "_deltas",
        "_events",
        "_gap_stride",
        "_gaps_us",
        "_kind",
        "_last_delta_at",
        "_until_due",
        "due",
        "ending",
        "first_delta_at",
        "repeats",
        "response",
        "source",
        "stream_error",
    )

    def __init__(self) -> None:
        self.response = _NOTHING
        self.ending: Ending | None = None
        self.stream_error: str | None = None  # the code of an `error` event
        self.source = UsageSource.STREAM
        self.first_delta_at: int | None = None
        self._counts = True
        self._events = 0
        self._deltas: dict[str, int] = {}
        self._kind: str | None = None  # of the last event, if that was a delta
        self.repeats = 0
        self.due = _NEVER
        self._until_due = 1  # deltas until the next one whose time is taken
        self._begins_gap = True  # that one begins a gap and ends none
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

    def freeze(self) -> None:
        """Count no event any more, but go on to learn of the response."""
        self._count_repeats()
        self._counts = False
        self._until_due = self.due = _NEVER

    def wants(self, kind: str) -> bool:
        """Whether the data of events of this type is worth decoding: it carries the response, or an error."""
        if kind in _PROGRESS:
            return self.response.id is None
        # Life-cycle events are those of one word: `response.created`, `response.completed`.
        return kind == "error" or (kind.startswith(_LIFE) and "." not in kind[len(_LIFE) :])

    def on_event(self, kind: str | None, data: dict[str, Any] | None) -> None:
        """Fold one event in. What follows the event that ended the response is not part of the call."""
        if self.ending is not None:
            return
        self._count_repeats()
        if kind is not None and kind.endswith(_DELTA):
            self._kind = self._kind_of(kind)
            self.repeats, self.due = 1, self._until_due
            if self.due == 1:
                self.on_due()
            return
        self._kind, self.due = None, _NEVER
        self._events += self._counts
        if data is not None:
            self._observe(kind or "", data)
        elif kind in _PROGRESS and kind[len(_LIFE) :] != self.response.status:
            self.response = self.response.updated(Response(status=kind[len(_LIFE) :]))

    def on_due(self) -> None:
        """Take the time of a delta: one at which a gap begins, or ends, or both."""
        now = time.perf_counter_ns()
        passed_over = 0
        if self._begins_gap:
            self._begins_gap = False
            if self.first_delta_at is None:
                self.first_delta_at = now
        else:
            self._gaps_us.append(min((now - self._last_delta_at) // 1000, _LONGEST_GAP_US))
            if len(self._gaps_us) >= _MOST_GAPS:
                self._gaps_us = self._gaps_us[::2]
                self._gap_stride *= 2
            if self._gap_stride > 1:
                self._begins_gap = True
                passed_over = self._gap_stride - 2
        self._last_delta_at = now
        self.due = self.repeats + passed_over + 1

    def on_garbled(self) -> None:
        """Count an event that nobody can read, and on which the SDK raises."""
        self.on_event(None, None)
        self.stream_error = self.stream_error or json.JSONDecodeError.__name__

    def on_body(self, data: dict[str, Any]) -> None:
        """Take the whole body of an answer that was not streamed."""
        response = Response.from_json(data)
        self.response = response.without_usage() if response.is_under_way else response
        self.source = UsageSource.RESPONSE
        code = error_code(data.get("error"))
        if self.response.id is None and code is not None:
            self.ending = Ending(Outcome.ERROR, code)
        else:
            # An answer whose work goes on in the background is a call that did what it was asked.
            self.ending = ending_of(self.response, "completed")

    def on_beginning(self, response_id: str | None, *, is_whole: bool) -> None:
        """Take the id of a body that was not streamed and cannot be read: it broke off, or is too large."""
        if response_id is not None and self.response is _NOTHING:
            self.response = Response(id=response_id)
        if is_whole:
            self.source = UsageSource.RESPONSE
            self.ending = ending_of(self.response, "completed")

    def _observe(self, kind: str, data: dict[str, Any]) -> None:
        said = kind.removeprefix(_LIFE)
        ends = kind.startswith(_LIFE) and said in TERMINAL_STATUSES
        response = data.get("response")
        if isinstance(response, dict):
            seen = Response.from_json(response)
            seen = seen if ends else seen.without_usage()
            self.response = seen if self.response is _NOTHING else self.response.updated(seen)
        # The SDK raises on any event with an `error`, whatever its type.
        error = data.get("error")
        if kind == "error" or error:
            self.stream_error = error_code(error if isinstance(error, dict) else data) or "error"
        if ends:
            self.ending = ending_of(self.response, said)

    def _kind_of(self, kind: str) -> str:
        name = _delta_name(kind)
        return name if name in self._deltas or len(self._deltas) < _MOST_KINDS else _OTHER_KIND

    def _count_repeats(self) -> None:
        repeats, self.repeats = self.repeats, 0
        if self._kind is not None:
            self._until_due = self.due = self.due - repeats
        if repeats and self._counts and self.ending is None:
            self._events += repeats
            if self._kind is not None:
                self._deltas[self._kind] = self._deltas.get(self._kind, 0) + repeats


@functools.lru_cache(maxsize=_MOST_KINDS)
def _delta_name(kind: str) -> str:
    return exportable(kind.removeprefix(_LIFE).removesuffix(_DELTA))

"""Keeps the facts of one answer, and updates them with each event."""

from __future__ import annotations

import copy
import functools
import json
import sys
import time
from array import array
from typing import Any, Final

from .._facts.outcome import TRUNCATED, Ending, Outcome, ending_of
from .._facts.response import TERMINAL_STATUSES, Response, error_code, utf8_safe
from .._facts.usage import UsageSource

_EMPTY_RESPONSE: Final = Response()
_DELTA: Final = ".delta"
_LIFECYCLE_PREFIX: Final = "response."
# These follow `response.created` and repeat its response object. Only the status is new, or the id.
_PROGRESS_TYPES: Final = frozenset({"response.in_progress", "response.queued"})
# While these arrive, the response runs, unless its own status is final.
_RUNNING_TYPES: Final = _PROGRESS_TYPES | {"response.created"}

# The second word of the API's event types for a part of the answer: `response.output_text.done`. Such events
# contain no response object. Some are large.
_PARTS: Final = frozenset(
    {
        "audio",
        "code_interpreter_call",
        "code_interpreter_call_code",
        "compaction",
        "content_part",
        "custom_tool_call_input",
        "file_search_call",
        "function_call_arguments",
        "image_generation_call",
        "mcp_call",
        "mcp_call_arguments",
        "mcp_list_tools",
        "output_item",
        "output_text",
        "reasoning_summary_part",
        "reasoning_summary_text",
        "reasoning_text",
        "refusal",
        "shell_call_command",
        "shell_call_output_content",
        "web_search_call",
    }
)
# A response object has at least one of these.
_RESPONSE_FIELDS: Final = frozenset({"id", "model", "object", "output", "response", "status", "usage"})
_MAX_TYPES: Final = 128

# After one of these the output is complete as a rule, and the terminal event is due. After reasoning, and
# after the code or the arguments of a hosted tool, more output follows.
_DONE: Final = ".done"
_MORE_FOLLOWS: Final = ("response.reasoning", "response.code_interpreter_call", "response.mcp_call")

_MAX_KINDS: Final = 32
_OTHER_KIND: Final = "other"
# Each gap becomes one point of a histogram. For the SDK a point costs as much as 20 events cost here.
_MAX_GAPS: Final = 24
_MAX_GAP_US: Final = 2**32 - 1

_NEVER: Final = sys.maxsize


class AnswerState:
    """The facts of one answer. Its size does not depend on the length of the answer.

    Attributes:
        response: The latest facts of the response object.
        ending: How the response ended; `None` before its terminal event or complete document.
        source: Where `response.usage` was read.
        stream_error: The code of an `error` event; `None` if there was none.
        first_delta_at: When the first delta arrived, by `time.perf_counter_ns`.
        repeats: Events of the same type as the last one that are not counted yet. The event reader adds
            to it.
        notify_at: The event reader calls `on_repeats` when `repeats` reaches this number.

    """

    __slots__ = (
        "_deltas",
        "_events",
        "_gap_stride",
        "_gaps_us",
        "_is_counting",
        "_kind",
        "_last_delta_at",
        "_last_type",
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
        self.stream_error: str | None = None
        self.source = UsageSource.STREAM
        self.first_delta_at: int | None = None
        self._is_counting = True
        self._last_type: str | None = None
        self._events = 0
        self._deltas: dict[str, int] | None = None  # made when it is needed: an open stream has none
        self._kind: str | None = None  # kind of the last event; `None` if that was not a delta
        self.repeats = 0
        self.notify_at = _NEVER
        self._until_timed = 1  # number of deltas until the next recorded time
        self._starts_gap = True  # whether that delta only starts a gap
        self._last_delta_at = 0
        self._gaps_us = array("I")
        self._gap_stride = 1

    @property
    def events(self) -> int:
        """The number of events."""
        self._count_repeats()
        return self._events

    @property
    def deltas(self) -> dict[str, int]:
        """The number of delta events for each kind.

        The kind is the event type without `response.` and `.delta`. If there are very many kinds, the later
        ones are counted as `other`.
        """
        self._count_repeats()
        return self._deltas or {}

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between deltas. In a long stream only every n-th gap is kept."""
        return [gap / 1e6 for gap in self._gaps_us]

    @property
    def is_output_done(self) -> bool:
        """Whether the last event says that a part of the output is complete: the terminal event is due."""
        last_type = self._last_type or ""
        return last_type.endswith(_DONE) and not last_type.startswith(_MORE_FOLLOWS)

    def copied(self) -> AnswerState:
        """Return a copy. Events that it receives do not change this one."""
        duplicate = copy.copy(self)
        duplicate._deltas = self._deltas and self._deltas.copy()  # noqa: SLF001  # of this class
        duplicate._gaps_us = self._gaps_us[:]  # noqa: SLF001
        return duplicate

    def stop_timing(self) -> None:
        """Record no time of a delta: the whole body is there, and its deltas have no times of their own."""
        self._until_timed = self.notify_at = _NEVER

    def stop_counting(self) -> None:
        """Ignore further events in all counts, but still update the response."""
        self._count_repeats()
        self._is_counting = False
        self.stop_timing()

    def needs_data(self, event_type: str, event: bytes | bytearray) -> bool:
        """Whether the data of an event may contain an error, or the response with anything new."""
        if event_type in _PROGRESS_TYPES:
            known = self.response.id
            return known is None or known.encode("utf-8", "replace") not in event
        return _may_contain_response(event_type)

    def on_event(self, event_type: str | None, data: dict[str, Any] | None) -> None:
        """Add one event to the facts. Events after the terminal event are ignored."""
        if self.ending is not None:
            return
        self._count_repeats()
        self._last_type = event_type
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
        """Record the time of this delta: it starts a gap, ends one, or both."""
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
        """Count an event with invalid JSON. The SDK raises on such an event."""
        self.on_event(None, None)
        self.stream_error = self.stream_error or json.JSONDecodeError.__name__

    def on_document(self, data: dict[str, Any]) -> None:
        """Read the facts of a complete document."""
        response = Response.from_json(_response_object(data) or data)
        self.response = response.without_usage() if response.is_running else response
        self.source = UsageSource.RESPONSE
        error = data.get("error")
        if self.response.id is None and error:
            self.ending = Ending(Outcome.ERROR, error_code(error) or "error")
        elif data and not data.keys() & _RESPONSE_FIELDS:
            self.ending = TRUNCATED  # a document of another kind: the server has no such route
        else:
            # The call of a background response has succeeded, although the response still runs.
            self.ending = ending_of(self.response, "completed" if response.is_running else "")

    def on_partial_document(self, response_id: str | None, *, is_complete: bool) -> None:
        """Record the response id of a document that is incomplete or too large to parse.

        Args:
            response_id: The id, or `None` if it was not found.
            is_complete: Whether the whole document arrived.

        """
        if response_id is not None and self.response is _EMPTY_RESPONSE:
            self.response = Response(id=response_id)
        if is_complete:
            self.source = UsageSource.RESPONSE
            self.ending = ending_of(self.response, "completed")

    def _read_event(self, event_type: str, data: dict[str, Any]) -> None:
        status = event_type.removeprefix(_LIFECYCLE_PREFIX)
        is_terminal = event_type.startswith(_LIFECYCLE_PREFIX) and status in TERMINAL_STATUSES
        response = _response_object(data)
        if response is not None:
            newer = Response.from_json(response)
            if not is_terminal:
                is_terminal = newer.is_terminal if event_type in _RUNNING_TYPES else newer.has_ended
            newer = newer if is_terminal else newer.without_usage()
            self.response = newer if self.response is _EMPTY_RESPONSE else self.response.merged_with(newer)
        # The SDK raises on an event with `error`, whatever its type is.
        error = data.get("error")
        if event_type == "error" or error:
            self.stream_error = error_code(error if isinstance(error, dict) else data) or "error"
        if is_terminal:
            self.ending = ending_of(self.response, status)

    def _counted_kind(self, event_type: str) -> str:
        kind, known = _delta_kind(event_type), self._deltas or {}
        return kind if kind in known or len(known) < _MAX_KINDS else _OTHER_KIND

    def _count_repeats(self) -> None:
        repeats, self.repeats = self.repeats, 0
        if self._kind is not None:
            self._until_timed = self.notify_at = self.notify_at - repeats
        if repeats and self._is_counting and self.ending is None:
            self._events += repeats
            if self._kind is not None:
                self._deltas = deltas = self._deltas or {}
                deltas[self._kind] = deltas.get(self._kind, 0) + repeats


def _response_object(data: dict[str, Any]) -> dict[str, Any] | None:
    """Return the response object in the data of an event or in a document: a field of it, or all of it."""
    response = data.get("response")
    if isinstance(response, dict):
        return response
    return data if data.get("object") == "response" else None


@functools.lru_cache(maxsize=_MAX_TYPES)
def _may_contain_response(event_type: str) -> bool:
    # A type that is not known here may end the response: servers have terminal events of their own.
    if event_type == "keepalive" or event_type.endswith(_DELTA):
        return False
    words = event_type.split(".", 2)
    return len(words) < 3 or words[0] != "response" or words[1] not in _PARTS


@functools.lru_cache(maxsize=_MAX_KINDS)
def _delta_kind(event_type: str) -> str:
    return utf8_safe(event_type.removeprefix(_LIFECYCLE_PREFIX).removesuffix(_DELTA))

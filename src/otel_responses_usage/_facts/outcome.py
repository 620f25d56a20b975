"""The ways in which a call can end, and the span status and finish reason of each."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from .response import Response


class Outcome(str, Enum):
    """How a call ended: the value of `openai_responses.stream.outcome`."""

    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    ERROR = "error"
    CUT = "cut"
    TRUNCATED = "truncated"
    CLOSED = "closed"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"
    EXIT = "exit"


# The application itself closes a stream or cancels the task that reads it.
_NOT_ERRORS: Final = frozenset({Outcome.COMPLETED, Outcome.INCOMPLETE, Outcome.CLOSED, Outcome.CANCELLED})

_FINISH_REASONS: Final = {"max_output_tokens": "length", "max_tokens": "length"}


class Ending(NamedTuple):
    """An outcome and its `error.type`, which is `None` if the outcome is no error."""

    outcome: Outcome
    error_type: str | None = None

    @property
    def is_error(self) -> bool:
        """Whether the span gets the status "error"."""
        return self.outcome not in _NOT_ERRORS

    def finish_reason(self, response: Response) -> str:
        """Return the finish reason of the response, as the GenAI conventions name it."""
        if self.outcome is Outcome.COMPLETED:
            return "tool_calls" if response.calls_tools else "stop"
        if self.outcome is Outcome.INCOMPLETE:
            reason = response.incomplete_reason or (response.status == "cancelled" and "cancelled")
            # Servers omit the reason only for a length limit. They name all other reasons.
            return _FINISH_REASONS.get(reason, reason) if reason else "length"
        return "error"


TRUNCATED: Final = Ending(Outcome.TRUNCATED, "stream_truncated")
CLOSED: Final = Ending(Outcome.CLOSED)
CANCELLED: Final = Ending(Outcome.CANCELLED)
ABANDONED: Final = Ending(Outcome.ABANDONED, "stream_abandoned")
EXIT: Final = Ending(Outcome.EXIT, "process_exit")

_OUTCOME_BY_STATUS: Final = {
    "completed": Outcome.COMPLETED,
    "incomplete": Outcome.INCOMPLETE,
    "failed": Outcome.FAILED,
    # A cancelled response stopped before it was complete.
    "cancelled": Outcome.INCOMPLETE,
}


def ending_of(response: Response, fallback_status: str) -> Ending:
    """Return the ending of a response that has ended.

    Args:
        response: The latest state of the response object.
        fallback_status: The status that follows from the event type or from the kind of answer. It is used
            only if the response object has no final status. Some servers omit the status. Other servers
            send the event `response.completed` for every response, so the object is more reliable. If this
            is not a final status either, the error or the incomplete reason of the response decides.

    """
    outcome = _OUTCOME_BY_STATUS.get(response.status or "") or _OUTCOME_BY_STATUS.get(fallback_status)
    if outcome is None:
        if response.error_code is not None:
            outcome = Outcome.FAILED
        else:
            outcome = Outcome.COMPLETED if response.incomplete_reason is None else Outcome.INCOMPLETE
    if outcome is Outcome.FAILED:
        return Ending(outcome, response.error_code or "failed")
    return Ending(outcome)

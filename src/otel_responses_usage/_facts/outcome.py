"""The ways a call can end, and what each means for its span."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from .response import Response


class Outcome(str, Enum):
    """How a call ended; the value of `openai_responses.stream.outcome`."""

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


_NOT_ERRORS: Final = frozenset({Outcome.COMPLETED, Outcome.INCOMPLETE, Outcome.CLOSED})

_FINISH_REASONS: Final = {"max_output_tokens": "length", "max_tokens": "length"}


class Ending(NamedTuple):
    """An outcome with the word for its `error.type`; `None` where the outcome is no error."""

    outcome: Outcome
    error_type: str | None = None

    @property
    def is_error(self) -> bool:
        """Whether the span's status is an error."""
        return self.outcome not in _NOT_ERRORS

    def finish_reason(self, response: Response) -> str:
        """Return the one finish reason of the response, in the words of the GenAI conventions."""
        if self.outcome is Outcome.COMPLETED:
            return "tool_calls" if response.calls_tools else "stop"
        if self.outcome is Outcome.INCOMPLETE:
            reason = response.incomplete_reason or (response.status == "cancelled" and "cancelled")
            # A server that names no reason has cut by length: the other reasons are always named.
            return _FINISH_REASONS.get(reason, reason) if reason else "length"
        return "error"


TRUNCATED: Final = Ending(Outcome.TRUNCATED, "stream_truncated")
CLOSED: Final = Ending(Outcome.CLOSED)
ABANDONED: Final = Ending(Outcome.ABANDONED, "stream_abandoned")
EXIT: Final = Ending(Outcome.EXIT, "process_exit")

_OUTCOME_BY_STATUS: Final = {
    "completed": Outcome.COMPLETED,
    "incomplete": Outcome.INCOMPLETE,
    "failed": Outcome.FAILED,
    # A response that somebody cancelled is one that ended before its time.
    "cancelled": Outcome.INCOMPLETE,
}


def ending_of(response: Response, fallback_status: str) -> Ending:
    """Return the ending of a response that has ended.

    Args:
        response: The last sight of the response.
        fallback_status: The status that the event's type or the answer stands for. It decides where the
            response itself has no final status: several servers send `completed` for everything, others no
            status.

    """
    status = response.status if response.status in _OUTCOME_BY_STATUS else fallback_status
    outcome = _OUTCOME_BY_STATUS.get(status, Outcome.COMPLETED)
    if outcome is Outcome.FAILED:
        return Ending(outcome, response.error_code or "failed")
    return Ending(outcome)

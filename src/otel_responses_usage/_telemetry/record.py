"""All facts of an ended call, as the telemetry writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .._facts.outcome import Ending, Outcome
from .._facts.request import ResponsesRequest
from .._facts.response import Response
from .._facts.usage import MissingReason, Usage, UsageSource


class Retrieval(NamedTuple):
    """The look-up that was made for a call."""

    attempts: int
    duration_s: float


class Record(NamedTuple):
    """All facts of an ended call. Times in nanoseconds are of the wall clock.

    Attributes:
        request_id: The server's id of the HTTP request.
        resend_count: How often the SDK sent the request again.
        input_count: Input tokens as the API counts them beforehand, if that was asked for.
        is_received: Whether the usage was in the answer, in a part that the application has received.

    """

    request: ResponsesRequest
    start_ns: int
    end_ns: int
    ending: Ending
    response: Response
    events: int
    deltas: Mapping[str, int]
    time_to_first_chunk_s: float | None
    gaps_s: list[float]
    usage: Usage | None
    source: UsageSource | None
    missing_reason: MissingReason | None
    retrieval: Retrieval | None
    request_id: str | None
    resend_count: int
    is_received: bool
    input_count: int | None = None

    @property
    def finish_reason(self) -> str | None:
        """The finish reason. A response that still runs in the background has none yet."""
        has_finished = self.events or not self.response.is_running
        return self.ending.finish_reason(self.response) if has_finished else None

    @property
    def is_refused(self) -> bool:
        """Whether the call ended without any answer."""
        return self.ending.outcome is Outcome.ERROR and self.response.id is None and not self.events

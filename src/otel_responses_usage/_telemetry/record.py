"""All facts of an ended call, as the telemetry writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from opentelemetry.trace import Span

from .._facts.outcome import Ending, Outcome
from .._facts.request import Operation, ResponsesRequest, Server
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

    @property
    def is_refused(self) -> bool:
        """Whether the call ended without any answer."""
        return self.ending.outcome is Outcome.ERROR and self.response.id is None and not self.events


class UncountedCall(NamedTuple):
    """What is kept of a call that ended without usage, in case that the usage becomes known later.

    Attributes:
        operation: The kind of call.
        server: The server that it was sent to.
        model: The model that was asked for.
        completion_window: The completion window that was asked for.
        missing_reason: Why the usage was not known when the call was recorded.
        span: A span that is not recorded, with the context of the span of the call.
        has_tools: Whether the use of hosted tools was recorded already.

    """

    operation: Operation
    server: Server
    model: str | None
    completion_window: str | None
    missing_reason: MissingReason
    span: Span
    has_tools: bool

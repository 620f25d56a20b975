"""All facts of an ended call, as the telemetry writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .._call_record import CallRecord
from .._facts.outcome import Ending, Outcome
from .._facts.request import ResponsesRequest
from .._facts.response import Response
from .._facts.tools import ToolUsage
from .._facts.usage import MissingReason, Usage, UsageSource
from .neighbour import CallSpan


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


def call_record(call_span: CallSpan, record: Record) -> CallRecord:
    """Return what the application is told of an ended call."""
    request, response, retrieval = record.request, record.response, record.retrieval
    tools = response.tools or ToolUsage()
    return CallRecord(
        operation=request.operation.value,
        provider=request.server.provider,
        server_address=request.server.address,
        server_port=request.server.port,
        request_model=request.model,
        response_model=response.model,
        response_id=response.id,
        previous_response_id=request.previous_response_id,
        conversation_id=request.conversation_id,
        request_id=record.request_id,
        lane=request.lane,
        streamed=request.streams,
        outcome=record.ending.outcome,
        error_type=record.ending.error_type,
        finish_reason=record.finish_reason,
        status=response.status,
        start_time_ns=record.start_ns,
        end_time_ns=record.end_ns,
        time_to_first_chunk_s=record.time_to_first_chunk_s,
        events=record.events,
        deltas=sum(record.deltas.values()),
        deltas_by_type=dict(record.deltas),
        usage=record.usage,
        usage_source=record.source,
        missing_reason=record.missing_reason,
        service_tier=response.service_tier,
        completion_window=request.completion_window,
        tool_calls=dict(tools.calls),
        web_search_requests=tools.web_search_requests,
        image_generation_input_tokens=tools.image_input_tokens,
        image_generation_output_tokens=tools.image_output_tokens,
        input_count=record.input_count,
        resend_count=record.resend_count,
        retrieval_attempts=retrieval.attempts if retrieval is not None else 0,
        retrieval_duration_s=retrieval.duration_s if retrieval is not None else None,
        baggage=dict(call_span.baggage.on_span),
        span_context=call_span.span.get_span_context(),
    )

"""What an application is told of an ended call.

Imported only if an application has asked for that. The import takes 2 ms.
"""

from __future__ import annotations

from .._call_record import CallRecord
from .._facts.tools import ToolUsage
from .neighbour import CallSpan
from .record import Record


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

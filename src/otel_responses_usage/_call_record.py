"""What an application is told of one ended call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ._facts.outcome import Outcome, ending_of
from ._facts.response import Response
from ._facts.tools import ToolUsage
from ._facts.usage import MissingReason, Usage, UsageSource

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One ended call of the Responses API, with its usage or the reason why it is not known.

    It has no content and no credentials. A value that is not known is `None`.

    Attributes:
        operation: The kind of call: `chat` or `compact`. A response hook also gets `fetch_response`.
        provider: As `gen_ai.provider.name`, for example `openai`.
        server_address: The host that the call was sent to.
        server_port: Its port.
        request_model: The model that was asked for.
        response_model: The model that answered.
        response_id: The id of the response.
        previous_response_id: The response that the call continues.
        conversation_id: The conversation that the call belongs to.
        request_id: The `x-request-id` of the answer.
        lane: The lane of a WebSocket, if it has a name.
        streamed: Whether a stream was asked for.
        outcome: How the call ended.
        error_type: As `error.type`; `None` if the outcome is no error.
        finish_reason: As `gen_ai.response.finish_reasons`; `None` while the response runs.
        status: The last status that the API gave.
        start_time_ns: When the call began, in nanoseconds since the epoch.
        end_time_ns: When it ended for the application, in nanoseconds since the epoch.
        time_to_first_chunk_s: Seconds from the call to the first delta.
        events: The number of events received.
        deltas: The number of deltas among them. It is no number of tokens.
        deltas_by_type: The same by kind, for example `output_text`.
        usage: The token counts that the API reported.
        usage_source: Where they were read.
        missing_reason: Why `usage` is `None`.
        service_tier: The tier that served the call.
        completion_window: The completion window that was asked for, for example `2h`.
        tool_calls: Items of the output that hosted tools made, by type.
        web_search_requests: Web searches that are billed.
        image_generation_input_tokens: Input tokens of image generation, which are not in `usage`.
        image_generation_output_tokens: Output tokens of image generation, which are not in `usage`.
        input_count: Input tokens as the API counts them beforehand, if that was asked for.
        resend_count: How often the SDK sent the request again.
        retrieval_attempts: Requests of the look-up, 0 if there was none.
        retrieval_duration_s: Seconds from the end of the call to the end of the look-up.
        baggage: The baggage entries of `Config.baggage_keys`, each cut at 128 characters.
        span_context: The context of the span of the call, or of the span it was made in.
        is_late: Whether this is the second record of a call, whose usage became known after its first.

    """

    operation: str
    provider: str
    server_address: str | None
    server_port: int | None
    request_model: str | None
    response_model: str | None
    response_id: str | None
    previous_response_id: str | None
    conversation_id: str | None
    request_id: str | None
    lane: str | None
    streamed: bool
    outcome: Outcome
    error_type: str | None
    finish_reason: str | None
    status: str | None
    start_time_ns: int
    end_time_ns: int
    time_to_first_chunk_s: float | None
    events: int
    deltas: int
    deltas_by_type: Mapping[str, int]
    usage: Usage | None
    usage_source: UsageSource | None
    missing_reason: MissingReason | None
    service_tier: str | None
    completion_window: str | None
    tool_calls: Mapping[str, int]
    web_search_requests: int | None
    image_generation_input_tokens: int | None
    image_generation_output_tokens: int | None
    input_count: int | None
    resend_count: int
    retrieval_attempts: int
    retrieval_duration_s: float | None
    baggage: Mapping[str, str]
    span_context: SpanContext
    is_late: bool = False


def late_record(first: CallRecord, response: Response) -> CallRecord:
    """Return the second record of a call, whose response the application was shown with its usage."""
    tools = response.tools or ToolUsage()
    return replace(
        first,
        response_model=response.model or first.response_model,
        finish_reason=first.finish_reason or ending_of(response, "completed").finish_reason(response),
        status=response.status,
        usage=response.usage,
        usage_source=UsageSource.OBSERVATION,
        missing_reason=None,
        service_tier=response.service_tier or first.service_tier,
        tool_calls=dict(tools.calls),
        web_search_requests=tools.web_search_requests,
        image_generation_input_tokens=tools.image_input_tokens,
        image_generation_output_tokens=tools.image_output_tokens,
        is_late=True,
    )

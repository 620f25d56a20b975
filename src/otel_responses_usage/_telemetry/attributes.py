"""The attributes of spans and metric points, as functions of a call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

from opentelemetry.util.types import AttributeValue

from .._facts.outcome import Outcome
from .._facts.request import Operation, ResponsesRequest, Server
from .._facts.tools import ToolUsage
from .._facts.usage import MissingReason, UsageSource
from . import semconv as names
from .record import Record

_API_TYPE: Final = "responses"
# Optional attributes at the start of a span: the index of the field in the request, and the name.
_REQUEST_ATTRIBUTES: Final = tuple(
    (ResponsesRequest._fields.index(field), name)
    for field, name in (
        ("max_output_tokens", names.REQUEST_MAX_TOKENS),
        ("temperature", names.REQUEST_TEMPERATURE),
        ("top_p", names.REQUEST_TOP_P),
        ("reasoning_effort", names.REQUEST_REASONING_LEVEL),
        ("previous_response_id", names.REQUEST_PREVIOUS_RESPONSE_ID),
        ("stream_cursor", names.REQUEST_STREAM_CURSOR),
        ("conversation_id", names.CONVERSATION_ID),
        ("output_type", names.OUTPUT_TYPE),
        ("service_tier", names.OPENAI_REQUEST_SERVICE_TIER),
        ("response_id", names.RESPONSE_ID),
    )
)

# Attributes of ours that a usage span has.
_USAGE_SPAN_NAMES: Final = (
    names.STREAM_OUTCOME,
    names.USAGE_SOURCE,
    names.USAGE_MISSING_REASON,
    names.INPUT_COUNT,
    names.RETRIEVAL_ATTEMPTS,
    names.RETRIEVAL_DURATION,
    names.COMPLETION_WINDOW,
)


def start_attributes(request: ResponsesRequest) -> dict[str, AttributeValue]:
    """Return the attributes at the start of a span."""
    attributes = _fixed_attributes(request.operation, request.server, request.model, request.streams).copy()
    for index, name in _REQUEST_ATTRIBUTES:
        value: Any = request[index]
        if value is not None:
            attributes[name] = value
    if request.prompt is not None:
        attributes |= without_none(
            {names.PROMPT_NAME: request.prompt.name, names.PROMPT_VERSION: request.prompt.version}
        )
    if request.protocol is not None:
        attributes |= without_none(
            {
                names.NETWORK_PROTOCOL_NAME: request.protocol,
                names.STREAM_LANE: request.lane,
                names.REQUEST_GENERATE: request.generate,
            }
        )
    return attributes


def end_attributes(record: Record) -> dict[str, AttributeValue]:
    """Return the attributes at the end of a span."""
    response, is_fetch = record.response, record.request.is_fetch
    reason = record.finish_reason
    attributes: dict[str, AttributeValue | None] = {
        names.RESPONSE_ID: response.id,
        names.RESPONSE_MODEL: response.model,
        names.RESPONSE_STATUS: response.status if is_fetch else None,
        names.RESPONSE_FINISH_REASONS: (reason,) if reason else None,
        names.OPENAI_RESPONSE_SERVICE_TIER: response.service_tier,
        names.RESPONSE_TIME_TO_FIRST_CHUNK: None if is_fetch else record.time_to_first_chunk_s,
        names.CONVERSATION_COMPACTED: (response.is_compacted and not is_fetch) or None,
        names.RESEND_COUNT: record.resend_count or None,
        names.ERROR_TYPE: record.ending.error_type,
        **own_attributes(record),
        **_usage_attributes(record),
    }
    return without_none(attributes)


def own_attributes(record: Record) -> dict[str, AttributeValue | None]:
    """The attributes with names of this package."""
    attributes: dict[str, AttributeValue | None] = {
        names.STREAM_OUTCOME: record.ending.outcome.value,
        names.LAST_STATUS: record.response.status,
        names.REQUEST_ID: record.request_id,
    }
    if record.request.streams or record.events:
        attributes[names.STREAM_EVENTS] = record.events
        attributes[names.STREAM_DELTAS] = sum(record.deltas.values())
    for kind, count in record.deltas.items():
        attributes[names.STREAM_DELTAS_BY_TYPE + kind] = count
    if not record.request.is_fetch:
        attributes[names.USAGE_SOURCE] = record.source.value if record.source else None
        reason = record.missing_reason
        attributes[names.USAGE_MISSING_REASON] = reason.value if reason else None
        attributes[names.INPUT_COUNT] = record.input_count
        attributes[names.COMPLETION_WINDOW] = record.request.completion_window
        attributes[names.CACHE_MISS_REASON] = record.response.cache_miss_reason
        if record.response.tools is not None:
            attributes |= _tool_attributes(record.response.tools)
    if record.retrieval is not None:
        attributes[names.RETRIEVAL_ATTEMPTS] = record.retrieval.attempts
        attributes[names.RETRIEVAL_DURATION] = record.retrieval.duration_s
    return attributes


def _tool_attributes(tools: ToolUsage) -> dict[str, AttributeValue | None]:
    return {
        names.TOOL_WEB_SEARCH_REQUESTS: tools.web_search_requests,
        names.TOOL_IMAGE_INPUT_TOKENS: tools.image_input_tokens,
        names.TOOL_IMAGE_OUTPUT_TOKENS: tools.image_output_tokens,
        **{names.TOOL_CALLS_BY_TYPE + kind: count for kind, count in tools.calls},
    }


def _usage_attributes(record: Record) -> dict[str, AttributeValue | None]:
    """The counts of tokens, if they are known. A fetch has none: they belong to the call it fetches."""
    usage = record.usage
    if usage is None or record.request.is_fetch:
        return {}
    return {
        names.USAGE_INPUT_TOKENS: usage.input_tokens,
        names.USAGE_OUTPUT_TOKENS: usage.output_tokens,
        # The conventions leave a detail of zero out.
        names.USAGE_CACHE_READ_INPUT_TOKENS: usage.cache_read_input_tokens or None,
        names.USAGE_CACHE_WRITE_INPUT_TOKENS: usage.cache_write_input_tokens or None,
        names.USAGE_REASONING_OUTPUT_TOKENS: usage.reasoning_output_tokens or None,
    }


def usage_span_attributes(record: Record) -> dict[str, AttributeValue | None]:
    """The attributes of a usage span. It has no operation name, so it is not counted as a call."""
    own = own_attributes(record)
    return {
        names.PROVIDER_NAME: record.request.server.provider,
        names.REQUEST_MODEL: record.request.model,
        names.RESPONSE_ID: record.response.id,
        names.RESPONSE_MODEL: record.response.model,
        names.OPENAI_RESPONSE_SERVICE_TIER: record.response.service_tier,
        **{name: own.get(name) for name in _USAGE_SPAN_NAMES},
        **(_tool_attributes(record.response.tools) if record.response.tools is not None else {}),
        **_usage_attributes(record),
    }


def without_none(attributes: Mapping[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    """Return the attributes that have a value."""
    return {name: value for name, value in attributes.items() if value is not None}


# Cached, since most calls of a process have the same values. Callers must copy the result.


@functools.lru_cache(maxsize=128)
def _fixed_attributes(
    operation: Operation, server: Server, model: str | None, streams: bool
) -> dict[str, AttributeValue]:
    is_fetch = operation is Operation.FETCH_RESPONSE  # which always streams
    return {
        **common_attributes(operation, server, model),
        **({names.REQUEST_STREAM: True} if streams and not is_fetch else {}),
        names.OPENAI_API_TYPE: _API_TYPE,
    }


@functools.lru_cache(maxsize=128)
def common_attributes(
    operation: Operation,
    server: Server,
    requested_model: str | None,
    model: str | None = None,
    service_tier: str | None = None,
    completion_window: str | None = None,
) -> dict[str, AttributeValue]:
    """Return what spans and points have in common, and what decides the price if it is given."""
    return without_none(
        {
            names.OPERATION_NAME: operation.value,
            names.PROVIDER_NAME: server.provider,
            names.REQUEST_MODEL: requested_model,
            names.RESPONSE_MODEL: model,
            names.SERVER_ADDRESS: server.address,
            names.SERVER_PORT: server.port,
            names.OPENAI_RESPONSE_SERVICE_TIER: service_tier,
            names.COMPLETION_WINDOW: completion_window,
        }
    )


@functools.lru_cache(maxsize=128)
def call_attributes(
    outcome: Outcome,
    provider: str,
    model: str | None,
    source: UsageSource | None,
    missing_reason: MissingReason | None,
) -> dict[str, AttributeValue]:
    return without_none(
        {
            names.STREAM_OUTCOME: outcome.value,
            names.PROVIDER_NAME: provider,
            names.REQUEST_MODEL: model,
            names.USAGE_SOURCE: source.value if source else None,
            names.USAGE_MISSING_REASON: missing_reason.value if missing_reason else None,
        }
    )


@functools.lru_cache(maxsize=128)
def model_attributes(provider: str, model: str | None) -> dict[str, AttributeValue]:
    """Return the attributes of the counters that tell providers and models apart, and nothing else."""
    return without_none({names.PROVIDER_NAME: provider, names.REQUEST_MODEL: model})

"""Names of attributes and metrics.

The GenAI names are constants here, not imports. The incubating modules rename and remove names in minor
releases. The names must not depend on the release that a service has installed.
"""

import os
from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple

# The one that OpenTelemetry's own GenAI instrumentations use.
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.37.0"

ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
NETWORK_PROTOCOL_NAME: Final = "network.protocol.name"
RESEND_COUNT: Final = "http.request.resend_count"

OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
CONVERSATION_COMPACTED: Final = "gen_ai.conversation.compacted"
PROMPT_NAME: Final = "gen_ai.prompt.name"
PROMPT_VERSION: Final = "gen_ai.prompt.version"
OUTPUT_TYPE: Final = "gen_ai.output.type"

REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_STREAM: Final = "gen_ai.request.stream"
REQUEST_STREAM_CURSOR: Final = "gen_ai.request.stream_cursor"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_REASONING_LEVEL: Final = "gen_ai.request.reasoning.level"
REQUEST_PREVIOUS_RESPONSE_ID: Final = "gen_ai.request.previous_response.id"

RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_STATUS: Final = "gen_ai.response.status"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"

USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
USAGE_CACHE_WRITE_INPUT_TOKENS: Final = "gen_ai.usage.cache_write.input_tokens"
USAGE_REASONING_OUTPUT_TOKENS: Final = "gen_ai.usage.reasoning.output_tokens"
TOKEN_TYPE: Final = "gen_ai.token.type"
TOKEN_MODALITY: Final = "gen_ai.token.modality"

OPENAI_API_TYPE: Final = "openai.api.type"
OPENAI_REQUEST_SERVICE_TIER: Final = "openai.request.service_tier"
OPENAI_RESPONSE_SERVICE_TIER: Final = "openai.response.service_tier"

STREAM_OUTCOME: Final = "openai_responses.stream.outcome"
STREAM_LANE: Final = "openai_responses.stream.lane"
STREAM_EVENTS: Final = "openai_responses.stream.events"
STREAM_DELTAS: Final = "openai_responses.stream.deltas"
STREAM_DELTAS_BY_TYPE: Final = "openai_responses.stream.deltas_by_type."
LAST_STATUS: Final = "openai_responses.response.status"
REQUEST_ID: Final = "openai_responses.request_id"
REQUEST_GENERATE: Final = "openai_responses.request.generate"
COMPLETION_WINDOW: Final = "openai_responses.request.completion_window"
CACHE_MISS_REASON: Final = "openai_responses.prompt_cache.miss_reason"
TOOL_CALLS_BY_TYPE: Final = "openai_responses.tool.calls."
TOOL_WEB_SEARCH_REQUESTS: Final = "openai_responses.tool.web_search.requests"
TOOL_IMAGE_INPUT_TOKENS: Final = "openai_responses.tool.image_generation.input_tokens"
TOOL_IMAGE_OUTPUT_TOKENS: Final = "openai_responses.tool.image_generation.output_tokens"
TOOL_TYPE: Final = "openai_responses.tool.type"
RATE_LIMIT_TYPE: Final = "openai_responses.rate_limit.type"
USAGE_SOURCE: Final = "openai_responses.usage.source"
INPUT_COUNT: Final = "openai_responses.usage.input_count"
USAGE_MISSING_REASON: Final = "openai_responses.usage.missing_reason"
RETRIEVAL_ATTEMPTS: Final = "openai_responses.retrieval.attempts"
RETRIEVAL_DURATION: Final = "openai_responses.retrieval.duration"
RETRIEVAL_RESULT: Final = "openai_responses.retrieval.result"

METRIC_CALLS: Final = "openai_responses.calls"
METRIC_LATE_USAGE: Final = "openai_responses.late_usage"
METRIC_TOOL_CALLS: Final = "openai_responses.tool.calls"
METRIC_WEB_SEARCH_REQUESTS: Final = "openai_responses.tool.web_search.requests"
METRIC_TOOL_TOKENS: Final = "openai_responses.tool.tokens"
METRIC_ON_CALL_LOSSES: Final = "openai_responses.on_call.losses"
ON_CALL_LOSS: Final = "openai_responses.on_call.loss"
METRIC_INPUT_COUNT: Final = "openai_responses.usage.input_count"
METRIC_RETRIES: Final = "openai_responses.retries"
METRIC_RATE_LIMIT_REMAINING: Final = "openai_responses.rate_limit.remaining"
METRIC_RATE_LIMIT_LIMIT: Final = "openai_responses.rate_limit.limit"
METRIC_RETRIEVAL_DURATION: Final = "openai_responses.retrieval.duration"
METRIC_PENDING: Final = "openai_responses.pending"
METRIC_OPEN_CIRCUITS: Final = "openai_responses.retrieval.open_circuits"
METRIC_FAULTS: Final = "openai_responses.faults"

# Bucket boundaries of the conventions.
DURATION_BUCKETS_S: Final = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
TOKEN_BUCKETS: Final = (
    1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864,
)  # fmt: skip


class TokenInstrument(Enum):
    """The kind of instrument for tokens: a counter for sums, a histogram for tokens per call."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"


class TokenMetric(NamedTuple):
    """A token metric: its name, the field of `Usage` that it records, and fixed attributes."""

    name: str
    instrument: TokenInstrument
    field: str
    attributes: Mapping[str, str]


class Generation(NamedTuple):
    """The metric names of one generation of the GenAI conventions."""

    duration: str
    fetch_duration: str
    time_to_first_chunk: str
    time_per_output_chunk: str
    tokens: tuple[TokenMetric, ...]


CURRENT: Final = Generation(
    duration="gen_ai.client.operation.duration",
    fetch_duration="gen_ai.client.operation.duration",
    time_to_first_chunk="gen_ai.client.operation.time_to_first_chunk",
    time_per_output_chunk="gen_ai.client.operation.time_per_output_chunk",
    tokens=tuple(
        TokenMetric(
            "gen_ai.client.token.usage", TokenInstrument.HISTOGRAM, f"{kind}_tokens", {TOKEN_TYPE: kind}
        )
        for kind in ("input", "output")
    ),
)
NEXT: Final = Generation(
    duration="gen_ai.client.inference.duration",
    fetch_duration="gen_ai.client.operation.duration",  # a fetch is no inference
    time_to_first_chunk="gen_ai.client.inference.time_to_first_chunk",
    time_per_output_chunk="gen_ai.client.inference.time_per_output_chunk",
    tokens=(
        *(
            # The API does not report the modality of tokens.
            TokenMetric(
                f"gen_ai.client.inference.usage.{name}",
                TokenInstrument.COUNTER,
                name.replace(".", "_"),
                {TOKEN_MODALITY: "unknown"},
            )
            for name in (
                "input_tokens",
                "output_tokens",
                "cache_read.input_tokens",
                "cache_write.input_tokens",
                "reasoning.output_tokens",
            )
        ),
        *(
            TokenMetric(f"gen_ai.client.inference.operation.{name}", TokenInstrument.HISTOGRAM, name, {})
            for name in ("input_tokens", "output_tokens")
        ),
    ),
)

_OPT_IN: Final = "OTEL_SEMCONV_STABILITY_OPT_IN"
_LATEST: Final = "gen_ai_latest_experimental"


def generations(environ: Mapping[str, str] = os.environ) -> tuple[Generation, ...]:
    """Return the generations of the conventions to record, by the opt-in environment variable."""
    values = {value.strip().lower() for value in environ.get(_OPT_IN, "").split(",")}
    if f"{_LATEST}/dup" in values:
        return CURRENT, NEXT
    return (NEXT,) if _LATEST in values else (CURRENT,)

"""Token usage as the API reported it, where it was read, and why it could not be."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, NamedTuple

_MAX_INT64: Final = 2**63 - 1


class UsageSource(str, Enum):
    """Where the usage of a call was read; the value of `openai_responses.usage.source`."""

    STREAM = "stream"
    RESPONSE = "response"
    RETRIEVAL = "retrieval"
    OBSERVATION = "observation"
    TAIL = "tail"


class MissingReason(str, Enum):
    """Why the usage of a call is not known; the value of `openai_responses.usage.missing_reason`."""

    NO_RESPONSE_ID = "no_response_id"
    NOT_STORED = "not_stored"
    NOT_FOUND = "not_found"
    UNAUTHORIZED = "unauthorized"
    UNSUPPORTED = "unsupported"
    NO_USAGE = "no_usage"
    TIMEOUT = "timeout"
    TRANSPORT_ERROR = "transport_error"
    OVERLOAD = "overload"
    CIRCUIT_OPEN = "circuit_open"
    DISABLED = "disabled"
    SHUTDOWN = "shutdown"


class Usage(NamedTuple):
    """The tokens the API reported for one response.

    A count that the API did not report is `None`; a reported zero stays zero. Nothing is estimated.

    Attributes:
        input_tokens: Tokens of the prompt, cached ones included.
        output_tokens: Tokens generated, reasoning included.
        cache_read_input_tokens: Input tokens served from the prompt cache.
        cache_write_input_tokens: Input tokens written to the prompt cache.
        reasoning_output_tokens: Output tokens spent on reasoning.

    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    reasoning_output_tokens: int | None = None

    @classmethod
    def from_response(cls, response: Mapping[str, Any]) -> Usage | None:
        """Read the `usage` of a response object as decoded from JSON; `None` where it reports no count."""
        usage = response.get("usage")
        if not isinstance(usage, dict):
            return None
        inputs = usage.get("input_tokens_details")
        outputs = usage.get("output_tokens_details")
        parsed = cls(
            input_tokens=_token_count(usage, "input_tokens"),
            output_tokens=_token_count(usage, "output_tokens"),
            cache_read_input_tokens=_token_count(inputs, "cached_tokens"),
            cache_write_input_tokens=_token_count(inputs, "cache_write_tokens"),
            reasoning_output_tokens=_token_count(outputs, "reasoning_tokens"),
        )
        # Without the two main counts there is nothing to bill: details alone are not usage.
        return None if parsed.input_tokens is None and parsed.output_tokens is None else parsed


def _token_count(counts: object, name: str) -> int | None:
    value = counts.get(name) if isinstance(counts, dict) else None
    # `True` is an int to Python, but no count; and what exceeds 64 bits no exporter can write.
    return value if type(value) is int and 0 <= value <= _MAX_INT64 else None

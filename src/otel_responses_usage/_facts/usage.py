"""Token usage as the API reported it, where it was read, and why it is missing."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, NamedTuple

MAX_COUNT: Final = 2**63 - 1  # exporters cannot write more than 64 bits


class UsageSource(str, Enum):
    """Where the usage of a call was read: the value of `openai_responses.usage.source`."""

    STREAM = "stream"
    RESPONSE = "response"
    RETRIEVAL = "retrieval"
    OBSERVATION = "observation"
    TAIL = "tail"


class MissingReason(str, Enum):
    """Why the usage of a call is unknown: the value of `openai_responses.usage.missing_reason`."""

    NO_RESPONSE_ID = "no_response_id"
    NOT_STORED = "not_stored"
    DEFERRED = "deferred"
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
    """The token counts that the API reported for one response.

    A count that the API did not report is `None`. A reported zero stays zero. Nothing is estimated.

    Attributes:
        input_tokens: Tokens of the prompt, including cached tokens.
        output_tokens: Generated tokens, including reasoning.
        cache_read_input_tokens: Input tokens that were read from the prompt cache.
        cache_write_input_tokens: Input tokens that were written to the prompt cache.
        reasoning_output_tokens: Output tokens that were used for reasoning.

    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    reasoning_output_tokens: int | None = None

    @classmethod
    def from_response(cls, response: Mapping[str, Any]) -> Usage | None:
        """Return the usage of a decoded response object, or `None` if it reports no counts."""
        usage = response.get("usage")
        if not isinstance(usage, dict):
            return None
        inputs = usage.get("input_tokens_details")
        outputs = usage.get("output_tokens_details")
        parsed = cls(
            input_tokens=reported_count(usage, "input_tokens"),
            output_tokens=reported_count(usage, "output_tokens"),
            cache_read_input_tokens=reported_count(inputs, "cached_tokens"),
            cache_write_input_tokens=reported_count(inputs, "cache_write_tokens"),
            reasoning_output_tokens=reported_count(outputs, "reasoning_tokens"),
        )
        # A usage needs at least one of the two main counts. Details alone are not enough to bill.
        return None if parsed.input_tokens is None and parsed.output_tokens is None else parsed


def reported_count(counts: object, name: str) -> int | None:
    """Return the count of this name in a decoded object, or `None` if it is missing or no whole number."""
    value = counts.get(name) if isinstance(counts, dict) else None
    # JSON does not distinguish 11 from 11.0. NaN, infinity and fractions are not whole numbers.
    if type(value) is float and value.is_integer():
        value = int(value)
    # `type` excludes `True`, which is an int in Python.
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None

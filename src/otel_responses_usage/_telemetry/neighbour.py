"""Another instrumentation that has a span of the same call, as the telemetry sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from opentelemetry.trace import Span, SpanContext

from .._facts.response import Response
from .._facts.usage import Usage
from .baggage import NO_BAGGAGE, CallBaggage


class Neighbour(Protocol):
    """Another instrumentation that has a span of the same call.

    Attributes:
        records_tokens: Whether it records `gen_ai.client.token.usage` itself.
        records_times: Whether it records the duration and the chunk times of the call itself.
        suppresses: Whether it makes the call under `suppress_instrumentation()`, for the sake of HTTP spans.

    """

    records_tokens: bool
    records_times: bool
    suppresses: bool

    @property
    def context(self) -> SpanContext:
        """The context of its span. If that cannot be seen, the context in which the call was made."""
        ...

    @property
    def can_be_added_to(self) -> bool:
        """Whether its span is open and recorded."""
        ...

    @property
    def has_usage(self) -> bool:
        """Whether it has written the usage of the call on its span."""
        ...

    def learn(self, usage: Usage, response: Response, *, is_error: bool) -> bool:
        """Have it write the usage of an answer that the application has received.

        Returns:
            Whether it does so.

        """
        ...

    def add(self, attributes: Mapping[str, Any], baggage: Mapping[str, str]) -> None:
        """Add attributes to its span. Those of the baggage do not replace any that it has."""
        ...

    def release(self) -> None:
        """Give its span back: the call was refused, and the next call may belong to the same span."""
        ...


class CallSpan(NamedTuple):
    """The span of a call.

    Attributes:
        span: The `chat` span. If there is none, a span that is not recorded: its context is that of the
            neighbour's span, or of the span in which the call was made.
        is_own: Whether it is our `chat` span.
        neighbour: Who else has a span of the call.
        baggage: Attributes that the application gave its caller's context.

    """

    span: Span
    is_own: bool = True
    neighbour: Neighbour | None = None
    baggage: CallBaggage = NO_BAGGAGE

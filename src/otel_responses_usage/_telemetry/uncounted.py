"""A call that ended without usage, as it is kept until its response is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from opentelemetry.trace import Span

from .._facts.request import Operation, Server
from .._facts.tools import ToolUsage
from .._facts.usage import MissingReason


class UncountedCall(NamedTuple):
    """What is kept of a call that ended without usage, in case that the usage becomes known later.

    Attributes:
        operation: The kind of call.
        server: The server that it was sent to.
        model: The model that was asked for.
        completion_window: The completion window that was asked for.
        missing_reason: Why the usage was not known when the call was recorded.
        span: A span that is not recorded, with the context of the span of the call.
        labels: Attributes of its metric points that come from baggage.
        tools: The use of hosted tools that was recorded already; `None` if there was none.

    """

    operation: Operation
    server: Server
    model: str | None
    completion_window: str | None
    missing_reason: MissingReason
    span: Span
    labels: Mapping[str, str]
    tools: ToolUsage | None

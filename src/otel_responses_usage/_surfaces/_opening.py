"""Opens calls: says whether a call is recorded, and who else has a span of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from opentelemetry import context, trace
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import SpanContext

from .._call.invocation import Invocation
from .._call.ledger import Ledger
from .._config import Spans
from .._facts.request import Operation, ResponsesRequest
from ._neighbours import FoundNeighbour, Neighbours
from ._scope import RequestScope

# The members of an `Enum` are looked up slowly.
_CHAT: Final = Operation.CHAT


class CallOpener:
    """Opens the calls that the application has not suppressed, each beside its neighbour if it has one."""

    def __init__(self, ledger: Ledger, spans: Spans) -> None:
        self._ledger = ledger
        self._looks_for_neighbours = spans != "always"
        self._neighbours = Neighbours()

    def open(
        self,
        request: ResponsesRequest,
        parameters: Mapping[str, Any],
        headers: object,
        scope: RequestScope,
        start_ns: int | None,
        link: SpanContext | None = None,
    ) -> Invocation | None:
        """Open a call in this scope, unless it is suppressed by the application or not recorded.

        Args:
            request: What is known of the call.
            parameters: All its parameters, with their content.
            headers: The headers that the SDK was given for it.
            scope: The scope of its HTTP request.
            start_ns: When it began, in nanoseconds of the wall clock; now by default.
            link: The context of the span of a call that led to this one.

        """
        here = context.get_current()
        is_enabled = not here or is_instrumentation_enabled()
        # What another package suppresses inside of its own `request` is not what the application suppresses.
        is_suppressed = not is_enabled and not scope.is_entered_enabled
        neighbour = None
        if (self._looks_for_neighbours or is_suppressed) and request.operation is _CHAT:
            neighbour = self._neighbours.find(here, request, headers)
        if neighbour is None and is_enabled:
            return self._ledger.open(request, None, start_ns, link, parameters)
        invocation = None
        if not is_suppressed or (neighbour is not None and neighbour.suppresses):
            neighbour_or_none = neighbour if self._looks_for_neighbours else None
            invocation = self._open_enabled(
                request, parameters, neighbour_or_none, start_ns, link, is_enabled
            )
        if invocation is None and neighbour is not None:
            neighbour.release()
        return invocation

    def _open_enabled(
        self,
        request: ResponsesRequest,
        parameters: Mapping[str, Any],
        neighbour: FoundNeighbour | None,
        start_ns: int | None,
        link: SpanContext | None,
        is_enabled: bool,
    ) -> Invocation | None:
        """Open a call. Some tracers make no span while instrumentation is suppressed, so here it is not."""
        if is_enabled:
            return self._ledger.open(request, neighbour, start_ns, link, parameters)
        token = context.attach(_without_suppression())
        try:
            return self._ledger.open(request, neighbour, start_ns, link, parameters)
        finally:
            context.detach(token)


def _without_suppression() -> context.Context:
    """Return a context that has nothing but the current span and the current baggage."""
    from opentelemetry import baggage  # only beside some neighbours

    here = trace.set_span_in_context(trace.get_current_span(), context.Context())
    for name, value in baggage.get_all().items():
        here = baggage.set_baggage(name, value, here)
    return here

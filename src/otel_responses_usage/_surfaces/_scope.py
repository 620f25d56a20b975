"""The scope in which the SDK makes a request: which call an HTTP response belongs to."""

from __future__ import annotations

import time
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context, trace
from opentelemetry.instrumentation.utils import is_instrumentation_enabled

from .._call.invocation import Invocation

if TYPE_CHECKING:
    from typing_extensions import Self


class RequestScope:
    """The scope in which the SDK makes a request. An HTTP response in this context belongs to its call.

    Scopes can be nested: a callback of the application may make requests, too, even requests without a span.

    Attributes:
        invocation: The call; `None` if it is not recorded.
        waits_for_call: Whether an answer in this scope belongs to a call that is not known yet.
        is_entered_enabled: Whether the application had not suppressed instrumentation when it made the call,
            as far as that is known.

    """

    __slots__ = ("_outer", "_token", "invocation", "is_entered_enabled", "waits_for_call")

    def __init__(self, invocation: Invocation | None) -> None:
        self.invocation = invocation
        self.waits_for_call = False
        self.is_entered_enabled = False
        self._token: Any = None

    def take_start_ns(self) -> int | None:
        """Return when the call began, if it began before its scope."""
        return None

    def __enter__(self) -> Self:
        self._outer = current_scope.get()
        current_scope.set(self)
        if self.invocation is not None and self.invocation.call_span.is_own:
            self._token = context.attach(trace.set_span_in_context(self.invocation.call_span.span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The garbage collector may close an unfinished coroutine at any point: in a foreign context, during
        # another call, or while a thread holds the lock that `span.end()` needs.
        if current_scope.get() is self:
            current_scope.set(self._outer)
            if self._token is not None:
                context.detach(self._token)
        invocation = self.invocation
        if invocation is None:
            return
        if isinstance(error, GeneratorExit):
            invocation.on_garbage_collected()
        elif error is not None:
            invocation.on_raise(error)
        else:
            invocation.on_return()


class OuterScope(RequestScope):
    """The scope of a `request` of another package, before the SDK's own `request` runs."""

    __slots__ = ("_start_ns",)

    def __init__(self) -> None:
        super().__init__(None)
        self.waits_for_call = True
        self.is_entered_enabled = is_instrumentation_enabled()
        self._start_ns = time.time_ns()

    def take_start_ns(self) -> int | None:
        """Return when the call began, and note that it is known now."""
        if not self.waits_for_call:
            return None
        self.waits_for_call = False
        # Several packages may stand one before the other.
        return self._outer.take_start_ns() or self._start_ns


# The scope of what is not part of any call.
NO_SCOPE: Final = RequestScope(None)
NO_SCOPE.waits_for_call = True
current_scope: Final[ContextVar[RequestScope]] = ContextVar(
    "otel_responses_usage.request_scope", default=NO_SCOPE
)

"""Keeps all open calls. Each call is added once and removed once."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import SpanContext

from .._config import Config
from .._facts.request import ResponsesRequest
from .._lookup.recovery import Recovery
from .._telemetry.neighbour import Neighbour
from .._telemetry.telemetry import Telemetry
from .hooks import NO_HOOKS, Hooks
from .invocation import Invocation
from .observation import Observation
from .services import Services

if TYPE_CHECKING:
    from .._call_record import CallRecord
    from .delivery import Delivery

# Higher priorities run first. An application may flush its exporters at exit; `close` must run before.
_EXIT_PRIORITY: Final = 1000
_NO_PARAMETERS: Final[Mapping[str, Any]] = {}
# The part of `Config.exit_timeout` that is kept for `Config.on_call`. Look-ups may take the rest.
_DELIVERY_SHARE: Final = 0.1


class Ledger:
    """Opens calls, and ends the open ones when the process or the instrumentation ends.

    Attributes:
        observation: Takes usage from responses that the application itself fetches.

    """

    def __init__(
        self, config: Config, telemetry: Telemetry, recovery: Recovery, hooks: Hooks = NO_HOOKS
    ) -> None:
        self._config = config
        self._hooks = hooks
        self._delivery = None if config.on_call is None else _make_delivery(config.on_call, telemetry)
        self._makes_chat_spans = config.spans != "never"
        self._telemetry = telemetry
        self._recovery = recovery
        self.observation = Observation(recovery, telemetry)
        self._services = Services(config, telemetry, recovery, self._delivery, self.observation, self._remove)
        self._open: dict[Invocation, None] = {}
        self._callbacks_before_next_call: list[Callable[[], object]] = []
        self._closed = False
        self._is_registered_at_exit = False
        if hasattr(os, "register_at_fork"):
            ledger_ref = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _reset_after_fork(ledger_ref()))

    @property
    def accepts_calls(self) -> bool:
        """Whether calls are recorded: an OpenTelemetry SDK is set, or the application is told of calls."""
        return not self._closed and (self._delivery is not None or self._telemetry.has_sdk)

    def open(
        self,
        request: ResponsesRequest,
        neighbour: Neighbour | None = None,
        start_ns: int | None = None,
        link: SpanContext | None = None,
        parameters: Mapping[str, Any] = _NO_PARAMETERS,
    ) -> Invocation | None:
        """Start a call. Returns `None` if it would not be recorded, or if the ledger is closed.

        Args:
            request: The parameters of the call.
            neighbour: Who else has a span of this call.
            start_ns: When it began, in nanoseconds of the wall clock; now by default.
            link: The context of the span of a call that led to this one.
            parameters: All parameters of the call, with their content.

        """
        hooks = self._hooks
        if self._closed:
            return None
        # A call that led to this one has been accepted already.
        if hooks.excludes is not None and link is None and not hooks.accepts(parameters):
            return None
        while self._callbacks_before_next_call:
            with contextlib.suppress(IndexError):  # another thread may take the last one
                self._callbacks_before_next_call.pop()()
        start_ns = start_ns or time.time_ns()
        has_span = self._makes_chat_spans or request.is_fetch
        call_span = self._telemetry.start(request, start_ns, neighbour, has_span=has_span, link=link)
        if self._delivery is None and not self._telemetry.is_recorded(call_span):
            return None
        if hooks.on_request is not None:
            hooks.begin(call_span.span, parameters)
        invocation = Invocation(request, call_span, start_ns, self._services)
        self._open[invocation] = None
        if not self._is_registered_at_exit:
            # Register at the first span, not earlier. The functions run in reverse order, and by now the
            # provider has registered its own shutdown. So `close` runs before the shutdown.
            self._is_registered_at_exit = True
            atexit.register(self._close_at_exit)
            _close_at_exit_of_child(self._close_at_exit)
        return invocation

    def drain(self) -> None:
        """End all open calls, then wait for the pending look-ups, up to `Config.exit_timeout`."""
        for invocation in list(self._open):
            invocation.on_exit()
        timeout_s = self._config.exit_timeout
        if self._delivery is None:
            self._recovery.drain(timeout_s)
            return
        began_s = time.monotonic()
        self._recovery.drain(timeout_s * (1 - _DELIVERY_SHARE))
        self._delivery.drain(max(0.0, timeout_s - (time.monotonic() - began_s)), is_exit=True)

    def flush(self, timeout_s: float) -> bool:
        """Wait for all pending look-ups, at most so long, and return whether none is left."""
        began_s = time.monotonic()
        is_done = self._recovery.flush(timeout_s, includes_background=True)
        if self._delivery is None:
            return is_done
        return self._delivery.drain(max(0.0, timeout_s - (time.monotonic() - began_s))) and is_done

    def flush_before_export(self, timeout_s: float | None) -> None:
        """Wait for pending look-ups, except those of background responses.

        Args:
            timeout_s: The application's own timeout. The wait is limited by `Config.flush_timeout`, too.

        """
        limit_s = self._config.flush_timeout
        timeout_s = limit_s if timeout_s is None else min(limit_s, timeout_s)
        self._recovery.flush(timeout_s, includes_background=False)

    def close(self) -> None:
        """Refuse all further calls, then do the same as `drain`."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        began_s, left_s = time.monotonic(), 0.0
        try:
            self.drain()
            left_s = max(0.0, self._config.exit_timeout - (time.monotonic() - began_s))
        finally:  # also if Ctrl-C ends the wait
            self._recovery.stop(0.0)
            if self._delivery is not None:
                self._delivery.drain(left_s, is_exit=True)
                self._delivery.give_up()

    def _close_at_exit(self) -> None:
        # Ctrl-C ends the wait for the look-ups. At exit no code can handle it, and Python would print it.
        with contextlib.suppress(KeyboardInterrupt):
            self.close()

    def reset_after_fork(self) -> None:
        """Forget the open calls in a forked child: the parent process ends them."""
        for invocation in self._open:
            invocation.discard()
        self._open = {}
        self._is_registered_at_exit = False
        self.observation.clear()
        self._telemetry.begin_anew()
        if self._delivery is not None:
            self._delivery.begin_anew()
        # The child inherits the metric values of the parent. The first call of the child corrects them,
        # because little code is safe directly after a fork.
        self._callbacks_before_next_call += self._recovery.begin_anew()

    def _remove(self, invocation: Invocation) -> None:
        self._open.pop(invocation, None)


def _make_delivery(on_call: Callable[[CallRecord], object], telemetry: Telemetry) -> Delivery:
    from .delivery import Delivery  # most applications have no `on_call`, and need not wait for this import

    return Delivery(on_call, lambda loss: telemetry.count_on_call_loss(loss.value))


def _close_at_exit_of_child(close: Callable[[], None]) -> None:
    """Call `close` when a child process of `multiprocessing` ends.

    Most Python versions do not run `atexit` there.
    """
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, close, exitpriority=_EXIT_PRIORITY)


def _reset_after_fork(ledger: Ledger | None) -> None:
    if ledger is not None:
        ledger.reset_after_fork()

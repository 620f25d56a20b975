"""The calls that are open: each is entered once and leaves once."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Final

from opentelemetry.trace import INVALID_SPAN

from .._config import Config
from .._facts.request import ResponsesRequest, Server
from .._facts.response import Response
from .._lookup.recovery import Recovery
from .._telemetry.telemetry import Telemetry
from .invocation import Invocation, Services

# Before what an application has registered for the same moment, such as a flush.
_EXIT_PRIORITY: Final = 1000


class Ledger:
    """Opens calls, and closes what is left when the process or the instrumentation ends."""

    def __init__(self, config: Config, telemetry: Telemetry, recovery: Recovery) -> None:
        self._config = config
        self._telemetry = telemetry
        self._recovery = recovery
        self._services = Services(config, telemetry, recovery, self._remove)
        self._open: dict[Invocation, None] = {}
        self._callbacks_before_next_call: list[Callable[[], object]] = []
        self._closed = False
        self._is_registered_at_exit = False
        if hasattr(os, "register_at_fork"):
            ledger_ref = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _reset_after_fork(ledger_ref()))

    @property
    def accepts_calls(self) -> bool:
        """Whether calls are worth describing: they are taken, and there is somebody who may listen."""
        return not self._closed and self._telemetry.has_sdk

    def open(self, request: ResponsesRequest) -> Invocation | None:
        """Begin a call; `None` where nobody listens, and once the ledger is closed."""
        if self._closed:
            return None
        while self._callbacks_before_next_call:
            with contextlib.suppress(IndexError):  # of two threads one finds it empty
                self._callbacks_before_next_call.pop()()
        start_ns = time.time_ns()
        span = self._telemetry.start(request, start_ns)
        if not self._telemetry.is_recorded(span):
            return None
        invocation = Invocation(request, span, start_ns, self._services)
        self._open[invocation] = None
        if not self._is_registered_at_exit:
            # Not before the first span: the provider that made it has registered its own shutdown by
            # now, and what is registered last runs first.
            self._is_registered_at_exit = True
            atexit.register(self.close)
            _close_at_exit_of_child(self.close)
        return invocation

    @property
    def has_pending(self) -> bool:
        """Whether any ended call waits for its usage."""
        return self._recovery.is_waiting

    def is_pending(self, server: Server, response_id: str) -> bool:
        """Whether an ended call waits for the usage of this response of this server."""
        return self._recovery.awaits(server, response_id)

    def observe(self, server: Server, response: Response) -> None:
        """Use what the application itself has learned of a response that a call waits for."""
        self._recovery.observe(server, response)

    def drain(self) -> None:
        """End every open call, and wait for the pending look-ups as long as the settings allow."""
        for invocation in list(self._open):
            invocation.on_exit()
        self._recovery.drain(self._config.exit_timeout)

    def close(self) -> None:
        """Settle, and take no call any more."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self.drain()
        self._recovery.stop(0.0)

    def reset_after_fork(self) -> None:
        """Leave to the parent process what it had under way when this one was forked."""
        for invocation in self._open:
            invocation.discard()
        self._open = {}
        self._is_registered_at_exit = False
        # The metrics have come along with the parent's values. They are put right by the first call: just
        # after a fork, whatever an application does is risky.
        pending_spans, forget_circuits = self._recovery.begin_anew()
        if pending_spans:
            self._callbacks_before_next_call.append(
                partial(self._telemetry.add_pending, INVALID_SPAN, -pending_spans)
            )
        self._callbacks_before_next_call.append(forget_circuits)

    def _remove(self, invocation: Invocation) -> None:
        self._open.pop(invocation, None)


def _close_at_exit_of_child(close: Callable[[], None]) -> None:
    """Have `close` called when a child of `multiprocessing` ends: most Pythons run no `atexit` there."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, close, exitpriority=_EXIT_PRIORITY)


def _reset_after_fork(ledger: Ledger | None) -> None:
    if ledger is not None:
        ledger.reset_after_fork()

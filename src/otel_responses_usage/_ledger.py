"""The calls that are open: each is entered once and leaves once."""

from __future__ import annotations

import atexit

from ._config import Config
from ._invocation import Invocation
from ._outcome import EXIT
from ._recovery import Recovery
from ._request import ResponsesRequest
from ._telemetry import Telemetry


class Ledger:
    """Opens calls, and closes what is left when the process or the instrumentation ends."""

    def __init__(self, config: Config, telemetry: Telemetry, recovery: Recovery) -> None:
        self._config = config
        self._telemetry = telemetry
        self._recovery = recovery
        self._open: dict[Invocation, None] = {}
        self._closed = False
        self._closes_at_exit = False

    def open(self, request: ResponsesRequest) -> Invocation | None:
        """Begin a call; `None` once the ledger is closed."""
        if self._closed:
            return None
        invocation = Invocation(request, self._config, self._telemetry, self._recovery, self._strike)
        self._open[invocation] = None
        if not self._closes_at_exit:
            # Not before the first span: the provider that made it has registered its own shutdown by
            # now, and what is registered last runs first.
            self._closes_at_exit = True
            atexit.register(self.close)
        return invocation

    def close(self) -> None:
        """End every open call, and wait for the pending look-ups as long as the settings allow."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for invocation in list(self._open):
            invocation.finish(EXIT)
        self._recovery.stop(self._config.exit_timeout)

    def _strike(self, invocation: Invocation) -> None:
        self._open.pop(invocation, None)

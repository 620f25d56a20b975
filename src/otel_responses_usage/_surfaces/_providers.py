"""The SDK's providers, which export nothing any more once they are shut down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opentelemetry import metrics, trace

from .. import _fault
from .._call.ledger import Ledger


class ProviderSurface:
    """Settles what is under way before the application shuts a provider down."""

    def __init__(self, ledger: Ledger, tracer_provider: Any, meter_provider: Any) -> None:
        self._ledger = ledger
        self._tracer_provider = tracer_provider
        self._meter_provider = meter_provider

    def shutdown(self, wrapped: Callable[..., Any], provider: Any, args: Any, kwargs: Any) -> Any:
        """End open spans and wait for pending ones, then let the provider shut down."""
        try:
            if provider in (
                self._tracer_provider or trace.get_tracer_provider(),
                self._meter_provider or metrics.get_meter_provider(),
            ):
                self._ledger.drain()
        except Exception:
            _fault.report("settling before a shutdown")
        return wrapped(*args, **kwargs)

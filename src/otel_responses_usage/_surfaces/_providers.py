"""Wraps the shutdown of the OpenTelemetry providers. They export nothing after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opentelemetry import metrics, trace

from .. import _fault
from .._call.ledger import Ledger


class ProviderSurface:
    """Ends the open calls before the application shuts a provider down."""

    def __init__(self, ledger: Ledger, tracer_provider: Any, meter_provider: Any) -> None:
        self._ledger = ledger
        self._tracer_provider = tracer_provider
        self._meter_provider = meter_provider

    def shutdown(self, wrapped: Callable[..., Any], provider: Any, args: Any, kwargs: Any) -> Any:
        """End the open calls and wait for pending look-ups, then shut the provider down."""
        try:
            if provider in (
                self._tracer_provider or trace.get_tracer_provider(),
                self._meter_provider or metrics.get_meter_provider(),
            ):
                self._ledger.drain()
        except Exception:
            _fault.report("settling before a shutdown")
        return wrapped(*args, **kwargs)

"""Wraps the shutdown and the flush of the OpenTelemetry providers that get our spans and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from opentelemetry import metrics, trace

from .. import _fault
from .._call.ledger import Ledger

# A part of a provider that its tracers, or its meters, share with it: its name there, and its name here.
_SHARED_PARTS: Final = (
    ("span_processor", "_active_span_processor"),
    ("_measurement_consumer", "_measurement_consumer"),
)
_MAX_WRAPPERS: Final = 8


class ProviderSurface:
    """Waits for usage before the application shuts down or flushes a provider that gets it."""

    def __init__(self, ledger: Ledger, tracer: trace.Tracer, meter: metrics.Meter) -> None:
        self._ledger = ledger
        self._sources = (tracer, meter)

    def shutdown(self, wrapped: Callable[..., Any], provider: Any, args: Any, kwargs: Any) -> Any:
        """End the open calls and wait for pending look-ups, then shut the provider down."""
        try:
            if self._reports_to(provider):
                self._ledger.drain()
        except Exception:
            _fault.report("settling before a shutdown")
        return wrapped(*args, **kwargs)

    def force_flush(self, wrapped: Callable[..., Any], provider: Any, args: Any, kwargs: Any) -> Any:
        """Wait for pending look-ups, then flush the provider in the time that is left."""
        try:
            if self._reports_to(provider):
                timeout_ms = args[0] if args else kwargs.get("timeout_millis")
                began = time.monotonic()
                self._ledger.flush_before_export(None if timeout_ms is None else timeout_ms / 1000)
                if timeout_ms is not None:
                    left_ms = max(0, timeout_ms - int(1000 * (time.monotonic() - began)))
                    args, kwargs = (), {**kwargs, "timeout_millis": left_ms}
        except Exception:
            _fault.report("waiting before a flush")
        return wrapped(*args, **kwargs)

    def _reports_to(self, provider: Any) -> bool:
        """Whether our spans or points go to this provider.

        The application may have given us another object than the provider: Logfire and others wrap it. So
        what a provider shares with its tracers and meters is compared.
        """
        for name, name_at_provider in _SHARED_PARTS:
            part = getattr(provider, name_at_provider, None)
            if part is not None and any(_holds(source, name, part) for source in self._sources):
                return True
        return False


def _holds(source: Any, name: str, part: object) -> bool:
    """Whether a tracer or a meter, or one that it wraps, has this part."""
    found, remaining = [source], _MAX_WRAPPERS
    while found and remaining:
        remaining -= 1
        candidate = found.pop()
        held = getattr(candidate, "__dict__", {})
        if held.get(name) is part:
            return True
        found += [value for value in held.values() if isinstance(value, (trace.Tracer, metrics.Meter))]
    return False

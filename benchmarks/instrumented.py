"""The instrumentation, switched on for as long as a measurement takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from otel_responses_usage import Config, ResponsesUsageInstrumentor

__all__ = ["Config", "ResponsesUsageInstrumentor", "instrumented"]


@contextlib.contextmanager
def instrumented(config: Config | None = None, **providers: Any) -> Iterator[None]:
    """Switch the instrumentation on, with these providers."""
    instrumentor = ResponsesUsageInstrumentor()
    instrumentor.instrument(config=config or Config(exit_timeout=0.0), **providers)
    try:
        yield
    finally:
        instrumentor.uninstrument()

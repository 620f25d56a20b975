"""Exact token usage of streamed OpenAI Responses calls, as OpenTelemetry spans and metrics."""

from typing import TYPE_CHECKING

from ._config import Config
from ._facts.outcome import Outcome
from ._facts.usage import MissingReason, Usage, UsageSource
from ._instrumentor import ResponsesUsageInstrumentor
from ._version import __version__

if TYPE_CHECKING:
    from ._call_record import CallRecord

__all__ = [
    "CallRecord",
    "Config",
    "MissingReason",
    "Outcome",
    "ResponsesUsageInstrumentor",
    "Usage",
    "UsageSource",
    "__version__",
]


if not TYPE_CHECKING:  # a type checker would take every name for one of this module

    def __getattr__(name: str) -> object:
        """Import `CallRecord` when it is asked for. The import takes 2 ms, and few applications need it."""
        if name != "CallRecord":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from ._call_record import CallRecord

        return CallRecord


def __dir__() -> list[str]:
    return sorted(__all__)

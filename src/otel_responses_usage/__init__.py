"""Exact token usage of streamed OpenAI Responses calls, as OpenTelemetry spans and metrics."""

from ._call_record import CallRecord
from ._config import Config
from ._facts.outcome import Outcome
from ._facts.usage import MissingReason, Usage, UsageSource
from ._instrumentor import ResponsesUsageInstrumentor
from ._version import __version__

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

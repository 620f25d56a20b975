"""Exact token usage of streamed OpenAI Responses calls, as OpenTelemetry spans and metrics."""

from ._config import Config
from ._instrumentor import ResponsesUsageInstrumentor
from ._outcome import Outcome
from ._usage import MissingReason, Usage, UsageSource

__all__ = ["Config", "MissingReason", "Outcome", "ResponsesUsageInstrumentor", "Usage", "UsageSource"]

"""Where other packages are touched: the openai SDK, its HTTP libraries, the OpenTelemetry SDK."""

from ._patches import Applied, Patch, patches
from ._retrieve import HttpRetriever

__all__ = ["Applied", "HttpRetriever", "Patch", "patches"]

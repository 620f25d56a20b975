"""All code that touches other packages: the openai SDK, its HTTP libraries, the OpenTelemetry SDK."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lookup.imports import late_import
from ._patches import Patches

if TYPE_CHECKING:
    from .._lookup.worker import Pace
    from ._retrieve import HttpRetriever

__all__ = ["Patches", "make_retriever"]


def make_retriever(pace: Pace) -> HttpRetriever:
    """Return a client for look-up requests. The first call imports the module for it."""
    with late_import:
        from ._retrieve import HttpRetriever
    return HttpRetriever(pace)

"""The table of everything that is replaced in other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._ledger import Ledger
from ._http import HttpSurface
from ._providers import ProviderSurface


@dataclass(frozen=True, slots=True)
class Patch:
    """One replaced function: the module, its name there, and the wrapper."""

    module: str
    name: str
    wrapper: Callable[..., Any]


def patches(ledger: Ledger, tracer_provider: Any, meter_provider: Any) -> tuple[Patch, ...]:
    """Return the patches that write into this ledger; the providers are those it reports to."""
    http = HttpSurface(ledger)
    providers = ProviderSurface(ledger, tracer_provider, meter_provider)
    client = "openai._base_client"
    return (
        Patch(client, "SyncAPIClient.request", http.request),
        Patch(client, "SyncAPIClient._process_response", http.process_response),
        Patch(client, "AsyncAPIClient.request", http.async_request),
        Patch(client, "AsyncAPIClient._process_response", http.process_response),
        Patch("opentelemetry.sdk.trace", "TracerProvider.shutdown", providers.shutdown),
        Patch("opentelemetry.sdk.metrics", "MeterProvider.shutdown", providers.shutdown),
    )

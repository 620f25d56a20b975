"""All functions that are replaced in other packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import wrapt
from opentelemetry import metrics, trace

from .._call.ledger import Ledger
from ._http import HttpSurface
from ._providers import ProviderSurface

# In wrapt 2, neither class is a subclass of the other.
_PROXIES: Final[Any] = (wrapt.ObjectProxy, wrapt.FunctionWrapper)


# A function to replace: the module, its name in the module, and the wrapper.
Replacement: TypeAlias = tuple[str, str, Callable[..., Any]]


class Patch:
    """A wrapper around a function of another package."""

    def __init__(self, module: str, name: str, wrapper: Callable[..., Any]) -> None:
        """Wrap the function. The module must be imported.

        Raises:
            AttributeError: There is no such function.

        """
        self._owner, self._attribute, _ = wrapt.resolve_path(module, name)
        self._proxy = wrapt.wrap_function_wrapper(module, name, wrapper)

    def remove(self) -> None:
        """Remove the wrapper. Wrappers that others have added since stay in place."""
        outer = vars(self._owner).get(self._attribute)
        if outer is self._proxy:
            setattr(self._owner, self._attribute, self._proxy.__wrapped__)
            return
        while isinstance(outer, _PROXIES):
            if outer.__wrapped__ is self._proxy:
                outer.__wrapped__ = self._proxy.__wrapped__
                return
            outer = outer.__wrapped__
        # A wrapper of another kind cannot be changed. Below it this wrapper stays, and does nothing.


def replacements(ledger: Ledger, tracer: trace.Tracer, meter: metrics.Meter) -> tuple[Replacement, ...]:
    """Return the functions to replace. The tracer and the meter are those that the ledger reports to."""
    http = HttpSurface(ledger)
    providers = ProviderSurface(ledger, tracer, meter)
    client = "openai._base_client"
    return (
        (client, "SyncAPIClient.request", http.request),
        (client, "SyncAPIClient._process_response", http.process_response),
        (client, "AsyncAPIClient.request", http.async_request),
        (client, "AsyncAPIClient._process_response", http.process_response),
        ("opentelemetry.sdk.trace", "TracerProvider.shutdown", providers.shutdown),
        ("opentelemetry.sdk.trace", "TracerProvider.force_flush", providers.force_flush),
        ("opentelemetry.sdk.metrics", "MeterProvider.shutdown", providers.shutdown),
        ("opentelemetry.sdk.metrics", "MeterProvider.force_flush", providers.force_flush),
    )

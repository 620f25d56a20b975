"""The table of everything that is replaced in other packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import wrapt

from .._ledger import Ledger
from ._http import HttpSurface
from ._providers import ProviderSurface

# Of wrapt 2 the one is no subclass of the other.
_PROXIES: Final[Any] = (wrapt.ObjectProxy, wrapt.FunctionWrapper)


class Patch(NamedTuple):
    """One replaced function: the module, its name there, and the wrapper."""

    module: str
    name: str
    wrapper: Callable[..., Any]

    def apply(self) -> Applied:
        """Replace the function. The module has been imported.

        Raises:
            AttributeError: It is not there.

        """
        owner, attribute, _ = wrapt.resolve_path(self.module, self.name)
        return Applied(owner, attribute, wrapt.wrap_function_wrapper(self.module, self.name, self.wrapper))


class Applied(NamedTuple):
    """A patch in place: the class, the attribute, and what stands there now."""

    owner: Any
    attribute: str
    proxy: Any

    def remove(self) -> None:
        """Take the wrapper out, and leave in place what others have wrapped around it since."""
        outer = vars(self.owner).get(self.attribute)
        if outer is self.proxy:
            setattr(self.owner, self.attribute, self.proxy.__wrapped__)
            return
        while isinstance(outer, _PROXIES):
            if outer.__wrapped__ is self.proxy:
                outer.__wrapped__ = self.proxy.__wrapped__
                return
            outer = outer.__wrapped__
        # Below a wrapper of another kind ours stays; without its ledger it does nothing.


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

"""All functions that are replaced in other packages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from opentelemetry import metrics, trace

from .._call.ledger import Ledger
from .._config import Spans
from ._http import HttpSurface
from ._patch import Patch
from ._providers import ProviderSurface

_CLIENT: Final = "openai._base_client"

# A function to replace: the module, its name in the module, and the wrapper.
_Replacement: TypeAlias = tuple[str, str, Callable[..., Any]]

_logger = logging.getLogger("otel_responses_usage")


class Patches:
    """The functions to replace in other packages, and those that have been replaced.

    Attributes:
        modules: The modules of the functions.

    """

    def __init__(self, ledger: Ledger, tracer: trace.Tracer, meter: metrics.Meter, spans: Spans) -> None:
        """Replace nothing yet. The tracer and the meter are those that the ledger reports to."""
        http = HttpSurface(ledger, spans)
        providers = ProviderSurface(ledger, tracer, meter)
        self._classes = http.classes
        self._replacements: tuple[_Replacement, ...] = (
            (_CLIENT, "SyncAPIClient.request", http.request),
            (_CLIENT, "SyncAPIClient._process_response", http.process_response),
            (_CLIENT, "AsyncAPIClient.request", http.async_request),
            (_CLIENT, "AsyncAPIClient._process_response", http.process_response),
            (_CLIENT, "BaseClient._make_status_error_from_response", http.make_status_error),
            (_CLIENT, "BaseClient._calculate_retry_timeout", http.calculate_retry_timeout),
            (_CLIENT, "BaseClient.__init__", http.classes.client_made),
            ("openai._exceptions", "APIConnectionError.__init__", http.connection_error_made),
            ("opentelemetry.sdk.trace", "TracerProvider.shutdown", providers.shutdown),
            ("opentelemetry.sdk.trace", "TracerProvider.force_flush", providers.force_flush),
            ("opentelemetry.sdk.metrics", "MeterProvider.shutdown", providers.shutdown),
            ("opentelemetry.sdk.metrics", "MeterProvider.force_flush", providers.force_flush),
        )
        self.modules = tuple({module: None for module, _, _ in self._replacements})
        self._made: list[Patch] = []

    def apply(self, module_name: str) -> None:
        """Replace the functions of this module, which has been imported."""
        for module, name, wrapper in self._replacements:
            if module == module_name:
                try:
                    self._made.append(Patch.of_module(module, name, wrapper))
                except AttributeError:
                    _logger.warning("%s.%s is not there and is not instrumented.", module, name)
        if module_name == _CLIENT:
            self._classes.cover_module(sys.modules[_CLIENT])

    def remove(self) -> None:
        """Put all functions back."""
        while self._made:
            self._made.pop().remove()
        self._classes.remove()

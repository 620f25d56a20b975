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
from ._opening import CallOpener
from ._patch import Patch
from ._providers import ProviderSurface
from ._websocket import WebSocketSurface

_CLIENT: Final = "openai._base_client"

# A function to replace: the module, its name in the module, and the wrapper.
_Replacement: TypeAlias = tuple[str, str, Callable[..., Any]]

# Modules that have the functions to replace only if they have this one: older releases have no WebSocket.
_FEATURES: Final = {
    "openai.resources.responses.responses": "Responses.connect",
    "openai.resources.beta.responses.responses": "Responses.connect",
}

_logger = logging.getLogger("otel_responses_usage")


class Patches:
    """The functions to replace in other packages, and those that have been replaced.

    Attributes:
        modules: The modules of the functions.

    """

    def __init__(self, ledger: Ledger, tracer: trace.Tracer, meter: metrics.Meter, spans: Spans) -> None:
        """Replace nothing yet. The tracer and the meter are those that the ledger reports to."""
        opener = CallOpener(ledger, spans)
        http = HttpSurface(ledger, opener)
        self._websockets = websockets = WebSocketSurface(ledger, opener)
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
            *(
                (module, f"{name}.{method}", wrapper)
                for module in _FEATURES
                for name, method, wrapper in (
                    ("ResponsesConnectionManager", "__enter__", websockets.enter),
                    ("ResponsesConnectionManager", "enter", websockets.enter),
                    ("ResponsesConnection", "__init__", websockets.connection_made),
                    ("AsyncResponsesConnectionManager", "__aenter__", websockets.async_enter),
                    ("AsyncResponsesConnectionManager", "enter", websockets.async_enter),
                    ("AsyncResponsesConnection", "__init__", websockets.connection_made),
                )
            ),
            ("openai._send_queue", "SendQueue.enqueue", websockets.enqueued),
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
                    if _has_feature(module):
                        _logger.warning("%s.%s is not there and is not instrumented.", module, name)
        if module_name == _CLIENT:
            self._classes.cover_module(sys.modules[_CLIENT])

    def remove(self) -> None:
        """Put all functions back."""
        while self._made:
            self._made.pop().remove()
        self._classes.remove()
        self._websockets.remove()


def _has_feature(module: str) -> bool:
    """Whether a module has what its functions belong to. All but those of the WebSocket always have."""
    owner: Any = sys.modules[module]
    for name in _FEATURES.get(module, "").split("."):
        owner = getattr(owner, name, None) if name else owner
    return owner is not None

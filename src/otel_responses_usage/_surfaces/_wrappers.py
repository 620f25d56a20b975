"""Finds the transport inside of known wrappers. They trace, retry or cache, and change no request."""

from __future__ import annotations

import sys
from typing import Any, Final

# The class of each known wrapper, by module and name. The value is the attribute with the inner transport.
# A wrapper with two inner transports has two: for sync and for async clients. A look-up may use the inner
# transport directly only if the wrapper adds nothing to a request except its trace context, and forbids no
# request. So a transport that limits the rate of requests does not belong here.
_INNER: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    # opentelemetry-instrumentation-httpx
    ("opentelemetry.instrumentation.httpx", "SyncOpenTelemetryTransport"): ("_transport",),
    ("opentelemetry.instrumentation.httpx", "AsyncOpenTelemetryTransport"): ("_transport",),
    ("opentelemetry.instrumentation.httpx", "SyncOpenTelemetryTransportHttpx2"): ("_transport",),
    ("opentelemetry.instrumentation.httpx", "AsyncOpenTelemetryTransportHttpx2"): ("_transport",),
    # httpx-retries
    ("httpx_retries.transport", "RetryTransport"): ("_sync_transport", "_async_transport"),
    # hishel
    ("hishel.httpx._sync", "CacheTransport"): ("next_transport",),
    ("hishel.httpx._async", "AsyncCacheTransport"): ("next_transport",),
    ("hishel.httpx2._sync", "CacheTransport"): ("next_transport",),
    ("hishel.httpx2._async", "AsyncCacheTransport"): ("next_transport",),
    # pydantic-ai
    ("pydantic_ai.retries", "TenacityTransport"): ("wrapped",),
    ("pydantic_ai.retries", "AsyncTenacityTransport"): ("wrapped",),
    ("pydantic_ai.retries", "HTTPX2TenacityTransport"): ("wrapped",),
    ("pydantic_ai.retries", "AsyncHTTPX2TenacityTransport"): ("wrapped",),
    # httpx-retry
    ("httpx_retry.transports", "RetryTransport"): ("transport",),
    ("httpx_retry.transports", "AsyncRetryTransport"): ("transport",),
    # httpx-tenacity
    ("httpx_tenacity.tenacious_transport", "TenaciousTransport"): ("_transport",),
    ("httpx_tenacity.async_tenacious_transport", "AsyncTenaciousTransport"): ("_transport",),
}
_MOST_WRAPPERS: Final = 8
_METHODS: Final = ("handle_request", "handle_async_request")


def unwrap(transport: Any, *, is_async: bool) -> Any:
    """Return the transport inside of known wrappers, which may be nested.

    Args:
        transport: The transport of the application's HTTP client.
        is_async: Whether that client is an async one.

    Returns:
        The first transport that is not a known wrapper. A wrapper that was changed, a subclass of a wrapper,
        and a wrapper inside of too many others are not looked through.

    """
    for _ in range(_MOST_WRAPPERS):
        attributes = _inner_attributes(transport)
        if attributes is None:
            break
        transport = getattr(transport, attributes[-1 if is_async else 0], None)
    return transport


def handler_modules(transport: Any) -> set[str]:
    """Return the modules of the functions that handle the requests of a transport.

    An application can replace these methods in a subclass, in the class, or in one transport.
    """
    handlers = (getattr(transport, name, None) for name in _METHODS)
    return {str(getattr(handler, "__module__", None)) for handler in handlers if handler is not None}


def _inner_attributes(transport: Any) -> tuple[str, ...] | None:
    cls = type(transport)
    module, name = cls.__module__, cls.__qualname__
    attributes = _INNER.get((module, name))
    if attributes is None or getattr(sys.modules.get(module), name, None) is not cls:
        return None
    return attributes if handler_modules(transport) == {module} else None

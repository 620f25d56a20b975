"""Transports of the HTTP library for look-ups through proxies and over HTTP/2."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import logging
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Final

from .._lookup.imports import late_import
from ._connections import NotConnectedError, Reply
from ._target import Target, TransportSettings, content_headers

_MOST_TRANSPORTS: Final = 16


class Transports:
    """Transports of the HTTP library. They are used for proxies and HTTP/2, which `Connections` cannot do."""

    def __init__(self, largest_body: int) -> None:
        self._largest_body = largest_body
        self._lock = threading.Lock()
        self._log_filter = _LogFilter()
        self._transports: dict[TransportSettings, Any] = {}
        self._users: dict[TransportSettings, int] = {}

    def ask(self, target: Target, path: bytes, timeout_s: float, content: bytes) -> Reply:
        """Send a request and return its answer. Raises the same errors as `Connections.get`."""
        settings, (scheme, host, port) = target.settings, target.origin
        library = sys.modules[settings.library]
        url = library.URL(scheme=scheme.decode(), host=host.decode(), port=port, raw_path=path)
        extensions = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)}
        headers = [*target.headers, *content_headers(content)]
        method = "POST" if content else "GET"
        request = library.Request(method, url, headers=headers, content=content, extensions=extensions)
        deadline = time.monotonic() + timeout_s
        with self._borrowed(settings) as transport:
            try:
                response = transport.handle_request(request)
                try:
                    body = _read(response.stream, deadline, self._largest_body)
                finally:
                    response.close()
            except library.TimeoutException as error:
                raise TimeoutError from error
            except (library.ConnectError, library.ProxyError) as error:
                raise OSError if _is_of_tls(error) else NotConnectedError from error
            except (library.TransportError, library.DecodingError) as error:
                raise OSError from error
        answer_headers = http.client.HTTPMessage()
        for name, value in response.headers.multi_items():
            answer_headers[name] = value
        return Reply(response.status_code, answer_headers, body)

    def close(self) -> None:
        """Close the transports that are not in use."""
        with self._lock, self._log_filter.active():
            for settings in self._unused():
                self._transports.pop(settings).close()
            if not self._transports:
                self._log_filter.remove()

    @contextlib.contextmanager
    def _borrowed(self, settings: TransportSettings) -> Iterator[Any]:
        with self._log_filter.active():
            yield from self._borrow(settings)

    def _borrow(self, settings: TransportSettings) -> Iterator[Any]:
        with self._lock:
            transport = self._transports.pop(settings, None)
            if transport is None:
                transport = _make_transport(settings)
                self._log_filter.add(settings.library)
            self._transports[settings] = transport  # ordered by last use
            self._users[settings] = self._users.get(settings, 0) + 1
        try:
            yield transport
        finally:
            with self._lock:
                self._users[settings] -= 1
                surplus = self._unused()[: max(0, len(self._transports) - _MOST_TRANSPORTS)]
                old = [self._transports.pop(each) for each in surplus]
            for each in old:
                each.close()

    def _unused(self) -> list[TransportSettings]:
        unused = [settings for settings in self._transports if not self._users.get(settings)]
        for settings in unused:
            self._users.pop(settings, None)
        return unused


class _LogFilter(logging.Filter):
    """Drops the log records that the HTTP library writes for requests of the look-ups, and no others."""

    def __init__(self) -> None:
        super().__init__()
        self._is_active: ContextVar[bool] = ContextVar("otel_responses_usage.log_filter", default=False)
        self._loggers: dict[logging.Logger, None] = {}

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002  # given by the base class
        return not self._is_active.get()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Drop the records that are written in this block."""
        token = self._is_active.set(True)
        try:
            yield
        finally:
            self._is_active.reset(token)

    def add(self, library: str) -> None:
        """Filter the loggers of the HTTP library and of the packages that it uses."""
        packages = {library.replace("httpx", "httpcore"), "h2", "hpack", "hyperframe", "socksio"}
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if name.partition(".")[0] in packages and isinstance(logger, logging.Logger):
                logger.addFilter(self)
                self._loggers[logger] = None

    def remove(self) -> None:
        """Leave the loggers as they were."""
        while self._loggers:
            self._loggers.popitem()[0].removeFilter(self)


def _is_of_tls(error: BaseException | None) -> bool:
    """Return whether an error of the HTTP library was caused by TLS."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None


def _make_transport(settings: TransportSettings) -> Any:
    library = sys.modules[settings.library]
    core = settings.library.replace("httpx", "httpcore")
    with late_import:
        for module in (f"{core}._sync.http2", f"{core}._sync.socks_proxy", "encodings.idna"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    proxy = None
    if settings.proxy is not None:
        url, headers, ssl_context = settings.proxy
        proxy = library.Proxy(url, headers=list(headers), ssl_context=ssl_context)
    return library.HTTPTransport(
        # For plain HTTP the context is not used. An empty one is made quickly.
        verify=settings.ssl_context or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        proxy=proxy,
        uds=settings.uds,
        local_address=settings.local_address,
        http1=settings.http1,
        http2=settings.http2,
        limits=library.Limits(max_connections=None, keepalive_expiry=5.0),
    )


def _read(stream: Any, deadline: float, largest_body: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    for piece in stream:
        size += len(piece)
        if size > largest_body:
            return b""
        if time.monotonic() > deadline:
            raise TimeoutError
        pieces.append(piece)
    return b"".join(pieces)

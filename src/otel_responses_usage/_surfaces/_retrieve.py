"""Asks for a response again, with the application's credentials and settings, on connections of our own.

The application's connection pool is never touched. An async pool belongs to the application's event loop,
and in any pool a request of ours could take the connection that the application waits for.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import errno
import http.client
import importlib
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from opentelemetry import propagate

from .._facts.response import Response
from .._facts.usage import MissingReason
from .._lookup.imports import late_import
from .._lookup.retrieval import Answer, Failure
from ._connections import Connections, Destination, Reply

# Headers that belong to the request that made the response, not to the application's settings.
_OF_THE_REQUEST: Final = frozenset(
    {
        b"accept",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"expect",
        b"idempotency-key",
        b"transfer-encoding",
        b"x-stainless-raw-response",
        b"x-stainless-read-timeout",
        b"x-stainless-retry-count",
    }
)
_CREDENTIALS: Final = ("authorization", "api-key")
_SIGNATURE: Final = "AWS4-"
# Clients that the SDK makes itself, when the application gives it none: all with the same TLS settings.
_CLIENTS_OF_THE_SDK: Final = frozenset({"SyncHttpxClientWrapper", "AsyncHttpxClientWrapper"})
_MOST_REDIRECTS: Final = 3
_LARGEST_BODY: Final = 64 * 1024 * 1024
_MOST_TRANSPORTS: Final = 16
_PORTS: Final = {b"https": 443, b"http": 80}
# What this process lacks says nothing about the server.
_LACKING: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN}
)


class TransportSettings(NamedTuple):
    """How the application's HTTP client reaches a server. Connections are shared by equal settings.

    Attributes:
        library: The HTTP library's name, `httpx` or `httpx2`.
        ssl_context: The application's own, with its authorities and client certificates; `None` where no
            TLS is spoken.
        proxy: URL and headers of the proxy, and the context for speaking TLS with it.
        uds: Path of a Unix socket.
        local_address: The address that connections are made from.
        http1: Whether the application may speak HTTP/1.1.
        http2: Whether it may speak HTTP/2.

    """

    library: str
    ssl_context: ssl.SSLContext | None
    proxy: tuple[str, tuple[tuple[bytes, bytes], ...], ssl.SSLContext | None] | None
    uds: str | None
    local_address: str | None
    http1: bool
    http2: bool

    @property
    def is_plain(self) -> bool:
        """Whether connections of our own serve: HTTP/1.1 without a proxy."""
        return self.proxy is None and self.http1 and not self.http2

    def __repr__(self) -> str:
        return "<TransportSettings>"  # a proxy's headers hold credentials


class Target(NamedTuple):
    """One response of one server, with the headers that the application sent when it made it.

    `tenant` stands for the credentials among the headers; it is drawn anew in each process.
    """

    settings: TransportSettings
    origin: _Origin
    path: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    tenant: int

    def __repr__(self) -> str:
        return "<Target>"  # the headers hold credentials


class _Origin(NamedTuple):
    scheme: bytes
    host: bytes
    port: int | None


def make_target(
    transport: Any, client_class: type, url: Any, headers: Any, response_id: str
) -> Target | MissingReason:
    """Return where a response can be asked for, or why it cannot.

    Args:
        transport: What the application's HTTP client has sent the request with.
        client_class: The class of that HTTP client.
        url: The URL of the HTTP request that made the response, as it was sent.
        headers: The headers of that request, as they were sent.
        response_id: The response; whatever is in it, it stays one segment of the path.

    """
    settings = _settings(transport, client_class, url)
    if settings is None:  # what the application put in place of a transport is not known here
        return MissingReason.TRANSPORT_ERROR
    if headers.get("authorization", "").startswith(_SIGNATURE):
        return MissingReason.UNAUTHORIZED  # it signs that one request
    path, mark, query = url.raw_path.partition(b"?")
    path = b"%b/%b%b%b" % (path.rstrip(b"/"), quote(response_id, safe="").encode("ascii"), mark, query)
    dropped = _OF_THE_REQUEST | {name.lower().encode() for name in propagate.get_global_textmap().fields}
    sent = [(name, value) for name, value in headers.raw if name.lower() not in dropped]
    sent.append((b"accept", b"application/json"))
    tenant = hash(tuple(headers.get(name) for name in _CREDENTIALS))
    return Target(settings, _origin(url), path, tuple(sent), tenant)


class HttpRetriever:
    """Sends the requests of the look-ups. Any thread may call any method."""

    def __init__(self) -> None:
        self._connections = Connections(_LARGEST_BODY)
        self._transports = _Transports()

    def get(self, target: Target, timeout_s: float) -> Answer:
        """Ask once. What a server or a network can do wrong is part of the answer."""
        ask = self._ask if target.settings.is_plain else self._transports.ask
        deadline, path = time.monotonic() + timeout_s, target.path
        try:
            for _ in range(_MOST_REDIRECTS):
                reply = ask(target, path, max(0.001, deadline - time.monotonic()))
                again = _redirected(target, path, reply)
                if again is None:
                    break
                path = again
            body = _decoded(target.settings.library, reply)
        except TimeoutError:
            return Answer(failure=Failure.TIMEOUT)
        except OSError as error:
            lacks = error.errno in _LACKING and not isinstance(error, (ssl.SSLError, socket.gaierror))
            return Answer(failure=Failure.RESOURCES if lacks else Failure.TRANSPORT)
        except (http.client.HTTPException, ValueError):  # not HTTP; no host name; no such encoding
            return Answer(failure=Failure.TRANSPORT)
        return Answer(
            status=reply.status, response=_response(body), retry_after_s=_retry_after_s(reply.headers)
        )

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._connections.close()
        self._transports.close()

    def interrupt(self) -> None:
        """End the requests that are under way."""
        self._connections.interrupt()

    def _ask(self, target: Target, path: bytes, timeout_s: float) -> Reply:
        settings, (scheme, host, port) = target.settings, target.origin
        destination = Destination(
            host.decode("ascii"),
            port or _PORTS[scheme],
            settings.ssl_context,
            settings.uds,
            settings.local_address,
        )
        lines = b"".join(b"%b: %b\r\n" % header for header in target.headers)
        return self._connections.get(destination, b"GET %b HTTP/1.1\r\n%b\r\n" % (path, lines), timeout_s)


class _Transports:
    """Transports of the HTTP library, for what our own connections do not do: proxies and HTTP/2."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transports: dict[TransportSettings, Any] = {}
        self._users: dict[TransportSettings, int] = {}

    def ask(self, target: Target, path: bytes, timeout_s: float) -> Reply:
        settings, (scheme, host, port) = target.settings, target.origin
        library = sys.modules[settings.library]
        url = library.URL(scheme=scheme.decode(), host=host.decode(), port=port, raw_path=path)
        extensions = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)}
        request = library.Request("GET", url, headers=list(target.headers), extensions=extensions)
        deadline = time.monotonic() + timeout_s
        with self._borrowed(settings) as transport:
            try:
                response = transport.handle_request(request)
                try:
                    body = _read(response.stream, deadline)
                finally:
                    response.close()
            except library.TimeoutException as error:
                raise TimeoutError from error
            except (library.TransportError, library.DecodingError) as error:
                raise OSError from error
        headers = http.client.HTTPMessage()
        for name, value in response.headers.multi_items():
            headers[name] = value
        return Reply(response.status_code, headers, body)

    def close(self) -> None:
        with self._lock:
            idle = [self._transports.pop(settings) for settings in self._unused()]
        for transport in idle:
            transport.close()

    @contextlib.contextmanager
    def _borrowed(self, settings: TransportSettings) -> Any:
        with self._lock:
            transport = self._transports.pop(settings, None) or _make_transport(settings)
            self._transports[settings] = transport  # last used, last in the order
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
        # Where no TLS is spoken any context serves, and an empty one is made quickly.
        verify=settings.ssl_context or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        proxy=proxy,
        uds=settings.uds,
        local_address=settings.local_address,
        http1=settings.http1,
        http2=settings.http2,
        limits=library.Limits(max_connections=None, keepalive_expiry=5.0),
    )


def _read(stream: Any, deadline: float) -> bytes:
    pieces: list[bytes] = []
    size = 0
    for piece in stream:
        size += len(piece)
        if size > _LARGEST_BODY:
            return b""
        if time.monotonic() > deadline:
            raise TimeoutError
        pieces.append(piece)
    return b"".join(pieces)


def _settings(transport: Any, client_class: type, url: Any) -> TransportSettings | None:
    """Read the settings of the application's transport; they are nowhere public."""
    library = type(url).__module__.partition(".")[0]
    pool = getattr(transport, "_pool", None)
    if pool is not None and not _is_of_library(transport, library):
        return None  # what it adds to a request, a request of ours would lack
    is_secure = url.scheme == "https"
    if pool is None:
        return _aiohttp_settings(library, transport, is_secure) if _is_aiohttp(transport) else None
    proxy = None
    proxy_url = getattr(pool, "_proxy_url", None)
    if proxy_url is not None:
        origin = proxy_url.origin
        host = origin.host.decode()
        if ":" in host:
            host = f"[{host}]"
        # SOCKS has credentials of its own; those of an HTTP proxy are among its headers.
        user, password = getattr(pool, "_proxy_auth", None) or (b"", b"")
        login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user else ""
        proxy = (
            f"{origin.scheme.decode()}://{login}{host}:{origin.port}",
            tuple(getattr(pool, "_proxy_headers", ())),
            getattr(pool, "_proxy_ssl_context", None),
        )
    ssl_context = None
    if is_secure:
        ssl_context = getattr(pool, "_ssl_context", None)
        if client_class.__name__ in _CLIENTS_OF_THE_SDK:
            ssl_context = _shared(library, ssl_context)
    return TransportSettings(
        library,
        ssl_context,
        proxy,
        getattr(pool, "_uds", None),
        getattr(pool, "_local_address", None),
        http1=bool(getattr(pool, "_http1", True)),
        # Without TLS, HTTP/2 is spoken only by an application that speaks nothing else.
        http2=bool(getattr(pool, "_http2", False)) and (is_secure or not getattr(pool, "_http1", True)),
    )


_shared_contexts: Final[dict[object, ssl.SSLContext]] = {}
_MOST_SHARED_CONTEXTS: Final = 16


def _shared(library: str, ssl_context: ssl.SSLContext | None) -> ssl.SSLContext | None:
    """Return one context for all that differ in nothing.

    Each client has a context of its own, and some applications make a client for every call. A context does
    not tell its client certificate, so contexts are shared only among clients that the SDK has made itself.
    """
    if ssl_context is None:
        return None
    authorities = tuple(sorted(ssl_context.cert_store_stats().items()))
    key = library, ssl_context.verify_mode, ssl_context.check_hostname, authorities
    if len(_shared_contexts) >= _MOST_SHARED_CONTEXTS:
        _shared_contexts.clear()
    return _shared_contexts.setdefault(key, ssl_context)


def _is_of_library(transport: Any, library: str) -> bool:
    methods = (getattr(type(transport), name, None) for name in ("handle_request", "handle_async_request"))
    return all(method is None or method.__module__.startswith(library + ".") for method in methods)


def _aiohttp_settings(library: str, transport: Any, is_secure: bool) -> TransportSettings:
    """Read the settings of aiohttp behind the httpx interface, `DefaultAioHttpClient`."""
    proxy = None
    if transport.proxy is not None:
        headers = list(transport.proxy.headers.raw)
        if transport.proxy.raw_auth is not None:
            token = base64.b64encode(b":".join(transport.proxy.raw_auth))
            headers.append((b"proxy-authorization", b"Basic " + token))
        proxy = (str(transport.proxy.url), tuple(headers), transport.proxy.ssl_context)
    return TransportSettings(
        library,
        transport.ssl_context if is_secure else None,
        proxy,
        transport.uds,
        getattr(transport, "local_address", None),
        http1=True,
        http2=False,
    )


def _is_aiohttp(transport: Any) -> bool:
    return any(cls.__name__ == "AiohttpTransport" for cls in type(transport).__mro__)


def _origin(url: Any) -> _Origin:
    return _Origin(url.raw_scheme, url.raw_host, url.port)


def _redirected(target: Target, path: bytes, reply: Reply) -> bytes | None:
    """Return the path that the server redirects to. Credentials go to no other server than before."""
    location = reply.headers.get("location")
    if reply.status not in (301, 302, 303, 307, 308) or location is None:
        return None
    library, (scheme, host, port) = sys.modules[target.settings.library], target.origin
    url = library.URL(scheme=scheme.decode(), host=host.decode(), port=port, raw_path=path)
    try:
        again = url.join(location)
    except library.InvalidURL:
        return None
    return again.raw_path if _origin(again) == _origin(url) else None


def _decoded(library: str, reply: Reply) -> bytes:
    encoding = reply.headers.get("content-encoding")
    if encoding is None:
        return reply.body
    module = sys.modules[library]
    try:
        response = module.Response(200, headers={"content-encoding": encoding}, content=reply.body)
        content: bytes = response.content
    except module.DecodingError as error:
        raise ValueError("the body cannot be decoded") from error
    return content


def _response(content: bytes) -> Response | None:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return Response.from_json(document) if isinstance(document, Mapping) else None


def _retry_after_s(headers: http.client.HTTPMessage) -> float | None:
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            return max(0.0, float(text) * unit_s)
        except ValueError:
            continue
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None

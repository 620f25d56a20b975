"""Asking for a response again: the application's credentials and route, but connections of our own.

The application's connection pool is never touched. An async pool belongs to the application's event
loop, and in any pool a request of ours could take the connection that the application waits for.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import importlib
import json
import ssl
import sys
import time
from collections.abc import AsyncIterable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from opentelemetry import propagate

from .._facts.response import Response
from .._facts.usage import MissingReason
from .._lookup.imports import late_import
from .._lookup.loop import let_by
from .._lookup.retrieval import Answer, Trouble

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
_TIMEOUTS: Final = ("connect", "read", "write", "pool")
_CREDENTIALS: Final = ("authorization", "api-key")
_SIGNATURE: Final = "AWS4-"
_MOST_LINES: Final = 4
_MOST_REDIRECTS: Final = 3
_LARGEST_BODY: Final = 64 * 1024 * 1024


class Route(NamedTuple):
    """How the application's HTTP client reaches the server; connections are shared by equal routes.

    Attributes:
        library: The HTTP library's name, `httpx` or `httpx2`.
        ssl_context: The application's own, with its authorities and client certificates.
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

    def __repr__(self) -> str:
        return "<Route>"  # a proxy's headers hold credentials


class Target(NamedTuple):
    """One response of one server, with the headers that the application sent when it made it.

    `tenant` stands for the credentials among the headers; it is drawn anew in each process.
    """

    route: Route
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


def make_target(transport: Any, url: Any, headers: Any, response_id: str) -> Target | MissingReason:
    """Return where a response can be asked for, or why it cannot.

    Args:
        transport: What the application's HTTP client has sent the request with.
        url: The URL of the HTTP request that made the response, as it was sent.
        headers: The headers of that request, as they were sent.
        response_id: The response; whatever is in it, it stays one segment of the path.

    """
    route = _route(transport, url)
    if route is None:  # what the application put in place of a transport is not known here
        return MissingReason.TRANSPORT_ERROR
    if headers.get("authorization", "").startswith(_SIGNATURE):
        return MissingReason.UNAUTHORIZED  # it signs that one request
    path, mark, query = url.raw_path.partition(b"?")
    path = b"%b/%b%b%b" % (path.rstrip(b"/"), quote(response_id, safe="").encode("ascii"), mark, query)
    dropped = _OF_THE_REQUEST | {name.lower().encode() for name in propagate.get_global_textmap().fields}
    sent = [(name, value) for name, value in headers.raw if name.lower() not in dropped]
    sent.append((b"accept", b"application/json"))
    tenant = hash(tuple(headers.get(name) for name in _CREDENTIALS))
    return Target(route, _origin(url), path, tuple(sent), tenant)


class HttpRetriever:
    """Makes the requests of the look-ups, on the event loop that uses it.

    It speaks to the connection pool below the HTTP library: its client's log lines would appear among the
    application's own, and to parse each URL and to dress each answer up takes a fifth of a look-up.
    """

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._lines: dict[Route, _Line] = {}

    async def get(self, target: Target, timeout_s: float) -> Answer:
        """Ask once. What a server or a network can do wrong is part of the answer."""
        line = self._line(target.route)
        library, core = sys.modules[target.route.library], sys.modules[_core_of(target.route.library)]
        path = target.path
        extensions = {"timeout": dict.fromkeys(_TIMEOUTS, timeout_s)}
        line.users += 1
        try:
            for _ in range(_MOST_REDIRECTS):
                url = core.URL(**target.origin._asdict(), target=path)
                request = core.Request("GET", url, headers=target.headers, extensions=extensions)
                await let_by()
                received = await line.pool.handle_async_request(request)
                body = received.stream
                try:
                    await let_by()
                    response = library.Response(received.status, headers=received.headers, content=body)
                    if "content-encoding" in response.headers:
                        body = response.aiter_bytes()
                    content = await _read(body)
                    await let_by()
                finally:
                    await received.aclose()
                again = _redirected(library, target.origin, path, response)
                if again is None:
                    break
                path = again
        except core.TimeoutException:
            return Answer(trouble=Trouble.TIMEOUT)
        except (
            core.NetworkError,
            core.ProtocolError,
            core.ProxyError,
            core.UnsupportedProtocol,
            library.DecodingError,
            OSError,
        ):
            return Answer(trouble=Trouble.TRANSPORT)
        finally:
            line.users -= 1
            await self._close_old_lines()
        return Answer(
            status=response.status_code,
            response=_response(content),
            retry_after_s=_retry_after_s(response.headers),
        )

    async def aclose(self) -> None:
        """Close every connection."""
        lines, self._lines = self._lines, {}
        for line in lines.values():
            await line.pool.aclose()

    def _line(self, route: Route) -> _Line:
        line = self._lines.pop(route, None) or _Line(_make_pool(route, self._max_connections))
        self._lines[route] = line  # last used, last in the order
        return line

    async def _close_old_lines(self) -> None:
        # Each client of an application's has TLS settings of its own, and some make one for every call.
        idle = [route for route, line in self._lines.items() if line.users == 0]
        for route in idle[: max(0, len(self._lines) - _MOST_LINES)]:
            await self._lines.pop(route).pool.aclose()


class _Line:
    """The connections of one route, and how many requests use them right now."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.users = 0


def _make_pool(route: Route, max_connections: int) -> Any:
    library = sys.modules[route.library]
    _import_what_it_needs(route.library)
    proxy = None
    if route.proxy is not None:
        url, headers, ssl_context = route.proxy
        proxy = library.Proxy(url, headers=list(headers), ssl_context=ssl_context)
    transport = library.AsyncHTTPTransport(
        verify=route.ssl_context if route.ssl_context is not None else True,
        proxy=proxy,
        uds=route.uds,
        local_address=route.local_address,
        http1=route.http1,
        http2=route.http2,
        limits=library.Limits(max_connections=max_connections, keepalive_expiry=5.0),
    )
    return transport._pool  # noqa: SLF001  # as everywhere here: of the application's transport, too


def _import_what_it_needs(library: str) -> None:
    """Import what the HTTP library imports at its first request."""
    with late_import:
        for module in (
            "anyio._backends._asyncio",
            "encodings.idna",
            f"{_core_of(library)}._backends.anyio",
        ):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)


def _route(transport: Any, url: Any) -> Route | None:
    """Read the settings of the application's transport; they are nowhere public."""
    library = type(url).__module__.partition(".")[0]
    pool = getattr(transport, "_pool", None)
    if pool is not None and not _is_the_library_s_own(transport, library):
        return None  # what it adds to a request, a request of ours would lack
    if pool is None:
        return _aiohttp_route(library, transport) if _is_aiohttp(transport) else None
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
    return Route(
        library,
        getattr(pool, "_ssl_context", None),
        proxy,
        getattr(pool, "_uds", None),
        getattr(pool, "_local_address", None),
        http1=bool(getattr(pool, "_http1", True)),
        http2=bool(getattr(pool, "_http2", False)),
    )


def _is_the_library_s_own(transport: Any, library: str) -> bool:
    methods = (getattr(type(transport), name, None) for name in ("handle_request", "handle_async_request"))
    return all(method is None or method.__module__.startswith(library + ".") for method in methods)


def _aiohttp_route(library: str, transport: Any) -> Route:
    """Read the settings of aiohttp behind the httpx interface, `DefaultAioHttpClient`."""
    proxy = None
    if transport.proxy is not None:
        headers = list(transport.proxy.headers.raw)
        if transport.proxy.raw_auth is not None:
            token = base64.b64encode(b":".join(transport.proxy.raw_auth))
            headers.append((b"proxy-authorization", b"Basic " + token))
        proxy = (str(transport.proxy.url), tuple(headers), transport.proxy.ssl_context)
    return Route(
        library,
        transport.ssl_context,
        proxy,
        transport.uds,
        getattr(transport, "local_address", None),
        http1=True,
        http2=False,
    )


def _is_aiohttp(transport: Any) -> bool:
    return any(cls.__name__ == "AiohttpTransport" for cls in type(transport).__mro__)


def _core_of(library: str) -> str:
    return library.replace("httpx", "httpcore")


def _origin(url: Any) -> _Origin:
    return _Origin(url.raw_scheme, url.raw_host, url.port)


def _redirected(library: Any, origin: _Origin, path: bytes, response: Any) -> bytes | None:
    """Return where the server sends us; to no other, since credentials are for the origin they went to."""
    if not response.has_redirect_location:
        return None
    scheme, host, port = origin
    url = library.URL(scheme=scheme.decode(), host=host.decode(), port=port, raw_path=path)
    try:
        again = url.join(response.headers["location"])
    except library.InvalidURL:
        return None
    return again.raw_path if _origin(again) == _origin(url) else None


async def _read(body: AsyncIterable[bytes]) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async for piece in body:
        size += len(piece)
        if size > _LARGEST_BODY:
            return b""
        pieces.append(piece)
    return b"".join(pieces)


def _response(content: bytes) -> Response | None:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return Response.from_json(document) if isinstance(document, Mapping) else None


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
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

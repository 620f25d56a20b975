"""Sends the requests of the look-ups, with the credentials and settings of the application.

They use their own connections, never those of the application's connection pool. An async pool belongs to
the event loop of the application. And a look-up could take a connection that the application waits for.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import functools
import http.client
import importlib
import json
import logging
import re
import ssl
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from opentelemetry import propagate

from .._facts.response import Response, is_response_object
from .._facts.usage import MissingReason
from .._lookup.imports import late_import
from .._lookup.retrieval import Answer, Failure
from .._lookup.worker import Pace
from ._connections import Connections, Destination, NotConnectedError, Reply, lacks_resources

# Headers that describe one request and its body. They are never sent again.
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
# Headers that are sent again by name. The default headers of the application's clients are sent again, too.
_KEPT: Final = frozenset(
    {
        b"accept-encoding",
        b"accept-language",
        b"anthropic-beta",
        b"azureml-model-deployment",
        b"cf-aig-byok-alias",
        b"cookie",
        b"copilot-integration-id",
        b"helicone-openai-api-base",
        b"helicone-target-provider",
        b"helicone-target-url",
        b"host",
        b"user-agent",
        b"x-stainless-arch",
        b"x-stainless-async",
        b"x-stainless-lang",
        b"x-stainless-os",
        b"x-stainless-package-version",
        b"x-stainless-runtime",
        b"x-stainless-runtime-version",
        b"x-vercel-protection-bypass",
    }
)
# Gateways that choose the account and the provider by headers of these names.
_KEPT_PREFIXES: Final = (b"cf-access-", b"openai-", b"x-portkey-")
# A header with one of these words in its name holds a credential, an account, or the version of an API.
_KEPT_WORDS: Final = frozenset(
    {
        b"account",
        b"auth",
        b"authentication",
        b"bearer",
        b"credential",
        b"credentials",
        b"jwt",
        b"key",
        b"org",
        b"organisation",
        b"organization",
        b"passwd",
        b"password",
        b"project",
        b"tenant",
        b"version",
        b"workspace",
    }
)
_KEPT_SUFFIXES: Final = (b"apikey", b"authorization", b"client-id", b"secret", b"token")
# A header with one of these words belongs to one request, even if its name has a word from above.
_WORDS_OF_ONE_REQUEST: Final = frozenset(
    {
        b"cache",
        b"correlation",
        b"dedup",
        b"deduplication",
        b"idempotency",
        b"metadata",
        b"nonce",
        b"request",
        b"span",
        b"trace",
    }
)
# Credentials for which a server can answer differently.
_CREDENTIALS: Final = ("authorization", "api-key", "x-api-key")
_SIGNATURE: Final = "AWS4-"
# HTTP clients that the SDK makes itself if the application gives it none. They have the same TLS settings.
_CLIENTS_OF_THE_SDK: Final = frozenset({"SyncHttpxClientWrapper", "AsyncHttpxClientWrapper"})
_MOST_REDIRECTS: Final = 3
_LARGEST_BODY: Final = 64 * 1024 * 1024
_MOST_TRANSPORTS: Final = 16
_PORTS: Final = {b"https": 443, b"http": 80}
# Segments that a server or a proxy removes from a path.
_DOT_SEGMENTS: Final = frozenset({"", ".", ".."})


class TransportSettings(NamedTuple):
    """How the application's HTTP client reaches a server. Equal settings share their connections.

    Attributes:
        library: The HTTP library's name, `httpx` or `httpx2`.
        ssl_context: The application's context, with its authorities and client certificates. `None` for
            plain HTTP.
        proxy: The URL and headers of the proxy, and the context for TLS to the proxy.
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
        """Whether `Connections` can be used: HTTP/1.1 without a proxy."""
        return self.proxy is None and self.http1 and not self.http2

    def __repr__(self) -> str:
        return "<TransportSettings>"  # a proxy's headers hold credentials


class Target(NamedTuple):
    """One response of one server, and the headers for its request.

    `tenant` is a hash of the credentials. It differs between processes.
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
    transport: Any,
    client_class: type,
    url: Any,
    headers: Any,
    default_names: Iterable[str],
    response_id: str,
) -> Target | MissingReason:
    """Return the target of a look-up, or the reason why there is none.

    Args:
        transport: The transport that sent the application's request.
        client_class: The class of the application's HTTP client.
        url: The URL of that request.
        headers: The headers of that request, as sent.
        default_names: The names of the default headers of the application's clients.
        response_id: The id of the response. It becomes one segment of the path.

    """
    if response_id in _DOT_SEGMENTS:  # it would lead to another path, with the credentials
        return MissingReason.UNSUPPORTED
    settings = _settings(transport, client_class, url)
    if settings is None:  # an unknown transport may change requests in any way
        return MissingReason.TRANSPORT_ERROR
    if headers.get("authorization", "").startswith(_SIGNATURE):
        return MissingReason.UNAUTHORIZED  # it signs that one request
    path, mark, query = url.raw_path.partition(b"?")
    path = b"%b/%b%b%b" % (path.rstrip(b"/"), quote(response_id, safe="").encode("ascii"), mark, query)
    tenant = hash(tuple(headers.get(name) for name in _CREDENTIALS))
    return Target(settings, _origin(url), path, _headers(headers.raw, default_names), tenant)


def _headers(
    sent: Iterable[tuple[bytes, bytes]], default_names: Iterable[str]
) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers for the request of a look-up.

    A list says what is sent again: credentials, organisation and project, versions, user agent, cookies, and
    the default headers of the application's clients, by which gateways choose a route. Everything else
    belongs to the one request that it was sent with, such as trace contexts and request ids.
    """
    defaults = {str(name).lower().encode() for name in default_names}
    dropped = _OF_THE_REQUEST | {name.lower().encode() for name in propagate.get_global_textmap().fields}
    kept = [
        (name, value)
        for name, value in sent
        if (lower := name.lower()) not in dropped and (lower in defaults or _is_kept(lower))
    ]
    kept.append((b"accept", b"application/json"))
    return tuple(kept)


@functools.lru_cache(maxsize=256)
def _is_kept(name: bytes) -> bool:
    """Return whether a header with this name, in lower case, is sent again."""
    words = set(re.split(rb"[-_]", name))
    if words & _WORDS_OF_ONE_REQUEST:
        return False
    if name in _KEPT or name.startswith(_KEPT_PREFIXES) or name.endswith(_KEPT_SUFFIXES):
        return True
    return bool(words & _KEPT_WORDS)


class HttpRetriever:
    """Sends the requests of the look-ups. Any thread may call any method."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._connections = Connections(_LARGEST_BODY, pace)
        self._transports = _Transports()

    def get(self, target: Target, timeout_s: float) -> Answer:
        """Send one request. Errors of the server and the network are part of the answer."""
        ask = self._ask if target.settings.is_plain else self._transports.ask
        deadline, path = time.monotonic() + timeout_s, target.path
        try:
            for _ in range(_MOST_REDIRECTS):
                reply = ask(target, path, max(0.001, deadline - time.monotonic()))
                again = _redirected(target, path, reply)
                if again is None:
                    break
                path = again
            self._pace.let_application_in()
            body = _decoded(target.settings.library, reply)
        except TimeoutError:
            return Answer(failure=Failure.TIMEOUT)
        except NotConnectedError:
            return Answer(failure=Failure.UNREACHABLE)
        except OSError as error:
            return Answer(failure=Failure.RESOURCES if lacks_resources(error) else Failure.TRANSPORT)
        except (http.client.HTTPException, ValueError):  # not HTTP; not a host name; an unknown encoding
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
    """Transports of the HTTP library. They are used for proxies and HTTP/2, which `Connections` cannot do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._log_filter = _LogFilter()
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
            except (library.ConnectError, library.ProxyError) as error:
                raise OSError if _is_of_tls(error) else NotConnectedError from error
            except (library.TransportError, library.DecodingError) as error:
                raise OSError from error
        headers = http.client.HTTPMessage()
        for name, value in response.headers.multi_items():
            headers[name] = value
        return Reply(response.status_code, headers, body)

    def close(self) -> None:
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
    """Read the settings of the application's transport. They have no public attributes."""
    library = type(url).__module__.partition(".")[0]
    pool = getattr(transport, "_pool", None)
    if pool is not None and not _is_of_library(transport, library):
        return None  # it may add something to a request that a look-up would lack
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
        # Only SOCKS has separate credentials. Those of an HTTP proxy are among its headers.
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
        # Without TLS, a client uses HTTP/2 only if it has no other protocol.
        http2=bool(getattr(pool, "_http2", False)) and (is_secure or not getattr(pool, "_http1", True)),
    )


_shared_contexts: Final[dict[object, ssl.SSLContext]] = {}
_MOST_SHARED_CONTEXTS: Final = 16


def _shared(library: str, ssl_context: ssl.SSLContext | None) -> ssl.SSLContext | None:
    """Return one context for all equal contexts.

    Each client has its own context, and some applications make a client for every call. The client
    certificate of a context cannot be read, so only clients that the SDK has made itself share a context.
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
    """Return the path of a redirect, or `None`. A redirect to another server is not followed."""
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
    if isinstance(document, Mapping) and is_response_object(document):
        return Response.from_json(document)
    return None


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

"""Says where a response can be asked for, with the settings and headers of the application's request."""

from __future__ import annotations

import base64
import functools
import logging
import re
import ssl
from collections.abc import Iterable
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from opentelemetry import propagate

from .._facts.usage import MissingReason
from ._wrappers import handler_modules, unwrap

_logger = logging.getLogger(__name__)

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
    origin: Origin
    path: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    tenant: int

    def __repr__(self) -> str:
        return "<Target>"  # the headers hold credentials


class Origin(NamedTuple):
    """Scheme, host and port of a server. Credentials go to no other origin."""

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
        transport: The transport that the application's request was given to.
        client_class: The class of the application's HTTP client.
        url: The URL of that request.
        headers: The headers of that request, as sent.
        default_names: The names of the default headers of the application's clients.
        response_id: The id of the response. It becomes one segment of the path.

    """
    if response_id in _DOT_SEGMENTS:  # it would lead to another path, with the credentials
        return MissingReason.UNSUPPORTED
    inner = unwrap(transport, is_async=hasattr(client_class, "__aenter__"))
    is_of_sdk = inner is transport and client_class.__name__ in _CLIENTS_OF_THE_SDK
    settings = _settings(inner, url, is_of_sdk=is_of_sdk)
    if settings is None:  # an unknown transport may change requests in any way
        _warn_once(client_class if inner is None else type(inner))
        return MissingReason.TRANSPORT_ERROR
    if headers.get("authorization", "").startswith(_SIGNATURE):
        return MissingReason.UNAUTHORIZED  # it signs that one request
    path, mark, query = url.raw_path.partition(b"?")
    path = b"%b/%b%b%b" % (path.rstrip(b"/"), quote(response_id, safe="").encode("ascii"), mark, query)
    tenant = hash(tuple(headers.get(name) for name in _CREDENTIALS))
    return Target(settings, origin_of(url), path, _headers(headers.raw, default_names), tenant)


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


_warned_of: Final[dict[str, object]] = {}
_MOST_WARNINGS: Final = 64


def _warn_once(unknown: type) -> None:
    """Log the name of an unknown class, once per process."""
    name, mark = f"{unknown.__module__}.{unknown.__qualname__}", object()
    # No lock: several threads may make targets, and `setdefault` is atomic.
    if len(_warned_of) < _MOST_WARNINGS and _warned_of.setdefault(name, mark) is mark:
        _logger.warning(
            "The HTTP transport %s is unknown or changed. "
            "The usage of streams that end early is not looked up through it.",
            name,
        )


def _settings(transport: Any, url: Any, *, is_of_sdk: bool) -> TransportSettings | None:
    """Read the settings of a transport; return `None` if it is unknown. They have no public attributes.

    Args:
        transport: The transport inside of all known wrappers.
        url: The URL of the application's request.
        is_of_sdk: Whether the SDK itself made the HTTP client and its transport.

    """
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
        if is_of_sdk:
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
    return all(module.startswith(library + ".") for module in handler_modules(transport))


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
    """Return whether this is the transport of httpx-aiohttp, or of the copy that the SDK contains."""
    if not any(cls.__name__ == "AiohttpTransport" for cls in type(transport).__mro__):
        return False
    return all("httpx_aiohttp" in module.split(".") for module in handler_modules(transport))


def content_headers(content: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers that a request with this content has besides those of its target."""
    if not content:
        return ()
    return (b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))


def origin_of(url: Any) -> Origin:
    """Return the origin of a URL of the HTTP library."""
    return Origin(url.raw_scheme, url.raw_host, url.port)

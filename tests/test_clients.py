"""However the application's client is made, a look-up goes its way with its credentials, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import trustme
from openai._types import Omit

from calls import CUT, HTTP, OTHER_HTTP, create, settle
from conftest import Instrument, Serve
from embedded.answer import Answer, usage
from embedded.http_server import Cut, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import error
from observed import Observed, token_attributes, usage_attributes
from otel_responses_usage import ResponsesUsageInstrumentor

ANSWER = Answer(pieces=("one ", "two ", "three "), usage=usage(7, 21, cached=3, reasoning=11))
ASKED: dict[str, Any] = {"model": "m", "input": "x"}
KEY = "canary-of-the-key"

# What belongs to one request and not to the application's settings.
OF_THE_REQUEST = {
    "accept",
    "connection",
    "content-length",
    "content-type",
    "x-stainless-read-timeout",
    "x-stainless-retry-count",
}


class Door:
    """A listener in front of a server: it passes bytes on, and keeps what the clients have said.

    `enter` is given a new connection, does what comes before the bytes, and returns the connection to
    read from, with what it has read of it and the address to go to.
    """

    def __init__(
        self,
        enter: Callable[[socket.socket], tuple[socket.socket, bytes, Any]],
        at: Path | str = "127.0.0.1",
    ) -> None:
        self._enter = enter
        if isinstance(at, Path):
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(at))
        else:
            self._listener = socket.socket(socket.AF_INET6 if ":" in at else socket.AF_INET)
            self._listener.bind((at, 0))
        self._listener.listen()
        self._said: list[bytes] = []
        self._entered = 0
        threading.Thread(target=self._open, daemon=True).start()

    @property
    def address(self) -> str:
        host, port, *_ = self._listener.getsockname()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def connections(self) -> int:
        """Connections that came through."""
        return self._entered

    @property
    def requests(self) -> list[bytes]:
        """The heads of all requests that came through."""
        return re.findall(rb"(?s)(?:GET|POST|CONNECT) \S+ HTTP/1.1\r\n.*?\r\n\r\n", b"".join(self._said))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _open(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(connection,), daemon=True).start()

    def _pass(self, connection: socket.socket) -> None:
        with connection:
            try:
                client, first, address = self._enter(connection)
            except OSError:  # the client does not trust us, or we do not trust the client
                return
            with client, socket.create_connection(address) as server:
                self._entered += 1
                server.sendall(first)
                self._said.append(first)
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server, self._said.append)
                back.join()


def _pump(
    source: socket.socket, sink: socket.socket, keep: Callable[[bytes], object] = lambda _: None
) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            keep(data)
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def address_of(server: ScriptedServer) -> tuple[str, int]:
    url = urlsplit(server.url)
    return str(url.hostname), int(url.port or 0)


@pytest.fixture
def door() -> Iterator[Callable[..., Door]]:
    """Open doors; they are closed afterwards."""
    doors: list[Door] = []

    def open_door(*args: Any) -> Door:
        doors.append(Door(*args))
        return doors[-1]

    yield open_door
    for opened in doors:
        opened.close()


def cutting(request: SeenRequest) -> Reply:
    """A server whose streams are cut at the first delta, and which keeps their responses."""
    if request.path == "/oauth/token":
        return Reply.json({"access_token": KEY, "expires_in": 3600, "token_type": "Bearer"})
    if not request.headers.keys() & {"authorization", "api-key"}:
        return error(401, "no credentials")
    if request.method == "POST":
        return Reply.sse(ANSWER.events()[:5], end=Cut())
    return Reply.json(ANSWER.response())


@pytest.fixture
def server(serve: Serve) -> ScriptedServer:
    """The server that the look-ups of a test go to."""
    return serve(cutting)


def read_cut(client: Any, **asked: Any) -> None:
    """Make one streamed call that is cut, and close the client."""

    async def main() -> None:
        try:
            with pytest.raises(CUT):
                async with create(client, **ASKED, **asked) as reader:
                    await reader.rest()
        finally:
            await settle(client.close())

    asyncio.run(main())


def posts_and_gets(server: ScriptedServer) -> tuple[list[SeenRequest], list[SeenRequest]]:
    requests = [request for request in server.requests if "/responses" in request.path]
    return [one for one in requests if one.method == "POST"], [one for one in requests if one.method == "GET"]


def settings(request: SeenRequest) -> dict[str, str]:
    """What a request carries of the application's settings, credentials first of all."""
    return {name: value for name, value in request.headers.items() if name not in OF_THE_REQUEST}


def looked_up(observed: Observed, server: ScriptedServer, door: Door) -> SeenRequest:
    """The one GET that has brought the usage, after proof that it is as the call was."""
    span = observed.span()
    (posted,), (get,) = posts_and_gets(server)
    assert token_attributes(span) == usage_attributes(ANSWER.usage)
    assert (span.attributes or {})["openai_responses.usage.source"] == "retrieval"
    assert settings(get) == settings(posted)
    assert get.path == f"{posted.path}/{ANSWER.id}"
    assert get.query == posted.query
    assert [head.partition(b" ")[0] for head in door.requests[-2:]] == [b"POST", b"GET"]
    for head in door.requests:
        # At most one of each: the server's own view of the headers would hide a second.
        names = re.findall(rb"(?m)^([\w-]+):", head.lower())
        assert len(names) == len(set(names))
    assert KEY not in "".join(text for _, text in observed.told())
    return get


def not_looked_up(observed: Observed, server: ScriptedServer) -> str:
    """The reason told, after proof that no GET was made."""
    attributes = observed.span().attributes or {}
    assert posts_and_gets(server)[1] == []
    assert "openai_responses.retrieval.attempts" not in attributes
    return str(attributes["openai_responses.usage.missing_reason"])


# --- clients over plain HTTP ------------------------------------------------------------------------


class Tokens:
    """Hands out another token every time it is asked."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> str:
        self.made += 1
        return f"{KEY}-{self.made}"

    async def later(self) -> str:
        await asyncio.sleep(0)
        return self()


class Signed(HTTP.Auth):  # type: ignore[misc]
    """An authentication of the application's own, which comes last and outranks the SDK's."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def auth_flow(self, request: Any) -> Iterator[Any]:
        request.headers["authorization"] = f"{self.scheme} {KEY}"
        yield request


def _hook(request: Any) -> None:
    request.headers["x-hook-token"] = "h-1"


async def _async_hook(request: Any) -> None:
    _hook(request)


def made(kind: str, url: str, **options: Any) -> Any:
    """A client of this kind for the server at `url`; its key is `KEY` unless it has others."""
    if "Azure" in kind:
        options = {"azure_endpoint": url, "api_version": "2026-01-01", **options}
    elif "Bedrock" in kind:
        options = {"base_url": f"{url}/openai/v1", **options}
    else:
        options = {"base_url": f"{url}/v1", "api_key": KEY, **options}
    return getattr(openai, kind)(max_retries=0, **options)


def of_workload(kind: str, url: str) -> Any:
    """A client that exchanges a token of its surroundings for one of the API."""
    provider = {"token_type": "jwt", "get_token": lambda: "subject"}
    identity = {"identity_provider_id": "i", "service_account_id": "s", "provider": provider}
    client = made(kind, url, api_key=None, workload_identity=identity)
    client._workload_identity_auth.token_exchange_url = f"{url}/oauth/token"
    return client


@dataclass(frozen=True)
class Client:
    """A way to make a client for a URL, what its call asks, and what its look-up has to carry."""

    name: str
    make: Callable[[str], Any]
    carries: dict[str, str]
    asked: dict[str, Any] = field(default_factory=dict)
    needs: Callable[[], bool] = lambda: True  # of the SDK

    def __str__(self) -> str:
        return self.name


BEARER = {"authorization": f"Bearer {KEY}"}
FIRST = {"authorization": f"Bearer {KEY}-1"}  # the token of the call, and no later one
BASIC = {"authorization": HTTP.BasicAuth("u", KEY)._auth_header}


def _has(name: str) -> Callable[[], bool]:
    return lambda: hasattr(openai, name)


def _since(*release: int) -> Callable[[], bool]:
    return lambda: tuple(int(part) for part in openai.__version__.split(".")[:2]) >= release


def _has_other() -> bool:
    return OTHER_HTTP is not None


CLIENTS = (
    Client("sync", lambda url: made("OpenAI", url), BEARER),
    Client("async", lambda url: made("AsyncOpenAI", url), BEARER),
    Client(
        "DefaultHttpxClient",
        lambda url: made("OpenAI", url, http_client=openai.DefaultHttpxClient()),
        BEARER,
    ),
    Client(
        "DefaultAsyncHttpxClient",
        lambda url: made("AsyncOpenAI", url, http_client=openai.DefaultAsyncHttpxClient()),
        BEARER,
    ),
    Client(
        "DefaultAioHttpClient",
        lambda url: made("AsyncOpenAI", url, http_client=openai.DefaultAioHttpClient()),
        BEARER,
        needs=_has("DefaultAioHttpClient"),
    ),
    Client(
        "other library",
        lambda url: made("OpenAI", url, http_client=OTHER_HTTP.Client()),
        BEARER,
        needs=_has_other,
    ),
    Client(
        "other library, async",
        lambda url: made("AsyncOpenAI", url, http_client=OTHER_HTTP.AsyncClient()),
        BEARER,
        needs=_has_other,
    ),
    # Keys.
    Client(
        "key of a function", lambda url: made("OpenAI", url, api_key=Tokens()), FIRST, needs=_since(1, 106)
    ),
    Client(
        "key of a coroutine",
        lambda url: made("AsyncOpenAI", url, api_key=Tokens().later),
        FIRST,
        needs=_since(1, 106),
    ),
    Client(
        "key of a copy",
        lambda url: made("OpenAI", url, api_key="not-this-one").with_options(api_key=KEY),
        BEARER,
    ),
    Client(
        "key of a copy of a copy",
        lambda url: made("AsyncOpenAI", url, api_key="no").with_options(timeout=9).copy(api_key=KEY),
        BEARER,
    ),
    Client(
        "key of the call",
        lambda url: made("OpenAI", url, api_key="not-this-one"),
        BEARER,
        {"extra_headers": {"Authorization": BEARER["authorization"]}},
    ),
    Client(
        "key of the call in small letters",
        lambda url: made("OpenAI", url, api_key="not-this-one"),
        BEARER,
        {"extra_headers": BEARER},
        needs=_since(3, 54),  # earlier ones send both keys themselves
    ),
    Client(
        "key of the default headers",
        lambda url: made(
            "OpenAI",
            url,
            api_key="not-this-one",
            default_headers={"Authorization": BEARER["authorization"]},
        ),
        BEARER,
    ),
    # Settings.
    Client(
        "organization, project, headers, query",
        lambda url: made(
            "OpenAI",
            url,
            organization="org-1",
            project="proj-1",
            default_headers={"x-tenant": "t-1"},
            default_query={"api-version": "v1"},
        ),
        {**BEARER, "openai-organization": "org-1", "openai-project": "proj-1", "x-tenant": "t-1"},
    ),
    Client(
        "key and query of the call",
        lambda url: made("AsyncOpenAI", url),
        {**BEARER, "x-call-key": "c-1"},
        {"extra_headers": {"x-call-key": "c-1"}, "extra_query": {"call": "1"}},
    ),
    Client(
        "headers of a copy",
        lambda url: made("OpenAI", url).with_options(default_headers={"x-copy": "c-1"}),
        {**BEARER, "x-copy": "c-1"},
    ),
    Client(
        "path of its own",
        lambda url: made(
            "OpenAI", url, base_url=f"{url}/tenants/a b/v1/", default_query={"tenant": "t-1", "empty": ""}
        ),
        BEARER,
    ),
    # What the HTTP client adds.
    Client("auth", lambda url: made("OpenAI", url, http_client=HTTP.Client(auth=("u", KEY))), BASIC),
    Client(
        "auth, async",
        lambda url: made("AsyncOpenAI", url, http_client=HTTP.AsyncClient(auth=("u", KEY))),
        BASIC,
    ),
    Client(
        "auth of its own",
        lambda url: made("OpenAI", url, http_client=HTTP.Client(auth=Signed("Custom"))),
        {"authorization": f"Custom {KEY}"},
    ),
    Client(
        "headers and cookies",
        lambda url: made(
            "OpenAI", url, http_client=HTTP.Client(headers={"x-pool": "p-1"}, cookies={"session": KEY})
        ),
        {**BEARER, "x-pool": "p-1", "cookie": f"session={KEY}"},
    ),
    Client(
        "event hook",
        lambda url: made("OpenAI", url, http_client=HTTP.Client(event_hooks={"request": [_hook]})),
        {**BEARER, "x-hook-token": "h-1"},
    ),
    Client(
        "event hook, async",
        lambda url: made(
            "AsyncOpenAI", url, http_client=HTTP.AsyncClient(event_hooks={"request": [_async_hook]})
        ),
        {**BEARER, "x-hook-token": "h-1"},
    ),
    # Azure.
    Client("azure key", lambda url: made("AzureOpenAI", url, api_key=KEY), {"api-key": KEY}),
    Client("azure key, async", lambda url: made("AsyncAzureOpenAI", url, api_key=KEY), {"api-key": KEY}),
    Client("azure token", lambda url: made("AzureOpenAI", url, azure_ad_token=KEY), BEARER),
    Client(
        "azure token of a function",
        lambda url: made("AzureOpenAI", url, azure_ad_token_provider=Tokens()),
        FIRST,
    ),
    Client(
        "azure token of a function, async",
        lambda url: made("AsyncAzureOpenAI", url, azure_ad_token_provider=Tokens()),
        FIRST,
    ),
    Client(
        "azure token of a coroutine",
        lambda url: made("AsyncAzureOpenAI", url, azure_ad_token_provider=Tokens().later),
        FIRST,
    ),
    Client(
        "azure deployment",
        lambda url: made("AzureOpenAI", url, api_key=KEY, azure_deployment="d"),
        {"api-key": KEY},
    ),
    Client(
        "azure deployment of a copy",
        lambda url: made("AzureOpenAI", url, api_key=KEY, azure_deployment="d").with_options(timeout=9),
        {"api-key": KEY},
    ),
    Client(
        "azure deployment, token of a coroutine",
        lambda url: made(
            "AsyncAzureOpenAI", url, azure_deployment="d", azure_ad_token_provider=Tokens().later
        ),
        FIRST,
    ),
    # Others.
    Client(
        "bedrock key",
        lambda url: made("BedrockOpenAI", url, api_key=KEY),
        BEARER,
        needs=_has("BedrockOpenAI"),
    ),
    Client(
        "bedrock token of a function",
        lambda url: made("BedrockOpenAI", url, bedrock_token_provider=Tokens()),
        FIRST,
        needs=_has("BedrockOpenAI"),
    ),
    Client(
        "bedrock token of a coroutine",
        lambda url: made("AsyncBedrockOpenAI", url, bedrock_token_provider=Tokens().later),
        FIRST,
        needs=_has("BedrockOpenAI"),
    ),
    Client("workload identity", lambda url: of_workload("OpenAI", url), BEARER, needs=_since(2, 31)),
    Client(
        "workload identity, async", lambda url: of_workload("AsyncOpenAI", url), BEARER, needs=_since(2, 31)
    ),
)


@pytest.mark.parametrize("kind", CLIENTS, ids=str)
def test_the_look_up_is_made_with_what_the_call_was_made_with(
    kind: Client, server: ScriptedServer, door: Callable[..., Door], observed: Observed
) -> None:
    """Path, query, every header and the credentials as really sent: the GET has them, each once."""
    if not kind.needs():
        pytest.skip("not in this release of the SDK")
    front = door(lambda connection: (connection, b"", address_of(server)))
    read_cut(kind.make(f"http://{front.address}"), **kind.asked)
    get = looked_up(observed, server, front)
    assert {name: get.headers.get(name) for name in kind.carries} == kind.carries


# --- clients that go another way --------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A private certificate authority."""
    return trustme.CA()


def tls(server: ScriptedServer, authority: trustme.CA, *, asks_client: bool) -> Callable[..., Any]:
    """Speak TLS at the door, with certificates of this authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if asks_client:
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)

    def enter(connection: socket.socket) -> tuple[socket.socket, bytes, Any]:
        return context.wrap_socket(connection, server_side=True), b"", address_of(server)

    return enter


def proxy(connection: socket.socket) -> tuple[socket.socket, bytes, Any]:
    """Do as a forward proxy does: the request says where it goes to."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(1 << 16)
    method, target, _ = head.split(b" ", 2)
    url = urlsplit(f"//{target.decode()}" if method == b"CONNECT" else target.decode())
    if method == b"CONNECT":
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        return connection, b"", (url.hostname, url.port)
    return connection, head, (url.hostname, url.port)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def socks_proxy(connection: socket.socket) -> tuple[socket.socket, bytes, Any]:
    """Do as a SOCKS 5 proxy does that wants a name and a password."""
    reader = connection.makefile("rb", buffering=0)
    _, methods = reader.read(2)
    if 2 not in reader.read(methods):
        connection.sendall(b"\x05\xff")
        raise OSError("no credentials are offered")
    connection.sendall(b"\x05\x02")
    reader.read(1)
    user = reader.read(reader.read(1)[0])
    password = reader.read(reader.read(1)[0])
    if (user, password) != (b"user", KEY.encode()):
        raise OSError("wrong credentials")
    connection.sendall(b"\x01\x00")
    *_, kind = reader.read(4)
    host = socket.inet_ntoa(reader.read(4)) if kind == 1 else reader.read(reader.read(1)[0]).decode()
    port = int.from_bytes(reader.read(2), "big")
    connection.sendall(b"\x05\x00\x00\x01" + bytes(6))
    return connection, b"", (host, port)


# The kinds of HTTP client, by the SDK's client for them.
POOLS: dict[str, tuple[str, Callable[..., Any]]] = {
    "sync": ("OpenAI", HTTP.Client),
    "async": ("AsyncOpenAI", HTTP.AsyncClient),
    "aiohttp": ("AsyncOpenAI", lambda **how: openai.DefaultAioHttpClient(**how)),
    "other library": ("OpenAI", lambda **how: OTHER_HTTP.Client(**how)),
    "other library, async": ("AsyncOpenAI", lambda **how: OTHER_HTTP.AsyncClient(**how)),
}


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Make an SDK client over an HTTP client with these settings."""
    if request.param.startswith("other") and OTHER_HTTP is None:
        pytest.skip("this release of the SDK knows one HTTP library")
    if request.param == "aiohttp" and not hasattr(openai, "DefaultAioHttpClient"):
        pytest.skip("not in this release of the SDK")
    kind, http_client = POOLS[request.param]
    return lambda url, **settings: made(kind, url, http_client=http_client(**settings))


def trusting(authority: trustme.CA, *, has_certificate: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if has_certificate:
        authority.issue_cert("client@application").configure_cert(context)
    return context


@pytest.mark.parametrize("asks_client", [False, True], ids=["private authority", "client certificate"])
def test_the_look_up_trusts_whom_the_application_trusts(
    asks_client: bool,
    pool: Callable[..., Any],
    authority: trustme.CA,
    server: ScriptedServer,
    door: Callable[..., Door],
    observed: Observed,
) -> None:
    """The application's own TLS settings are used, its client certificate too."""
    front = door(tls(server, authority, asks_client=asks_client))
    read_cut(
        pool(f"https://{front.address}", verify=trusting(authority, has_certificate=asks_client)),
    )
    get = looked_up(observed, server, front)
    assert get.headers["authorization"] == BEARER["authorization"]


# aiohttp's own business with httpx-aiohttp.
@pytest.mark.filterwarnings("ignore:.*(BasicAuth|proxy_auth):DeprecationWarning")
def test_the_look_up_goes_through_the_proxy(
    pool: Callable[..., Any], server: ScriptedServer, door: Callable[..., Door], observed: Observed
) -> None:
    """With a proxy in the way, the GET passes it as the call did, with the proxy's own credentials."""
    front = door(proxy)
    read_cut(pool(server.url, proxy=f"http://user:{KEY}@{front.address}"))
    looked_up(observed, server, front)
    posted, get = front.requests
    assert posted.startswith(b"POST " + server.url.encode())
    assert get.startswith(b"GET " + server.url.encode())
    wanted = re.search(rb"(?i)proxy-authorization: Basic \S+", posted)
    assert wanted is not None
    assert wanted[0].lower() in get.lower()


def test_the_look_up_goes_through_the_proxy_s_tunnel(
    pool: Callable[..., Any],
    authority: trustme.CA,
    server: ScriptedServer,
    door: Callable[..., Door],
    observed: Observed,
) -> None:
    """To a server with TLS behind a proxy, the GET has a tunnel as the call had."""
    far, front = door(tls(server, authority, asks_client=False)), door(proxy)
    context = trusting(authority, has_certificate=False)
    read_cut(pool(f"https://{far.address}", proxy=f"http://{front.address}", verify=context))
    looked_up(observed, server, far)
    assert front.connections == 2
    assert server.connections == 2


def test_the_look_up_goes_through_the_proxy_of_the_environment(
    server: ScriptedServer, door: Callable[..., Door], observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that only the environment names is used as well."""
    front = door(proxy)
    monkeypatch.setenv("HTTP_PROXY", f"http://{front.address}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    client = made("OpenAI", server.url)
    monkeypatch.undo()
    read_cut(client)
    looked_up(observed, server, front)
    assert [head.split(b" ")[0] for head in front.requests] == [b"POST", b"GET"]


def test_the_look_up_goes_through_a_socks_proxy(
    server: ScriptedServer, door: Callable[..., Door], observed: Observed
) -> None:
    """A SOCKS proxy gets its name and password for the GET as well."""
    pytest.importorskip("socksio", reason="the HTTP library speaks SOCKS with it")
    front = door(socks_proxy)
    through = HTTP.Client(proxy=f"socks5://user:{KEY}@{front.address}")
    read_cut(made("OpenAI", server.url, http_client=through))
    looked_up(observed, server, front)


@pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 on this machine")
def test_the_look_up_goes_through_a_proxy_with_an_ipv6_address(
    server: ScriptedServer, door: Callable[..., Door], observed: Observed
) -> None:
    """A proxy may be named by an IPv6 address."""
    front = door(proxy, "::1")
    read_cut(made("OpenAI", server.url, http_client=HTTP.Client(proxy=f"http://{front.address}")))
    looked_up(observed, server, front)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_look_up_goes_through_the_unix_socket(
    kind: str, server: ScriptedServer, door: Callable[..., Door], observed: Observed, tmp_path: Path
) -> None:
    """A server behind a Unix socket is asked there, under the name the application calls it by."""
    uds = tmp_path / "door"
    front = door(lambda connection: (connection, b"", address_of(server)), uds)
    if kind == "sync":
        http_client = HTTP.Client(transport=HTTP.HTTPTransport(uds=str(uds)))
    else:
        http_client = HTTP.AsyncClient(transport=HTTP.AsyncHTTPTransport(uds=str(uds)))
    client = made("OpenAI" if kind == "sync" else "AsyncOpenAI", "http://api.test", http_client=http_client)
    read_cut(client)
    get = looked_up(observed, server, front)
    assert get.headers["host"] == "api.test"


@pytest.mark.parametrize("kind", ["sync", "async", "aiohttp"])
def test_the_look_up_comes_from_the_application_s_address(
    kind: str, server: ScriptedServer, door: Callable[..., Door], observed: Observed
) -> None:
    """An application that leaves by one of its machine's addresses is let in by it; the GET uses it, too."""
    clients: set[str] = set()

    def note(connection: socket.socket) -> tuple[socket.socket, bytes, Any]:
        clients.add(connection.getpeername()[0])
        return connection, b"", address_of(server)

    front = door(note)
    if kind == "sync":
        http_client = HTTP.Client(transport=HTTP.HTTPTransport(local_address="127.0.0.2"))
    elif kind == "async":
        http_client = HTTP.AsyncClient(transport=HTTP.AsyncHTTPTransport(local_address="127.0.0.2"))
    else:
        if not hasattr(openai, "DefaultAioHttpClient"):
            pytest.skip("not in this release of the SDK")
        http_client = openai.DefaultAioHttpClient()
        http_client._transport = type(http_client._transport)(local_address="127.0.0.2")
    client = made(
        "OpenAI" if kind == "sync" else "AsyncOpenAI", f"http://{front.address}", http_client=http_client
    )
    read_cut(client)
    looked_up(observed, server, front)
    assert clients == {"127.0.0.2"}


def test_the_look_up_goes_through_the_proxy_with_tls_of_its_own(
    authority: trustme.CA, server: ScriptedServer, door: Callable[..., Door], observed: Observed
) -> None:
    """A proxy that is spoken to by TLS is trusted as the application trusts it."""
    speak_tls = tls(server, authority, asks_client=False)
    front = door(lambda connection: proxy(speak_tls(connection)[0]))
    trust = trusting(authority, has_certificate=False)
    through = HTTP.Proxy(f"https://{front.address}", ssl_context=trust)
    read_cut(made("OpenAI", server.url, http_client=HTTP.Client(proxy=through)))
    looked_up(observed, server, front)


# --- clients whose way is not known -----------------------------------------------------------------


class Wrapping(HTTP.BaseTransport):  # type: ignore[misc]
    """A transport of the application's own, which may do anything to a request."""

    def __init__(self) -> None:
        self._inner = HTTP.HTTPTransport()

    def handle_request(self, request: Any) -> Any:
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


class Authorizing(HTTP.HTTPTransport):  # type: ignore[misc]
    """A transport that knows the credentials, while the client does not."""

    def handle_request(self, request: Any) -> Any:
        headers = [*request.headers.multi_items(), ("x-secret", KEY)]
        again = HTTP.Request(
            request.method, request.url, headers=headers, stream=request.stream, extensions=request.extensions
        )
        return super().handle_request(again)


class Pieces(HTTP.SyncByteStream):  # type: ignore[misc]
    """A body that breaks off."""

    def __iter__(self) -> Iterator[bytes]:
        for step in Reply.sse(ANSWER.events()[:5]).steps:
            yield step.data  # type: ignore[union-attr]
        raise HTTP.RemoteProtocolError("the end")


class AsyncPieces(HTTP.AsyncByteStream):  # type: ignore[misc]
    async def __aiter__(self) -> AsyncIterator[bytes]:
        for step in Reply.sse(ANSWER.events()[:5]).steps:
            yield step.data  # type: ignore[union-attr]
        raise HTTP.RemoteProtocolError("the end")


def _mock(request: Any) -> Any:
    assert request.method == "POST"
    return HTTP.Response(200, headers={"content-type": "text/event-stream"}, stream=Pieces())


async def _async_mock(request: Any) -> Any:
    assert request.method == "POST"
    return HTTP.Response(200, headers={"content-type": "text/event-stream"}, stream=AsyncPieces())


def _changed() -> Any:
    """A client whose transport handles requests with a function of the application."""
    client = HTTP.Client()
    original = client._transport.handle_request

    def handle_request(request: Any) -> Any:
        request.headers["x-secret"] = KEY
        return original(request)

    client._transport.handle_request = handle_request
    return client


def _derived_from_aiohttp() -> Any:
    """A client whose transport is derived from the one over aiohttp, and adds a header."""
    client = openai.DefaultAioHttpClient()
    base: Any = type(client._transport)

    class AuthorizingAiohttp(base):  # type: ignore[misc]
        async def handle_async_request(self, request: Any) -> Any:
            request.headers["x-secret"] = KEY
            return await super().handle_async_request(request)

    client._transport = AuthorizingAiohttp()
    return client


UNKNOWN: dict[str, tuple[str, Callable[[], Any]]] = {
    "wrapped": ("OpenAI", lambda: HTTP.Client(transport=Wrapping())),
    "derived": ("OpenAI", lambda: HTTP.Client(transport=Authorizing())),
    "mounted": ("OpenAI", lambda: HTTP.Client(mounts={"http://127.0.0.1": Authorizing()})),
    "changed": ("OpenAI", _changed),
    "derived from aiohttp": ("AsyncOpenAI", _derived_from_aiohttp),
    "mock": ("OpenAI", lambda: HTTP.Client(transport=HTTP.MockTransport(_mock))),
    "mock, async": ("AsyncOpenAI", lambda: HTTP.AsyncClient(transport=HTTP.MockTransport(_async_mock))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_transport_of_the_application_s_own_is_not_guessed(
    name: str, server: ScriptedServer, observed: Observed
) -> None:
    """What only the application's transport knows a GET of ours would lack: none is made."""
    kind, http_client = UNKNOWN[name]
    if "aiohttp" in name and not hasattr(openai, "DefaultAioHttpClient"):
        pytest.skip("not in this release of the SDK")
    read_cut(made(kind, server.url, http_client=http_client()))
    assert not_looked_up(observed, server) == "transport_error"
    attributes = observed.span().attributes or {}
    assert attributes["openai_responses.stream.outcome"] == "cut"
    assert attributes["openai_responses.stream.events"] == 5
    assert attributes["gen_ai.response.id"] == ANSWER.id


def test_a_transport_of_the_application_s_own_is_named_once(
    server: ScriptedServer, instrument: Instrument, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the class of an unknown transport at the first stream that is lost, and not again."""

    class NamedOnce(Authorizing):
        pass

    observed = instrument()
    for count in (1, 2):
        read_cut(made("OpenAI", server.url, http_client=HTTP.Client(transport=NamedOnce())))
        observed.spans(count)
    records = [record for record in caplog.records if record.name.startswith("otel_responses_usage")]
    assert [record.levelname for record in records] == ["WARNING"]
    assert f"{__name__}.{NamedOnce.__qualname__} " in records[0].getMessage()
    assert KEY not in caplog.text


def _answer(body: Any) -> Any:
    return HTTP.Response(200, headers={"content-type": "text/event-stream"}, stream=body)


@contextlib.contextmanager
def mocked(transport: type[Any], method: str) -> Iterator[None]:
    """Answer in place of a transport, as test tools for HTTP do."""
    original = getattr(transport, method)

    def handle(_: Any, request: Any) -> Any:
        assert request.method == "POST"
        return _answer(Pieces())

    async def handle_async(_: Any, request: Any) -> Any:
        assert request.method == "POST"
        return _answer(AsyncPieces())

    setattr(transport, method, handle if method == "handle_request" else handle_async)
    try:
        yield
    finally:
        setattr(transport, method, original)


MOCKED: dict[str, tuple[str, Callable[[], Any], Callable[[], type[Any]]]] = {
    "sync": ("OpenAI", HTTP.Client, lambda: HTTP.HTTPTransport),
    "async": ("AsyncOpenAI", HTTP.AsyncClient, lambda: HTTP.AsyncHTTPTransport),
    "aiohttp": (
        "AsyncOpenAI",
        lambda: openai.DefaultAioHttpClient(),
        lambda: type(openai.DefaultAioHttpClient()._transport),
    ),
}


@pytest.mark.parametrize("name", MOCKED)
def test_an_answer_that_no_connection_carried_is_not_looked_up(
    name: str, server: ScriptedServer, observed: Observed
) -> None:
    """A unit test that mocks the network makes no real request, even after the mock is gone."""
    kind, http_client, transport = MOCKED[name]
    if name == "aiohttp" and not hasattr(openai, "DefaultAioHttpClient"):
        pytest.skip("not in this release of the SDK")
    client = made(kind, server.url, http_client=http_client())

    async def main() -> None:
        method = "handle_request" if kind == "OpenAI" else "handle_async_request"
        with mocked(transport(), method):
            stream = await settle(client.responses.create(**ASKED, stream=True))
            await settle(anext(stream) if hasattr(stream, "__anext__") else next(stream))
        await settle(stream.close())
        await settle(client.close())

    asyncio.run(main())
    assert not_looked_up(observed, server) == "transport_error"
    assert server.connections == 0


# --- headers ----------------------------------------------------------------------------------------

OF_ONE_REQUEST = {
    **dict.fromkeys(("traceparent", "tracestate", "baggage", "b3", "x-b3-traceid", "x-b3-spanid"), "1"),
    **dict.fromkeys(("sentry-trace", "x-datadog-trace-id", "x-datadog-tags", "newrelic"), "2"),
    **dict.fromkeys(("x-amzn-trace-id", "uber-trace-id", "uberctx-user", "x-cloud-trace-context"), "3"),
    **dict.fromkeys(("elastic-apm-traceparent", "x-instana-t", "x-dynatrace", "ot-tracer-traceid"), "4"),
    **dict.fromkeys(("x-client-request-id", "x-request-id", "x-correlation-id", "request-id"), "5"),
    **dict.fromkeys(("helicone-request-id", "helicone-session-id", "x-ms-client-request-id"), "6"),
    **dict.fromkeys(("idempotency-key", "x-idempotency-key", "x-portkey-trace-id"), "7"),
    **dict.fromkeys(
        ("cf-aig-cache-key", "cf-aig-metadata", "x-litellm-tags", "x-stainless-helper-method"), "8"
    ),
    **dict.fromkeys(("x-anything-else", "if-none-match", "range", "prefer"), "9"),
}
OF_THE_ACCOUNT = {
    **dict.fromkeys(("api-key", "x-api-key", "x-goog-api-key", "ocp-apim-subscription-key"), KEY),
    **dict.fromkeys(("proxy-authorization", "x-serverless-authorization", "x-auth-token"), KEY),
    **dict.fromkeys(("helicone-auth", "cf-aig-authorization", "x-litellm-api-key"), KEY),
    **dict.fromkeys(("cf-access-client-id", "cf-access-client-secret", "x-client-secret"), KEY),
    **dict.fromkeys(("x-portkey-api-key", "x-portkey-config", "x-portkey-virtual-key"), KEY),
    **dict.fromkeys(("openai-organization", "openai-project", "openai-beta", "cookie"), "a"),
    **dict.fromkeys(("x-tenant-id", "x-workspace", "x-api-version", "helicone-target-url"), "b"),
}


def _get_of_a_call(server: ScriptedServer, observed: Observed, client: Any, **asked: Any) -> SeenRequest:
    read_cut(client, **asked)
    observed.span()
    _, (get,) = posts_and_gets(server)
    return get


@pytest.mark.parametrize("kind", ["OpenAI", "AsyncOpenAI"])
def test_headers_of_one_call_stay_behind_and_credentials_are_sent_again(
    kind: str, server: ScriptedServer, observed: Observed
) -> None:
    """Trace contexts and ids belong to one request. Credentials and accounts belong to the next one, too."""
    get = _get_of_a_call(
        server, observed, made(kind, server.url), extra_headers={**OF_ONE_REQUEST, **OF_THE_ACCOUNT}
    )
    assert get.headers.keys() & OF_ONE_REQUEST.keys() == set()
    assert {name: get.headers.get(name) for name in OF_THE_ACCOUNT} == OF_THE_ACCOUNT


DEFAULTS = {"X-Route": "eu", "HTTP-Referer": "https://app.test", "x-client-request-id": "of-the-client"}


@pytest.mark.parametrize(
    "make",
    [
        lambda url: made("OpenAI", url, default_headers=DEFAULTS),
        lambda url: made("AsyncOpenAI", url).with_options(default_headers=DEFAULTS),
        lambda url: made("OpenAI", url, http_client=HTTP.Client(headers=DEFAULTS)),
        lambda url: made("AsyncOpenAI", url, http_client=HTTP.AsyncClient(headers=DEFAULTS)),
    ],
    ids=["client", "copy", "HTTP client", "async HTTP client"],
)
def test_default_headers_are_sent_again(
    make: Callable[[str], Any], server: ScriptedServer, observed: Observed
) -> None:
    """Gateways choose a route by them, whatever they are called. What a call adds is not among them."""
    get = _get_of_a_call(server, observed, make(server.url), extra_headers={"x-call": "c-1"})
    assert {name: get.headers.get(name.lower()) for name in DEFAULTS} == DEFAULTS
    assert "x-call" not in get.headers


def test_a_default_header_that_a_call_has_replaced_is_sent_as_that_call_sent_it(
    server: ScriptedServer, observed: Observed
) -> None:
    """The response is where the call was routed to."""
    client = made("OpenAI", server.url, default_headers={"x-route": "eu"})
    get = _get_of_a_call(server, observed, client, extra_headers={"X-Route": "us"})
    assert get.headers["x-route"] == "us"


# --- what is written to logs ------------------------------------------------------------------------


# aiohttp's own business with httpx-aiohttp.
@pytest.mark.filterwarnings("ignore:.*(BasicAuth|proxy_auth):DeprecationWarning")
@pytest.mark.parametrize("way", ["direct", "proxy", "tunnel", "SOCKS proxy"])
def test_a_look_up_writes_nothing_to_the_log_of_the_http_library(
    way: str,
    authority: trustme.CA,
    server: ScriptedServer,
    door: Callable[..., Door],
    observed: Observed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At DEBUG the library writes a dozen lines for a request of the application, and none for a look-up."""
    if way == "SOCKS proxy":
        pytest.importorskip("socksio", reason="the HTTP library speaks SOCKS with it")
    url, settings = server.url, {}
    if way == "tunnel":
        url = f"https://{door(tls(server, authority, asks_client=False)).address}"
        settings = {"verify": trusting(authority, has_certificate=False)}
    if way in {"proxy", "tunnel"}:
        settings["proxy"] = f"http://{door(proxy).address}"
    elif way == "SOCKS proxy":
        settings["proxy"] = f"socks5://user:{KEY}@{door(socks_proxy).address}"
    with caplog.at_level(logging.DEBUG):
        read_cut(made("OpenAI", url, http_client=HTTP.Client(**settings)))
        assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)
        before = len(caplog.records)
        ResponsesUsageInstrumentor().uninstrument()
    core = HTTP.__name__.replace("httpx", "httpcore")
    of_the_library = [record for record in caplog.records if record.name.startswith(core)]
    assert {record.threadName for record in of_the_library} == {threading.current_thread().name}
    assert sum("send_request_headers.started" in record.message for record in of_the_library) >= 1
    assert not [record for record in of_the_library if "GET" in record.message]
    assert not [record for record in caplog.records[before:] if record.name.startswith(core)]
    for name, logger in logging.root.manager.loggerDict.items():
        assert not (name.startswith(core) and getattr(logger, "filters", None))


def test_a_signature_is_not_used_again(server: ScriptedServer, observed: Observed) -> None:
    """Credentials that sign one request open no other: no GET is made, and the span says so."""
    signed = Signed("AWS4-HMAC-SHA256 Credential=x, Signature=")
    read_cut(made("OpenAI", server.url, http_client=HTTP.Client(auth=signed)))
    assert not_looked_up(observed, server) == "unauthorized"


@pytest.mark.skipif(not hasattr(openai, "BedrockOpenAI"), reason="not in this release of the SDK")
@pytest.mark.parametrize("kind", ["BedrockOpenAI", "AsyncBedrockOpenAI"])
def test_bedrock_s_signature_is_not_used_again(kind: str, server: ScriptedServer, observed: Observed) -> None:
    """With AWS credentials every request is signed for itself: no GET is made, and the span says so."""
    pytest.importorskip("botocore", reason="the SDK signs with botocore")
    client = made(kind, server.url, aws_region="us-east-1", aws_access_key_id="id", aws_secret_access_key=KEY)
    read_cut(client)
    assert not_looked_up(observed, server) == "unauthorized"
    (posted,), _ = posts_and_gets(server)
    assert posted.headers["authorization"].startswith("AWS4-HMAC-SHA256")


def test_a_call_without_credentials_is_looked_up_without(serve: Serve, observed: Observed) -> None:
    """A server on the application's own machine may want no key: then the GET has none either."""

    def handler(request: SeenRequest) -> Reply:
        if request.method == "POST":
            return Reply.sse(ANSWER.events()[:5], end=Cut())
        return Reply.json(ANSWER.response())

    server = serve(handler)
    read_cut(made("OpenAI", server.url), extra_headers={"Authorization": Omit()})
    assert "authorization" not in server.requests[0].headers
    assert token_attributes(observed.span()) == usage_attributes(ANSWER.usage)
    (_,), (get,) = posts_and_gets(server)
    assert "authorization" not in get.headers

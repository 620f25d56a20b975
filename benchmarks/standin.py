"""A stand-in for the SDK's client that costs next to nothing, so that what remains is ours.

It has the two methods that the instrumentation wraps, and an HTTP response whose body is in memory. It
takes the place of `openai` in a process of its own, where the real one is then never imported.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import Any

_COMPACT = "/responses/compact"


class Headers(dict[str, str]):
    """The headers of an answer, of which the HTTP library has names and values as bytes, too."""

    def __init__(self) -> None:
        super().__init__(
            {
                "date": "Mon, 30 Nov 2026 10:00:00 GMT",
                "content-type": "text/event-stream; charset=utf-8",
                "transfer-encoding": "chunked",
                "connection": "keep-alive",
                "openai-version": "2020-10-01",
                "x-request-id": "req_0f3e4a5b6c7d8e9f",
                "openai-processing-ms": "87",
                "server": "cloudflare",
                "cf-ray": "8f0a1b2c3d4e5f60-FRA",
            }
        )
        self.raw = [(name.encode(), value.encode()) for name, value in self.items()]


HEADERS = Headers()


class URL:
    """As much of an HTTP library's URL as a call needs."""

    scheme, host, port, raw_path = "http", "127.0.0.1", 8080, b"/v1/responses"


class SyncByteStream:
    """A body; named as the class of the HTTP library that it stands for."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces

    def close(self) -> None:
        """Let go of nothing."""


class AsyncByteStream:
    """The same for an async client."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece

    async def aclose(self) -> None:
        """Let go of nothing."""


class BoundSyncStream(SyncByteStream):
    """What an HTTP library puts around a body, to know when it is closed."""

    def __init__(self, stream: SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        """Close the body."""
        self._stream.close()


class BoundAsyncStream(AsyncByteStream):
    """The same for an async client."""

    def __init__(self, stream: AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        stream: Any = self._stream.__aiter__()
        try:
            async for piece in stream:
                yield piece
        finally:
            await stream.aclose()

    async def aclose(self) -> None:
        """Close the body."""
        await self._stream.aclose()


def body(pieces: list[bytes]) -> BoundSyncStream:
    """Return the body of an answer as a sync client has it."""
    return BoundSyncStream(SyncByteStream(pieces))


def async_body(pieces: list[bytes]) -> BoundAsyncStream:
    """Return the body of an answer as an async client has it."""
    return BoundAsyncStream(AsyncByteStream(pieces))


class Request:
    """The HTTP request that was made."""

    method, url = "POST", URL()

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}


class Response:
    """An HTTP response whose body has not been read."""

    status_code, http_version = 200, "HTTP/1.1"
    is_stream_consumed = is_closed = False
    history: tuple[Response, ...] = ()

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.headers = HEADERS
        self.extensions: dict[str, Any] = {}
        self.request = Request()


class ReadResponse(Response):
    """An HTTP response whose body has been read."""

    is_stream_consumed = is_closed = True

    def __init__(self, content: bytes) -> None:
        super().__init__(None)
        self.content = content


class Options:
    """What the SDK calls the options of a request."""

    method = "post"
    params: dict[str, Any] = {}  # noqa: RUF012
    extra_json: dict[str, Any] | None = None
    content: bytes | None = None

    def __init__(self, url: str = "/responses") -> None:
        self.url = url
        self.headers: dict[str, str] = {}
        self.json_data: dict[str, Any] = {"model": "gpt-5.4-mini", "input": "hello"}
        if url != _COMPACT:
            self.json_data |= {"stream": True, "max_output_tokens": 100, "temperature": 0.5}


class ResponsesConnection:
    """A WebSocket connection of the SDK, as far as the instrumentation wraps it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection


class Responses:
    """The methods that an application calls. Other instrumentations wrap them."""

    def create(self) -> None:
        """Do nothing."""


class _Client:
    base_url = URL()
    _client = None

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def _process_response(self, **given: Any) -> Any:
        return given["response"]


class BaseClient:
    """What the SDK's clients have in common, as far as the instrumentation wraps it."""

    def _make_status_error_from_response(self, response: Response) -> Exception:
        raise NotImplementedError

    def _calculate_retry_timeout(self, *given: Any) -> float:
        raise NotImplementedError


class PlainSyncAPIClient(_Client):
    """A sync client that the instrumentation leaves alone."""

    def request(self, cast_to: object, options: Any, **_: Any) -> Any:
        """Answer with the body that the client was made with."""
        is_read = options.url == _COMPACT
        response = ReadResponse(self._pieces[0]) if is_read else Response(body(self._pieces))
        return self._process_response(cast_to=cast_to, options=options, response=response, stream=True)


class PlainAsyncAPIClient(_Client):
    """An async client that the instrumentation leaves alone."""

    async def request(self, cast_to: object, options: Any, **_: Any) -> Any:
        """Answer with the body that the client was made with."""
        is_read = options.url == _COMPACT
        response = ReadResponse(self._pieces[0]) if is_read else Response(async_body(self._pieces))
        return self._process_response(cast_to=cast_to, options=options, response=response, stream=True)


class SyncAPIClient(PlainSyncAPIClient):
    """The sync client, as far as the instrumentation wraps it."""


class AsyncAPIClient(PlainAsyncAPIClient):
    """The async client, as far as the instrumentation wraps it."""


_MODULES: dict[str, tuple[type, ...]] = {
    "openai": (),
    "openai._base_client": (BaseClient, SyncAPIClient, AsyncAPIClient),
    "openai.resources": (),
    "openai.resources.responses": (),
    "openai.resources.responses.responses": (Responses, ResponsesConnection),
}


def install() -> None:
    """Take the SDK's place in this process; refused where the real one is in it already."""
    if "openai" in sys.modules:
        raise RuntimeError("the real SDK has been imported")
    for name, classes in _MODULES.items():
        module = ModuleType(name)
        module.__path__ = []
        for each in classes:
            setattr(module, each.__name__, each)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
        sys.modules[name] = module


def drain(client: PlainSyncAPIClient) -> None:
    """Make a call and read its body to the end."""
    response = client.request(object, Options())
    for _ in response.stream:
        pass
    response.stream.close()


def compact(client: PlainSyncAPIClient) -> None:
    """Make a call that compacts a conversation. Its answer is not streamed."""
    client.request(object, Options(_COMPACT))


async def async_drain(client: PlainAsyncAPIClient) -> None:
    """Make a call and read its body to the end."""
    response = await client.request(object, Options())
    async for _ in response.stream:
        pass
    await response.stream.aclose()


def run(coroutine: Any) -> Any:
    """Run a coroutine that never waits, and return what it returns."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        return returned.value
    raise RuntimeError("it waits")

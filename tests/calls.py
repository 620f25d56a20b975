"""The ways an application can make a call and read its answer.

Each is written once, as a coroutine, and driven by both kinds of client: `settle`, `entered` and
`items` do with a sync client at once what they await with an async one. A sync client is driven without
an event loop, so what it does is what an application's thread would do.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai.resources.responses import Responses

SDK = tuple(int(number) for number in openai.__version__.split(".")[:3])


def since(*version: int) -> pytest.MarkDecorator:
    """Skip a test of what only later releases of the SDK have."""
    return pytest.mark.skipif(version > SDK, reason=f"not in openai {openai.__version__}")


# Whether the stream of a stored response can be asked for.
CAN_RESUME = "stream" in inspect.signature(Responses.retrieve).parameters
needs_resume = pytest.mark.skipif(not CAN_RESUME, reason="not in this release of the SDK")

# The HTTP library under this release of the SDK, and the one that it takes clients of as well, if it does.
HTTP: Any = importlib.import_module("httpx2" if SDK >= (3,) else "httpx")
_OTHER = "httpx" if SDK >= (3,) else "httpx2"
_HAS_OTHER = importlib.util.find_spec(_OTHER) and _OTHER in inspect.getsource(openai._base_client)
OTHER_HTTP: Any = importlib.import_module(_OTHER) if _HAS_OTHER else None
# What the application sees of a connection that breaks: the SDK's own, and in older releases the library's.
CUT: tuple[type[Exception], ...] = (
    openai.APIConnectionError,
    *(library.TransportError for library in (HTTP, OTHER_HTTP) if library is not None),
)

MODEL = "gpt-5.4-mini"
PROMPT = "canary-of-the-prompt"


async def settle(value: Any) -> Any:
    """What a call of either client comes to."""
    return await value if inspect.isawaitable(value) else value


class Dropped(Exception):  # noqa: N818  # it is nobody's error
    """Raised by an application that just lets go of what it holds: nothing is closed on its way."""


@contextlib.asynccontextmanager
async def entered(manager: Any) -> AsyncIterator[Any]:
    """`with` or `async with`, whichever the object is for."""
    is_async = hasattr(manager, "__aenter__")
    leave = manager.__aexit__ if is_async else manager.__exit__
    value = await settle(manager.__aenter__() if is_async else manager.__enter__())
    try:
        yield value
    except Dropped:
        raise
    except BaseException as error:
        if not await settle(leave(type(error), error, error.__traceback__)):
            raise
    else:
        await settle(leave(None, None, None))


async def items(source: Any) -> AsyncIterator[Any]:
    """`for` or `async for`."""
    if hasattr(source, "__aiter__"):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item


class Reader:
    """An answer being read: `take` reads until some events have passed, `rest` to the end."""

    def __init__(self, source: Any, close: Callable[[], Any], events_in: Callable[[Any], int]) -> None:
        # No generator of ours goes around it: a loop would hold one that is dropped half-read.
        self._items = source.__aiter__() if hasattr(source, "__aiter__") else iter(source)
        self._close = close
        self._events_in = events_in
        self.seen: list[Any] = []
        self.seen_at: list[float] = []
        self.passed = 0  # events, in what was seen

    async def take(self, events: int) -> None:
        wanted = self.passed + events
        while self.passed < wanted:
            self._see(await self._next())

    async def rest(self) -> None:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                self._see(await self._next())

    async def _next(self) -> Any:
        try:
            return await settle(
                self._items.__anext__() if hasattr(self._items, "__anext__") else next(self._items)
            )
        except StopIteration:
            raise StopAsyncIteration from None

    def _see(self, item: Any) -> None:
        self.seen.append(item)
        events = self._events_in(item)
        if events:  # lines and pieces may have none
            self.seen_at.append(time.time())
        self.passed += events

    async def close(self) -> None:
        await settle(self._close())


def _one(_: Any) -> int:
    return 1


class _Events:
    """Counts the events of a body that comes in any pieces: a line of data, and a blank one at some time."""

    def __init__(self) -> None:
        self._rest = b""
        self._has_data = False

    def in_bytes(self, piece: bytes) -> int:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = 0
        for line in lines:
            if line.startswith(b"data:"):
                self._has_data = not line.startswith(b"data: [DONE]")
            elif not line.rstrip(b"\r"):
                events += self._has_data
                self._has_data = False
        return events

    def in_text(self, piece: str) -> int:
        return self.in_bytes(piece.encode())

    def in_line(self, line: str) -> int:
        return self.in_text(f"{line}\n")


Opened = contextlib.AbstractAsyncContextManager[Reader]


@contextlib.asynccontextmanager
async def _stream(stream: Any) -> AsyncIterator[Reader]:
    async with entered(stream):
        yield Reader(stream, stream.close, _one)


@contextlib.asynccontextmanager
async def create(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    async with _stream(await settle(client.responses.create(**asked, stream=True))) as reader:
        yield reader


@contextlib.asynccontextmanager
async def extra_body(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    model = asked.pop("model")
    call = client.responses.create(**asked, model="not-this-one", stream=True, extra_body={"model": model})
    async with _stream(await settle(call)) as reader:
        yield reader


@contextlib.asynccontextmanager
async def manager(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    async with entered(client.responses.stream(**asked)) as stream:
        yield Reader(stream, stream.close, _one)


@contextlib.asynccontextmanager
async def with_options(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    async with create(client.with_options(max_retries=0), **asked) as reader:
        yield reader


@contextlib.asynccontextmanager
async def raw(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    response = await settle(client.responses.with_raw_response.create(**asked, stream=True))
    async with _stream(response.parse()) as reader:
        yield reader


@contextlib.asynccontextmanager
async def raw_twice(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    """Parsed a second time, to another type of event."""
    response = await settle(client.responses.with_raw_response.create(**asked, stream=True))
    response.parse()
    kind = openai.AsyncStream if isinstance(client, openai.AsyncOpenAI) else openai.Stream
    async with _stream(response.parse(to=kind[object])) as reader:
        yield reader


@contextlib.asynccontextmanager
async def streaming(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    call = client.responses.with_streaming_response.create(**asked, stream=True)
    async with entered(call) as response:
        stream = await settle(response.parse())
        yield Reader(stream, stream.close, _one)


def _read_by(method: str, events_in: Callable[[_Events, Any], int]) -> Callable[..., Opened]:
    @contextlib.asynccontextmanager
    async def call(client: Any, **asked: Any) -> AsyncIterator[Reader]:
        made = client.responses.with_streaming_response.create(**asked, stream=True)
        async with entered(made) as response:
            yield Reader(getattr(response, method)(), response.close, functools.partial(events_in, _Events()))

    return call


@contextlib.asynccontextmanager
async def beta(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    async with _stream(await settle(client.beta.responses.create(**asked, stream=True))) as reader:
        yield reader


@contextlib.asynccontextmanager
async def post(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    kind = openai.AsyncStream if isinstance(client, openai.AsyncOpenAI) else openai.Stream
    call = client.post(
        "/responses",
        body={**asked, "stream": True},
        cast_to=object,
        stream=True,
        stream_cls=kind[object],
    )
    async with _stream(await settle(call)) as reader:
        yield reader


@contextlib.asynccontextmanager
async def resume(client: Any, **asked: Any) -> AsyncIterator[Reader]:
    """No call but a fetch: what is left of the stream of a call that somebody has made."""
    async with _stream(await settle(client.responses.retrieve(**asked, stream=True))) as reader:
        yield reader


@functools.cache
def is_in_sdk(attribute: str) -> bool:
    """Whether the client of the SDK that is installed has this attribute, which may be dotted."""
    owner: Any = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1")
    for name in attribute.split("."):
        owner = getattr(owner, name, None)
    return owner is not None


@dataclass(frozen=True)
class Call:
    """A way of calling, and which SDK has it."""

    name: str
    open: Callable[..., Opened]
    needs: str = "responses"  # attribute of the client, dotted
    reads_events: bool = True

    def __str__(self) -> str:
        return self.name

    def is_in_sdk(self) -> bool:
        """Whether the SDK that is installed has it."""
        return is_in_sdk(self.needs)


CALLS = (
    Call("create", create),
    Call("extra_body", extra_body),
    Call("manager", manager),
    Call("with_options", with_options),
    Call("raw", raw),
    Call("raw_twice", raw_twice),
    Call("streaming", streaming),
    Call("iter_bytes", _read_by("iter_bytes", _Events.in_bytes), reads_events=False),
    Call("iter_text", _read_by("iter_text", _Events.in_text), reads_events=False),
    Call("iter_lines", _read_by("iter_lines", _Events.in_line), reads_events=False),
    Call("beta", beta, needs="beta.responses"),
    Call("post", post),
)

Driver = Callable[[Callable[[], Awaitable[None]]], None]

"""An application whose HTTP transports are wrapped, in an environment that has the packages of the wrappers.

`wrapped.py LIBRARY URL` makes one call with each client, over the HTTP library `httpx` or `httpx2`. Each call
goes to a path with the name of its client. The program prints the spans and log records of each call as JSON.
It leaves the files of caches in its working directory.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

MakeClient = Callable[[Any, str], Any]
"""Makes an HTTP client of a library. The second argument is the URL of the server."""

# By name. A look-up uses the library's own transport inside of the first kind.
KNOWN: dict[str, MakeClient] = {}
UNKNOWN: dict[str, MakeClient] = {}
# Clients that exist for one library only.
ONLY: dict[str, str] = {}
TRACED = "traced"
"""The clients with this word in their names trace their requests."""


def known(make: MakeClient) -> MakeClient:
    KNOWN[make.__name__] = make
    return make


def unknown(make: MakeClient) -> MakeClient:
    UNKNOWN[make.__name__] = make
    return make


def only(library: str) -> Callable[[MakeClient], MakeClient]:
    def note(make: MakeClient) -> MakeClient:
        ONLY[make.__name__] = library
        return make

    return note


# --- the packages -----------------------------------------------------------------------------------


def opentelemetry(http: Any) -> tuple[Any, Any]:
    """The sync and the async transport of OpenTelemetry."""
    from opentelemetry.instrumentation import httpx as package

    suffix = "Httpx2" if http.__name__ == "httpx2" else ""
    return tuple(getattr(package, f"{kind}OpenTelemetryTransport{suffix}") for kind in ("Sync", "Async"))


def instrumentor(http: Any) -> Any:
    from opentelemetry.instrumentation import httpx as package

    return package.HTTPX2ClientInstrumentor if http.__name__ == "httpx2" else package.HTTPXClientInstrumentor


def hishel(http: Any) -> tuple[Any, Any]:
    """The package's part for this library, and a function that makes the storage."""
    import hishel

    package = importlib.import_module(f"hishel.{http.__name__}")
    return package, lambda kind: getattr(hishel, kind)(database_path=f"{kind}.db")


def tenacity(http: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The sync and the async transport of pydantic-ai, and their settings."""
    from pydantic_ai import retries
    from tenacity import stop_after_attempt

    infix = "HTTPX2" if http.__name__ == "httpx2" else ""
    warnings.filterwarnings("ignore", "`(Async)?TenacityTransport` is deprecated")
    return (
        getattr(retries, f"{infix}TenacityTransport"),
        getattr(retries, f"Async{infix}TenacityTransport"),
        {"stop": stop_after_attempt(2), "reraise": True},
    )


# --- known wrappers ---------------------------------------------------------------------------------


@known
def traced(http: Any, _: str) -> Any:
    return http.Client(transport=opentelemetry(http)[0](http.HTTPTransport()))


@known
def traced_async(http: Any, _: str) -> Any:
    return http.AsyncClient(transport=opentelemetry(http)[1](http.AsyncHTTPTransport()))


@known
def traced_mount(http: Any, url: str) -> Any:
    return http.Client(mounts={url: opentelemetry(http)[0](http.HTTPTransport())})


@known
def traced_mount_async(http: Any, url: str) -> Any:
    return http.AsyncClient(mounts={url: opentelemetry(http)[1](http.AsyncHTTPTransport())})


@known
def traced_proxy(http: Any, url: str) -> Any:
    """The server is its own proxy."""
    return http.Client(transport=opentelemetry(http)[0](http.HTTPTransport(proxy=url)))


@known
def traced_by_instrument_client(http: Any, _: str) -> Any:
    client = http.Client()
    instrumentor(http).instrument_client(client)
    return client


@known
def traced_and_retried_by_instrument_client(http: Any, _: str) -> Any:
    transport, _, config = tenacity(http)
    client = http.Client(transport=transport(config, wrapped=http.HTTPTransport()))
    instrumentor(http).instrument_client(client)
    return client


@known
def traced_by_instrument(http: Any, url: str) -> Any:
    """The HTTP library's own transports are patched, also those of the look-ups, which a proxy needs."""
    instrumentor(http)().instrument()
    return http.Client(transport=http.HTTPTransport(proxy=url))


@known
def traced_aiohttp(http: Any, _: str) -> Any:
    import openai

    if http.__name__ == "httpx2":
        inner = openai.DefaultAioHttpClient()._transport
    else:
        from httpx_aiohttp import AiohttpTransport

        inner = AiohttpTransport()
    return http.AsyncClient(transport=opentelemetry(http)[1](inner))


@known
@only("httpx")
def httpx_retries(http: Any, _: str) -> Any:
    from httpx_retries import RetryTransport

    return http.Client(transport=RetryTransport())


@known
@only("httpx")
def httpx_retries_async(http: Any, _: str) -> Any:
    from httpx_retries import RetryTransport

    return http.AsyncClient(transport=RetryTransport())


@known
@only("httpx")
def httpx_retries_of_a_transport(http: Any, url: str) -> Any:
    from httpx_retries import RetryTransport

    return http.Client(transport=RetryTransport(http.HTTPTransport(proxy=url)))


@known
@only("httpx")
def traced_httpx_retries(http: Any, _: str) -> Any:
    from httpx_retries import RetryTransport

    return http.AsyncClient(transport=opentelemetry(http)[1](RetryTransport(http.AsyncHTTPTransport())))


@known
def hishel_cache(http: Any, _: str) -> Any:
    package, storage = hishel(http)
    return http.Client(transport=package.CacheTransport(http.HTTPTransport(), storage("SqliteStorage")))


@known
def hishel_cache_async(http: Any, _: str) -> Any:
    package, storage = hishel(http)
    inner = http.AsyncHTTPTransport()
    return http.AsyncClient(transport=package.AsyncCacheTransport(inner, storage("AsyncSqliteStorage")))


@known
def hishel_by_rfc(http: Any, _: str) -> Any:
    package, storage = hishel(http)
    inner = http.HTTPTransport()
    return http.Client(transport=package.CacheTransport(inner, storage("SqliteStorage"), rfc=True))


@known
def hishel_by_rfc_async(http: Any, _: str) -> Any:
    package, storage = hishel(http)
    transport = package.AsyncCacheTransport(
        http.AsyncHTTPTransport(), storage("AsyncSqliteStorage"), rfc=True
    )
    return http.AsyncClient(transport=transport)


@known
def hishel_client(http: Any, _: str) -> Any:
    package, storage = hishel(http)
    return package.CacheClient(storage=storage("SqliteStorage"))


@known
def pydantic_ai(http: Any, _: str) -> Any:
    transport, _, config = tenacity(http)
    return http.Client(transport=transport(config, wrapped=http.HTTPTransport()))


@known
def pydantic_ai_async(http: Any, _: str) -> Any:
    _, transport, config = tenacity(http)
    return http.AsyncClient(transport=transport(config, wrapped=http.AsyncHTTPTransport()))


@known
def traced_pydantic_ai_over_hishel(http: Any, _: str) -> Any:
    transport, _, config = tenacity(http)
    package, storage = hishel(http)
    cache = package.CacheTransport(http.HTTPTransport(), storage("SqliteStorage"))
    return http.Client(transport=opentelemetry(http)[0](transport(config, wrapped=cache)))


@known
@only("httpx")
def httpx_retry(http: Any, _: str) -> Any:
    from httpx_retry import RetryTransport

    return http.Client(transport=RetryTransport())


@known
@only("httpx")
def httpx_retry_async(http: Any, _: str) -> Any:
    from httpx_retry import AsyncRetryTransport

    return http.AsyncClient(transport=AsyncRetryTransport())


@known
@only("httpx")
def httpx_tenacity(http: Any, _: str) -> Any:
    from httpx_tenacity import TenaciousTransport

    return http.Client(transport=TenaciousTransport.create())


@known
@only("httpx")
def httpx_tenacity_async(http: Any, _: str) -> Any:
    from httpx_tenacity import AsyncTenaciousTransport

    return http.AsyncClient(transport=AsyncTenaciousTransport.create())


# --- unknown transports -----------------------------------------------------------------------------


def authorizing(base: Any) -> Any:
    """A subclass that adds a header to a request."""

    class Authorizing(base):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            request.headers["x-added"] = "canary"
            return super().handle_request(request)

    return Authorizing


@unknown
def traced_by_a_subclass(http: Any, _: str) -> Any:
    return http.Client(transport=authorizing(opentelemetry(http)[0])(http.HTTPTransport()))


@unknown
def traced_by_an_empty_subclass(http: Any, _: str) -> Any:
    class Empty(opentelemetry(http)[0]):  # type: ignore[misc]
        pass

    return http.Client(transport=Empty(http.HTTPTransport()))


@unknown
def traced_by_a_class_of_the_same_name(http: Any, _: str) -> Any:
    original = opentelemetry(http)[0]
    subclass = authorizing(original)
    subclass.__module__, subclass.__qualname__ = original.__module__, original.__qualname__
    return http.Client(transport=subclass(http.HTTPTransport()))


@unknown
def traced_over_an_unknown_transport(http: Any, _: str) -> Any:
    return http.Client(transport=opentelemetry(http)[0](authorizing(http.HTTPTransport)()))


@unknown
def traced_and_changed(http: Any, _: str) -> Any:
    """The application has replaced the method of one wrapper."""
    transport = opentelemetry(http)[0](http.HTTPTransport())
    original = transport.handle_request

    def handle_request(request: Any) -> Any:
        request.headers["x-added"] = "canary"
        return original(request)

    transport.handle_request = handle_request
    return http.Client(transport=transport)


@unknown
def traced_too_often(http: Any, _: str) -> Any:
    transport = http.HTTPTransport()
    for _ in range(9):
        transport = opentelemetry(http)[0](transport)
    return http.Client(transport=transport)


@unknown
@only("httpx")
def httpx_retries_by_a_subclass(http: Any, _: str) -> Any:
    from httpx_retries import RetryTransport

    return http.Client(transport=authorizing(RetryTransport)())


@unknown
def hishel_by_a_subclass(http: Any, _: str) -> Any:
    package, storage = hishel(http)
    transport = authorizing(package.CacheTransport)(http.HTTPTransport(), storage("SqliteStorage"))
    return http.Client(transport=transport)


@unknown
def pydantic_ai_by_a_subclass(http: Any, _: str) -> Any:
    transport, _, config = tenacity(http)
    return http.Client(transport=authorizing(transport)(config, wrapped=http.HTTPTransport()))


@unknown
@only("httpx")
def httpx_limiter(http: Any, _: str) -> Any:
    """A look-up that went round it could break a limit."""
    from httpx_limiter import AsyncRateLimitedTransport, Rate
    from httpx_limiter.aiolimiter import AiolimiterAsyncLimiter

    limiter = AiolimiterAsyncLimiter.create(Rate.create(magnitude=9))
    return http.AsyncClient(transport=AsyncRateLimitedTransport.create(limiter=limiter))


# --- the program ------------------------------------------------------------------------------------


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "otel_responses_usage.story":  # each call has one
            self.texts.append(f"{record.levelname} {record.getMessage()}")


async def settle(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def call(client: Any, errors: tuple[type[Exception], ...]) -> None:
    """Make one streamed call. The server cuts it, and one of these errors is raised."""
    try:
        stream = await settle(client.responses.create(model="m", input="x", stream=True))
        if hasattr(stream, "__aiter__"):
            async for _ in stream:
                pass
        else:
            for _ in stream:
                pass
    except errors:
        return
    finally:
        await settle(client.close())
    raise AssertionError("the stream was not cut")


def play(http: Any, url: str, name: str, make: MakeClient) -> dict[str, Any]:
    """Make a call and return its spans and log records, or an error."""
    import openai
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.util._once import Once

    from otel_responses_usage import ResponsesUsageInstrumentor

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace._TRACER_PROVIDER, trace._TRACER_PROVIDER_SET_ONCE = None, Once()
    trace.set_tracer_provider(provider)
    ResponsesUsageInstrumentor().instrument()
    records = Records()
    logger = logging.getLogger("otel_responses_usage")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(records)
    try:
        http_client = make(http, url)
        kind = openai.AsyncOpenAI if isinstance(http_client, http.AsyncClient) else openai.OpenAI
        base_url = f"{url}/{name}/v1"
        client = kind(base_url=base_url, api_key="key", max_retries=0, http_client=http_client)
        asyncio.run(call(client, (openai.APIConnectionError, http.TransportError)))
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        ResponsesUsageInstrumentor().uninstrument()  # waits for the look-up
        logger.removeHandler(records)
        if instrumentor(http)().is_instrumented_by_opentelemetry:
            instrumentor(http)().uninstrument()
    return {
        "spans": [
            [span.instrumentation_scope.name, span.name, dict(span.attributes)]
            for span in spans.get_finished_spans()
        ],
        "log": records.texts,
    }


def main(library: str, url: str) -> None:
    http = importlib.import_module(library)
    played = {
        name: play(http, url, name, make)
        for name, make in [*KNOWN.items(), *UNKNOWN.items()]
        if ONLY.get(name, library) == library
    }
    sys.stdout.write(json.dumps(played))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Calls over HTTP: wraps two methods of the SDK's clients that every call uses."""

from __future__ import annotations

import functools
import json
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from opentelemetry import context, trace
from opentelemetry.instrumentation.utils import is_instrumentation_enabled

from .. import _fault
from .._call.invocation import Invocation
from .._call.ledger import Ledger
from .._facts.outcome import CLOSED
from .._facts.request import (
    ResponsesRequest,
    Server,
    describe_create,
    describe_fetch,
    fetched_response_id,
    is_create,
    returned_response_id,
)
from .._facts.response import Response, is_response_object
from .._facts.usage import MissingReason
from .._lookup.imports import late_import
from ._tap import tap

if TYPE_CHECKING:
    from ._target import Target

Wrapped = Callable[..., Any]


class _RequestScope:
    """The scope in which the SDK makes a request. An HTTP response in this context belongs to its call.

    Scopes can be nested: a callback of the application may make requests, too, even requests without a span.
    """

    __slots__ = ("_outer", "_token", "invocation")

    def __init__(self, invocation: Invocation | None) -> None:
        self.invocation = invocation

    def __enter__(self) -> None:
        self._outer = _current_scope.get()
        _current_scope.set(self)
        self._token = None
        if self.invocation is not None:
            self._token = context.attach(trace.set_span_in_context(self.invocation.span))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The garbage collector may close an unfinished coroutine at any point: in a foreign context, during
        # another call, or while a thread holds the lock that `span.end()` needs.
        if _current_scope.get() is self:
            _current_scope.set(self._outer)
            if self._token is not None:
                context.detach(self._token)
        if self.invocation is None:
            return
        if isinstance(error, GeneratorExit):
            self.invocation.on_garbage_collected()
        elif error is not None:
            self.invocation.on_raise(error)
        else:
            self.invocation.on_return()


_NO_SCOPE: Final = _RequestScope(None)
_current_scope: Final[ContextVar[_RequestScope]] = ContextVar(
    "otel_responses_usage.request_scope", default=_NO_SCOPE
)


class HttpSurface:
    """Wrappers for two methods: `request` makes a call, `_process_response` receives the HTTP response.

    Every call uses both, and `request` once. This includes `create`, `parse`, `stream`, `retrieve`, and raw
    and streaming responses. It includes Azure clients, copied clients, and methods that were stored before
    `instrument()`.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def request(self, wrapped: Wrapped, client: Any, args: Any, kwargs: Any) -> Any:
        """Make a call, with its span as the current span."""
        scope = self._open_scope(client, args, kwargs)
        if scope is None:
            return wrapped(*args, **kwargs)
        with scope:
            return wrapped(*args, **kwargs)

    async def async_request(self, wrapped: Wrapped, client: Any, args: Any, kwargs: Any) -> Any:
        """Make a call, with its span as the current span."""
        scope = self._open_scope(client, args, kwargs)
        if scope is None:
            return await wrapped(*args, **kwargs)
        with scope:
            return await wrapped(*args, **kwargs)

    def process_response(self, wrapped: Wrapped, client: Any, args: Any, kwargs: Any) -> Any:
        """Read the HTTP response before the SDK does.

        This one wrapper is for both clients: it awaits nothing itself.
        """
        invocation = _current_scope.get().invocation
        try:
            if invocation is not None:
                _attach(invocation, client, kwargs["response"])
            elif self._ledger.has_pending:
                self._observe(client, kwargs["options"], kwargs["response"])
        except Exception:
            _fault.report("looking at an answer")
            if invocation is not None:
                invocation.finish(CLOSED)  # the answer cannot be read any more
        return wrapped(*args, **kwargs)

    def _observe(self, client: Any, options: Any, response: Any) -> None:
        """Use the answer to a call without a span if it contains a response with a pending look-up."""
        path, _, _ = options.url.partition("?")
        response_id = returned_response_id(options.method, path) if "responses" in path else None
        if response_id is None:
            return
        server = _server(client, options.url)
        if self._ledger.is_pending(server, unquote(response_id)) and _is_body_read(response):
            document = response.json()
            if isinstance(document, dict) and is_response_object(document):
                # The answer may show the response under another id.
                shown = Response.from_json(document)._replace(id=unquote(response_id))
                self._ledger.observe(server, shown)

    def _open_scope(self, client: Any, args: Any, kwargs: Any) -> _RequestScope | None:
        """Open a call and return the scope for its request.

        The scope has no invocation if the call is not recorded but runs inside of another one. The result is
        `None` if no scope is needed.
        """
        invocation = None
        try:
            if not self._ledger.accepts_calls:
                return None  # this instrumentation is off; the outer scope may belong to another one
            if is_instrumentation_enabled():
                request = _describe_request(client, kwargs["options"] if "options" in kwargs else args[1])
                invocation = None if request is None else self._ledger.open(request)
        except Exception:
            _fault.report("opening a call")
        return None if invocation is None and _current_scope.get() is _NO_SCOPE else _RequestScope(invocation)


class _TargetFactory:
    """Makes the look-up target for a response id. Each open stream has one.

    It keeps no reference to the clients: a dropped client must close its connections at once, in its own
    thread. It keeps no reference to the request, which contains the prompt. The default headers belong to
    the clients, and all their streams share them.
    """

    __slots__ = ("_client_class", "_client_headers", "_default_headers", "_headers", "_transport", "_url")

    def __init__(self, client: Any, request: Any) -> None:
        http_client = client._client  # noqa: SLF001
        choose = getattr(http_client, "_transport_for_url", None)
        self._transport = choose(request.url) if choose is not None else None
        self._client_class = type(http_client)
        self._url = request.url
        self._headers = request.headers
        self._default_headers = getattr(client, "_custom_headers", ())
        self._client_headers = getattr(http_client, "headers", ())

    def __call__(self, response_id: str) -> Target | MissingReason:
        with late_import:
            from ._target import make_target
        default_names = (*self._default_headers, *self._client_headers)
        return make_target(
            self._transport, self._client_class, self._url, self._headers, default_names, response_id
        )


def _no_target(response_id: str) -> MissingReason:  # noqa: ARG001  # called like a `_TargetFactory`
    """Return the reason for an answer that no connection carried: a test has mocked the transport."""
    return MissingReason.TRANSPORT_ERROR


def _attach(invocation: Invocation, client: Any, response: Any) -> None:
    first = response.history[0] if response.history else response
    make_target = _TargetFactory(client, first.request) if _has_connection(response) else _no_target
    if not invocation.on_answer(make_target):
        return
    if _is_body_read(response):
        invocation.on_document(response.content)
    else:
        tap(response, invocation)


def _has_connection(response: Any) -> bool:
    """Return whether a connection carried the answer. A mocked transport makes its answers itself."""
    if "network_stream" in response.extensions:
        return True
    # aiohttp behind the interface of the HTTP library
    stream = getattr(response.stream, "_stream", None)
    return getattr(getattr(stream, "_aiohttp_response", None), "_protocol", None) is not None


def _is_body_read(response: Any) -> bool:
    return bool(response.is_stream_consumed or response.is_closed)


def _describe_request(client: Any, options: Any) -> ResponsesRequest | None:
    """Return the parameters of the call with these options, or `None` if it is not a Responses call."""
    path, _, _ = options.url.partition("?")
    if "responses" not in path:
        return None
    if is_create(options.method, path):
        return describe_create(_body(options), _server(client, options.url))
    response_id = fetched_response_id(options.method, path)
    query = options.params if isinstance(options.params, Mapping) else {}
    if response_id is not None and query.get("stream") in (True, "true"):
        return describe_fetch(unquote(response_id), query, _server(client, options.url))
    return None


def _body(options: Any) -> Mapping[str, Any]:
    """Return the request body as it will be sent: `extra_body` overrides the named arguments."""
    body: Any = options.json_data if options.json_data is not None else getattr(options, "content", None)
    if isinstance(body, (bytes, str)):
        try:
            body = json.loads(body)
        except ValueError:
            body = None
    elif hasattr(body, "model_dump"):
        body = body.model_dump()
    body = {} if body is None else body
    extra = options.extra_json
    if isinstance(body, dict):  # the common case, with the faster check
        return ChainMap(extra, body) if isinstance(extra, dict) else body
    return body if isinstance(body, Mapping) else {}


def _server(client: Any, url: str) -> Server:
    base = client.base_url if "://" not in url else type(client.base_url)(url)
    client_class: type = type(client)
    return Server.from_url_parts(base.host, base.port, base.scheme, azure=_is_azure(client_class))


@functools.lru_cache(maxsize=64)
def _is_azure(client_class: type) -> bool:
    return any(cls.__name__ == "BaseAzureClient" for cls in client_class.__mro__)

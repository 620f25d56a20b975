"""Calls over HTTP: wraps the methods of the SDK's clients that every call uses."""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote

from opentelemetry.instrumentation.utils import is_instrumentation_enabled

from .. import _fault
from .._call.invocation import Invocation, is_api_error
from .._call.ledger import Ledger
from .._facts.headers import AnswerHeaders
from .._facts.outcome import CLOSED
from .._facts.request import returned_response_id
from .._facts.response import Response, is_response_object
from ._classes import ClientClasses
from ._describe import describe_http_request, describe_options, server_of
from ._opening import CallOpener
from ._reading import call_when_read
from ._scope import NO_SCOPE, RequestScope, current_scope
from ._tap import tap
from ._target_factory import TargetFactory, no_target

Wrapped = Callable[..., Any]

_SDK_CLIENT_MODULE: Final = "openai._base_client"
_MAX_CONSTRUCTORS: Final = 4

_logger = logging.getLogger("otel_responses_usage")


class HttpSurface:
    """Wrappers for methods that every call of the SDK's clients uses.

    `request` makes a call, and `_process_response` receives the HTTP response. Each call uses them once. This
    includes `create`, `parse`, `stream`, `retrieve`, and raw and streaming responses. It includes Azure
    clients, copied clients, and methods that were stored before `instrument()`.

    Another package may have stored the SDK's own `request` before `instrument()`, and call that one. Such a
    call is noticed when its answer is processed, or when the SDK makes an error of it. From then on the
    client's own way of calling is wrapped, too: see `ClientClasses`.

    Attributes:
        classes: Wraps the `request` of client classes that have their own.

    """

    def __init__(self, ledger: Ledger, opener: CallOpener) -> None:
        self._ledger = ledger
        self._opener = opener
        self._has_warned = False
        self.classes = ClientClasses(self._on_missed_error, self._on_missed_result)

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
        scope = current_scope.get()
        invocation = scope.invocation
        late_scope = None
        try:
            if scope.waits_for_call and self._ledger.accepts_calls and not self.classes.is_direct(client):
                invocation, late_scope = self._open_late(scope, client, kwargs["options"], kwargs["response"])
            if invocation is not None:
                _attach(invocation, client, kwargs["response"])
            elif self._ledger.observation.is_useful:
                self._observe(client, kwargs["options"], kwargs["response"])
        except Exception:
            _fault.report("looking at an answer")
            if invocation is not None:
                invocation.finish(CLOSED)  # the answer cannot be read any more
        if late_scope is None:
            return wrapped(*args, **kwargs)
        if inspect.iscoroutinefunction(wrapped):
            return _awaited_in(late_scope, wrapped, args, kwargs)
        with late_scope:
            return wrapped(*args, **kwargs)

    def make_status_error(self, wrapped: Wrapped, client: Any, args: Any, kwargs: Any) -> Any:
        """Make the error of a refused call. If the call was not seen, it is recorded here."""
        error = wrapped(*args, **kwargs)
        self._on_unseen_error(error, type(client))
        self._on_refusal(error)
        return error

    def calculate_retry_timeout(self, wrapped: Wrapped, client: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """Note that the SDK sends the request of a call again, after so many seconds."""
        delay_s = wrapped(*args, **kwargs)
        self._on_retry(delay_s, *args, **kwargs)
        return delay_s

    @_fault.catch_and_report("looking at a retry")
    def _on_retry(
        self,
        delay_s: float,
        remaining_retries: int,  # noqa: ARG002  # the arguments of the SDK's method
        options: Any,  # noqa: ARG002
        response_headers: Any = None,
    ) -> None:
        invocation = current_scope.get().invocation
        if invocation is not None:
            invocation.on_resend(delay_s=delay_s)
            if response_headers is not None:
                invocation.on_refusal(_facts_of(response_headers))

    @_fault.catch_and_report("looking at a refusal")
    def _on_refusal(self, error: Any) -> None:
        invocation = current_scope.get().invocation
        if invocation is not None:
            _note_headers(invocation, error)

    def connection_error_made(self, wrapped: Wrapped, error: Any, args: Any, kwargs: Any) -> Any:
        """Make the error of a call without an answer. If the call was not seen, it is recorded here."""
        wrapped(*args, **kwargs)
        if current_scope.get().waits_for_call and _is_made_by_request():
            self._on_unseen_error(error, None)

    @_fault.catch_and_report("looking at an error")
    def _on_unseen_error(self, error: Any, client_class: type | None) -> None:
        scope = current_scope.get()
        if not scope.waits_for_call or not self._ledger.accepts_calls:
            return  # most calls are seen, and have a scope
        call = describe_http_request(error.request, client_class)
        if call is None:
            return
        invocation = self._opener.open(*call, None, scope, scope.take_start_ns())
        if scope is not NO_SCOPE:
            scope.invocation = invocation  # which ends with the scope
        if invocation is not None:
            invocation.on_resend(_resend_count(error.request))
            if scope is NO_SCOPE:
                _note_headers(invocation, error)
                invocation.on_raise(error)

    def _observe(self, client: Any, options: Any, response: Any) -> None:
        """Use the answer to a call without a span if it contains a response with a pending look-up."""
        path, _, _ = options.url.partition("?")
        response_id = returned_response_id(options.method, path) if "responses" in path else None
        if response_id is None:
            return
        response_id, server = unquote(response_id), server_of(client, options.url)
        observation = self._ledger.observation
        if not observation.awaits(server, response_id):
            return

        def observe() -> None:
            facts = _facts_of_body(response)
            if facts is not None:
                # The answer may show the response under another id.
                observation.observe(server, facts._replace(id=response_id))

        if _is_body_read(response):
            observe()
        else:
            call_when_read(response, observe)

    def _open_scope(self, client: Any, args: Any, kwargs: Any) -> RequestScope | None:
        """Open a call and return the scope for its request.

        The scope has no invocation if the call is not recorded but runs inside of another one. The result is
        `None` if no scope is needed.
        """
        invocation, outer = None, NO_SCOPE
        try:
            if not self._ledger.accepts_calls:
                return None  # this instrumentation is off; the outer scope may belong to another one
            outer = current_scope.get()
            if client is None and args:  # the method was stored from the class, and not bound
                client, args = args[0], args[1:]
            options = kwargs["options"] if "options" in kwargs else args[1]
            call = describe_options(client, options)
            if call is not None:
                start_ns = outer.take_start_ns()
                invocation = self._opener.open(*call, options.headers, outer, start_ns)
        except Exception:
            _fault.report("opening a call")
        return None if invocation is None and outer is NO_SCOPE else RequestScope(invocation)

    def _open_late(
        self, scope: RequestScope, client: Any, options: Any, response: Any
    ) -> tuple[Invocation | None, RequestScope | None]:
        """Open a call that another package has brought past our wrapper of `request`.

        Returns:
            The call, and a scope to process its answer in, if it has no scope yet.

        """
        call = describe_options(client, options)
        if call is None:
            return None, None
        self.classes.cover_client(client)
        start_ns = scope.take_start_ns()
        invocation = self._opener.open(*call, options.headers, scope, start_ns or _sent_ns(response))
        if invocation is not None:
            invocation.on_resend(_resend_count(response.request))
        if scope is NO_SCOPE:
            return invocation, RequestScope(invocation)
        # Its span does not become the current span. The other package may have set one since the scope was
        # entered, and resets it first.
        scope.invocation = invocation
        return invocation, None

    def _on_missed_error(self, client: Any, args: Any, kwargs: Any, error: BaseException) -> None:
        """Record a call that another package has brought past our wrapper, and that got no answer."""
        # Other exceptions may have been raised before the SDK sent anything.
        if isinstance(error, Exception) and not is_api_error(error):
            return
        scope = self._open_scope(client, args, kwargs)
        if scope is not None and scope.invocation is not None:
            scope.invocation.on_raise(error)

    def _on_missed_result(self, client: Any, args: Any, kwargs: Any) -> None:
        """Warn once if a call was answered and not seen."""
        if self._has_warned or not self._ledger.accepts_calls or not is_instrumentation_enabled():
            return
        try:
            if describe_options(client, kwargs["options"] if "options" in kwargs else args[1]) is None:
                return
        except Exception:
            return  # arguments of its own
        self._has_warned = True
        client_class = f"{type(client).__module__}.{type(client).__qualname__}"
        _logger.warning("%s does not use the SDK's request method. Its calls are not recorded.", client_class)


def _is_made_by_request() -> bool:
    """Whether the SDK's `request` makes this exception, and not one of its streams or the application."""
    frame = sys._getframe(2)  # noqa: SLF001  # the caller of `connection_error_made`
    for _ in range(_MAX_CONSTRUCTORS):
        if frame.f_code.co_name != "__init__":
            break
        assert frame.f_back is not None  # noqa: S101  # something constructs the exception
        frame = frame.f_back
    return frame.f_globals.get("__name__") == _SDK_CLIENT_MODULE


async def _awaited_in(scope: RequestScope, wrapped: Wrapped, args: Any, kwargs: Any) -> Any:
    with scope:
        return await wrapped(*args, **kwargs)


def _facts_of(headers: Any) -> AnswerHeaders:
    """Return the facts in the headers of an answer. Headers of another type have none."""
    return AnswerHeaders.from_raw(getattr(headers, "raw", ()))


def _note_headers(invocation: Invocation, error: Any) -> None:
    """Have a call note the headers of the answer that an error was made of, if there was an answer."""
    response = getattr(error, "response", None)
    if response is not None:
        invocation.on_headers(_facts_of(response.headers))


def _resend_count(http_request: Any) -> int:
    """How often the SDK has sent this request again, as it tells the server."""
    count = http_request.headers.get("x-stainless-retry-count", "")
    return int(count) if count.isdecimal() else 0


def _sent_ns(response: Any) -> int | None:
    """When the request of a response was sent, in nanoseconds of the wall clock, if that is known."""
    started_s = getattr(response.stream, "_start", None)  # by `time.perf_counter`
    if not isinstance(started_s, float):
        return None
    return time.time_ns() - int((time.perf_counter() - started_s) * 1e9)


def _attach(invocation: Invocation, client: Any, response: Any) -> None:
    first = response.history[0] if response.history else response
    sent = first.request
    make_target = TargetFactory(client, sent.url, sent.headers) if _has_connection(response) else no_target
    if not invocation.on_answer(make_target):
        return
    invocation.on_headers(_facts_of(response.headers))
    if invocation.keeps_content:
        invocation.on_sent(sent.content)
    if _is_body_read(response):
        invocation.on_document(response.content)
    else:
        tap(response, invocation)


def _facts_of_body(response: Any) -> Response | None:
    """Return the facts of the response object in a body that has been read, or `None` if it has none."""
    try:
        document = response.json()
    except (ValueError, RecursionError):
        return None
    is_response = isinstance(document, dict) and is_response_object(document)
    return Response.from_json(document) if is_response else None


def _has_connection(response: Any) -> bool:
    """Return whether a connection carried the answer. A mocked transport makes its answers itself."""
    if "network_stream" in response.extensions:
        return True
    # aiohttp behind the interface of the HTTP library
    stream = getattr(response.stream, "_stream", None)
    return getattr(getattr(stream, "_aiohttp_response", None), "_protocol", None) is not None


def _is_body_read(response: Any) -> bool:
    return bool(response.is_stream_consumed or response.is_closed)

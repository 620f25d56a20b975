"""Other instrumentations of the same calls: how they are recognised, and what they record."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from enum import Enum
from types import FrameType
from typing import Any, Final, NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext

from .. import _fault
from .._facts.request import ResponsesRequest
from .._facts.response import Response
from .._facts.usage import Usage


class _Sign(Enum):
    """How a neighbour is recognised.

    Attributes:
        CONTAINER: The current context has a container of this name. The neighbour writes on its span what is
            put into it, also if its span is not sampled.
        SCOPE: The current span was made by a tracer of this name, and is the span of an inference.
        ATTRIBUTE: The current span has the attributes of an inference span. Its scope does not matter.
        WRAPPER: `Responses.create` has a wrapper from modules with this prefix. Its span cannot be seen: it
            is made after the answer, or is not current.

    """

    CONTAINER = "container"
    SCOPE = "scope"
    ATTRIBUTE = "attribute"
    WRAPPER = "wrapper"


class _Kind(NamedTuple):
    """What is known of one kind of neighbour.

    Attributes:
        sign: How it is recognised.
        name: The name for the sign.
        records_tokens: Whether it records `gen_ai.client.token.usage`.
        records_times: Whether it records the duration and the chunk times of a call.
        suppresses: Whether it makes the call under `suppress_instrumentation()`, for the sake of HTTP spans.
        tells_later: Whether it writes the usage of a stream in a record of its own, after its span.

    """

    sign: _Sign
    name: str
    records_tokens: bool = False
    records_times: bool = False
    suppresses: bool = False
    tells_later: bool = False


# The first one that fits counts.
_KINDS: Final = (
    # OpenTelemetry itself: opentelemetry-util-genai. The key is a string, so nothing is imported.
    _Kind(
        _Sign.CONTAINER,
        "opentelemetry.genai.client.inference.context",
        records_tokens=True,
        records_times=True,
    ),
    _Kind(_Sign.SCOPE, "pydantic-ai", records_tokens=True),
    _Kind(_Sign.SCOPE, "agent_framework", records_tokens=True, records_times=True),
    _Kind(_Sign.SCOPE, "logfire.openai", suppresses=True, tells_later=True),
    # OpenInference, and what follows the conventions of OpenTelemetry.
    _Kind(_Sign.ATTRIBUTE, "openinference.span.kind"),
    _Kind(_Sign.ATTRIBUTE, "gen_ai.operation.name"),
    # OpenLLMetry and Langfuse.
    _Kind(_Sign.WRAPPER, "opentelemetry.instrumentation.openai."),
    _Kind(_Sign.WRAPPER, "langfuse."),
)
(_CONTAINER,), _SCOPES, _ATTRIBUTES, _WRAPPERS = (
    tuple(kind for kind in _KINDS if kind.sign is sign) for sign in _Sign
)
_INFERENCES: Final = frozenset({"LLM", "chat", "generate_content", "text_completion"})

_OWN_SCOPE: Final = "otel_responses_usage"
_REQUEST_MODEL: Final = "gen_ai.request.model"
# A span with one of these has the usage.
_USAGE_NAMES: Final = ("gen_ai.usage.output_tokens", "llm.token_count.completion")
_MAX_WRAPPERS: Final = 16
_SDK_METHODS: Final = "openai.resources.responses.responses"
_SDK_STREAM_MODULE: Final = "openai._streaming"
_MAX_FRAMES: Final = 100
# The SDK is given this header if the application asks for a raw response. It does not send it.
_RAW_RESPONSE: Final = "X-Stainless-Raw-Response"


class FoundNeighbour:
    """A neighbour that has a span of the call that is about to be made; see `Neighbour`."""

    __slots__ = (
        "_claims",
        "_container",
        "_is_raw_stream",
        "_span",
        "_tells_later",
        "context",
        "records_times",
        "records_tokens",
        "suppresses",
    )

    def __init__(
        self, kind: _Kind, span: Any, container: Any, claims: _Claims, *, is_raw_stream: bool
    ) -> None:
        self._span = span  # `None` if it cannot be seen
        self._container = container
        self._claims = claims
        self._is_raw_stream = is_raw_stream
        self._tells_later = kind.tells_later
        self.records_tokens = kind.records_tokens
        self.records_times = kind.records_times
        self.suppresses = kind.suppresses
        self.context: SpanContext = (span or trace.get_current_span()).get_span_context()

    @property
    def can_be_added_to(self) -> bool:
        """Whether its span is open and recorded."""
        return self._span is not None and bool(self._span.is_recording())

    @property
    def has_usage(self) -> bool:
        """Whether it has written the usage on its span."""
        attributes = getattr(self._span, "attributes", None) or {}
        return any(name in attributes for name in _USAGE_NAMES)

    def learn(self, usage: Usage, response: Response, *, is_error: bool) -> bool:
        """Have it write the usage of an answer that the application has received."""
        if self._container is not None:
            if getattr(self._span, "end_time", None) is not None:
                return self.has_usage  # the container is not read any more
            _fill(self._container, usage, response)
            return True
        # A neighbour reads the objects that the SDK makes of an answer.
        if is_error or (self._is_raw_stream and not _is_read_by_sdk()):
            return False
        return self._span is None or self._tells_later or self._span.is_recording() or self.has_usage

    def add(self, attributes: Mapping[str, Any], baggage: Mapping[str, str]) -> None:
        """Add attributes to its span. Those of the baggage do not replace any that it has."""
        known = getattr(self._span, "attributes", None) or {}
        added = {name: value for name, value in baggage.items() if name not in known}
        self._span.set_attributes({**added, **attributes})

    def release(self) -> None:
        """Give its span back."""
        self._claims.remove(_inner(self._span) if self._container is None else self._container)


class _Claims:
    """The spans and containers that belong to a call. They are not kept, and need no hash."""

    def __init__(self) -> None:
        self._claimed: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def add(self, thing: Any) -> bool:
        """Claim a thing, and return false if it was claimed already."""
        if id(thing) in self._claimed:
            return False
        self._claimed[id(thing)] = thing
        return True

    def remove(self, thing: Any) -> None:
        """Give a thing back."""
        self._claimed.pop(id(thing), None)


class Neighbours:
    """Finds the neighbour of a call. A span belongs to the first call that is made in it."""

    def __init__(self) -> None:
        self._claims = _Claims()
        self._has_failed = False
        self._method: Any = None  # the method of the SDK that was looked at last
        self._wrapper_kind: _Kind | None = None  # who has wrapped that

    def find(self, here: Context, request: ResponsesRequest, headers: object) -> FoundNeighbour | None:
        """Return who has a span of the call that is about to be made, and claim that span.

        Args:
            here: The current context.
            request: The parameters of the call.
            headers: The headers that the SDK was given for it.

        """
        try:
            if here and (found := self._find_in(here, request, headers)) is not None:
                return found
            module = sys.modules.get(_SDK_METHODS)
            method = module.Responses.__dict__.get("create") if module is not None else None
            if method is not self._method:
                self._method, self._wrapper_kind = method, _find_wrapper(method)
            kind = self._wrapper_kind
            # These neighbours do not see a stream that the application gets as bytes, or over a WebSocket.
            if kind is None or request.protocol or (request.streams and _asks_for_raw_response(headers)):
                return None
            return FoundNeighbour(kind, None, None, self._claims, is_raw_stream=False)
        except Exception:
            # One that is not as expected is no neighbour. One report, and not one for each call.
            if not self._has_failed:
                self._has_failed = True
                _fault.report("looking for another instrumentation's span")
            return None

    def _find_in(self, here: Context, request: ResponsesRequest, headers: object) -> FoundNeighbour | None:
        """Return the neighbour whose span or container is in this context, and claim that."""
        span = trace.get_current_span(here)
        container = here.get(_CONTAINER.name)
        kind = _CONTAINER if container is not None else _kind_of(span) if span.is_recording() else None
        if kind is None or not self._claim(span, container, request.model):
            return None
        is_raw_stream = request.streams and _asks_for_raw_response(headers)
        return FoundNeighbour(kind, span, container, self._claims, is_raw_stream=is_raw_stream)

    def _claim(self, span: Any, container: Any, model: str | None) -> bool:
        """Claim a span for a call with this model. False if it belongs to another call."""
        attributes = getattr(span, "attributes", None) or {}
        # Without a tracer provider, all calls have the same span and containers of their own.
        is_of_model = attributes.get(_REQUEST_MODEL, model) == model
        return is_of_model and self._claims.add(_inner(span) if container is None else container)


def _inner(span: Any) -> Any:
    """Return the span that a proxy of another package stands for."""
    return getattr(span, "__wrapped__", span)


def _is_read_by_sdk() -> bool:
    """Whether the SDK's stream reads the answer now, and not the application by lines or bytes."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001
    for _ in range(_MAX_FRAMES):
        if frame is None or frame.f_globals.get("__name__") == _SDK_STREAM_MODULE:
            return frame is not None
        frame = frame.f_back
    return False


def _kind_of(span: Any) -> _Kind | None:
    """Return what is known of the neighbour that has made the current span, if it is of an inference."""
    attributes = getattr(span, "attributes", None)
    if attributes is None:
        return None
    for by_attribute in _ATTRIBUTES:  # a loop, since a server's span is looked at in every call
        if attributes.get(by_attribute.name) in _INFERENCES:
            scope = getattr(getattr(span, "instrumentation_scope", None), "name", "")
            if scope == _OWN_SCOPE:
                return None
            return next((kind for kind in _SCOPES if kind.name == scope), by_attribute)
    return None


def _find_wrapper(function: Any) -> _Kind | None:
    for _ in range(_MAX_WRAPPERS):
        wrapper = getattr(function, "_self_wrapper", None)
        if wrapper is None:
            return None
        wrapper_module = str(getattr(wrapper, "__module__", ""))
        for kind in _WRAPPERS:
            if wrapper_module.startswith(kind.name):
                return kind
        function = getattr(function, "__wrapped__", None)
    return None


def _asks_for_raw_response(headers: object) -> bool:
    return isinstance(headers, Mapping) and bool(headers.get(_RAW_RESPONSE))


def _fill(container: Any, usage: Usage, response: Response) -> None:
    """Put the usage into the container of another instrumentation, without replacing what it has."""
    for name, value in (
        ("usage_input_tokens", usage.input_tokens),
        ("usage_output_tokens", usage.output_tokens),
        ("usage_cache_read_input_tokens", usage.cache_read_input_tokens),
        ("usage_cache_write_input_tokens", usage.cache_write_input_tokens),
        ("usage_reasoning_output_tokens", usage.reasoning_output_tokens),
        ("response_id", response.id),
        ("response_model", response.model),
    ):
        if value is not None and getattr(container, name, value) is None:
            setattr(container, name, value)

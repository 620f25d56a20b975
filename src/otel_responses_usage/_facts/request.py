"""The parameters of a Responses API call, without its content."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final, NamedTuple


class Operation(str, Enum):
    """The kind of call: the value of `gen_ai.operation.name`."""

    CHAT = "chat"
    COMPACT = "compact"
    FETCH_RESPONSE = "fetch_response"


# The members of an `Enum` are looked up slowly.
_FETCH_RESPONSE: Final = Operation.FETCH_RESPONSE


_OUTPUT_TYPES: Final = {"text": "text", "json_object": "json", "json_schema": "json"}

# Providers of the Responses API, by the domain of their host.
_PROVIDERS: Final = (
    ("openai.com", "openai"),
    ("openai.azure.com", "azure.ai.openai"),
    ("cognitiveservices.azure.com", "azure.ai.openai"),
    ("services.ai.azure.com", "azure.ai.inference"),
    ("amazonaws.com", "aws.bedrock"),
    ("googleapis.com", "gcp.vertex_ai"),
    ("x.ai", "x_ai"),
    ("deepseek.com", "deepseek"),
    ("groq.com", "groq"),
    ("mistral.ai", "mistral_ai"),
    ("perplexity.ai", "perplexity"),
    ("openrouter.ai", "openrouter"),
    ("githubcopilot.com", "github_copilot"),
)

_PORTS: Final = {"https": 443, "http": 80}
_MAX_WINDOW_LENGTH: Final = 8

WEBSOCKET: Final = "websocket"


class Server(NamedTuple):
    """The server that a call is sent to."""

    provider: str
    address: str | None
    port: int | None

    @staticmethod
    def from_url_parts(host: str | None, port: int | None, scheme: str, *, azure: bool = False) -> Server:
        """Return the server of a base URL. `azure` is true for an Azure client."""
        return _server(host or "", port or _PORTS.get(scheme), azure)


class Prompt(NamedTuple):
    """A prompt that is stored at the provider."""

    name: str | None
    version: str | None


class ResponsesRequest(NamedTuple):
    """The parameters of one call, as sent. A parameter that the application did not set is `None`.

    `protocol` is `None` for HTTP, and `lane` for the default lane of a WebSocket.
    """

    operation: Operation
    server: Server
    streams: bool = False
    model: str | None = None
    stored: bool = True
    background: bool = False
    response_id: str | None = None
    stream_cursor: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    reasoning_effort: str | None = None
    previous_response_id: str | None = None
    conversation_id: str | None = None
    output_type: str | None = None
    service_tier: str | None = None
    completion_window: str | None = None
    prompt: Prompt | None = None
    protocol: str | None = None
    lane: str | None = None
    generate: bool | None = None

    @property
    def is_fetch(self) -> bool:
        """Whether the call fetches an existing response: it generates no tokens."""
        return self.operation is _FETCH_RESPONSE

    @property
    def span_name(self) -> str:
        """The operation and the model. Both have few values, as span names should."""
        return _span_name(self.operation, self.model)


@functools.lru_cache(maxsize=64)
def _span_name(operation: Operation, model: str | None) -> str:
    return f"{operation.value} {model}" if model else operation.value


@functools.lru_cache(maxsize=64)
def generating_operation(method: str, path: str) -> Operation | None:
    """Return the operation of a request that generates tokens, or `None`. `path` has no query."""
    match [method.lower(), *_last_segments(path, 2)]:
        case ["post", *_, "responses"]:
            return Operation.CHAT
        case ["post", "responses", "compact"]:
            return Operation.COMPACT
        case _:
            return None


def fetched_response_id(method: str, path: str) -> str | None:
    """Return the id of the response that a request fetches, or `None` if it fetches none."""
    match [method.lower(), *_last_segments(path, 2)]:
        case ["get", "responses", response_id]:
            return response_id or None
        case _:
            return None


def returned_response_id(method: str, path: str) -> str | None:
    """Return the id of the response object in the answer to a request: a fetch or a cancel.

    Other requests give `None`.
    """
    match [method.lower(), *_last_segments(path, 3)]:
        case ["post", "responses", response_id, "cancel"]:
            return response_id or None
        case _:
            return fetched_response_id(method, path)


def _last_segments(path: str, count: int) -> list[str]:
    # The application may pass a full URL, as in `client.post("https://host/v1/responses")`.
    return path.removesuffix("/").split("/")[-count:]


def describe_generation(operation: Operation, body: Mapping[str, Any], server: Server) -> ResponsesRequest:
    """Return the parameters of a call that generates tokens. `body` is the request body as sent."""
    fields: list[Any] = [operation, server, *_DEFAULTS]
    for name, value in body.items():
        parser = _FIELD_PARSERS.get(name)
        if parser is not None:
            index, parse = parser
            fields[index] = parse(value)
    return ResponsesRequest._make(fields)


def describe_message(message: Mapping[str, Any], server: Server) -> ResponsesRequest:
    """Return the parameters of a call that a message of a WebSocket makes. Its answer always streams."""
    request = describe_generation(Operation.CHAT, message, server)
    return request._replace(streams=True, protocol=WEBSOCKET, lane=_text(message.get("stream_id")))


def describe_fetch(response_id: str, query: Mapping[str, Any], server: Server) -> ResponsesRequest:
    """Return the parameters of a streamed fetch of an existing response."""
    cursor = query.get("starting_after")
    return ResponsesRequest(
        operation=Operation.FETCH_RESPONSE,
        server=server,
        streams=True,
        response_id=response_id,
        stream_cursor=str(cursor) if isinstance(cursor, (int, str)) else None,
    )


@functools.lru_cache(maxsize=64)
def _server(host: str, port: int | None, azure: bool) -> Server:
    return Server("azure.ai.openai" if azure else _provider(host), host or None, port)


def _provider(host: str) -> str:
    for domain, provider in _PROVIDERS:
        if host == domain or host.endswith("." + domain):
            return provider
    # An unknown host is a proxy or another server with the OpenAI protocol.
    return "openai"


# A value of another type counts as not set. This includes the sentinels of the SDK.


def _field(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _text(value: object) -> str | None:
    # The value as sent. `str()` of a member of a string enumeration gives its name instead.
    return str.__str__(value) if isinstance(value, str) and value else None


def _integer(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 2**63 else None


def _number(value: object) -> float | None:
    return float(value) if type(value) in (int, float) else None  # type: ignore[arg-type]


def _id(value: object) -> str | None:
    return _text(value) or _text(_field(value, "id"))


def _service_tier(value: object) -> str | None:
    tier = _text(value)
    return None if tier == "auto" else tier  # which asks for none


def _prompt(value: object) -> Prompt | None:
    prompt = Prompt(_text(_field(value, "id")), _text(_field(value, "version")))
    return prompt if any(prompt) else None


def _completion_window(options: object) -> str | None:
    """Return how long a background response may take, as in `2h`. `None` if it is to be made at once."""
    window = _text(_field(options, "completion_window")) or ""
    is_in_hours = window.isascii() and window[:-1].isdigit() and window.endswith("h")
    return window if is_in_hours and len(window) <= _MAX_WINDOW_LENGTH else None


def _output_type(text: object) -> str | None:
    return _OUTPUT_TYPES.get(_text(_field(_field(text, "format"), "type")) or "")


# For each name in the request body: the index of its field and its parser.
_FIELD_PARSERS: Final[dict[str, tuple[int, Callable[[object], object]]]] = {
    name: (ResponsesRequest._fields.index(field), parse)
    for name, field, parse in (
        ("stream", "streams", bool),  # like the SDK, whose sentinels are false
        ("model", "model", _text),
        ("store", "stored", lambda value: value is not False),
        ("background", "background", lambda value: value is True),
        ("max_output_tokens", "max_output_tokens", _integer),
        ("temperature", "temperature", _number),
        ("top_p", "top_p", _number),
        ("reasoning", "reasoning_effort", lambda value: _text(_field(value, "effort"))),
        ("previous_response_id", "previous_response_id", _text),
        ("conversation", "conversation_id", _id),
        ("text", "output_type", _output_type),
        ("service_tier", "service_tier", _service_tier),
        ("background_options", "completion_window", _completion_window),
        ("prompt", "prompt", _prompt),
        ("generate", "generate", lambda value: False if value is False else None),
    )
}
_DEFAULTS: Final = tuple(ResponsesRequest._field_defaults.values())

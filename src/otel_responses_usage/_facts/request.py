"""What a call of the Responses API asks for, without its content."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final, NamedTuple


class Operation(str, Enum):
    """What a call does; the value of `gen_ai.operation.name`."""

    CHAT = "chat"
    FETCH_RESPONSE = "fetch_response"


_OUTPUT_TYPES: Final = {"text": "text", "json_object": "json", "json_schema": "json"}

# Providers that speak the Responses API, by the end of their host's name.
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


class Server(NamedTuple):
    """The server a call goes to."""

    provider: str
    address: str | None
    port: int | None

    @staticmethod
    def from_url_parts(host: str | None, port: int | None, scheme: str, *, azure: bool = False) -> Server:
        """Name the server of a base URL; `azure` says that the application uses an Azure client."""
        return _server(host or "", port or _PORTS.get(scheme), azure)


class ResponsesRequest(NamedTuple):
    """One call as it is sent. What the application did not ask for is `None`."""

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

    @property
    def span_name(self) -> str:
        """The operation and the model; of few values, as span names must be."""
        return f"{self.operation.value} {self.model}" if self.model else self.operation.value


@functools.lru_cache(maxsize=64)
def is_create(method: str, path: str) -> bool:
    """Whether a request makes a response; `path` is without query."""
    return method.lower() == "post" and _last_segments(path, 1) == ["responses"]


def fetched_response_id(method: str, path: str) -> str | None:
    """Return the id of the response that a request fetches; `None` where it fetches none."""
    match [method.lower(), *_last_segments(path, 2)]:
        case ["get", "responses", response_id]:
            return response_id or None
        case _:
            return None


def returned_response_id(method: str, path: str) -> str | None:
    """Return the id of the response that the answer to a request shows: one fetched, or cancelled."""
    match [method.lower(), *_last_segments(path, 3)]:
        case ["post", "responses", response_id, "cancel"]:
            return response_id or None
        case _:
            return fetched_response_id(method, path)


def _last_segments(path: str, count: int) -> list[str]:
    # Only these: an application may name the whole URL, as in `client.post("https://host/v1/responses")`.
    return path.removesuffix("/").split("/")[-count:]


def describe_create(body: Mapping[str, Any], server: Server) -> ResponsesRequest:
    """Describe a call that makes a response, from the body as it is sent."""
    fields: list[Any] = [Operation.CHAT, server, *_DEFAULTS]
    for name, value in body.items():
        parser = _FIELD_PARSERS.get(name)
        if parser is not None:
            index, parse = parser
            fields[index] = parse(value)
    return ResponsesRequest._make(fields)


def describe_fetch(response_id: str, query: Mapping[str, Any], server: Server) -> ResponsesRequest:
    """Describe a streamed fetch of a response that an earlier call made."""
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
    # An OpenAI client against a host nobody knows: a proxy or a server that speaks OpenAI's protocol.
    return "openai"


# The SDK's own sentinels, and whatever else an application may pass, count as not given.


def _field(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _text(value: object) -> str | None:
    # As it is sent: the member of a `str` enumeration is sent as its value, but has another name.
    return str.__str__(value) if isinstance(value, str) and value else None


def _integer(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 2**63 else None


def _number(value: object) -> float | None:
    return float(value) if type(value) in (int, float) else None  # type: ignore[arg-type]


def _id(value: object) -> str | None:
    return _text(value) or _text(_field(value, "id"))


def _output_type(text: object) -> str | None:
    return _OUTPUT_TYPES.get(_text(_field(_field(text, "format"), "type")) or "")


# What is read of a body: the place of the field that each name fills, and how. Most calls give a few of them.
_FIELD_PARSERS: Final[dict[str, tuple[int, Callable[[object], object]]]] = {
    name: (ResponsesRequest._fields.index(field), parse)
    for name, field, parse in (
        ("stream", "streams", bool),  # as the SDK decides, whose sentinels are false
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
        ("service_tier", "service_tier", _text),
    )
}
_DEFAULTS: Final = tuple(ResponsesRequest._field_defaults.values())

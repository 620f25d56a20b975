"""Reads the parameters of a call from what the SDK or its HTTP library was given for it."""

from __future__ import annotations

import functools
import json
from collections import ChainMap
from collections.abc import Mapping
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

from .._facts.request import (
    ResponsesRequest,
    Server,
    describe_fetch,
    describe_generation,
    fetched_response_id,
    generating_operation,
)

# By the number of an address: the address, which keeps its number, the class of its client, and the server.
_servers: Final[dict[int, tuple[Any, type, Server]]] = {}
_MAX_SERVERS: Final = 64

# A call: what is known of it, and all its parameters with their content.
Described: TypeAlias = tuple[ResponsesRequest, Mapping[str, Any]]


def describe_options(client: Any, options: Any) -> Described | None:
    """Return the parameters of the call with these options, or `None` if it is not a Responses call."""
    path, _, _ = options.url.partition("?")
    if "responses" not in path:
        return None
    operation = generating_operation(options.method, path)
    if operation is not None:
        body = _body(options)
        return describe_generation(operation, body, server_of(client, options.url)), body
    response_id = fetched_response_id(options.method, path)
    query = options.params if isinstance(options.params, Mapping) else {}
    if response_id is not None and query.get("stream") in (True, "true"):
        return describe_fetch(unquote(response_id), query, server_of(client, options.url)), query
    return None


def describe_http_request(http_request: Any, client_class: type | None) -> Described | None:
    """Return the parameters of the call that this HTTP request was sent for, as `describe_options` does."""
    url = http_request.url
    operation = generating_operation(http_request.method, url.path)
    if operation is None:
        return None
    azure = client_class is not None and is_azure(client_class)
    server = Server.from_url_parts(url.host, url.port, url.scheme, azure=azure)
    document = json.loads(http_request.content)
    body = document if isinstance(document, dict) else {}
    return describe_generation(operation, body, server), body


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


def server_of(client: Any, url: str) -> Server:
    """Return the server that this client sends a request for this URL to."""
    base, client_class = client.base_url, type(client)
    if "://" in url:
        return _server_at(type(base)(url), client_class)
    # Most calls of a process go to the same address, whose parts are read slowly.
    known = _servers.get(id(base))
    if known is not None and known[0] is base and known[1] is client_class:
        return known[2]
    if len(_servers) >= _MAX_SERVERS:
        _servers.clear()
    server = _server_at(base, client_class)
    _servers[id(base)] = base, client_class, server
    return server


def _server_at(url: Any, client_class: type) -> Server:
    return Server.from_url_parts(url.host, url.port, url.scheme, azure=is_azure(client_class))


@functools.lru_cache(maxsize=64)
def is_azure(client_class: type) -> bool:
    """Return whether a client class of the SDK is one for Azure."""
    return any(cls.__name__ == "BaseAzureClient" for cls in client_class.__mro__)

"""Sends the requests of the look-ups, with the credentials and settings of the application.

They use their own connections, never those of the application's connection pool. An async pool belongs to
the event loop of the application. And a look-up could take a connection that the application waits for.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import sys
import time
from collections.abc import Mapping
from typing import Final

from .._facts.response import Response, is_response_object
from .._facts.usage import reported_count
from .._lookup.retrieval import Answer, Failure
from .._lookup.worker import Pace
from ._connections import Connections, Destination, NotConnectedError, Reply, lacks_resources
from ._target import Target, content_headers, origin_of
from ._transports import Transports

_MOST_REDIRECTS: Final = 3
_LARGEST_BODY: Final = 64 * 1024 * 1024
_PORTS: Final = {b"https": 443, b"http": 80}


class HttpRetriever:
    """Sends the requests of the look-ups. Any thread may call any method."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._connections = Connections(_LARGEST_BODY, pace)
        self._transports = Transports(_LARGEST_BODY)

    def get(self, target: Target, timeout_s: float, content: bytes = b"") -> Answer:
        """Send one request: a POST if there is content. Errors are part of the answer."""
        ask = self._ask if target.settings.is_plain else self._transports.ask
        deadline, path = time.monotonic() + timeout_s, target.path
        try:
            for _ in range(_MOST_REDIRECTS):
                reply = ask(target, path, max(0.001, deadline - time.monotonic()), content)
                again = _redirected(target, path, reply)
                if again is None:
                    break
                path = again
            self._pace.let_application_in()
            body = _decoded(target.settings.library, reply)
        except TimeoutError:
            return Answer(failure=Failure.TIMEOUT)
        except NotConnectedError:
            return Answer(failure=Failure.UNREACHABLE)
        except OSError as error:
            return Answer(failure=Failure.RESOURCES if lacks_resources(error) else Failure.TRANSPORT)
        except (http.client.HTTPException, ValueError):  # not HTTP; not a host name; an unknown encoding
            return Answer(failure=Failure.TRANSPORT)
        answer = Answer(
            status=reply.status,
            response=None if content else _response(body),
            retry_after_s=_retry_after_s(reply.headers),
            input_tokens=_input_tokens(body) if content else None,
        )
        self._pace.let_application_in()
        return answer

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._connections.close()
        self._transports.close()

    def interrupt(self) -> None:
        """End the requests that are under way."""
        self._connections.interrupt()

    def _ask(self, target: Target, path: bytes, timeout_s: float, content: bytes) -> Reply:
        settings, (scheme, host, port) = target.settings, target.origin
        destination = Destination(
            host.decode("ascii"),
            port or _PORTS[scheme],
            settings.ssl_context,
            settings.uds,
            settings.local_address,
        )
        headers = (*target.headers, *content_headers(content))
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        method = b"POST" if content else b"GET"
        request = b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, path, lines, content)
        return self._connections.get(destination, request, timeout_s)


def _redirected(target: Target, path: bytes, reply: Reply) -> bytes | None:
    """Return the path of a redirect, or `None`. A redirect to another server is not followed."""
    location = reply.headers.get("location")
    if reply.status not in (301, 302, 303, 307, 308) or location is None:
        return None
    library, (scheme, host, port) = sys.modules[target.settings.library], target.origin
    url = library.URL(scheme=scheme.decode(), host=host.decode(), port=port, raw_path=path)
    try:
        again = url.join(location)
    except library.InvalidURL:
        return None
    return again.raw_path if origin_of(again) == origin_of(url) else None


def _decoded(library: str, reply: Reply) -> bytes:
    encoding = reply.headers.get("content-encoding")
    if encoding is None:
        return reply.body
    module = sys.modules[library]
    try:
        response = module.Response(200, headers={"content-encoding": encoding}, content=reply.body)
        content: bytes = response.content
    except module.DecodingError as error:
        raise ValueError("the body cannot be decoded") from error
    return content


def _response(content: bytes) -> Response | None:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(document, Mapping) and is_response_object(document):
        return Response.from_json(document)
    return None


def _input_tokens(content: bytes) -> int | None:
    try:
        return reported_count(json.loads(content), "input_tokens")
    except (ValueError, RecursionError):
        return None


def _retry_after_s(headers: http.client.HTTPMessage) -> float | None:
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            return max(0.0, float(text) * unit_s)
        except ValueError:
            continue
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None

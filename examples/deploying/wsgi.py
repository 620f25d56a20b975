"""A service for gunicorn: `GET /?question=...`."""

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from answers import first_line


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    [question] = parse_qs(environ["QUERY_STRING"])["question"]
    body = first_line(question).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]

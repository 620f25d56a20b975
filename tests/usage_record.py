"""A stand-in for the provider's usage record, in the shape that the SDK's types document."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

WIDTHS = {"1h": 3600, "1d": 86400}

# What a request gets: a status, headers and a body that is written as JSON, unless it is bytes.
Answer = tuple[int, dict[str, str], Any]


class JSONServer:
    """A server on loopback that answers each GET with what `answer` returns; a context manager."""

    def __init__(self, answer: Callable[[str, dict[str, list[str]], dict[str, str]], Answer]) -> None:
        self.queries: list[tuple[str, dict[str, list[str]]]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                query = parse_qs(parts.query)
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.queries.append((parts.path, query))
                server.headers.append(headers)
                status, more, body = answer(parts.path, query, headers)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **more}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Write nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """The origin, without a slash at its end."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class UsageRecord:
    """Calls that were billed, and how the API tells them: bucket by bucket, page by page."""

    key: str = "sk-admin-canary"
    faults: list[Answer] = field(default_factory=list)
    most_buckets: int = 168
    calls: list[dict[str, Any]] = field(default_factory=list)
    searches: list[dict[str, Any]] = field(default_factory=list)

    def bill(
        self,
        at: float,
        model: str,
        input_tokens: int,
        output_tokens: int,
        *,
        cached: int = 0,
        project: str = "proj_shop",
        batch: bool = False,
    ) -> None:
        """Add one request."""
        self.calls.append(
            {
                "at": at,
                "model": model,
                "project_id": project,
                "batch": batch,
                "input_tokens": input_tokens,
                "output_tokens": output_tokens,
                "input_cached_tokens": cached,
                "num_model_requests": 1,
            }
        )

    def search(self, at: float, model: str, number: int, *, project: str = "proj_shop") -> None:
        """Add web searches."""
        self.searches.append(
            {
                "at": at,
                "model": model,
                "project_id": project,
                "num_requests": number,
                "num_model_requests": 1,
            }
        )

    def answer(self, path: str, query: dict[str, list[str]], headers: dict[str, str]) -> Answer:
        """Answer a request."""
        if self.faults:
            return self.faults.pop(0)
        if headers.get("authorization") != f"Bearer {self.key}":
            return 401, {}, {"error": {"message": f"Incorrect API key: {headers.get('authorization')}"}}
        if path == "/v1/organization/usage/completions":
            return 200, {}, self._page(self.calls, "organization.usage.completions.result", query)
        if path == "/v1/organization/usage/web_search_calls":
            return 200, {}, self._page(self.searches, "organization.usage.web_searches.result", query)
        return 404, {}, {"error": {"message": "Invalid URL"}}

    def _page(self, records: list[dict[str, Any]], kind: str, query: dict[str, list[str]]) -> dict[str, Any]:
        width = WIDTHS[query["bucket_width"][0]]
        start, end = int(query["start_time"][0]), int(query["end_time"][0])
        starts = list(range(start // width * width, end, width))
        first = int(query.get("page", ["page_0"])[0].removeprefix("page_"))
        last = first + min(int(query["limit"][0]), self.most_buckets)
        groups, projects = query.get("group_by[]", []), query.get("project_ids[]")
        return {
            "object": "page",
            "data": [
                {
                    "object": "bucket",
                    "start_time": begin,
                    "end_time": begin + width,
                    "results": _results(
                        [
                            record
                            for record in records
                            if begin <= record["at"] < begin + width
                            and (projects is None or record["project_id"] in projects)
                        ],
                        kind,
                        groups,
                    ),
                }
                for begin in starts[first:last]
            ],
            "has_more": last < len(starts),
            "next_page": f"page_{last}" if last < len(starts) else None,
        }


def _results(records: list[dict[str, Any]], kind: str, groups: list[str]) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        key = tuple(record.get(name) for name in groups)
        result = found.setdefault(
            key,
            {
                "object": kind,
                **dict.fromkeys(("project_id", "user_id", "api_key_id", "model")),
                **({"batch": None, "service_tier": None} if "completions" in kind else {}),
                **{name: record.get(name) for name in groups},
            },
        )
        for name, value in record.items():
            if type(value) is int:
                result[name] = result.get(name, 0) + value
        result.pop("at", None)
    return list(found.values())

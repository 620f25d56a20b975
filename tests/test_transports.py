"""Clients with wrapped transports: a look-up uses the transport inside of a known wrapper, and of no other.

The clients and their wrappers are in `transports/wrapped.py`. It runs in an environment of its own: the
development environment does not have these packages, and OpenTelemetry's would instrument other tests.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from embedded.answer import Answer, usage
from embedded.http_server import Cut, Reply, ScriptedServer, SeenRequest
from environments import environment
from observed import usage_attributes
from transports.wrapped import KNOWN, ONLY, TRACED, UNKNOWN

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "transports" / "wrapped.py"
ANSWER = Answer(pieces=("one ", "two ", "three "), usage=usage(7, 21, cached=3, reasoning=11))
TIMEOUT_S = 120.0

PACKAGES = (
    "opentelemetry-instrumentation-httpx>=0.66b2",
    "opentelemetry-sdk",
    "hishel[async]>=2",
    "httpx-aiohttp",
    "httpx-limiter[aiolimiter]",
    "httpx-retries",
    "httpx-retry",
    "httpx-tenacity",
    "pydantic-ai-slim[retries]",
)
# Releases of the SDK, and the HTTP libraries that they take clients of.
COMBINATIONS = (("openai<3", "httpx"), ("openai>=3,<4", "httpx"), ("openai>=3,<4", "httpx2"))

OURS = "otel_responses_usage"
OPENTELEMETRY = "opentelemetry.instrumentation.httpx"


@dataclass(frozen=True)
class Played:
    """One call of the program: the requests that the server saw, the spans and the log records."""

    posts: list[SeenRequest]
    gets: list[SeenRequest]
    spans: list[tuple[str, str, dict[str, Any]]]
    log: list[str]

    def attributes(self) -> dict[str, Any]:
        """The attributes of the one span of the package."""
        ((name, attributes),) = [
            (name, attributes) for scope, name, attributes in self.spans if scope == OURS
        ]
        assert name == "chat m"
        return attributes


class Program:
    """The program, run once with one release of the SDK and one HTTP library."""

    def __init__(self, sdk: str, library: str) -> None:
        python = environment("transports", sdk, *PACKAGES)
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OPENAI_"))
        }
        with ScriptedServer(self._answer) as server, tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(  # noqa: S603  # the program is the project's own
                [python, "-W", "error", PROGRAM, library, server.url],
                cwd=folder,
                check=False,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env={**inherited, "PYTHONPATH": str(ROOT / "src")},
            )
        assert done.returncode == 0, done.stderr
        self._requests = server.requests
        self._played: dict[str, Any] = json.loads(done.stdout)
        self.log = [line for played in self._played.values() for line in played.get("log", ())]

    @staticmethod
    def _answer(request: SeenRequest) -> Reply:
        if request.method == "POST":
            return Reply.sse(ANSWER.events()[:5], end=Cut())
        return Reply.json(ANSWER.response())

    def played(self, name: str) -> Played:
        """What came of the call with this client."""
        played = self._played[name]
        assert "error" not in played, played["error"]
        requests = [request for request in self._requests if f"/{name}/v1/" in request.path]
        return Played(
            [request for request in requests if request.method == "POST"],
            [request for request in requests if request.method == "GET"],
            played["spans"],
            played["log"],
        )


@functools.cache
def ran(sdk: str, library: str) -> Program:
    """The program with one combination. All tests of the combination share its one run."""
    return Program(sdk, library)


def cases(names: Any) -> list[Any]:
    """Each client with each combination that has it."""
    is_old = pytest.mark.skipif(sys.version_info < (3, 11), reason="pydantic-ai needs Python 3.11")
    return [
        pytest.param(
            sdk,
            library,
            name,
            id=f"{name}-{library}-{sdk}",
            marks=[is_old] if "pydantic_ai" in name else [],
        )
        for sdk, library in COMBINATIONS
        for name in names
        if ONLY.get(name, library) == library
    ]


@pytest.mark.parametrize(("sdk", "library", "name"), cases(KNOWN))
def test_a_known_wrapper_is_looked_through(sdk: str, library: str, name: str) -> None:
    """The usage is looked up without a span and without a trace context, and nothing is logged."""
    played = ran(sdk, library).played(name)
    (post,), (get,) = played.posts, played.gets
    attributes = played.attributes()
    assert attributes["openai_responses.usage.source"] == "retrieval"
    tokens = {name: value for name, value in attributes.items() if name.startswith("gen_ai.usage.")}
    assert tokens == usage_attributes(ANSWER.usage or {})
    assert get.path == f"{post.path}/{ANSWER.id}"
    assert get.headers["authorization"] == post.headers["authorization"] == "Bearer key"
    # Only the application's own request is traced.
    traced = [name for scope, name, _ in played.spans if scope == OPENTELEMETRY]
    assert traced == (["POST"] if TRACED in name else [])
    assert ("traceparent" in post.headers) == (TRACED in name)
    assert "traceparent" not in get.headers
    assert played.log == []


@pytest.mark.parametrize(("sdk", "library", "name"), cases(UNKNOWN))
def test_an_unknown_wrapper_is_not_looked_through(sdk: str, library: str, name: str) -> None:
    """No request is sent past a transport that may add something to it, or forbid it."""
    played = ran(sdk, library).played(name)
    assert len(played.posts) == 1
    assert played.gets == []
    assert played.attributes()["openai_responses.usage.missing_reason"] == "transport_error"


@pytest.mark.parametrize(("sdk", "library"), COMBINATIONS)
def test_an_unknown_wrapper_is_named_once(sdk: str, library: str) -> None:
    """The log names the class of each unknown transport once, however many calls it has lost."""
    log = ran(sdk, library).log
    assert len([line for line in log if "authorizing.<locals>.Authorizing is unknown" in line]) == 1
    assert len(log) == len(set(log))
    assert all(line.startswith("WARNING The HTTP transport ") for line in log)
    assert "key" not in " ".join(log)

"""The server and the providers of tests with very many streams.

The server is a process of its own, which does not compete with the application for the interpreter. The
providers keep little of a span.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import resource
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from embedded.answer import Answer, usage
from embedded.http_server import Cut, Hold, Pause, Reply, ScriptedServer, SeenRequest, Wait
from embedded.responses_api import Plan, ResponsesAPI
from file_process import FileProcess, answer_words
from observed import Observed

# What a server takes for a look-up. Look-ups take a fifth of the interpreter; so all threads are in use.
LOOK_UP_S = 0.03


# --- the server's process ------------------------------------------------------------------------------


class Served:
    """The Responses API: the model that a call names says what becomes of its stream."""

    def __init__(self) -> None:
        self.cut = threading.Event()
        self.look_ups = threading.Event()
        self.look_ups.set()
        self._numbers = itertools.count(1)
        self._plans: dict[str, Callable[[Answer], Plan]] = {
            "whole": Plan,
            "left open": lambda answer: Plan(answer, cut_after=3, end=Hold()),
            "broken": lambda answer: Plan(answer, cut_after=3, end=Cut()),
            "waits for its cut": lambda answer: Plan(answer, cut_after=1, end=Wait(self.cut)),
        }
        self.forget()

    def forget(self) -> None:
        """Drop what is known of all responses."""
        self.api = ResponsesAPI(self._plan)

    def __call__(self, request: SeenRequest) -> Reply:
        reply = self.api(request)
        if request.method == "GET":
            return dataclasses.replace(reply, before=(Wait(self.look_ups), Pause(LOOK_UP_S)))
        if any(isinstance(step, Wait) for step in reply.steps):
            return dataclasses.replace(reply, steps=(*reply.steps, Cut()))
        return reply

    def _plan(self, request: SeenRequest) -> Plan:
        number = next(self._numbers)
        # No two responses have a count in common.
        answer = Answer(("one ", "two "), usage(2 * number, 2 * number + 1))
        return self._plans[request.json["model"]](answer)


def allow_files() -> int:
    """Open as many files as may be, and return how many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def main() -> None:
    """Serve, and obey words."""
    allow_files()
    served = Served()
    with ScriptedServer(served) as server:

        def obey(word: str) -> Any:
            match word:
                case "cut":
                    served.cut.set()
                case "hold look-ups":
                    served.look_ups.clear()
                case "release look-ups":
                    served.look_ups.set()
                case "tell":
                    return told_by(served, server)
                case "forget":
                    served.cut.clear()
                    served.forget()
                    server.exchanges.clear()
            return None

        answer_words(server.url, obey)


def told_by(served: Served, server: ScriptedServer) -> dict[str, Any]:
    """The true counts, how long the streams took to end, and how many look-ups coincided."""
    ends = [
        exchange.ended_at
        for exchange in server.exchanges[:]
        if exchange.request.method == "POST" and exchange.ended_at is not None
    ]
    return {
        "truth": {
            response_id: [body["usage"]["input_tokens"], body["usage"]["output_tokens"]]
            for response_id, body in served.api.stored.items()
        },
        "cut_s": max(ends, default=0) - min(ends, default=0),
        "most_gets": server.peak_of("GET"),
    }


class Server(FileProcess):
    """The server's process, as the tests see it."""

    def __init__(self) -> None:
        super().__init__(__file__)
        self.url: str = self.answer()


# --- the application's process -------------------------------------------------------------------------

# The HTTP library that this release of the SDK uses.
HTTP: Any = sys.modules[openai.DefaultHttpxClient.__mro__[-2].__module__.partition(".")[0]]

# One for all clients, as in most applications: there are many clients here only for the sake of their pools.
TLS = ssl.create_default_context()


class Tally(Observed):
    """Providers that keep of a span only what is checked."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Any, ...]] = []
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(_Digest(self.told))

    @property
    def finished(self) -> int:
        return len(self.told)

    def settle(self, truth: dict[str, list[int]]) -> tuple[Counter[str], tuple[int, int]]:
        """Compare what was told with the server's counts, and forget it."""
        assert len({response_id for response_id, *_ in self.told}) == len(self.told)
        told: Counter[str] = Counter()
        inputs = outputs = 0
        for response_id, reason, *counts in self.told:
            told[reason or "exact"] += 1
            assert counts == (truth[response_id] if reason is None else [None, None])
            inputs += counts[0] or 0
            outputs += counts[1] or 0
        self.told.clear()
        return told, (inputs, outputs)


class _Digest(SpanProcessor):
    def __init__(self, told: list[tuple[Any, ...]]) -> None:
        self._told = told

    def on_end(self, span: ReadableSpan) -> None:
        names = (
            "gen_ai.response.id",
            "openai_responses.usage.missing_reason",
            "gen_ai.usage.input_tokens",
            "gen_ai.usage.output_tokens",
        )
        self._told.append(tuple((span.attributes or {}).get(name) for name in names))


def memory() -> tuple[int, float]:
    """What is in use once the garbage is collected: blocks of the interpreter, megabytes of the process."""
    for _ in range(3):
        gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    return sys.getallocatedblocks(), pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()

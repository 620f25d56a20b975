"""Clocks that jump and processes that are suspended, in the middle of streams and of look-ups.

`libfaketime` moves the wall clock of a running service. A clock that it does not reach gives the true times.
The monotonic clock is left alone. libfaketime 0.9.10 can move it, but does not fake `sem_clockwait`, by which
Python waits for a lock until a time of that clock. Every such wait would hang.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clocks_service import RETRIEVAL_TIMEOUT_S
from embedded.answer import Answer, new_id, usage
from embedded.http_server import Hold, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI, error
from observed import HANGING_S
from programs import ROOT, faketime
from sockets import HAS_WEBSOCKET
from traffic import show

if TYPE_CHECKING:
    from typing_extensions import Self

HOUR_S = 3600
PACE_S = 0.05
RESOLUTION_S = 0.03  # of a difference of the true clock, which has 10 ms
MOST_BUSY_S = 300  # libfaketime makes a busy machine much slower; the fault is an hour
COUNTS = usage(31, 245, cached=16, reasoning=128)
RUNTIMES = ("sync", "asyncio")


def plan(request: SeenRequest) -> Plan:
    """What becomes of a call, by the first word of its model."""
    answer = Answer(usage=COUNTS)
    left: dict[str, Any] = {"pace": PACE_S, "cut_after": 6, "end": Hold()}
    plans = {
        "warm-up": Plan(answer),
        "whole": Plan(answer, pace=PACE_S),
        # The look-up waits between its requests for some 3.5 s.
        "pending": Plan(answer, **left, get_replies=("in_progress",) * 5),
        # The look-up waits for the answer to its first request.
        "asked": Plan(answer, **left, get_replies=(Reply.json(answer.response(request.json), delay=3),)),
        # The look-up waits for an answer that tells it to ask again.
        "early": Plan(answer, **left, get_replies=(unfinished(answer, request, 3),)),
        # The look-up's first request has no answer in time.
        "unanswered": Plan(
            answer, **left, get_replies=(unfinished(answer, request, RETRIEVAL_TIMEOUT_S + 5),)
        ),
        "stuck": Plan(answer, **left, fate="stuck"),
        # Found when the application itself asks.
        "lost": Plan(answer, **left, get_replies=(error(404, "not found"),) * 4),
    }
    return plans[request.json["model"].split()[0]]


def unfinished(answer: Answer, request: SeenRequest, delay_s: float) -> Reply:
    """After some seconds, the response as it is before its end."""
    return Reply.json(answer.response(request.json, status="in_progress"), delay=delay_s)


class Service:
    """The service's process, between its servers."""

    def __init__(self, *arguments: str, **settings: str) -> None:
        self._api = ResponsesAPI(plan)
        self._arguments = arguments
        self._settings = settings
        self.told: dict[str, Any] = {}

    def run(self, suspended_s: float | None = None) -> dict[str, Any]:
        """Have it make its calls, suspended for a while in the middle of them, and return what it told."""
        with ScriptedServer(self._api) as server, WebSockets() as websockets:
            process = subprocess.Popen(  # noqa: S603
                [
                    sys.executable,
                    ROOT / "tests" / "clocks_service.py",
                    f"{server.url}/v1",
                    websockets.url,
                    *self._arguments,
                ],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("tests", "examples")),
                    **self._settings,
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            with process:
                try:
                    if suspended_s is not None:
                        assert process.stdout
                        assert process.stdin
                        assert process.stdout.readline() == "middle\n"
                        time.sleep(0.5)  # look-ups are under way
                        process.send_signal(signal.SIGSTOP)
                        time.sleep(suspended_s)
                        process.send_signal(signal.SIGCONT)
                    output, errors = process.communicate(
                        "\n" if suspended_s is not None else None, timeout=HANGING_S
                    )
                finally:
                    process.kill()
        assert process.returncode == 0, errors
        result: dict[str, Any] = json.loads(output)
        return result


class WebSockets:
    """A server for WebSockets, where the SDK has them."""

    def __init__(self) -> None:
        self.url = "http://127.0.0.1:9"
        self._api: Any = None

    def __enter__(self) -> Self:
        if HAS_WEBSOCKET:
            from embedded.websocket_api import Turn, WebSocketAPI

            turn = Turn(Answer(usage=COUNTS), pace=PACE_S)
            self._api = WebSocketAPI(lambda _: replace(turn, answer=replace(turn.answer, id=new_id())))
            self._api.__enter__()
            self.url = f"{self._api.url}"
        return self

    def __exit__(self, *_: object) -> None:
        if self._api is not None:
            self._api.__exit__(None, None, None)


def assert_sane(result: dict[str, Any], title: str, *, suspended_s: float = 0.0) -> None:
    """Durations are near the truth, no look-up hung or ended early, and every call is accounted for."""
    show(
        "\n".join(
            f"{title}, {model}: {span['openai_responses.stream.outcome']}, "
            f"{span.get('openai_responses.usage.source') or span['openai_responses.usage.missing_reason']}; "
            f"{span['duration_s']:.2f} s told, "
            f"{' to '.join(f'{true_s:.2f}' for true_s in result['true_s'][model])} s true; "
            f"look-up {span.get('openai_responses.retrieval.duration', 0):.2f} s"
            for model, span in sorted(result["told"].items())
        )
    )
    known = {
        "whole": ("completed", "stream"),
        "websocket": ("completed", "stream"),
        "pending": ("closed", "retrieval"),
        "asked": ("closed", "retrieval"),
        "early": ("closed", "retrieval"),
        "unanswered": ("closed", "retrieval"),
        "stuck": ("closed", "timeout"),
        "lost": ("closed", "not_found"),
    }
    for model, span in result["told"].items():
        source = span.get("openai_responses.usage.source")
        outcome = span["openai_responses.stream.outcome"]
        reason = span.get("openai_responses.usage.missing_reason")
        assert (outcome, source or reason) == known[model.split()[0]], model
        if source is not None:
            assert span["gen_ai.usage.output_tokens"] == COUNTS["output_tokens"]
        least_s, most_s = result["true_s"][model]
        assert least_s - RESOLUTION_S < span["duration_s"] < most_s + RESOLUTION_S, model
    # What a look-up waits for takes its time, and no more.
    for runtime in RUNTIMES:
        asked = {
            name: result["told"][f"{name} {runtime}"]["openai_responses.retrieval.duration"]
            for name in ("pending", "asked", "early", "unanswered", "stuck")
        }
        # Only requests and the pauses between them count towards the timeout, not the delays of a busy
        # machine. A look-up that believed the clock would take an hour.
        longest_s = RETRIEVAL_TIMEOUT_S + MOST_BUSY_S + suspended_s
        assert 3 < asked["pending"] < longest_s
        assert 2.9 < asked["asked"] < longest_s
        assert 2.9 < asked["early"] < longest_s
        assert 4.9 < asked["unanswered"] < longest_s
        assert RETRIEVAL_TIMEOUT_S - 0.2 < asked["stuck"] < longest_s
    assert result["settled_s"] < RETRIEVAL_TIMEOUT_S + MOST_BUSY_S + suspended_s
    for name, points in result["times"].items():
        for _, least_s, most_s in points:
            assert 0 <= least_s <= most_s < MOST_BUSY_S + suspended_s, name
    calls = len(result["told"])
    sources = [span.get("openai_responses.usage.source") for span in result["told"].values()]
    exact = len([source for source in sources if source])
    assert sum(result["calls"].values()) == calls
    # The calls that were not found are counted late, when the application fetches them.
    assert result["late"] == 2
    counts = dict.fromkeys(("input", "output"), exact + 2)
    assert result["tokens"] == {
        kind: [count, count * COUNTS[f"{kind}_tokens"]] for kind, count in counts.items()
    }
    assert result["pending"] == 0
    assert result["faults"] == 0


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S], ids=["+1 h", "-1 h"])
def test_a_jump_of_the_wall_clock_changes_nothing(jump_s: int, tmp_path: Path) -> None:
    """In the middle of streams and look-ups the time of day jumps by an hour."""
    file = tmp_path / "offset"
    file.write_text("+0")
    service = Service("jump", str(jump_s), **clock(file), FAKETIME_DONT_FAKE_MONOTONIC="1")
    assert_sane(service.run(), f"wall clock {jump_s:+d} s")


def clock(file: Path) -> dict[str, str]:
    """The environment of a process whose clocks are ahead by the seconds in a file."""
    return {
        "LD_PRELOAD": faketime(),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        # Without it, each look at a clock reads the file.
        "FAKETIME_CACHE_DURATION": "1",
    }


@pytest.mark.parametrize("suspended_s", [2, RETRIEVAL_TIMEOUT_S + 2])
def test_a_process_that_is_suspended_loses_nothing(suspended_s: float) -> None:
    """SIGSTOP for some seconds, also for longer than a look-up may take, and then SIGCONT."""
    assert_sane(
        Service("wait").run(suspended_s), f"suspended for {suspended_s:.0f} s", suspended_s=suspended_s
    )

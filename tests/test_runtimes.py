"""Applications on other runtimes than plain threads: what looks usage up stays out of their event loops.

Each application is one of the programs in `runtimes`. It has a process of its own, because patches of the
standard library must not reach the tests and the servers.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from embedded.answer import Answer, new_id, usage
from embedded.http_server import Cut, Hold, Pause, Reply, ScriptedServer, SeenRequest
from embedded.otlp_receiver import OtlpReceiver, ReceivedMetric, ReceivedSpan
from embedded.responses_api import Plan, ResponsesAPI
from observed import usage_attributes

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "runtimes"
ANSWER = Answer(
    pieces=tuple(f"piece {n} " for n in range(12)), usage=usage(31, 245, cached=16, reasoning=128)
)

# A look-up takes so long. An application that waits for one has a gap at least as long. On a busy machine the
# gaps of one that does not wait may be two seconds long.
LOOK_UP_S = 3.0
LONGEST_GAP_S = 2.9
EXIT_TIMEOUT_S = 8.0
# The look-up that hangs would hold an exit up for so long.
RETRIEVAL_TIMEOUT_S = 60.0
# A process that takes longer is killed, and its test fails.
TIMEOUT_S = 120.0
# What else a process may take for its end, on a busy machine.
GRACE_S = 30.0

KNOWN = {"source": "retrieval"}
COMPLETED = {"outcome": "completed", "source": "stream"}
CLOSED = {"outcome": "closed"}
CUT = {"outcome": "cut", "error": "RemoteProtocolError"}
ABANDONED = {"outcome": "abandoned", "error": "stream_abandoned"}


class NamedAPI(ResponsesAPI):
    """Ends a stream as its model is named, and takes its time for a look-up."""

    def __init__(self) -> None:
        super().__init__(self._plan_of)

    def __call__(self, request: SeenRequest) -> Reply:
        reply = super().__call__(request)
        if request.method == "GET":
            return replace(reply, before=(*reply.before, Pause(LOOK_UP_S)))
        return reply

    @staticmethod
    def _plan_of(request: SeenRequest) -> Plan:
        answer, model = replace(ANSWER, id=new_id()), request.json["model"]
        if model == "whole":
            return Plan(answer)
        if model.startswith("hanging"):
            return Plan(answer, cut_after=6, end=Cut(), get_replies=(Reply(before=(Hold(),)),))
        return Plan(answer, cut_after=6, end=Cut() if model.startswith("cut") else Hold())


@dataclass(frozen=True)
class Ran:
    """A process that has ended, and what it has exported."""

    code: int
    output: str
    log: str
    exited_at: float
    spans: list[ReceivedSpan]
    metrics: dict[str, ReceivedMetric]

    @property
    def seen(self) -> dict[str, Any]:
        """What the program has printed."""
        assert self.code == 0, self.log
        seen: dict[str, Any] = json.loads(self.output)
        return seen

    @property
    def log_of_ours(self) -> list[str]:
        """The lines on stderr that name our package."""
        log = self.log.replace(str(ROOT), "")  # the folder of the repository may have the same name
        return [line for line in log.splitlines() if re.search("otel.responses.usage", line)]

    def told(self) -> dict[str, dict[str, Any]]:
        """By model, which here names a call: how it ended, in the words of its span."""
        names = {
            "outcome": "openai_responses.stream.outcome",
            "error": "error.type",
            "source": "openai_responses.usage.source",
            "missing": "openai_responses.usage.missing_reason",
        }
        calls: dict[str, dict[str, Any]] = {}
        for span in self.spans:
            model = span.attributes["gen_ai.request.model"]
            assert model not in calls, "a span was exported twice"
            calls[model] = {
                short: span.attributes[name] for short, name in names.items() if name in span.attributes
            }
        return calls

    def assert_tokens_are_exact(self) -> None:
        """Check that spans of known usage and the metrics have the server's counts, and other spans none."""
        billed = usage_attributes(ANSWER.usage or {})
        known = 0
        for span in self.spans:
            counts = {
                name: value for name, value in span.attributes.items() if name.startswith("gen_ai.usage.")
            }
            is_known = "openai_responses.usage.source" in span.attributes
            known += is_known
            assert counts == (billed if is_known else {}), span.attributes
        sums: dict[str, float] = {}
        for point in self.metrics["gen_ai.client.token.usage"].points:
            kind = point.attributes["gen_ai.token.type"]
            sums[kind] = sums.get(kind, 0) + (point.sum or 0)
        assert sums == {"input": known * 31, "output": known * 245}
        assert "openai_responses.faults" not in self.metrics, self.metrics["openai_responses.faults"].points


class Program:
    """A program of the folder `runtimes` under way, with a server and a receiver of its own."""

    def __init__(self, *command: str, zero_code: bool = False, **settings: str) -> None:
        self._stack = contextlib.ExitStack()
        server = self._stack.enter_context(ScriptedServer(NamedAPI()))
        self.receiver = self._stack.enter_context(OtlpReceiver())
        launcher = [str(Path(sys.executable).with_name("opentelemetry-instrument"))] if zero_code else []
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OPENAI_"))
        }
        self.process = subprocess.Popen(  # noqa: S603  # the programs are the project's own
            [*launcher, sys.executable, *command],
            cwd=PROGRAMS,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **inherited,
                "OPENAI_API_KEY": "k",
                "OPENAI_BASE_URL": f"{server.url}/v1",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_ENDPOINT": self.receiver.http_endpoint,
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_METRICS_EXPORTER": "otlp",
                "OTEL_LOGS_EXPORTER": "none",
                "OTEL_BSP_SCHEDULE_DELAY": "100",
                "OTEL_RESPONSES_USAGE_EXIT_TIMEOUT": str(EXIT_TIMEOUT_S),
                "OTEL_RESPONSES_USAGE_RETRIEVAL_TIMEOUT": str(RETRIEVAL_TIMEOUT_S),
                **settings,
            },
        )
        self._timer = threading.Timer(TIMEOUT_S, self.process.kill)
        self._timer.start()

    def finish(self) -> Ran:
        """Wait until the process has ended, and return what it has exported."""
        try:
            output, log = self.process.communicate()
            exited_at = time.time()
        finally:
            self.stop()
        receiver = self.receiver
        return Ran(self.process.returncode, output, log, exited_at, receiver.spans, receiver.metrics)

    def stop(self) -> None:
        """End the process if it has not ended, and its servers."""
        self._timer.cancel()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        self._stack.close()


class Begun:
    """Programs that run at the same time, since each of them mostly waits; their results by name."""

    def __init__(self, **programs: Program) -> None:
        self._pool = ThreadPoolExecutor(len(programs))
        self._ran = {name: self._pool.submit(program.finish) for name, program in programs.items()}

    def __getitem__(self, name: str) -> Ran:
        return self._ran[name].result()

    def stop(self) -> None:
        self._pool.shutdown()


def has(module: str) -> pytest.MarkDecorator:
    """Skip a test where its library cannot be installed."""
    return pytest.mark.skipif(
        find_spec(module) is None,
        reason=f"{module} is not there for Python {sys.version_info[0]}.{sys.version_info[1]}",
    )


# The first line of a program on greenlets. Eventlet's sockets lack what trio needs when it is imported, and
# httpcore imports trio if it is installed.
PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": 'import sys; sys.modules["trio"] = None; import eventlet; eventlet.monkey_patch()',
}
CALLS = ("cut", "closed", "abandoned", "timed out")
AT_THE_END = {"cut at the end": CUT | KNOWN, "hanging at the end": CUT | {"missing": "shutdown"}}
TOLD = {
    "whole": COMPLETED,
    "cut": CUT | KNOWN,
    "closed": CLOSED | KNOWN,
    "abandoned": ABANDONED | KNOWN,
    "timed out": {"outcome": "cancelled"} | KNOWN,
    **AT_THE_END,
}
DISABLED = {
    call: {name: value for name, value in told.items() if name != "source"} | {"missing": "disabled"}
    for call, told in TOLD.items()
    if call != "whole"
} | {"whole": COMPLETED}
WAYS = {"by_hand": TOLD, "zero_code": TOLD, "disabled": DISABLED}


@pytest.fixture(
    scope="module", params=[pytest.param(library, marks=has(library)) for library in ("gevent", "eventlet")]
)
def greenlets(request: pytest.FixtureRequest) -> Iterator[Begun]:
    """Applications under one library of greenlets: set up by hand, without code, and with look-ups off."""
    main = f"{PATCHES[request.param]}; import greenlets; greenlets.main()"
    begun = Begun(
        by_hand=Program("-c", main, "by-hand", *CALLS),
        zero_code=Program("-c", main, "zero-code", *CALLS, zero_code=True),
        disabled=Program("-c", main, "by-hand", *CALLS, OTEL_RESPONSES_USAGE_RETRIEVAL="false"),
    )
    yield begun
    begun.stop()


@pytest.mark.parametrize("way", WAYS)
def test_streams_in_greenlets_are_told_as_in_threads(way: str, greenlets: Begun) -> None:
    """Under gevent and eventlet each stream has one span, with exact usage or the reason for none."""
    ran = greenlets[way]
    assert ran.code == 0, ran.log
    assert ran.told() == WAYS[way]
    ran.assert_tokens_are_exact()
    assert ran.log_of_ours == []


@pytest.mark.parametrize("way", WAYS)
def test_no_greenlet_sees_an_event_loop_of_ours(way: str, greenlets: Begun) -> None:
    """Under gevent and eventlet `asyncio.run` and `async_to_sync` work during and after look-ups."""
    seen = greenlets[way].seen
    assert seen["looks"] >= 10
    assert seen["seen"] == []


@pytest.mark.parametrize("way", ["by_hand", "zero_code"])
def test_greenlets_go_on_during_a_look_up(way: str, greenlets: Begun) -> None:
    """Under gevent and eventlet a look-up that waits for its answer does not stop the other greenlets."""
    seen = greenlets[way].seen
    assert seen["lasted_s"] >= LOOK_UP_S, "nothing was looked up"
    assert seen["longest_gap_s"] < LONGEST_GAP_S


@pytest.mark.parametrize("way", WAYS)
def test_a_process_of_greenlets_ends_in_time(way: str, greenlets: Begun) -> None:
    """Under gevent and eventlet an exit waits for look-ups, but not longer than the settings allow."""
    ran = greenlets[way]
    waited_s = ran.exited_at - ran.seen["ended_at"]
    longest_s = 0.0 if way == "disabled" else EXIT_TIMEOUT_S
    assert waited_s < longest_s + GRACE_S
    assert {call: ran.told().get(call) for call in AT_THE_END} == {
        call: WAYS[way][call] for call in AT_THE_END
    }


def get(port: int, page: str) -> int:
    """Read a page to its end, and return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=40)
    try:
        connection.request("GET", page)
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Program]]:
    """A Django application on `gunicorn -k gevent`, set up by hand and without code."""
    command = ("-m", "gunicorn", "-k", "gevent", "--workers=1", "--bind=127.0.0.1:0", "shop:application")
    programs = {
        way: Program(
            *command,
            zero_code=way == "zero-code",
            SHOP_DATABASE=str(tmp_path_factory.mktemp("shop") / "orders.sqlite"),
            SHOP_TELEMETRY=way,
        )
        for way in ("by-hand", "zero-code")
    }
    yield programs
    for program in programs.values():
        program.stop()


@has("gevent")
@pytest.mark.parametrize("way", ["by-hand", "zero-code"])
def test_the_database_of_django_works_beside_look_ups(way: str, shops: dict[str, Program]) -> None:
    """Under `gunicorn -k gevent` Django's database works before, during and after a look-up."""
    program = shops[way]
    assert program.process.stderr is not None
    listening = filter(None, (re.search(r"http://127.0.0.1:(\d+)", line) for line in program.process.stderr))
    port = int(next(listening)[1])
    before = get(port, "/orders")
    story = get(port, "/story?model=closed")
    during = get(port, "/orders")
    program.receiver.wait_for_spans(1)
    after = get(port, "/orders")
    time.sleep(1)
    long_after = get(port, "/orders")
    at_the_end = get(port, "/story?model=at+the+end")
    program.process.send_signal(signal.SIGTERM)
    ran = program.finish()
    assert (before, story, during, after, long_after, at_the_end) == (200,) * 6, ran.log
    assert ran.code == 0, ran.log
    assert ran.told() == {"closed": CLOSED | KNOWN, "at the end": CLOSED | KNOWN}
    ran.assert_tokens_are_exact()
    assert ran.log_of_ours == []


# All warnings are shown but two: of the connections of the OTLP exporter, and of the generators of the SDK.
WARNINGS = "default,ignore::ResourceWarning:urllib3.poolmanager,ignore:Async generator"
RUNTIMES = [
    pytest.param("asyncio"),
    pytest.param("uvloop", marks=has("uvloop")),
    pytest.param("nest_asyncio", marks=has("nest_asyncio")),
    pytest.param("trio"),
]


@pytest.fixture(scope="module")
def coroutines() -> Iterator[Begun]:
    """Applications on each event loop, with the debug mode of asyncio and the warnings of Python."""
    loud = {"PYTHONASYNCIODEBUG": "1", "PYTHONWARNINGS": WARNINGS}
    names = [runtime.values[0] for runtime in RUNTIMES]
    begun = Begun(**{name: Program("coroutines.py", name, **loud) for name in names if find_spec(name)})
    yield begun
    begun.stop()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_streams_in_coroutines_are_told_alike_on_every_event_loop(runtime: str, coroutines: Begun) -> None:
    """On every event loop usage is exact, and neither asyncio's debug mode nor a warning is seen."""
    ran = coroutines[runtime]
    assert ran.code == 0, ran.log
    assert ran.told() == {
        "whole": COMPLETED,
        "cut": CUT | KNOWN,
        "closed": CLOSED | KNOWN,
        "cancelled": {"outcome": "cancelled"} | KNOWN,
        "cut at the end": CUT | KNOWN,
    }
    ran.assert_tokens_are_exact()
    assert ran.log == ""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_event_loop_goes_on_during_a_look_up(runtime: str, coroutines: Begun) -> None:
    """On every event loop a look-up that waits for its answer does not stop the other tasks."""
    seen = coroutines[runtime].seen
    assert seen["lasted_s"] >= LOOK_UP_S, "nothing was looked up"
    assert seen["longest_gap_s"] < LONGEST_GAP_S


@pytest.fixture(scope="module")
def loops() -> Iterator[Begun]:
    """Applications that record each event loop of their process."""
    begun = Begun(threads=Program("loops.py", "threads"), coroutines=Program("loops.py", "coroutines"))
    yield begun
    begun.stop()


@pytest.mark.parametrize(("way", "made", "running"), [("threads", 0, []), ("coroutines", 1, ["MainThread"])])
def test_look_ups_run_no_event_loop(way: str, made: int, running: list[str], loops: Begun) -> None:
    """A process has the event loops of its application and no others, and no other thread runs one."""
    ran = loops[way]
    told = {"whole": COMPLETED, "cut": CUT | KNOWN, "closed": CLOSED | KNOWN, "cut at the end": CUT | KNOWN}
    assert ran.told() == (told | {"abandoned": ABANDONED | KNOWN} if way == "threads" else told)
    assert ran.seen == {"made": made, "running": running}
    assert ran.log == ""

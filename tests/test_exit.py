"""Processes that end with streams open and look-ups pending: everything is exported before they are gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Serve
from embedded.answer import Answer, new_id, usage
from embedded.http_server import Cut, Hold, Pause, Reply, ScriptedServer, SeenRequest, Step
from embedded.responses_api import Plan, ResponsesAPI
from observed import HANGING_S

ANSWER = Answer(
    pieces=tuple(f"piece {n} " for n in range(12)), usage=usage(31, 245, cached=16, reasoning=128)
)

# What an application sets up: providers that export to files, one line for a span or a round of points,
# with the process that wrote it.
TELEMETRY = """
import json
import os
from pathlib import Path

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

FOLDER = Path(__file__).parent


def provide():
    exporter = ConsoleSpanExporter(out=(FOLDER / "spans").open("a"), formatter=_span)
    tracer_provider = TracerProvider()
    tracer_provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
    trace.set_tracer_provider(tracer_provider)
    exporter = ConsoleMetricExporter(out=(FOLDER / "points").open("a"), formatter=_points)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=60_000)
    metrics.set_meter_provider(MeterProvider([reader]))


def _span(span):
    return json.dumps({"pid": os.getpid(), "name": span.name, "attributes": dict(span.attributes)}) + "\\n"


def _points(data):
    points = [
        {"name": metric["name"], **point}
        for resource in json.loads(data.to_json(indent=None))["resource_metrics"]
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
        for point in metric["data"]["data_points"]
    ]
    return json.dumps({"pid": os.getpid(), "points": points}) + "\\n"
"""

# An application with three streams open, one of them being read, and two that were cut a moment ago.
APPLICATION = '''
import asyncio
import atexit
import gc
import os
import signal
import sys
import threading
import time

import openai
from opentelemetry import metrics, trace
from otel_responses_usage import ResponsesUsageInstrumentor
from telemetry import FOLDER, provide

if sys.version_info >= (3, 13):
    # CPython crashes when it collects a half-read stream at its very end, which calls `timedelta`, with us
    # or without: https://github.com/python/cpython/issues/132413. So nothing is collected then.
    atexit.register(gc.freeze)

HTTP = sys.modules.get("httpx2") or sys.modules["httpx"]
CUT = (openai.APIConnectionError, HTTP.TransportError)

{setup}


def make_clients():
    """Clients whose requests say which process has made them; those of our look-ups do, too."""
    global client, async_client
    process = {{"x-process": str(os.getpid())}}
    client = openai.OpenAI(max_retries=0, default_headers=process)
    async_client = openai.AsyncOpenAI(max_retries=0, default_headers=process)


make_clients()


def read_half(model):
    stream = client.responses.create(model=model, input="x", stream=True)
    for _ in range(6):
        next(stream)
    return stream


def read_cut(model):
    try:
        list(client.responses.create(model=model, input="x", stream=True))
    except CUT:
        pass


async def async_read_half(model):
    stream = await async_client.responses.create(model=model, input="x", stream=True)
    for _ in range(6):
        await anext(stream)
    return stream


async def async_read_cut(model):
    try:
        async for _ in await async_client.responses.create(model=model, input="x", stream=True):
            pass
    except CUT:
        pass

{body}
'''

PROVIDER_FIRST = """
provide()
ResponsesUsageInstrumentor().instrument()
"""
INSTRUMENTED_FIRST = """
ResponsesUsageInstrumentor().instrument()
provide()
"""

BEGUN = """
stream = read_half("open")
reader = threading.Thread(target=list, args=(read_half("open in a thread"),), daemon=True)
reader.start()
loop = asyncio.new_event_loop()
async_stream = loop.run_until_complete(async_read_half("open, async"))
read_cut("cut")
loop.run_until_complete(async_read_cut("cut, async"))
"""


@dataclass(frozen=True)
class Ran:
    """A process that has ended, and what it has exported."""

    code: int
    output: str
    complaints: str
    ended_at: float
    spans: list[dict[str, Any]]
    points: list[dict[str, Any]]

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
            attributes = span["attributes"]
            model = attributes["gen_ai.request.model"]
            assert model not in calls, "a span was exported twice"
            calls[model] = {short: attributes[name] for short, name in names.items() if name in attributes}
        return calls

    def total(self, name: str, **attributes: str) -> int:
        """The sum of an instrument's points, by the last export of each process."""
        last = {line["pid"]: line["points"] for line in self.points}
        return sum(
            point.get("value", point.get("sum"))
            for points in last.values()
            for point in points
            if point["name"] == name and attributes.items() <= point["attributes"].items()
        )


def begin(
    folder: Path,
    server: ScriptedServer,
    body: str,
    setup: str = PROVIDER_FIRST,
    command: tuple[str, ...] = ("application.py",),
    **environ: str,
) -> subprocess.Popen[str]:
    """Start an application in a process of its own."""
    (folder / "telemetry.py").write_text(TELEMETRY)
    (folder / "application.py").write_text(APPLICATION.format(setup=setup, body=textwrap.dedent(body)))
    # A name, since names are resolved with difficulty when an interpreter exits.
    url = f"{server.url}/v1".replace("127.0.0.1", "localhost")
    api = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k", "no_proxy": "localhost", "NO_PROXY": "localhost"}
    return subprocess.Popen(  # noqa: S603  # written a few lines above
        [sys.executable, *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **api, **environ},
    )


def finish(folder: Path, process: subprocess.Popen[str]) -> Ran:
    """Wait until the application has ended, and read what it has exported."""
    try:
        output, complaints = process.communicate(timeout=HANGING_S)
    finally:
        process.kill()
    exported = {
        name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("spans", "points")
        if (folder / name).exists()
    }
    return Ran(
        process.returncode,
        output,
        complaints,
        time.time(),
        exported.get("spans", []),
        exported.get("points", []),
    )


def run(folder: Path, server: ScriptedServer, body: str, *args: Any, **environ: str) -> Ran:
    return finish(folder, begin(folder, server, body, *args, **environ))


class NamedAPI(ResponsesAPI):
    """Cuts calls, or answers them whole, as a model is named; holds others open; takes its time for a GET."""

    def __init__(self, before_get: Step) -> None:
        super().__init__(self._plan_of)
        self._before_get = before_get

    def __call__(self, request: SeenRequest) -> Reply:
        reply = super().__call__(request)
        return replace(reply, before=(self._before_get,)) if request.method == "GET" else reply

    @staticmethod
    def _plan_of(request: SeenRequest) -> Plan:
        answer, model = replace(ANSWER, id=new_id()), request.json["model"]
        if model.startswith("whole"):
            return Plan(answer)
        return Plan(answer, cut_after=6, end=Cut() if model.startswith("cut") else Hold())


EXIT = {"outcome": "exit", "error": "process_exit"}
CUT = {"outcome": "cut", "error": "RemoteProtocolError"}


def all_told(known: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What is told of the five calls of an application, where the same is known of the usage of each."""
    return {
        "open": EXIT | known,
        "open in a thread": EXIT | known,
        "open, async": EXIT | known,
        "cut": CUT | known,
        "cut, async": CUT | known,
    }


@pytest.mark.parametrize(
    ("end", "setup", "code", "complaint"),
    [
        ("", PROVIDER_FIRST, 0, ""),
        ("sys.exit(3)", INSTRUMENTED_FIRST, 3, ""),
        ("raise LookupError('own')", PROVIDER_FIRST, 1, "LookupError: own\n"),
        (
            """
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            """,
            INSTRUMENTED_FIRST,
            4,
            "",
        ),
    ],
    ids=["end", "sys.exit", "exception", "SIGTERM"],
)
def test_a_process_that_ends_loses_nothing(
    end: str, setup: str, code: int, complaint: str, tmp_path: Path, serve: Serve
) -> None:
    """However a process ends, its open streams are told as `exit`, and pending look-ups are waited for."""
    server = serve(NamedAPI(before_get=Pause(0.3)))
    ran = run(tmp_path, server, BEGUN + textwrap.dedent(end), setup)
    assert ran.code == code, ran.complaints
    assert ran.complaints.endswith(complaint)
    assert bool(ran.complaints) == bool(complaint)
    assert ran.told() == all_told({"source": "retrieval"})
    assert ran.total("gen_ai.client.token.usage", **{"gen_ai.token.type": "output"}) == 5 * 245
    assert ran.total("openai_responses.calls", **{"openai_responses.usage.source": "retrieval"}) == 5
    assert ran.total("openai_responses.pending") == 0


@pytest.mark.parametrize(
    "read",
    ["read_half('open')", "loop.run_until_complete(async_read_half('open'))"],
    ids=["sync", "async"],
)
def test_the_first_look_up_of_all_may_be_that_of_the_exit(read: str, tmp_path: Path, serve: Serve) -> None:
    """A process that never looked anything up has the usage of its open stream looked up when it ends."""
    body = f"loop = asyncio.new_event_loop()\nstream = {read}"
    ran = run(tmp_path, serve(NamedAPI(before_get=Pause(0.3))), body)
    assert (ran.code, ran.complaints) == (0, "")
    assert ran.told() == {"open": EXIT | {"source": "retrieval"}}


LOADED = """
def loaded():
    lookup, surfaces = "circuit lookups retrieval", "connections retrieve target transports"
    late = [f"_lookup.{name}" for name in lookup.split()]
    late += [f"_surfaces._{name}" for name in surfaces.split()]
    return [name for name in late if f"otel_responses_usage.{name}" in sys.modules]


list(client.responses.create(model="whole", input="x", stream=True))
print(len(loaded()))
read_cut("cut")
trace.get_tracer_provider().shutdown()
print(len(loaded()))
"""


def test_what_looks_up_is_loaded_by_the_first_look_up(tmp_path: Path, serve: Serve) -> None:
    """A process whose streams all tell their usage does not load what would look it up."""
    ran = run(tmp_path, serve(NamedAPI(before_get=Pause(0))), LOADED)
    assert (ran.output, ran.complaints) == ("0\n7\n", "")
    assert ran.told()["whole"] == {"outcome": "completed", "source": "stream"}
    assert ran.told()["cut"] == CUT | {"source": "retrieval"}


READ_ON = """
def interrupt():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()


def read_on():
    stream = read_half("open")
    interrupt()
    next(stream)


async def async_read_on():
    stream = await async_read_half("open")
    interrupt()
    await anext(stream)

"""


@pytest.mark.parametrize("read", ["read_on()", "asyncio.run(async_read_on())"], ids=["sync", "async"])
def test_a_read_that_a_signal_ends_is_cancelled(read: str, tmp_path: Path, serve: Serve) -> None:
    """A signal handler that leaves the process out of a blocked read has cancelled it; nothing is lost."""
    ran = run(tmp_path, serve(NamedAPI(before_get=Pause(0.3))), READ_ON + read)
    told = ran.told()["open"]
    assert ran.code == 4
    assert told == {"outcome": "cancelled", "source": "retrieval"}


def test_an_exit_is_not_held_up_for_longer_than_allowed(tmp_path: Path, serve: Serve) -> None:
    """Look-ups that hang keep a process for the exit timeout, and are then told as `shutdown`."""
    body = BEGUN + "print(time.time())"
    limits = {"OTEL_RESPONSES_USAGE_EXIT_TIMEOUT": "0.5", "OTEL_RESPONSES_USAGE_RETRIEVAL_TIMEOUT": "60"}
    ran = run(tmp_path, serve(NamedAPI(before_get=Hold())), body, **limits)
    assert (ran.code, ran.complaints) == (0, "")
    assert ran.ended_at - float(ran.output) < 10
    assert ran.told() == all_told({"missing": "shutdown"})
    assert ran.total("openai_responses.calls", **{"openai_responses.usage.missing_reason": "shutdown"}) == 5


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("trace.get_tracer_provider()", "metrics.get_meter_provider()"),
        ("metrics.get_meter_provider()", "trace.get_tracer_provider()"),
    ],
    ids=["tracer", "meter"],
)
def test_whichever_provider_is_shut_down_first_has_everything(
    first: str, second: str, tmp_path: Path, serve: Serve
) -> None:
    """An application that shuts its providers down itself has all spans and points exported by then."""
    body = f"""
    {first}.shutdown()
    {second}.shutdown()
    print(len((FOLDER / "spans").read_text().splitlines()), len((FOLDER / "points").read_text().splitlines()))
    """
    ran = run(tmp_path, serve(NamedAPI(before_get=Pause(0.3))), BEGUN + textwrap.dedent(body))
    assert (ran.code, ran.output, ran.complaints) == (0, "5 1\n", "")
    assert ran.told() == all_told({"source": "retrieval"})
    assert ran.total("gen_ai.client.token.usage", **{"gen_ai.token.type": "output"}) == 5 * 245

"""The recipes of docs/deploying.md: a stopped server loses no span and no token.

Each test runs a file of `examples/deploying` on the real server and stops it. At that moment no span and no
metric has been exported, and the look-ups of closed streams are pending.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_service

from embedded.answer import Answer, new_id, usage
from embedded.http_server import Hold, Pause, Reply, ScriptedServer, SeenRequest
from embedded.otlp_receiver import OtlpReceiver
from embedded.responses_api import Plan, ResponsesAPI
from observed import eventually

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "examples" / "deploying"
PAGE = (ROOT / "docs" / "deploying.md").read_text("utf-8")
BIN = Path(sys.executable).parent

# The first answer has one line and is read to its end. The second has two, so its stream is closed early.
BILLED = {"whole": usage(100, 7), "closed": usage(2000, 50)}
QUESTIONS = ("whole", "closed", "whole", "closed")
CALLS = Counter({("completed", "stream"): 2, ("closed", "retrieval"): 2})
TOKENS = Counter(
    {kind: sum(BILLED[question][f"{kind}_tokens"] for question in QUESTIONS) for kind in ("input", "output")}
)


class API(ResponsesAPI):
    """Plays the two answers, and delays every look-up."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(self._plan_of)
        self._delay = Pause(delay_s)

    def __call__(self, request: SeenRequest) -> Reply:
        reply = super().__call__(request)
        return replace(reply, before=(self._delay,)) if request.method == "GET" else reply

    @staticmethod
    def _plan_of(request: SeenRequest) -> Plan:
        question = request.json["input"]
        if question == "whole":
            return Plan(Answer(("One ", "line"), BILLED[question], id=new_id()))
        return Plan(
            Answer(("One line\n", "and more"), BILLED[question], id=new_id()), cut_after=5, end=Hold()
        )


class Receiver(OtlpReceiver):
    """Adds up the token metric of several processes: each of them exports totals of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._series: dict[Any, tuple[str, float]] = {}

    def _on_metrics(self, body: bytes) -> bytes:
        for of_resource in metrics_service.ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for metric in (metric for scope in of_resource.scope_metrics for metric in scope.metrics):
                if metric.name != "gen_ai.client.token.usage":
                    continue
                for point in metric.histogram.data_points:
                    labels = {pair.key: pair.value.string_value for pair in point.attributes}
                    origin = (of_resource.resource.SerializeToString(), point.start_time_unix_nano)
                    series = (origin, *sorted(labels.items()))
                    self._series[series] = (labels["gen_ai.token.type"], point.sum)
        return super()._on_metrics(body)

    def tokens(self) -> Counter[str]:
        """The sums of the metric, by token type."""
        totals: Counter[str] = Counter()
        for kind, total in self._series.values():
            totals[kind] += int(total)
        return totals

    def span_tokens(self) -> Counter[str]:
        """The sums over the spans, by token type."""
        totals: Counter[str] = Counter()
        for span in self.spans:
            for kind in ("input", "output"):
                totals[kind] += span.attributes.get(f"gen_ai.usage.{kind}_tokens", 0)
        return totals

    def calls(self) -> Counter[tuple[str, str | None]]:
        """The spans of calls, by outcome and by the source of their usage."""
        names = ("openai_responses.stream.outcome", "openai_responses.usage.source")
        return Counter(
            (span.attributes[names[0]], span.attributes.get(names[1]))
            for span in self.spans
            if names[0] in span.attributes
        )


@dataclass(frozen=True)
class Running:
    """A program that has been started, and what it has to do with."""

    process: subprocess.Popen[bytes]
    log: Path
    server: ScriptedServer
    receiver: Receiver

    def said(self) -> str:
        """The output so far. The test fails if the program has ended."""
        text = self.log.read_text("utf-8")
        assert self.process.poll() is None, text
        return text

    def wait_until_said(self, text: str, count: int = 1) -> None:
        """Wait until the output has the text so many times."""
        eventually(lambda: self.said().count(text) >= count, f"{count} times {text!r} in the output", 30)

    def write(self, line: str) -> None:
        """Write a line to the standard input of the program."""
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def wait_until_pending(self) -> None:
        """Wait until the look-up of every closed stream has been sent."""
        count = QUESTIONS.count("closed")
        eventually(
            lambda: [request.method for request in self.server.requests].count("GET") >= count, "look-ups"
        )

    def assert_all_arrived(self) -> None:
        """Every call is one span with its tokens, and the metric has the same tokens."""
        assert self.receiver.calls() == CALLS, self.log.read_text("utf-8")
        assert self.receiver.span_tokens() == TOKENS
        assert self.receiver.tokens() == TOKENS


@contextmanager
def running(folder: Path, command: tuple[str, ...], *, delay_s: float, **environ: str) -> Iterator[Running]:
    """Start a program of the examples. It exports nothing before it is stopped or flushed."""
    config = f'broker_url = "filesystem://"\nbroker_transport_options = {transport(folder)!r}\n'
    (folder / "celeryconfig.py").write_text(config)
    log = folder / "log.txt"
    with ScriptedServer(API(delay_s)) as server, Receiver() as receiver, log.open("wb") as said:
        protocol = environ.setdefault("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        process = subprocess.Popen(  # noqa: S603  # the project's own files
            [BIN / command[0], *command[1:]],
            cwd=PROGRAMS,
            env={
                "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join([str(PROGRAMS), str(folder)]),
                "PYTHONDONTWRITEBYTECODE": "1",
                "HOME": str(folder),  # gunicorn puts a socket there
                "OPENAI_API_KEY": "k",
                "OPENAI_BASE_URL": f"{server.url}/v1",
                "OTEL_SERVICE_NAME": "deployed",
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_METRICS_EXPORTER": "otlp",
                "OTEL_LOGS_EXPORTER": "none",
                "OTEL_EXPORTER_OTLP_ENDPOINT": (
                    receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
                ),
                "OTEL_BSP_SCHEDULE_DELAY": "60000",
                "OTEL_METRIC_EXPORT_INTERVAL": "60000",
                **environ,
            },
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            yield Running(process, log, server, receiver)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def transport(folder: Path) -> dict[str, Any]:
    """A broker in a folder."""
    return {
        "polling_interval": 0.1,
        "data_folder_in": str(folder),
        "data_folder_out": str(folder),
        "control_folder": str(folder / "control"),
    }


def ask_by_line(program: Running) -> None:
    """Ask on the standard input, one question after the other."""
    for count, question in enumerate(QUESTIONS, 1):
        program.write(question)
        program.wait_until_said("One line", count)


def ask_over_http(program: Running) -> None:
    """Ask all questions at once, when the server listens and the workers of an ASGI application run."""
    command = program.process.args
    assert isinstance(command, list)
    starting = 0 if "asgi:app" not in command else 2 if "--workers" in command else 1

    def listening() -> re.Match[str] | None:
        text = program.said()
        if text.count("Application startup complete") < starting:
            return None
        return re.search(r"(?:running on|Listening at:) (http://127\.0\.0\.1:\d+)", text)

    def ask(question: str) -> None:
        answer = httpx.get(url, params={"question": question}, timeout=20, trust_env=False)
        assert "One line" in answer.raise_for_status().text

    url = eventually(listening, "listening", 30)[1]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        list(pool.map(ask, QUESTIONS))


def ask_by_task(program: Running) -> None:
    """Send a task for each question, and wait until the worker reports success."""
    program.wait_until_said(" ready.")
    with Celery(broker="filesystem://", set_as_current=False) as producer:
        producer.conf.broker_transport_options = transport(program.log.parent)
        for question in QUESTIONS:
            producer.send_task("tasks.answer", [question])
        program.wait_until_said("succeeded in", len(QUESTIONS))


@dataclass(frozen=True)
class Deployment:
    """A command that the page names, and a way to reach the program."""

    command: str
    ask: Callable[[Running], None]
    extra: str = ""  # arguments that only the test needs
    code: int = 0
    # The look-ups are still pending when the server has finished its own shutdown.
    delay_s: float = 1.0
    # Settings for a second run under `opentelemetry-instrument`. None: there is no such run.
    zero_code: dict[str, str] | None = field(default_factory=lambda: {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})

    def __str__(self) -> str:
        return self.command


DEPLOYMENTS = (
    Deployment("python script.py", ask_by_line, code=143, zero_code=None),
    Deployment("uvicorn asgi:app", ask_over_http, "--port 0", code=-signal.SIGTERM),
    Deployment("uvicorn asgi:app --workers 2", ask_over_http, "--port 0"),
    Deployment("gunicorn wsgi:app --workers 2", ask_over_http, "--bind 127.0.0.1:0"),
    Deployment(
        "gunicorn wsgi:app --workers 2 --worker-class gevent",
        ask_over_http,
        "--bind 127.0.0.1:0",
        delay_s=2.5,  # a worker looks for the signal once a second
        zero_code={
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_PYTHON_AUTO_INSTRUMENTATION_EXPERIMENTAL_GEVENT_PATCH": "patch_all",
        },
    ),
    Deployment(
        "gunicorn asgi:app --workers 2 --worker-class uvicorn_worker.UvicornWorker",
        ask_over_http,
        "--bind 127.0.0.1:0",
        zero_code=None,
    ),
    Deployment(
        "celery --app tasks worker",
        ask_by_task,
        "--concurrency 2 --loglevel INFO --without-mingle --without-gossip",
        delay_s=4.2,  # the processes of the pool end 3.6 s after the signal
    ),
)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=str)
def test_sigterm_loses_nothing(deployment: Deployment, tmp_path: Path) -> None:
    """At SIGTERM every span and every token is exported, also those of pending look-ups."""
    stop_and_check(deployment, tmp_path)


@pytest.mark.parametrize("deployment", [one for one in DEPLOYMENTS if one.zero_code], ids=str)
def test_sigterm_loses_nothing_under_opentelemetry_instrument(deployment: Deployment, tmp_path: Path) -> None:
    """The same recipe works where `opentelemetry-instrument` has set the process up."""
    stop_and_check(deployment, tmp_path, "opentelemetry-instrument", **(deployment.zero_code or {}))


def stop_and_check(deployment: Deployment, folder: Path, *launcher: str, **environ: str) -> None:
    """Run a deployment, stop it by SIGTERM while look-ups are pending, and look at what has arrived."""
    command = (*launcher, *deployment.command.split(), *deployment.extra.split())
    with running(folder, command, delay_s=deployment.delay_s, **environ) as program:
        try:
            deployment.ask(program)
        except Exception as error:  # the servers say why they close a connection
            raise AssertionError(program.log.read_text("utf-8")) from error
        program.wait_until_pending()
        program.process.terminate()
        assert program.process.wait(30) == deployment.code, program.log.read_text("utf-8")
        program.assert_all_arrived()


def test_ctrl_c_loses_nothing_with_workers(tmp_path: Path) -> None:
    """At Ctrl-C, which all processes of uvicorn get, everything is exported as well."""
    command = ("uvicorn", "asgi:app", "--workers", "2", "--port", "0")
    with running(tmp_path, command, delay_s=1.0) as program:
        ask_over_http(program)
        program.wait_until_pending()
        os.killpg(program.process.pid, signal.SIGINT)
        assert program.process.wait(30) == 0
        program.assert_all_arrived()


RUNTIME = """
import sys

import function

for line in sys.stdin:
    print(function.handler({"question": line.strip()}, None), flush=True)
"""


@pytest.mark.parametrize("question", ["whole", "closed"])
def test_a_frozen_function_has_exported_its_call(question: str, tmp_path: Path) -> None:
    """A process that is frozen as soon as its handler has returned has exported the call by then."""
    patience = {"OTEL_RESPONSES_USAGE_FLUSH_TIMEOUT": "5"}  # the default is short on a busy machine
    with running(tmp_path, ("python", "-c", RUNTIME), delay_s=0.3, **patience) as program:
        program.write(question)
        program.wait_until_said("One line")
        program.process.send_signal(signal.SIGSTOP)
        billed = Counter({kind: BILLED[question][f"{kind}_tokens"] for kind in ("input", "output")})
        assert (program.receiver.span_tokens(), program.receiver.tokens()) == (billed, billed)


def test_the_page_quotes_the_programs() -> None:
    """Each piece of Python on the page is a part of the file that is named before it."""
    quote = r"\[`([\w.]+)`\]\(\.\./examples/deploying/\1\):\n\n```python\n(.*?)```"
    quotes = re.findall(quote, PAGE, re.DOTALL)
    assert len(quotes) == PAGE.count("```python")
    assert [name for name, quote in quotes if quote not in (PROGRAMS / name).read_text("utf-8")] == []


def test_the_page_names_the_commands() -> None:
    """Each command that is tested here is on the page."""
    lines = {line.strip() for line in PAGE.splitlines()}
    assert [deployment.command for deployment in DEPLOYMENTS if deployment.command not in lines] == []

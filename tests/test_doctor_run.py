"""`doctor --run`: what it says of applications whose telemetry is not complete, run for real."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from embedded.answer import Answer, usage
from embedded.http_server import Hold, ScriptedServer
from embedded.otlp_receiver import OtlpReceiver
from embedded.responses_api import Plan, ResponsesAPI
from otel_responses_usage._commands import doctor as doctor_package
from test_doctor import Told, doctor

SECRET = "sk-canary-4712"
PROMPT = "canary-prompt-4713"

PROVIDERS = """
from openai import OpenAI
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from otel_responses_usage import ResponsesUsageInstrumentor

tracer_provider = TracerProvider()
"""
EXPORTER = "tracer_provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))\n"
SET_TRACER = "trace.set_tracer_provider(tracer_provider)\n"
SET_METER = (
    "metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())]))\n"
)
ON = "ResponsesUsageInstrumentor().instrument()\n"
CALL = f"""
with OpenAI().responses.create(model="gpt-5.4-mini", input="{PROMPT}", stream=True) as stream:
    for event in stream:
        if event.type == "response.output_text.delta":
            break
print("left early")
"""
PLAIN = f"from openai import OpenAI\n{CALL}"
SET_UP = PROVIDERS + EXPORTER + SET_TRACER + SET_METER + ON
GREEN = "from gevent import monkey; monkey.patch_all()\n"
ENDED = "import os; os._exit(0)\n"
OTHER_API = """
try:
    OpenAI(max_retries=0).chat.completions.create(model="m", messages=[])
except Exception as error:
    print(type(error).__name__)
"""
OWN_REQUEST = """
import openai._base_client

method = openai._base_client.SyncAPIClient.request.__wrapped__
openai._base_client.SyncAPIClient.request = lambda self, *args, **kwargs: method(self, *args, **kwargs)
openai._base_client.SyncAPIClient._process_response = (
    openai._base_client.SyncAPIClient._process_response.__wrapped__
)
"""
SUPPRESSED = """
from opentelemetry.instrumentation.utils import suppress_instrumentation

with suppress_instrumentation(), OpenAI().responses.create(model="m", input="x", stream=True) as stream:
    next(iter(stream))
"""

# The application, how it is started, and the problems and notes that are to be named.
APPLICATIONS: dict[str, tuple[str, tuple[str, ...], set[str], set[str]]] = {
    "good": (SET_UP + CALL, (), set(), set()),
    "good, zero-code": (PLAIN, ("--zero-code",), set(), set()),
    "never instrumented": (SET_UP.replace(ON, "") + CALL, (), {"not-instrumented", "calls-missed"}, set()),
    "not started with opentelemetry-instrument": (
        PLAIN,
        (),
        {"no-sdk", "not-instrumented", "calls-missed"},
        set(),
    ),
    "instrumented after the call": (
        PROVIDERS + EXPORTER + SET_TRACER + SET_METER + CALL + ON,
        (),
        {"not-instrumented", "calls-missed"},
        set(),
    ),
    "a provider that is not set": (
        PROVIDERS + EXPORTER + SET_METER + ON + CALL,
        (),
        {"provider-unused"},
        {"delivery-untried"},
    ),
    "no exporter": (PROVIDERS + SET_TRACER + SET_METER + ON + CALL, (), {"no-exporter"}, set()),
    "no meter provider": (PROVIDERS + EXPORTER + SET_TRACER + ON + CALL, (), {"no-meter-provider"}, set()),
    "no exit": (SET_UP + CALL + ENDED, (), {"killed", "calls-open"}, set()),
    "gevent too late": (SET_UP + GREEN + CALL, (), {"gevent-order"}, set()),
    "methods replaced": (SET_UP + OWN_REQUEST + CALL, (), {"patch-replaced", "calls-missed"}, set()),
    "providers twice": (SET_UP + CALL, ("--zero-code",), set(), {"provider-twice"}),
    "another API": (SET_UP + OTHER_API, (), set(), {"other-api", "no-calls"}),
    "suppressed": (SET_UP + SUPPRESSED, (), set(), {"calls-suppressed"}),
    "no end": (SET_UP + CALL + "import time; time.sleep(120)", ("--timeout", "30"), set(), {"run-stopped"}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Told]]:
    """All runs, six at a time, against one server and one receiver."""
    folder = tmp_path_factory.mktemp("applications")
    plan = Plan(Answer(usage=usage(14, 871)), cut_after=6, end=Hold())
    with ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        server = stack.enter_context(ScriptedServer(ResponsesAPI(lambda _: plan)))
        receiver = stack.enter_context(OtlpReceiver())
        environ = {
            "OPENAI_API_KEY": SECRET,
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_LOGS_EXPORTER": "none",
        }
        runs = {}
        for number, (name, (source, options, _, _)) in enumerate(APPLICATIONS.items()):
            program = folder / f"app{number}.py"
            program.write_text(source)
            runs[name] = pool.submit(doctor, *options, "--run", str(program), cwd=folder, **environ)
        yield {name: run.result() for name, run in runs.items()}


@pytest.mark.parametrize("name", APPLICATIONS)
def test_what_is_wrong_with_an_application_is_named(runs: dict[str, Told], name: str) -> None:
    """The problems are those that were planted; notes that matter are there."""
    told, (_, _, problems, notes) = runs[name], APPLICATIONS[name]
    assert told.names("problem") == problems, told.output
    assert notes <= told.names("note"), told.output
    assert told.code == (1 if problems else 0)


def test_a_good_application_is_told_with_its_calls(runs: dict[str, Told]) -> None:
    """The calls are counted, and their usage is known by a look-up after the early end."""
    for name in ("good", "good, zero-code"):
        assert runs[name].found("calls") == "Responses calls: 1. With their usage: 1."
        assert re.match(
            r"Traces were delivered to http://127.0.0.1:\d+/v1/traces", runs[name].found("traces")
        )


def test_the_application_prints_as_ever(runs: dict[str, Told]) -> None:
    """Its output goes to the error output, so that the report can be read by a program."""
    assert "left early" in runs["good"].output


def test_no_report_has_content_or_keys(runs: dict[str, Told]) -> None:
    """The prompt and the key of the application are in no report. What it prints itself is its own."""
    told = {name: str(run.findings) for name, run in runs.items()}
    assert [name for name, text in told.items() if SECRET in text or PROMPT in text] == []


def test_the_probe_imports_no_threads_at_the_start(tmp_path: Path) -> None:
    """What gevent replaces is not imported before the first line of the application."""
    command = "import sys; print({'threading', 'socket', 'ssl', 'logging'} & set(sys.modules))"
    probe = Path(doctor_package.__file__).with_name("probe")
    environ = {"PYTHONPATH": str(probe), "RESPONSES_USAGE_DOCTOR_REPORT": str(tmp_path / "report")}
    alone, watched = (
        subprocess.run(  # noqa: S603  # written above
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for environment in ({}, environ)
    )
    assert watched == alone
    assert '"event": "start"' in (tmp_path / "report").read_text()


@pytest.fixture
def answering() -> Iterator[tuple[str, list[Plan]]]:
    """A server of the API, and the plan it answers by."""
    plans = [Plan(Answer(usage=usage(14, 9)), cut_after=6, end=Hold())]
    with ScriptedServer(ResponsesAPI(lambda _: plans[-1], key=SECRET)) as server:
        yield f"{server.url}/v1", plans


@pytest.mark.parametrize(
    ("fate", "key", "name", "level"),
    [
        ("kept", SECRET, "api", "ok"),
        ("lost", SECRET, "api-not-stored", "problem"),
        ("kept", "sk-of-another", "api-failed", "problem"),
    ],
)
def test_api_tells_whether_look_ups_work(
    answering: tuple[str, list[Plan]], tmp_path: Path, fate: str, key: str, name: str, level: str
) -> None:
    """One call is made, left early and looked up. What it costs is said before."""
    url, plans = answering
    plans.append(Plan(Answer(usage=usage(14, 9)), cut_after=6, end=Hold(), fate=fate))  # type: ignore[arg-type]
    program = tmp_path / "empty.py"
    program.write_text("")
    told = doctor("--api", "--run", str(program), OPENAI_API_KEY=key, OPENAI_BASE_URL=url)
    assert name in told.names(level), told.output
    assert "at most 16 output tokens are billed" in " ".join(told.output.split())
    assert key not in told.output

"""Every example runs as a user would run it and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_PROTOCOL,
)

from embedded.otlp_receiver import OtlpReceiver
from observed import HANGING_S

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# The row of the one call that the small examples make, but for the time it took. No cached tokens: "-".
CALL = ["completed", "14", "187", "23", "187", "-", "128", "stream"]


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Returns what the command printed, having complained of nothing."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OTEL_", "OPENAI_", "COLUMNS"))
    }
    done = subprocess.run(  # noqa: S603 - the project's own files
        command,
        env=inherited | {"COLUMNS": "120"} | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Before the first of them the scripts say that they set up their environment.
    complaints = re.sub(r"Setting up .*\n|Ready after .*\n", "", done.stderr)
    assert complaints == ""
    return done.stdout


def run_python(script: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    return run(sys.executable, "-W", "error", EXAMPLES / script, *arguments, env=env)


def rows(output: str) -> dict[str, list[str]]:
    """The table's lines by their first cell; cells are two blanks apart."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {first: rest for first, *rest in cells if rest}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"outcome": ["completed"], "known from": ["stream"]}),
        (("--cut",), {"outcome": ["cut"], "known from": ["retrieval"]}),
    ],
)
def test_the_token_report_shows_what_deltas_do_not_tell(
    arguments: tuple[str, ...], expected: dict[str, list[str]]
) -> None:
    """The report sets deltas against tokens, of a whole stream and of one that was cut."""
    table = rows(run_python("token_report.py", *arguments))
    assert table.items() >= expected.items()
    assert table.items() >= {"tokens billed": ["187"], "of them reasoning": ["128"]}.items()
    assert table["text assembled"][0].startswith("A crew of five: 👩🏽‍🚀")
    assert ("looked up" in table) == bool(arguments)
    assert int(table["deltas counted"][0].split()[0]) <= 14


def test_instrumenting_by_hand_exports_traces_and_metrics() -> None:
    """The example prints the answer, and what arrived in its stand-in receiver."""
    output = run_python("manual.py")
    assert output.startswith("A crew of five: ")
    assert rows(output)["chat gpt-5.4-mini"][:-1] == CALL


def test_each_response_over_a_websocket_has_its_span() -> None:
    """The example prints two answers of one connection, and the span and tokens of each."""
    output = run_python("websocket.py")
    lines = output.splitlines()
    assert lines[0] == lines[1] == "A crew of five: 👩🏽‍🚀👨🏻‍🔬🧑🏿‍🍳👩🏼‍🚒🧑🏾‍🌾."
    assert "spans 2" in output
    told = [line for line in lines if "chat gpt-5.4-mini" in line]
    assert [re.split(r"\s{2,}", line.strip())[1:9] for line in told] == [
        ["completed", "14", "187", "23", "187", "-", "128", "stream"]
    ] * 2


def test_instrumenting_by_hand_exports_to_an_endpoint_of_the_user() -> None:
    """With an endpoint in the environment the example sends its span there and prints nothing else."""
    with OtlpReceiver() as receiver:
        output = run_python("manual.py", env={OTEL_EXPORTER_OTLP_ENDPOINT: receiver.grpc_endpoint})
        [span] = receiver.wait_for_spans(1)
    assert span.attributes["gen_ai.usage.output_tokens"] == 187
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_an_application_is_instrumented_without_a_line_of_code(protocol: str) -> None:
    """Environment variables alone give an ordinary application its span and its metrics."""
    output = run(EXAMPLES / "zero_code" / "run", env={OTEL_EXPORTER_OTLP_PROTOCOL: protocol})
    assert output.startswith("A crew of five: ")
    assert rows(output)["chat gpt-5.4-mini"][:-1] == CALL
    assert "otel" not in (EXAMPLES / "zero_code" / "app.py").read_text().lower()


BESIDE = """
import sys

import openai
from opentelemetry import trace

# The sign of another instrumentation: the span of an inference that is current during a call.
INFERENCE = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"}
theirs = trace.get_tracer("theirs")
with openai.OpenAI() as client, theirs.start_as_current_span("theirs", attributes=INFERENCE):
    with client.responses.create(model="m", input="A story.", stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta" and "leave" in sys.argv:
                break
"""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["leave"], ["closed", "-", "-", "33", "196", "-", "-", "retrieval"]),
        ([], None),
    ],
    ids=["left early", "read to its end"],
)
def test_stand_ins_show_calls_beside_another_instrumentation(
    tmp_path: Path, arguments: list[str], told: list[str] | None
) -> None:
    """A usage span is the row of its call. A whole call has no span of this package, and so no row."""
    program = tmp_path / "beside.py"
    program.write_text(BESIDE)
    output = run_python("stand_ins.py", "opentelemetry-instrument", sys.executable, str(program), *arguments)
    row = rows(output).get("theirs")
    assert (row[:8] if row else None) == told
    assert ("in all" in output) == (told is not None)
    assert rows(output)["chat"] == ["output", "1", "196"]


def test_stand_ins_receive_the_test_of_the_doctor() -> None:
    """Its test span is no call."""
    command = f"{sys.executable} -m otel_responses_usage doctor 2>&1"
    output = run_python("stand_ins.py", "sh", "-c", command)
    assert "A test span was delivered" in output
    assert "What arrived over OTLP: spans 1, metrics 1" in output
    assert "in all" not in output

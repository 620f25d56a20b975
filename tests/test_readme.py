"""What the README says is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from enum import Enum
from pathlib import Path
from unittest.mock import Mock

import pytest

from embedded.answer import Answer, usage
from embedded.http_server import Hold, ScriptedServer
from embedded.otlp_receiver import OtlpReceiver
from embedded.responses_api import Plan, ResponsesAPI
from observed import usage_attributes
from otel_responses_usage import Config, MissingReason, Outcome, UsageSource
from otel_responses_usage._facts import outcome as _outcome
from otel_responses_usage._telemetry import semconv as _semconv
from otel_responses_usage._telemetry.telemetry import Telemetry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")

NAMES = {
    constant: value
    for constant, value in vars(_semconv).items()
    if constant.isupper() and constant[0] != "_" and isinstance(value, str) and constant != "SCHEMA_URL"
}
# Attributes that only metrics have; and a prefix, which stands in the README with an asterisk.
OF_METRICS = {
    _semconv.TOKEN_TYPE,
    _semconv.TOKEN_MODALITY,
    _semconv.RETRIEVAL_RESULT,
    _semconv.TOOL_TYPE,
    _semconv.RATE_LIMIT_TYPE,
    _semconv.ON_CALL_LOSS,
}
ATTRIBUTES = {
    name + "*" if name.endswith(".") else name
    for constant, name in NAMES.items()
    if not constant.startswith("METRIC_")
}
NAME = re.compile(r"(?<![\w.-])(?:gen_ai|openai|openai_responses|server|error|http|network)\.[a-z_.]*[a-z_*]")


def table(first_heading: str) -> list[list[str]]:
    """The rows below the table head that begins with these words, cell by cell."""
    _, found, rest = README.partition(f"\n| {first_heading} |")
    assert found, f"no table {first_heading}"
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def code(language: str) -> str:
    """The one block of code in this language that is marked with it."""
    [block] = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return str(block)


def test_the_example_by_hand_exports_what_was_billed(tmp_path: Path) -> None:
    """The lines of the README, run as they stand, bring a span and metrics with the server's own counts."""
    billed = usage(14, 871, cached=2, reasoning=640)
    program = tmp_path / "by_hand.py"
    program.write_text(code("python"))
    api = ResponsesAPI(lambda _: Plan(Answer(usage=billed), cut_after=6, end=Hold()))
    with ScriptedServer(api) as server, OtlpReceiver() as receiver:
        environment = {
            "PATH": os.environ["PATH"],
            "OPENAI_API_KEY": "sk-readme",
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint,
        }
        command = [sys.executable, str(program)]
        subprocess.run(command, env=environment, check=True, timeout=60)  # noqa: S603  # the README's own
    [span] = receiver.spans
    assert span.name == "chat gpt-5.4-mini"
    assert span.attributes["openai_responses.stream.outcome"] == "closed"
    assert span.attributes["openai_responses.usage.source"] == "retrieval"
    assert {key: value for key, value in span.attributes.items() if ".usage." in key} == {
        **usage_attributes(billed),
        "openai_responses.usage.source": "retrieval",
    }
    points = receiver.metrics["gen_ai.client.token.usage"].points
    assert {(point.attributes["gen_ai.token.type"], point.sum) for point in points} == {
        ("input", 14),
        ("output", 871),
    }


def test_the_table_of_attributes_has_those_of_the_spans() -> None:
    """Every attribute a span can have is in the table, and no other."""
    told = [name for attributes, _ in table("attribute") for name in NAME.findall(attributes)]
    assert sorted(told) == sorted(ATTRIBUTES - OF_METRICS)


def instruments(*generations: _semconv.Generation) -> set[tuple[str, ...]]:
    """Name, kind and, if it has one, unit of each instrument for these generations of the conventions."""
    meter = Mock()
    Telemetry(Mock(), meter, generations)
    return {
        (call.args[0], kind, *([call.kwargs["unit"]] if "unit" in call.kwargs else []))
        for kind, create in {
            "histogram": meter.create_histogram,
            "counter": meter.create_counter,
            "up-down counter": meter.create_up_down_counter,
            "gauge": meter.create_gauge,
        }.items()
        for call in create.call_args_list
    }


METRICS = {name for name, *_ in instruments(_semconv.CURRENT, _semconv.NEXT)}


@pytest.mark.parametrize(
    ("heading", "generation"),
    [("metric", _semconv.CURRENT), ("metric of the next generation", _semconv.NEXT)],
)
def test_the_tables_of_metrics_have_the_instruments(heading: str, generation: _semconv.Generation) -> None:
    """Every instrument is in the table with its kind and its unit, and no other."""
    rows = [[cell.replace("`", "") for cell in row] for row in table(heading)]
    told = {(name, *described.split(", ")) for name, described, _ in rows}
    ours = {one for one in instruments() if generation is _semconv.NEXT}
    assert told == instruments(generation) - ours


def test_every_name_in_the_text_is_one_that_is_written() -> None:
    """No attribute or metric is named anywhere that the code does not know."""
    prefixes = (_semconv.STREAM_DELTAS_BY_TYPE, _semconv.TOOL_CALLS_BY_TYPE)
    told = {
        next((prefix + "*" for prefix in prefixes if name.startswith(prefix)), name)
        for name in NAME.findall(README)
    }
    assert told == ATTRIBUTES | METRICS


def test_the_queries_use_names_that_exist() -> None:
    """Metrics and labels of the queries are those that Prometheus makes of ours."""
    used = set(re.findall(r"(?:gen_ai|openai_responses)_\w+", code("promql")))
    metrics = {_semconv.CURRENT.tokens[0].name: "_sum", _semconv.METRIC_CALLS: "_total"}
    known = {name.replace(".", "_") + metrics.get(name, "") for name in ATTRIBUTES | METRICS}
    assert used
    assert used <= known


@pytest.mark.parametrize(
    ("heading", "values"),
    [("outcome", Outcome), ("source", UsageSource), ("missing reason", MissingReason)],
)
def test_the_tables_of_values_have_every_value(heading: str, values: type[Enum]) -> None:
    """Each value of the attribute is in its table once, and no other."""
    assert sorted(row[0].strip("`") for row in table(heading)) == sorted(member.value for member in values)


def test_the_table_of_outcomes_has_their_status_and_error_type() -> None:
    """The status that a span has by its outcome is the one in the table, and so are fixed error types."""
    fixed = [ending for ending in vars(_outcome).values() if isinstance(ending, _outcome.Ending)]
    error_types = {ending.outcome.value: ending.error_type for ending in fixed if ending.error_type}
    rows = {row[0].strip("`"): row[2:] for row in table("outcome")}
    assert {outcome: row[0] for outcome, row in rows.items()} == {
        outcome.value: "error" if _outcome.Ending(outcome).is_error else "unset" for outcome in Outcome
    }
    told = {outcome: error_type.strip("`") for outcome, (_, error_type) in rows.items() if "`" in error_type}
    assert told == error_types


def _shown(default: object) -> str:
    if type(default) in (int, float):
        return f"{default:g}"
    return str(default).lower() if isinstance(default, (bool, str)) else "none"


def test_the_table_of_settings_has_every_setting_with_its_default() -> None:
    """Each field of `Config` is in the table under its variable, with its default, and no other is named."""
    settings = {f"OTEL_RESPONSES_USAGE_{field.name.upper()}": field.default for field in fields(Config)}
    told = {variable.strip("`"): default.strip("`") for variable, default, _ in table("variable")}
    assert told == {variable: _shown(default) for variable, default in settings.items()}
    assert set(re.findall(r"OTEL_RESPONSES_USAGE_\w+", README)) == set(told)


def test_every_link_leads_somewhere() -> None:
    """Files and sections that are linked to are there."""
    links = set(re.findall(r"\]\(([^)]+)\)", README))
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    sections = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    assert links
    assert {link for link in links if link not in sections and not (ROOT / link).exists()} == set()


def test_the_two_commands_can_be_run() -> None:
    """The commands that the README begins with are programs of this repository."""
    commands = re.findall(r"^scripts/\w+", README, re.MULTILINE)
    assert commands == ["scripts/demo", "scripts/test"]
    assert all(os.access(ROOT / command, os.X_OK) for command in commands)

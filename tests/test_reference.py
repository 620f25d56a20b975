"""What the reference and the page of look-ups say is so: their tables are those of the code."""

from __future__ import annotations

import re
from dataclasses import fields
from enum import Enum
from pathlib import Path
from unittest.mock import Mock

import pytest

import otel_responses_usage
from documents import DOCS, PAGES, ROOT, blocks, name_of
from documents import table as table_of
from otel_responses_usage import Config, MissingReason, Outcome, UsageSource
from otel_responses_usage._commands.doctor import trial
from otel_responses_usage._facts import outcome as _outcome
from otel_responses_usage._facts.response import Response
from otel_responses_usage._lookup.retrieval import (
    Answer,
    Attempt,
    DeadlinePassed,
    Failure,
    RetrievalPolicy,
    retrieval_flow,
)
from otel_responses_usage._telemetry import semconv as _semconv
from otel_responses_usage._telemetry.telemetry import Telemetry

REFERENCE = DOCS / "reference.md"

NAMES = {
    constant: value
    for constant, value in vars(_semconv).items()
    if constant.isupper() and constant[0] != "_" and isinstance(value, str) and constant != "SCHEMA_URL"
}
# Attributes that only metrics have; and a prefix, which stands on the page with an asterisk.
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
PROMETHEUS_NAME = re.compile(r"(?<![\w./:-])(?:gen_ai|openai_responses)_\w+")
# Not attributes: names of modules and of values.
NOT_ATTRIBUTES = re.compile(r"^(openai\.(v1|lib)|http\.client|openai_responses_usage)")


def table(first_heading: str) -> list[list[str]]:
    return table_of(REFERENCE, first_heading)


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


INSTRUMENTS = instruments(_semconv.CURRENT, _semconv.NEXT)
METRICS = {name for name, *_ in INSTRUMENTS}


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


def names_in(page: Path) -> set[str]:
    """The names of attributes and metrics on a page, those with a prefix as it stands in the table."""
    prefixes = (_semconv.STREAM_DELTAS_BY_TYPE, _semconv.TOOL_CALLS_BY_TYPE)
    return {
        next((prefix + "*" for prefix in prefixes if name.startswith(prefix)), name)
        for name in NAME.findall(page.read_text("utf-8"))
        if not NOT_ATTRIBUTES.match(name)
    }


def test_the_page_has_every_name() -> None:
    """Every attribute and metric of the code is on the page, and no other."""
    assert names_in(REFERENCE) == ATTRIBUTES | METRICS


# The page of deviations names what is not written; the page of traces has the scopes of others.
@pytest.mark.parametrize(
    "page",
    [page for page in [*PAGES, ROOT / "README.md"] if page.stem not in {"conventions", "neighbours"}],
    ids=name_of,
)
def test_every_name_on_the_pages_is_one_that_is_written(page: Path) -> None:
    """No page names an attribute or metric that the code does not know."""
    assert names_in(page) <= ATTRIBUTES | METRICS | {trial.METRIC}


def prometheus_names() -> set[str]:
    """What Prometheus makes of the metrics and attributes, and what the rules of this repository record."""
    units = {"s": "_seconds"}
    endings = {
        "histogram": ("_sum", "_count", "_bucket"),
        "counter": ("_total",),
        "up-down counter": ("",),
        "gauge": ("",),
    }
    made = {
        name.replace(".", "_") + units.get(unit[0] if unit else "", "") + ending
        for name, kind, *unit in INSTRUMENTS
        for ending in endings[kind]
    }
    return made | {name.replace(".", "_") for name in ATTRIBUTES}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_queries_use_names_that_exist(page: Path) -> None:
    """Metrics and labels of the queries are those that Prometheus makes of ours."""
    text = re.sub(r"gen_ai_latest_experimental|openai_responses_usage(?!_)", "", page.read_text("utf-8"))
    assert set(PROMETHEUS_NAME.findall(text)) <= prometheus_names()


def test_there_are_queries() -> None:
    """The block of queries, which other tests put to a real Prometheus, is there once."""
    [block] = blocks("promql", pages=[REFERENCE])
    assert len(block.text.splitlines()) == 2


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


def test_the_table_of_settings_has_every_setting_with_its_default() -> None:
    """Each field of `Config` is in the table under its variable, with its default, and no other."""
    settings = {f"OTEL_RESPONSES_USAGE_{field.name.upper()}": field.default for field in fields(Config)}
    told = {variable.strip("`"): default.strip("`") for variable, default, _ in table("variable")}
    assert told == {
        variable: "none"
        if default in ((), None)
        else str(default).lower()
        if isinstance(default, (bool, str))
        else f"{default:g}"
        for variable, default in settings.items()
    }


def test_the_table_of_python_names_has_the_public_ones() -> None:
    """Each public name of the package is in the table, and no other."""
    told = [name for names, _ in table("name") for name in re.findall(r"`(\w+)`", names)]
    assert sorted(told) == sorted(otel_responses_usage.__all__)


def requests_of(answer: Answer, limit_s: float) -> tuple[int, float, MissingReason | None]:
    """How many requests a look-up sends that gets this answer each time, in which time, and its reason."""
    flow = retrieval_flow("resp_1", RetrievalPolicy())
    requests, elapsed_s, step = 0, 0.0, next(flow)
    try:
        while True:
            if isinstance(step, Attempt):
                requests += 1
                step = flow.send(answer)
            elif elapsed_s + step.seconds > limit_s:
                flow.throw(DeadlinePassed())
            else:
                elapsed_s += step.seconds
                step = flow.send(None)
    except StopIteration as end:
        return requests, elapsed_s, end.value.reason


def test_the_table_of_requests_is_what_look_ups_send() -> None:
    """The numbers of requests on the page of look-ups are those of the code."""
    told = dict(table_of(DOCS / "look-ups.md", "case"))
    config, in_progress = Config(), Answer(200, Response(id="resp_1", status="in_progress"))
    assert (config.retrieval_timeout, config.background_timeout) == (10, 300)
    assert told["the response never ends, limit 10 s"] == str(requests_of(in_progress, 10)[0])
    assert told["the response never ends, limit 300 s"] == "about 150"
    assert requests_of(in_progress, 300)[0] == pytest.approx(150, rel=0.05)
    requests, elapsed_s, reason = requests_of(Answer(404), 10)
    assert told["404"] == f"{requests} within {elapsed_s:.1f} s, then `{reason.value if reason else None}`"
    for case, status in {"401, 403": 403, "another status, for example 400, 405 or 501": 501}.items():
        requests, _, reason = requests_of(Answer(status), 10)
        assert told[case] == f"{requests}, then `{reason.value if reason else None}`"
    requests, _, reason = requests_of(Answer(failure=Failure.TRANSPORT), 10)
    assert told["four broken connections"] == f"{requests}, then `{reason.value if reason else None}`"

"""Grafana's dashboards ask for what is there: every query of every panel, put to a real Prometheus."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from functools import partial
from itertools import combinations
from typing import Any
from urllib.error import HTTPError

import pytest
import yaml

from programs import wait_until
from stack import EXAMPLE, MODEL, Stack, hasten

GRAFANA = EXAMPLE / "grafana"
DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text("utf-8")) for path in sorted((GRAFANA / "dashboards").glob("*.json"))
}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
]
# What Grafana would put in: all services, models and tenants, six hours, a bar a minute, four scrapes.
VARIABLES = {
    "$job": ".*",
    "$model": ".*",
    "$tenant": ".*",
    "$__range": "6h",
    "$__interval": "1m",
    "$__rate_interval": "1m",
}


def promql(target: dict[str, Any]) -> str:
    """The query as the hastened Prometheus is asked it."""
    expression: str = target["expr"]
    for name in sorted(VARIABLES, key=len, reverse=True):
        expression = expression.replace(name, VARIABLES[name])
    assert "$" not in expression
    return hasten(expression)


@pytest.fixture(scope="module")
def at_work(stack: Stack) -> Stack:
    """Besides `cafe` a service that has a budget."""
    with stack.service("shop", "whole") as ended:
        assert ended() == 0
    return stack


@pytest.mark.parametrize("panel", PANELS)
def test_every_query_has_an_answer(at_work: Stack, panel: dict[str, Any]) -> None:
    """Each query of the panel returns numbers, with the labels that its legend shows."""

    def numbers(target: dict[str, Any]) -> list[dict[str, Any]]:
        series = at_work.prometheus.query(promql(target))
        return [one for one in series if math.isfinite(float(one["value"][1]))]

    for target in panel["targets"]:
        found = wait_until(partial(numbers, target), promql(target), 60)
        shown = [part.partition("}}")[0] for part in target.get("legendFormat", "").split("{{")[1:]]
        assert all(any(label in one["metric"] for one in found) for label in shown)


@pytest.mark.parametrize("panel", [panel for panel in PANELS if "rate(" in json.dumps(panel.values[0])])
def test_a_rate_spans_two_exports(panel: dict[str, Any]) -> None:
    """A rate looks at more than a minute, in which a service exports once, whatever the time range.

    Grafana takes a step and a scrape for `$__rate_interval`, or four scrapes, if that is longer: a minute,
    where steps are short, and between the first and the last of four scrapes there may be no export.
    """
    found = re.fullmatch(r"(\d+)m", panel["interval"])
    assert found
    assert int(found[1]) >= 1


@pytest.mark.parametrize("panel", [panel for panel in PANELS if "exemplar" in json.dumps(panel.values[0])])
def test_an_exemplar_leads_to_its_trace(at_work: Stack, panel: dict[str, Any]) -> None:
    """A diamond on the panel has, under the name that Grafana looks for, the id of a trace in Jaeger."""
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/datasources.yaml").read_text("utf-8"))
    [destination] = next(
        source["jsonData"]["exemplarTraceIdDestinations"]
        for source in sources["datasources"]
        if source["type"] == "prometheus"
    )
    assert destination["datasourceUid"] in {source["uid"] for source in sources["datasources"]}
    [target] = [target for target in panel["targets"] if target.get("exemplar")]
    series = wait_until(lambda: at_work.prometheus.exemplars(promql(target)), "exemplars", 30)
    trace_id = series[0]["exemplars"][0]["labels"][destination["name"]]

    def operations() -> set[str]:
        with suppress(HTTPError):  # not found: the span may still be on its way
            [trace] = at_work.jaeger._data(f"traces/{trace_id}")
            return {span["operationName"] for span in trace["spans"]}
        return set()

    assert wait_until(operations, f"trace {trace_id}", 30) == {f"chat {MODEL}"}


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_the_variables_have_values(at_work: Stack, dashboard: dict[str, Any]) -> None:
    """Services and models to choose from are those that made calls."""
    [services, models, *tenants] = [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    assert (services, models) == (
        "label_values(openai_responses_calls_total, job)",
        'label_values(openai_responses_calls_total{job=~"$job"}, gen_ai_request_model)',
    )
    own = 'openai_responses_calls_total{job=~"$job", gen_ai_request_model=~"$model", tenant_id!=""}'
    assert tenants == [f"label_values({own}, tenant_id)"] * (dashboard["uid"] == "openai-responses-tenants")
    series = at_work.prometheus.query("openai_responses_calls_total")
    assert {one["metric"]["job"] for one in series} >= {"cafe", "shop"}
    assert {one["metric"]["gen_ai_request_model"] for one in series} == {MODEL}
    assert {one["metric"].get("tenant_id") for one in series} == {None, "acme", "zeta"}


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_panels_stand_side_by_side(dashboard: dict[str, Any]) -> None:
    """No panel covers another or sticks out, and each says what it shows."""
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
    assert all(panel["title"] and panel["description"] for panel in dashboard["panels"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


def test_dashboards_lead_to_each_other() -> None:
    """A link names a dashboard that is there, and no two have one name."""
    uids = {dashboard["uid"] for dashboard in DASHBOARDS.values()}
    for dashboard in DASHBOARDS.values():
        links = {link["url"] for link in dashboard["links"]}
        assert links == {f"/d/{uid}" for uid in uids - {dashboard["uid"]}}
    assert len(uids) == len(DASHBOARDS)


def test_panels_use_the_data_source_that_is_chosen() -> None:
    """No panel is bound to a data source of one installation."""
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(panel.values[0]["datasource"] == chosen for panel in PANELS)


@pytest.mark.parametrize("panel", [panel for panel in PANELS if panel.values[0]["type"] == "timeseries"])
def test_legends_have_values(panel: dict[str, Any]) -> None:
    """Beside the name of a line stands a number: its sum, or its last value."""
    legend = panel["options"]["legend"]
    assert legend["displayMode"] == "table"
    assert {"sum", "lastNotNull"} & set(legend["calcs"])

"""Recording rules and alerts, checked by promtool and held against the code whose metrics they read."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml

from otel_responses_usage import Config, MissingReason, Outcome, UsageSource
from otel_responses_usage._telemetry import semconv as _semconv
from programs import run
from stack import EXAMPLE, RULES, hasten, price_examples


def rules(path: Path) -> list[dict[str, Any]]:
    """The rules of a file, in order."""
    groups = yaml.load(path.read_text("utf-8"), yaml.CSafeLoader)["groups"]  # much faster than in Python
    return [rule for group in groups for rule in group["rules"]]


RECORDED = [rule for name in ("recordings", "prices", "budgets") for rule in rules(RULES / f"{name}.yml")]
ALERTS = rules(RULES / "alerts.yml")
TESTS = sorted((RULES / "tests").glob("*_test.yml"))
EXPRESSIONS = [rule["expr"] for rule in (*RECORDED, *ALERTS)]

# Of names, as Prometheus makes them of ours, and what it adds by kind and unit.
METRICS = {
    _semconv.CURRENT.tokens[0].name: "_sum",
    _semconv.CURRENT.duration: "_seconds_count",
    _semconv.CURRENT.time_to_first_chunk: "_seconds_bucket",
    _semconv.METRIC_RETRIEVAL_DURATION: "_seconds_count",
    _semconv.METRIC_CALLS: "_total",
    _semconv.METRIC_PENDING: "",
    _semconv.METRIC_OPEN_CIRCUITS: "",
    _semconv.METRIC_FAULTS: "_total",
    _semconv.METRIC_LATE_USAGE: "_total",
    _semconv.METRIC_RETRIES: "_total",
    _semconv.METRIC_TOOL_CALLS: "_total",
    _semconv.METRIC_WEB_SEARCH_REQUESTS: "_total",
    _semconv.METRIC_TOOL_TOKENS: "_total",
    _semconv.METRIC_RATE_LIMIT_REMAINING: "",
    _semconv.METRIC_RATE_LIMIT_LIMIT: "",
    **{
        metric.name: "_total"
        for metric in _semconv.NEXT.tokens
        if metric.field in ("input_tokens", "cache_read_input_tokens", "cache_write_input_tokens")
        and metric.instrument is _semconv.TokenInstrument.COUNTER
    },
}
# What the Collector makes of spans: see the connector in collector-config.yaml.
OF_SPANS = {
    "openai_responses_spans_input_tokens_total",
    "openai_responses_spans_cached_input_tokens_total",
    "openai_responses_spans_cache_write_input_tokens_total",
    "openai_responses_spans_recovered_tokens_total",
}


def test_the_configuration_is_valid() -> None:
    """Prometheus takes its configuration, with every file of rules that it names."""
    assert "prometheus.yml is valid" in run("promtool", "check", "config", RULES / "prometheus.yml")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_rules_pass_their_tests(path: Path) -> None:
    """What the rules promise of counters and alerts holds on made-up series."""
    assert "SUCCESS" in run("promtool", "test", "rules", path)


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_every_alert_is_seen_silent_firing_and_cleared(alert: str) -> None:
    """In one of promtool's tests the alert is silent at first, then fires, and then is gone."""
    lives = []
    for path in TESTS:
        for case in yaml.safe_load(path.read_text("utf-8"))["tests"]:
            seen = [one for one in case.get("alert_rule_test", ()) if one["alertname"] == alert]
            lives.append([bool(one["exp_alerts"]) for one in seen])  # promtool needs them in no order
    assert [False, True, False] in lives


def test_every_recording_is_used() -> None:
    """What is recorded is read by an alert, a dashboard or another recording."""
    dashboards = "".join(path.read_text("utf-8") for path in (EXAMPLE / "grafana").rglob("*.json"))
    read = "\n".join((*EXPRESSIONS, dashboards))
    assert {rule["record"] for rule in RECORDED if not re.search(rf"{rule['record']}\b", read)} == set()


def test_the_rules_read_metrics_that_exist() -> None:
    """A metric of ours has in the rules the name that Prometheus gives it."""
    read = "\n".join(EXPRESSIONS)
    recorded = {rule["record"] for rule in RECORDED}
    selected = set(re.findall(r"(?<![\w:])(?:gen_ai|openai_responses)_\w+(?=[\[{)\s])", read))
    labels = {
        name.replace(".", "_")
        for constant, name in vars(_semconv).items()
        if isinstance(name, str) and not constant.startswith("METRIC_")
    }
    known = {name.replace(".", "_") + suffix for name, suffix in METRICS.items()}
    assert selected - labels - recorded == known | OF_SPANS


@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("openai_responses_stream_outcome", Outcome),
        ("openai_responses_retrieval_result", UsageSource),
        ("openai_responses_usage_missing_reason", MissingReason),
    ],
)
def test_the_rules_name_values_that_exist(label: str, values: type[Enum]) -> None:
    """Outcomes and sources that the rules select are those of the code."""
    named = re.findall(rf'{label}[=!]~?"([^"]+)"', "\n".join(EXPRESSIONS))
    assert named
    assert {value for some in named for value in some.split("|")} <= {member.value for member in values}


def test_look_ups_fail_by_anything_but_a_source() -> None:
    """To the alert, every source of usage is a success."""
    [expression] = [rule["expr"] for rule in ALERTS if rule["alert"] == "OpenAIRetrievalFailing"]
    [successes] = re.findall(r'openai_responses_retrieval_result!~"([^"]+)"', expression)
    assert set(successes.split("|")) == {source.value for source in UsageSource}


def test_pending_calls_alert_at_half_of_what_a_process_holds() -> None:
    """The limit of the alert is half of the default setting."""
    [expression] = [rule["expr"] for rule in ALERTS if rule["alert"] == "OpenAIUsagePending"]
    assert expression.endswith(f"> {Config().max_pending // 2}")


def test_the_commented_prices_are_valid(tmp_path: Path) -> None:
    """With the comment signs taken away the examples are rules, and each kind of price is among them."""
    path = tmp_path / "prices.yml"
    path.write_text(price_examples(), "utf-8")
    assert "SUCCESS" in run("promtool", "check", "rules", path)
    assert len(rules(path)) == len(re.findall(r"- record:", path.read_text("utf-8")))
    read = "\n".join(EXPRESSIONS)
    priced = {rule["record"] for rule in rules(path)}
    assert priced == set(re.findall(r"openai_responses:price_dollars:per_(?:thousand|million)\w+", read))


def test_every_model_has_all_its_prices(tmp_path: Path) -> None:
    """A model, tier and window that is in the price table has a price for each kind of token."""
    path = tmp_path / "prices.yml"
    path.write_text(price_examples(), "utf-8")
    kinds: dict[tuple[str, ...], set[str]] = {}
    for rule in rules(path):
        if rule["record"] == "openai_responses:price_dollars:per_million_tokens":
            labels = rule["labels"]
            key = (labels["gen_ai_request_model"], labels.get("tier", ""), labels.get("window", ""))
            kinds.setdefault(key, set()).add(labels["gen_ai_token_type"])
    assert len(kinds) == 3
    assert all(
        priced == {"input", "cached_input", "cache_write_input", "output"} for priced in kinds.values()
    )


def test_minutes_are_as_long_as_the_rules_think() -> None:
    """Increments are recorded once a minute, and there is a scrape in every minute."""
    groups = yaml.safe_load((RULES / "recordings.yml").read_text("utf-8"))["groups"]
    assert {group["interval"] for group in groups} == {"1m"}
    jobs = yaml.safe_load((RULES / "prometheus.yml").read_text("utf-8"))["global"]
    assert jobs["scrape_interval"] == "15s"


def test_gateways_and_agents_are_scraped_as_the_jobs_that_the_rules_know() -> None:
    """What the gateways' README has for Prometheus are the jobs of prometheus.yml with other targets."""
    readme = (EXAMPLE.with_name("gateway") / "README.md").read_text("utf-8")
    [block] = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)

    def jobs(text: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = yaml.safe_load(text)["scrape_configs"]
        return [{key: value for key, value in job.items() if key != "static_configs"} for job in found]

    assert jobs(block) == jobs((RULES / "prometheus.yml").read_text("utf-8"))


def test_the_readme_explains_every_alert() -> None:
    """The table of alerts has each with its severity, and no other."""
    readme = (EXAMPLE / "README.md").read_text("utf-8")
    told = re.findall(r"^\| `(OpenAI\w+)` \| (\w+) \|", readme, re.MULTILINE)
    assert told == [(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_links_its_runbook_and_a_dashboard(rule: dict[str, Any]) -> None:
    """The section is in docs/operations.md, and the dashboard has the variable that it is opened with."""
    page, _, anchor = rule["annotations"]["runbook_url"].rpartition("#")
    assert (page, anchor) == ("https://docs.example/operations.html", rule["alert"].lower())
    assert f"\n### {rule['alert']}\n" in (EXAMPLE.parents[1] / "docs" / "operations.md").read_text("utf-8")
    found = re.fullmatch(
        r"http://localhost:3000/d/([\w-]+)(?:\?var-(\w+)=\{\{ \$labels\.(\w+) \| urlquery \}\})?",
        rule["annotations"]["dashboard_url"],
    )
    assert found
    boards = {
        board["uid"]: {variable["name"] for variable in board["templating"]["list"]}
        for board in map(json.loads, (path.read_text("utf-8") for path in EXAMPLE.rglob("dashboards/*.json")))
    }
    assert {found[2]} - {None} <= boards[found[1]]
    assert found[3] in (None, "job", "tenant_id")


def test_hastened_rules_are_the_same_rules() -> None:
    """What the tests shorten in a rule are durations, and nothing else."""
    assert hasten("increase1m[1m] offset 70s > 100e3 for 1d per30d") == (
        "increase1m[2000ms] offset 2333ms > 100e3 for 2880000ms per30d"
    )

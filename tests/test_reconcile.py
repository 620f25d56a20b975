"""What `reconcile` does with its options, with servers that fail, and with the numbers it gets."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

import otel_responses_usage
from observed import HANGING_S
from otel_responses_usage._commands import COMMANDS, main, reconcile
from otel_responses_usage._commands.reconcile_compare import Cause, compare
from otel_responses_usage._commands.reconcile_facts import CounterRow, Counts, ProviderRow
from otel_responses_usage._telemetry import semconv
from usage_record import Answer, JSONServer, UsageRecord

HOUR = 3600
NOW = 1_795_988_000  # 2026-11-29 21:33:20
BEGIN = NOW // HOUR * HOUR - 24 * HOUR
MODEL = "gpt-5.4-mini-2026-03-17"
TOKENS = "gen_ai_client_token_usage"


@dataclass
class Series:
    """A stand-in for the query API of a Prometheus, for series of one sample in each bucket."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], dict[int, float]] = field(default_factory=dict)
    faults: list[Answer] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    before: bool = False  # whether each series had a sample before the range, a zero

    def add(self, name: str, values: dict[int, float], **labels: str) -> None:
        """Add a series: its values, by the bucket in which they lie."""
        self.samples[name, frozenset(labels.items())] = values

    def add_calls(self, bucket: int, number: int, input_tokens: int, output_tokens: int) -> None:
        """Add the counters of a process that made calls in one bucket."""
        own = {
            "job": "shop",
            "instance": f"{len(self.samples)}",
            "gen_ai_provider_name": "openai",
            "gen_ai_response_model": MODEL,
        }
        for kind, tokens in (("input", input_tokens), ("output", output_tokens)):
            labels = {"gen_ai_token_type": kind, **own}
            self.add(f"{TOKENS}_sum", {bucket: tokens}, **labels)
            self.add(f"{TOKENS}_count", {bucket: number}, **labels)

    def answer(self, path: str, query: dict[str, list[str]], _headers: dict[str, str]) -> Answer:
        """Answer a request."""
        if self.faults:
            return self.faults.pop(0)
        if path.endswith("/label/__name__/values"):
            return self._data(sorted({name for name, _labels in self.samples}))
        if path.endswith("/query"):
            name = query["query"][0].split('"')[1]
            found = [dict(labels) for other, labels in self.samples if other == name and self.before]
            return self._data(
                {"resultType": "vector", "result": [{"metric": one, "value": [0, "0"]} for one in found]}
            )
        start, step = int(query["start"][0]), int(query["step"][0])
        function, _separator, rest = query["query"][0].partition("(")
        name = rest.split('"')[1]
        result = [
            {
                "metric": dict(labels),
                "values": [
                    [start + bucket * step, "0" if function == "resets" else str(value)]
                    for bucket, value in values.items()
                    if start + bucket * step <= int(query["end"][0])
                ],
            }
            for (other, labels), values in self.samples.items()
            if other == name
        ]
        return self._data({"resultType": "matrix", "result": result})

    def _data(self, data: object) -> Answer:
        more = {"warnings": list(self.warnings)} if self.warnings else {}
        return 200, {"content-type": "application/json"}, {"status": "success", "data": data, **more}


@dataclass
class Bench:
    """Both servers, and the command run against them."""

    record: UsageRecord
    series: Series
    provider: JSONServer
    prometheus: JSONServer
    capsys: pytest.CaptureFixture[str]
    environ: dict[str, str]
    slept: list[float] = field(default_factory=list)

    def run(self, *options: str, now: float = NOW) -> tuple[int, str, str]:
        """Return the exit code and what was printed."""
        parser = argparse.ArgumentParser()
        reconcile.add_arguments(parser)
        arguments = parser.parse_args(
            [f"--prometheus={self.prometheus.url}", f"--base-url={self.provider.url}/v1", *options]
        )
        self.capsys.readouterr()
        code = reconcile.run_with(arguments, self.environ, now, self.slept.append)
        printed = self.capsys.readouterr()
        for secret in ("canary", self.record.key):
            assert secret not in printed.out + printed.err
        return code, printed.out, printed.err

    def report(self, *options: str) -> dict[str, Any]:
        """Return the report as JSON."""
        _, output, errors = self.run("--json", *options)
        assert not errors
        found: dict[str, Any] = json.loads(output)
        return found


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    """Two records that agree: three calls of one bucket."""
    record, series = UsageRecord(), Series()
    for second in (10, 20, 30):
        record.bill(BEGIN + 2 * HOUR + second, MODEL, 1000, 200, cached=100)
    series.add_calls(2, 3, 3000, 600)
    environ = {"OPENAI_ADMIN_KEY": record.key}
    with JSONServer(record.answer) as provider, JSONServer(series.answer) as prometheus:
        yield Bench(record, series, provider, prometheus, capsys, environ)


def test_the_stand_in_has_the_documented_shape() -> None:
    """The SDK's own types take the pages of our stand-in, and the SDK asks for them as we do."""
    usage = pytest.importorskip("openai.types.admin.organization.usage_completions_response")
    searches = pytest.importorskip("openai.types.admin.organization.usage_web_search_calls_response")
    record = UsageRecord()
    record.bill(BEGIN, MODEL, 10, 2, cached=1)
    record.search(BEGIN, MODEL, 3)
    with JSONServer(record.answer) as server:
        client = openai.OpenAI(admin_api_key=record.key, base_url=f"{server.url}/v1", max_retries=0)
        options = {"start_time": BEGIN, "end_time": BEGIN + 48 * HOUR, "bucket_width": "1h", "limit": 24}
        organization: Any = client.admin.organization
        page = organization.usage.completions(
            **options, group_by=["model", "batch"], project_ids=["proj_shop"]
        )
        other = organization.usage.web_search_calls(**options, group_by=["model"])
        [_, query], _ = server.queries

    usage.UsageCompletionsResponse.model_validate_json(page.to_json())
    searches.UsageWebSearchCallsResponse.model_validate_json(other.to_json())
    assert page.data[0].results[0].input_cached_tokens == 1
    assert (page.has_more, page.next_page, len(page.data)) == (True, "page_24", 24)
    assert other.data[0].results[0].num_requests == 3
    assert query["group_by[]"] == ["model", "batch"]
    assert query["project_ids[]"] == ["proj_shop"]


def test_the_record_is_read_as_the_sdk_reads_it(bench: Bench) -> None:
    """Range, width, groups and projects are in the query, and the key is in a header only."""
    bench.run("--project-id=proj_shop", "--project-id=proj_bar")
    [(path, query), (other_path, other_query)] = bench.provider.queries
    assert path == "/v1/organization/usage/completions"
    assert query == {
        "start_time": [str(BEGIN)],
        "end_time": [str(BEGIN + 24 * HOUR)],
        "bucket_width": ["1h"],
        "limit": ["24"],
        "group_by[]": ["model", "batch"],
        "project_ids[]": ["proj_shop", "proj_bar"],
    }
    assert other_path == "/v1/organization/usage/web_search_calls"
    assert other_query["group_by[]"] == ["model"]
    assert {headers["authorization"] for headers in bench.provider.headers} == {f"Bearer {bench.record.key}"}
    assert not any("authorization" in headers for headers in bench.prometheus.headers)


def test_equal_records_end_with_0(bench: Bench) -> None:
    """The report of two equal records, line by line."""
    code, text, errors = bench.run("--max-difference=0")
    assert (code, errors) == (0, "")
    assert text == (
        """\
Token usage from 2026-11-28 21:00 to 2026-11-29 21:00 UTC
Buckets: 24 of 1 h

gpt-5.4-mini-2026-03-17
                             provider       Prometheus       difference
  requests                          3                3                0
  input tokens                  3,000            3,000                0
    of which cached               300          unknown          unknown
  output tokens                   600              600                0

Notes
- Prometheus has no sample of these counters in the day before the range, so
  each counter is read from zero. If a process had counted before Prometheus
  knew it, this is included.
- Prometheus has no cached tokens. docs/reconcile.md says what records them.
- The range ended 33 min ago. The provider's record may not be complete yet.

Difference: 0 tokens, 0.00 % of all. This is within the bound of 0 tokens.
"""
    )


@pytest.mark.parametrize(
    ("bound", "code"),
    [("0", 1), ("119", 1), ("120", 0), ("3%", 1), ("3.3%", 0), ("100%", 0), ("0%", 1)],
)
def test_the_exit_code_tells_whether_the_bound_holds(bench: Bench, bound: str, code: int) -> None:
    """The bound is a number of tokens, or a share of the larger record: here 120 of 3,720."""
    bench.record.bill(BEGIN + 5 * HOUR, MODEL, 100, 20)
    assert bench.run(f"--max-difference={bound}")[0] == code


def test_differences_of_two_models_do_not_cancel(bench: Bench) -> None:
    """Too much of one model and too little of another are two differences."""
    bench.record.bill(BEGIN + 5 * HOUR, "gpt-5.5-2026-06-01", 500, 0)
    bench.series.add_calls(3, 1, 500, 0)
    report = bench.report()
    assert report["difference_tokens"] == 1000
    assert {part["cause"]: part["tokens"] for part in report["explanations"]} == {
        "unwatched": 500,
        "surplus": -500,
    }


def test_every_page_is_read(bench: Bench) -> None:
    """A range of many buckets comes in pages, and none is left out."""
    bench.record.most_buckets = 5
    for hour in range(24):
        bench.record.bill(BEGIN + hour * HOUR, MODEL, 10, 1)
    report = bench.report()
    assert report["models"][MODEL]["provider"]["requests"] == 27
    pages = [query.get("page") for path, query in bench.provider.queries if path.endswith("completions")]
    assert pages == [None, ["page_5"], ["page_10"], ["page_15"], ["page_20"]]


@pytest.mark.parametrize("which", ["record", "series"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(bench: Bench, which: str, status: int) -> None:
    """After 429 and 5xx the command waits, as long as the server says, and asks again."""
    faults: list[Answer] = [(status, {"retry-after": "7"}, {}), (status, {}, b"busy")]
    getattr(bench, which).faults += faults
    assert bench.run("--max-difference=0")[0] == 0
    assert bench.slept[0] == 7
    assert 0.5 <= bench.slept[1] <= 2
    assert len(bench.slept) == 2


def test_it_does_not_wait_longer_than_30_seconds(bench: Bench) -> None:
    """A server cannot stop the command for an hour."""
    bench.record.faults += [(429, {"retry-after": "3600"}, {}), (503, {"retry-after": "nonsense"}, {})]
    assert bench.run()[0] == 0
    assert bench.slept[0] == 30


@pytest.mark.parametrize(
    ("which", "faults", "message"),
    [
        (
            "record",
            [(429, {}, {"error": {"message": "Slow down."}})] * 5,
            "429 Too Many Requests: Slow down.",
        ),
        ("record", [(403, {}, {"error": {"message": "canary"}})], "needs an admin key"),
        ("record", [(400, {}, {"error": {"message": "Bad width."}})], "400 Bad Request: Bad width."),
        ("record", [(301, {"location": "http://127.0.0.1:1/"}, {})], "301 Moved Permanently"),
        ("record", [(200, {}, b"<html>")], "is no JSON"),
        ("record", [(200, {}, {"data": "x", "has_more": False})], "completions `data` is no list of buckets"),
        (
            "record",
            [(200, {}, {"data": [], "has_more": True})],
            "The record of /organization/usage/completions has no `next_page`.",
        ),
        (
            "record",
            [(200, {}, {"data": [{"start_time": BEGIN, "results": [{"model": MODEL}]}], "has_more": False})],
            "The record of /organization/usage/completions has no number `num_model_requests`.",
        ),
        ("record", [(200, {}, {"data": [], "has_more": True, "next_page": "p"})] * 3, "again and again"),
        (
            "record",
            [(200, {}, {"data": [{"start_time": 0, "results": []}], "has_more": False})],
            "not asked for: it begins at 1970-01-01 00:00 UTC",
        ),
        ("series", [(404, {}, b"")], "Is this the address of a Prometheus?"),
        ("series", [(422, {}, {"status": "error", "error": "too many samples"})], "too many samples"),
        ("series", [(200, {}, {"some": "thing"})], "none of the query API"),
        (
            "series",
            [(200, {}, {"status": "success", "data": 5})],
            "The answer of /api/v1/label/__name__/values has no list of names in `data`.",
        ),
        (
            "series",
            [
                (200, {}, {"status": "success", "data": ["openai_responses_calls_total"]}),
                (200, {}, {"status": "success", "data": {"result": 5}}),
            ],
            "The answer of /api/v1/query has no list of series in `data.result`.",
        ),
        ("series", [(302, {"location": "/login"}, b"")], "302 Found"),
    ],
)
def test_what_cannot_be_read_ends_with_2(
    bench: Bench, which: str, faults: list[Answer], message: str
) -> None:
    """An error is one line on stderr that says what happened. It has no key and no traceback in it."""
    getattr(bench, which).faults += faults
    code, output, errors = bench.run()
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.startswith("otel-responses-usage reconcile: ")
    assert errors.count("\n") == 1


def test_a_wrong_key_is_not_repeated(bench: Bench) -> None:
    """The API's message about a wrong key has the key in it. Ours has not."""
    bench.environ["OPENAI_ADMIN_KEY"] = "sk-proj-canary"
    code, _, errors = bench.run()
    assert code == 2
    assert "401 Unauthorized" in errors
    assert "A project key cannot read it." in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from=2026-11-28T21:30"], "--from: 2026-11-28 21:30 UTC is not the beginning of a bucket of 1h."),
        (["--to=2026-11-29T22:00"], "The bucket that ends at 2026-11-29 22:00 UTC is not over."),
        (["--from=2026-11-29", "--to=2026-11-29"], "--from must be before --to."),
        (["--from=2026-11-29", "--last=1d"], "Use --last or --from, not both."),
        (["--from=2001-01-01"], "At most 10,000 are possible."),
        (["--from=2026-11-01", "--to=2026-11-02"], "Nothing was compared."),
        (["--model=gpt-9"], "of the model gpt-9. Nothing was compared."),
        (["--base-url=http://api.example.com/v1"], "is not https. The key is not sent unencrypted."),
        (["--base-url=ftp://api.example.com"], "must begin with http:// or https://"),
        (["--prometheus=localhost:9090"], "must begin with http:// or https://"),
        (["--prometheus=http://127.0.0.1:1"], "Prometheus: No answer from http://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_compared_ends_with_2(bench: Bench, options: list[str], message: str) -> None:
    """A wrong range or address is named, and so is a comparison of nothing with nothing."""
    bench.record.calls = bench.record.calls if options[0] != "--from=2026-11-01" else []
    if options[0] == "--from=2026-11-01":
        bench.series.samples.clear()
    code, output, errors = bench.run(*options)
    assert (code, output) == (2, "")
    assert message in errors


@pytest.mark.parametrize(
    "option",
    ["--last=0h", "--last=week", "--from=yesterday", "--max-difference=-1", "--match=job", "--bucket=5m"],
)
def test_a_wrong_option_ends_with_2(bench: Bench, option: str) -> None:
    """The option is named with what it can be."""
    with pytest.raises(SystemExit) as ended:
        bench.run(option)
    assert ended.value.code == 2
    assert f"argument {option.partition('=')[0]}" in bench.capsys.readouterr().err


def test_without_a_key_nothing_is_asked(bench: Bench) -> None:
    """The variable is named."""
    del bench.environ["OPENAI_ADMIN_KEY"]
    code, _, errors = bench.run()
    assert code == 2
    assert "OPENAI_ADMIN_KEY is not set." in errors
    assert bench.provider.queries == bench.prometheus.queries == []


@pytest.mark.parametrize(
    ("environ", "url", "expected"),
    [
        ({"PROMETHEUS_BEARER_TOKEN": "t-canary"}, "", "Bearer t-canary"),
        ({"PROMETHEUS_USERNAME": "a", "PROMETHEUS_PASSWORD": "canary"}, "", "Basic YTpjYW5hcnk="),
        ({}, "a:canary@", "Basic YTpjYW5hcnk="),
    ],
)
def test_prometheus_can_ask_for_credentials(
    bench: Bench, environ: dict[str, str], url: str, expected: str
) -> None:
    """A token, or a user and a password, from the environment or from the address. They are never printed."""
    bench.environ.update(environ)
    address = f"--prometheus={bench.prometheus.url.replace('//', f'//{url}')}"
    assert bench.run(address)[0] == 0
    assert {headers["authorization"] for headers in bench.prometheus.headers} == {expected}
    bench.series.faults += [(422, {}, {"status": "error", "error": f"refused {expected}"})]
    assert bench.run(address)[0] == 2


def test_warnings_of_prometheus_are_shown(bench: Bench) -> None:
    """A server that has only a part of the data says so, and the report passes it on once."""
    bench.series.warnings = ("only 1 of 2 stores answered",)
    assert bench.report()["notes"].count("Prometheus warns: only 1 of 2 stores answered") == 1


def test_a_provider_without_web_searches_is_compared_all_the_same(bench: Bench) -> None:
    """A gateway may know the completions only."""
    answer = bench.record.answer

    def without_searches(path: str, query: dict[str, list[str]], headers: dict[str, str]) -> Answer:
        return (404, {}, {}) if "web_search" in path else answer(path, query, headers)

    with JSONServer(without_searches) as gateway:
        report = bench.report(f"--base-url={gateway.url}/v1")
    assert report["difference_tokens"] == 0
    assert "The provider has no record of web searches. They are not compared." in report["notes"]


def test_missing_series_are_named(bench: Bench) -> None:
    """A Prometheus without our counters is likely the wrong one."""
    bench.series.samples.clear()
    code, text, _ = bench.run()
    assert code == 1
    assert "Prometheus has no tokens in this range." in text
    assert "3 calls that Prometheus never counted" in text


def test_a_range_of_days(bench: Bench) -> None:
    """Days begin at midnight UTC, and the day that is not over is left out."""
    bench.record.bill(BEGIN - 24 * HOUR, MODEL, 5, 5)
    report = bench.report("--bucket=1d", "--last=1w")
    assert (report["from"], report["to"]) == ("2026-11-22T00:00Z", "2026-11-29T00:00Z")
    [query, _] = [query for _, query in bench.provider.queries]
    assert (query["bucket_width"], query["limit"]) == (["1d"], ["7"])
    assert report["models"][MODEL]["provider"]["requests"] == 4


def counter(kind: str, growth: int, **more: str | None) -> CounterRow:
    return CounterRow(0, kind, growth, **more)


@pytest.mark.parametrize(
    ("requests", "metered", "unmetered", "late", "cause", "unwatched"),
    [
        (5, 5, 0, 0, Cause.NONE, 0),
        (5, 4, 1, 0, Cause.UNMETERED, 0),
        (5, 4, 0, 0, Cause.UNWATCHED, 1),
        (5, 6, 0, 1, Cause.LATE, 0),
        (5, 5, 1, 1, Cause.NONE, 0),
        (5, 6, 0, 0, Cause.SURPLUS, -1),
        (5, 3, 1, 0, Cause.SEVERAL, 1),
        (5, 5, 1, 0, Cause.SEVERAL, -1),
    ],
)
def test_each_cause_is_told_apart(
    requests: int, metered: int, unmetered: int, late: int, cause: Cause, unwatched: int
) -> None:
    """The cause follows from the numbers of calls alone."""
    model = {"response_model": MODEL}
    comparison = compare(
        [ProviderRow(0, MODEL, Counts(requests, 1000, 100))],
        [
            counter("requests", metered, **model),
            counter("unmetered", unmetered, **model),
            counter("late", late, **model),
        ],
    )
    [cell] = comparison.models.values()
    assert (cell.cause, cell.unwatched) == (cause, unwatched)


@pytest.mark.parametrize(
    ("provider", "seen", "request_model", "expected"),
    [
        # By the response model that was seen with the request model.
        ([MODEL], [("alias", MODEL)], "alias", MODEL),
        # By the provider's name, with or without a date.
        ([MODEL], [], "gpt-5.4-mini", MODEL),
        (["gpt-5.4-mini"], [], "gpt-5.4-mini", "gpt-5.4-mini"),
        (["gpt-5.4-mini"], [("gpt-5.4-mini", MODEL)], "gpt-5.4-mini", "gpt-5.4-mini"),
        # Nothing is known of it.
        ([], [], "gpt-9", "gpt-9"),
        ([MODEL], [], None, "unknown"),
        # A model whose name begins in the same way is another one.
        (["gpt-5.4-mini-2026-03-17"], [], "gpt-5.4", "gpt-5.4"),
        # Several are possible.
        (["m-2026-01-01", "m-2026-02-02"], [], "m", "m-2026-01-01 + m-2026-02-02"),
    ],
)
def test_a_call_without_a_response_model_is_placed(
    provider: list[str], seen: list[tuple[str, str]], request_model: str | None, expected: str
) -> None:
    """The model of the request stands for the model that the provider names."""
    comparison = compare(
        [ProviderRow(0, model, Counts(1, 10, 1)) for model in provider],
        [
            *(counter("requests", 1, request_model=request, response_model=model) for request, model in seen),
            counter("unmetered", 1, request_model=request_model, reason="timeout"),
        ],
    )
    [model] = [model for model, cell in comparison.models.items() if cell.unmetered]
    assert model == expected


def test_the_names_in_prometheus_are_those_of_the_code() -> None:
    """Each counter that is read is one that this package or its Collector configuration makes."""
    from otel_responses_usage._commands.reconcile_prometheus import _METRICS

    token_metrics = {
        metric.name for generation in (semconv.CURRENT, semconv.NEXT) for metric in generation.tokens
    }
    made = token_metrics | {value for name, value in vars(semconv).items() if name.startswith("METRIC_")}
    plain = {name.replace(".", "_") for name in made} | {"openai_responses_spans_cached_input_tokens"}
    assert {re.sub("^(gen_ai_.*)_(sum|count)$", r"\1", name) for name in _METRICS} <= plain
    config = (Path(__file__).parents[1] / "collector-config.yaml").read_text("utf-8")
    assert "openai_responses.spans.cached_input_tokens" in config


def test_the_commands_are_not_imported_by_the_package() -> None:
    """An application pays nothing for the commands: no import of them, nor of what they need."""
    code = (
        "import sys, otel_responses_usage as package\n"
        "package.ResponsesUsageInstrumentor().instrument()\n"
        "print([name for name in sys.modules if name.startswith('otel_responses_usage._commands')])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGING_S, check=True)  # noqa: S603
    assert done.stdout == "[]\n"


def run_module(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "otel_responses_usage", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGING_S, check=False)  # noqa: S603


def test_the_command_runs_as_a_module() -> None:
    """`python -m otel_responses_usage` lists the commands and the version, and names a wrong command."""
    listed = run_module("--help")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in COMMANDS)
    assert run_module("--version").stdout == f"otel-responses-usage {otel_responses_usage.__version__}\n"
    helped = run_module("reconcile", "--help")
    assert helped.returncode == 0
    assert "OPENAI_ADMIN_KEY" in helped.stdout
    assert max(map(len, helped.stdout.splitlines())) <= 80
    wrong = run_module("recon")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_ctrl_c_ends_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is that of shells."""

    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(reconcile, "run", interrupted)
    assert main(["reconcile"]) == 130


def test_the_clock_is_that_of_the_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without options it compares the last 24 whole hours."""
    for name, value in bench.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    words = ["reconcile", f"--prometheus={bench.prometheus.url}", f"--base-url={bench.provider.url}/v1"]
    assert main(words) == 0
    assert "from 2026-11-28 21:00 to 2026-11-29 21:00 UTC" in capsys.readouterr().out


DOCS = Path(__file__).parents[1] / "docs" / "reconcile.md"


def snippets(language: str) -> list[str]:
    """The pieces of the page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_shows_what_is_printed(bench: Bench) -> None:
    """The report in docs/reconcile.md is the report of such calls."""
    report, border = snippets("text")
    bench.record.bill(BEGIN + 5 * HOUR + 60, MODEL, 100, 20)
    bench.record.bill(BEGIN + 7 * HOUR + 60, MODEL, 300, 60)
    own = {"job": "shop", "gen_ai_request_model": "gpt-5.4-mini"}
    bench.series.add(
        "openai_responses_calls_total", {5: 1}, openai_responses_usage_missing_reason="timeout", **own
    )
    bench.series.add("gen_ai_client_inference_usage_cache_read_input_tokens_total", {2: 300}, **own)
    bench.series.before = True
    code, text, _ = bench.run("--last=1d")
    assert code == 1
    assert text == report

    bench.series.add_calls(0, 1, 70, 8)  # in the stand-in also just after the end
    _, text, _ = bench.run("--from=2026-11-28T21:00", "--to=2026-11-29T21:00")
    assert border.splitlines()[0] in text
    assert border.splitlines()[-1] in text


def test_the_commands_on_the_page_are_accepted() -> None:
    """Each command in docs/reconcile.md has options that there are, and the page has all of them."""
    parser = argparse.ArgumentParser()
    reconcile.add_arguments(parser)
    commands = [line for text in snippets("sh") for line in text.splitlines() if "reconcile " in line]
    assert len(commands) == 2
    for command in commands:
        program, name, *words = shlex.split(command.partition(" > ")[0])
        assert (program, name) == ("otel-responses-usage", "reconcile")
        parser.parse_args(words)
    page = DOCS.read_text("utf-8")
    table = page[page.index("| option |") : page.index("The bound applies")]
    options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    assert (
        set(re.findall(r"--[a-z][a-z-]+", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
        == options
    )
    for name in re.findall(r"[A-Z]+_[A-Z_]+", reconcile._EPILOG):
        assert f"`{name}`" in page
    causes = re.findall(r"^\| [^|]+ \| `(\w+)` \|", page[page.index("| in the report |") :], re.MULTILINE)
    assert sorted(cause.value for cause in Cause) == sorted(causes)

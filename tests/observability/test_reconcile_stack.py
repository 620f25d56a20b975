"""`reconcile` on a real Prometheus: a planted loss is found to the token."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request

import openai
import pytest
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE as CUMULATIVE
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from embedded.answer import MODEL as SNAPSHOT
from embedded.answer import Answer, usage
from embedded.http_server import Hold, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI
from otel_responses_usage import Config, ResponsesUsageInstrumentor
from otel_responses_usage._commands import main
from programs import OPENER, Collector, Prometheus, wait_until
from usage_record import JSONServer, UsageRecord

HOUR = 3600
MODEL = "gpt-5.4-mini"
OTHER = "gpt-5.5-2026-06-01"
CURRENT, NEXT, BOTH = ("current",), ("next",), ("current", "next")


@dataclass(frozen=True)
class Call:
    """A call of a simulated process."""

    at: float
    model: str = SNAPSHOT
    request_model: str = MODEL
    input_tokens: int = 0
    output_tokens: int = 0
    cached: int = 0
    searches: int = 0
    reason: str | None = None  # why its usage is missing
    known_at: float | None = None  # when its usage became known all the same
    is_refused: bool = False
    is_counted: bool = False  # whether the API was asked for its input tokens


@dataclass
class Process:
    """A process that exports once a minute, and once more at its end, unless it is killed."""

    job: str
    instance: str
    start: float
    end: float
    calls: list[Call] = field(default_factory=list)
    generations: tuple[str, ...] = CURRENT
    exports_at_its_end: bool = True

    def exports(self) -> Iterator[float]:
        """When it exports."""
        moment = self.start + 60
        while moment < self.end:
            yield moment
            moment += 60
        if self.exports_at_its_end:
            yield self.end

    def metrics(self, now: float) -> list[Metric]:
        """What it has counted by then."""
        points = _Points(self.start, now)
        for call in self.calls:
            own = {"gen_ai.provider.name": "openai", "gen_ai.request.model": call.request_model}
            settled_at = call.at if call.reason is None else call.known_at
            if call.at <= now:
                ending = {"openai_responses.stream.outcome": "error" if call.is_refused else "closed"}
                if call.reason is None:
                    ending["openai_responses.usage.source"] = "stream"
                elif not call.is_refused:
                    ending["openai_responses.usage.missing_reason"] = call.reason
                points.count("openai_responses.calls", 1, {**own, **ending})
                if call.is_counted:
                    points.count("openai_responses.usage.input_count", call.input_tokens, {**own, **ending})
            if settled_at is not None and settled_at <= now:
                self._count_tokens(points, call, own)
                if call.reason is not None:
                    missing = {"openai_responses.usage.missing_reason": call.reason}
                    points.count("openai_responses.late_usage", 1, {**own, **missing})
        return points.metrics()

    def _count_tokens(self, points: _Points, call: Call, own: dict[str, str]) -> None:
        common = {**own, "gen_ai.operation.name": "chat", "gen_ai.response.model": call.model}
        kinds = {"input": call.input_tokens, "output": call.output_tokens}
        for kind, tokens in kinds.items():
            if "current" in self.generations:
                points.record("gen_ai.client.token.usage", tokens, {**common, "gen_ai.token.type": kind})
            if "next" in self.generations:
                points.record(f"gen_ai.client.inference.operation.{kind}_tokens", tokens, common)
        if "next" in self.generations:
            modality = {"gen_ai.token.modality": "unknown"}
            name = "gen_ai.client.inference.usage.cache_read.input_tokens"
            points.count(name, call.cached, {**common, **modality})
        if call.searches:
            points.count("openai_responses.tool.web_search.requests", call.searches, own)


class _Points:
    """Cumulative points of one process, as its SDK would export them."""

    def __init__(self, start: float, now: float) -> None:
        self._times = {"start_time_unix_nano": int(start * 1e9), "time_unix_nano": int(now * 1e9)}
        self._sums: dict[tuple[str, frozenset[tuple[str, str]]], int] = {}
        self._histograms: dict[tuple[str, frozenset[tuple[str, str]]], list[int]] = {}

    def count(self, name: str, number: int, attributes: dict[str, str]) -> None:
        key = (name, frozenset(attributes.items()))
        self._sums[key] = self._sums.get(key, 0) + number

    def record(self, name: str, number: int, attributes: dict[str, str]) -> None:
        self._histograms.setdefault((name, frozenset(attributes.items())), []).append(number)

    def metrics(self) -> list[Metric]:
        found = []
        for (name, attributes), number in self._sums.items():
            metric = Metric(name=name)
            metric.sum.is_monotonic = True
            metric.sum.aggregation_temporality = CUMULATIVE
            metric.sum.data_points.add(as_int=number, attributes=_attributes(attributes), **self._times)
            found.append(metric)
        for (name, attributes), numbers in self._histograms.items():
            metric = Metric(name=name)
            metric.histogram.aggregation_temporality = CUMULATIVE
            metric.histogram.data_points.add(
                count=len(numbers), sum=sum(numbers), bucket_counts=[len(numbers)], explicit_bounds=[],
                attributes=_attributes(attributes), **self._times,
            )  # fmt: skip
            found.append(metric)
        return found


def _attributes(attributes: Any) -> list[KeyValue]:
    return [KeyValue(key=key, value=AnyValue(string_value=value)) for key, value in sorted(attributes)]


class History:
    """A Prometheus that has received what simulated processes exported, in the order of time."""

    def __init__(self, prometheus: Prometheus, start: int) -> None:
        self.prometheus = prometheus
        self.start = start

    def receive(self, *processes: Process) -> None:
        """Send every export of these processes."""
        exports = sorted((moment, index) for index, one in enumerate(processes) for moment in one.exports())
        for moment, index in exports:
            process = processes[index]
            request = ExportMetricsServiceRequest()
            resource = request.resource_metrics.add()
            names = {"service.name": process.job, "service.instance.id": process.instance}
            resource.resource.attributes.extend(_attributes(names.items()))
            resource.scope_metrics.add().metrics.extend(process.metrics(moment))
            OPENER.open(
                Request(  # noqa: S310  # on loopback
                    f"{self.prometheus.url}/api/v1/otlp/v1/metrics",
                    data=request.SerializeToString(),
                    headers={"content-type": "application/x-protobuf"},
                ),
                timeout=20,
            ).close()


Start = Callable[..., History]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start an empty Prometheus that takes OTLP, with a history that begins eight hours ago."""
    running: list[Prometheus] = []

    def run(otlp: str = "") -> History:
        config = tmp_path / f"prometheus-{len(running)}.yml"
        config.write_text(otlp or "global: {}\n", "utf-8")
        directory = tmp_path / f"data-{len(running)}"
        prometheus = Prometheus(directory, config, "--web.enable-otlp-receiver")
        running.append(prometheus.start())
        return History(prometheus, int(time.time()) // HOUR * HOUR - 8 * HOUR)

    yield run
    for prometheus in running:
        prometheus.stop()


@dataclass(frozen=True)
class Result:
    """What the command did."""

    code: int
    report: dict[str, Any]
    text: str
    errors: str

    def counts(self, model: str) -> dict[str, Any]:
        """The differences of a model."""
        found: dict[str, Any] = self.report["models"][model]["difference"]
        return found

    def explained(self) -> dict[str, tuple[int, int]]:
        """Tokens and calls by cause."""
        return {part["cause"]: (part["tokens"], part["calls"]) for part in self.report["explanations"]}


Reconcile = Callable[..., Result]


@pytest.fixture
def record() -> UsageRecord:
    """The provider's record."""
    return UsageRecord()


@pytest.fixture
def reconcile(
    record: UsageRecord, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reconcile]:
    """Run the command against the record and a Prometheus: once for JSON, once for text."""
    monkeypatch.setenv("OPENAI_ADMIN_KEY", record.key)
    with JSONServer(record.answer) as provider:

        def run(history: History, *options: str, hours: int = 8, begin: int | None = None) -> Result:
            begin = history.start if begin is None else begin
            words = [
                "reconcile",
                f"--prometheus={history.prometheus.url}",
                f"--base-url={provider.url}/v1",
                f"--from={_iso(begin)}",
                f"--to={_iso(begin + hours * HOUR)}",
                *options,
            ]
            capsys.readouterr()
            code = main([*words, "--json"])
            printed = capsys.readouterr()
            assert main(words) == code
            text = capsys.readouterr().out
            assert record.key not in printed.out + printed.err + text
            assert max(map(len, text.splitlines()), default=0) <= 80
            return Result(code, json.loads(printed.out or "{}"), text, printed.err)

        yield run


def _iso(time_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(time_s))


def bill(record: UsageRecord, *processes: Process) -> None:
    """Let the provider bill all calls that it served."""
    for process in processes:
        for call in process.calls:
            if not call.is_refused:
                record.bill(call.at, call.model, call.input_tokens, call.output_tokens, cached=call.cached)
                if call.searches:
                    record.search(call.at, call.model, call.searches)


def calls(begin: float, number: int, seed: int = 1, **more: Any) -> list[Call]:
    """Calls in the hour after `begin`, none of them near its borders."""
    chance = random.Random(seed)  # noqa: S311  # the same calls each time
    return [
        Call(
            at=begin + 300 + chance.random() * (HOUR - 900),
            input_tokens=chance.randrange(1, 5000),
            output_tokens=chance.randrange(1, 900),
            **more,
        )
        for _ in range(number)
    ]


def test_equal_records_are_equal(start: Start, record: UsageRecord, reconcile: Reconcile) -> None:
    """Long and short processes, restarts under the same name and new series are counted in full."""
    history = start()
    begin = history.start
    web = Process("shop", "a", begin - HOUR, begin + 8 * HOUR - 400)
    web.calls = [call for hour in range(8) for call in calls(begin + hour * HOUR, 5, seed=hour)]
    # Before the range: counted by the process, and no part of the range.
    early = calls(begin - HOUR, 3, seed=70)
    web.calls += early
    # Two processes under one name: one counter that falls inside a bucket.
    first = Process("job", "same", begin + 100, begin + 2 * HOUR + 1000, calls(begin + HOUR, 4, seed=71))
    first.calls += [Call(begin + 2 * HOUR + 300, input_tokens=11, output_tokens=5)]
    again = Process(
        "job", "same", begin + 2 * HOUR + 1200, begin + 4 * HOUR, calls(begin + 3 * HOUR, 6, seed=72)
    )
    again.calls += [Call(begin + 2 * HOUR + 1500, input_tokens=7, output_tokens=3)]
    # The same, but the new counter has overtaken the old one before the bucket ends.
    fast = Process("job", "fast", begin + 100, begin + HOUR - 100)
    fast.calls = [Call(begin + 200, input_tokens=10), Call(begin + 300)]
    faster = Process("job", "fast", begin + HOUR + 60, begin + 2 * HOUR)
    faster.calls = [Call(begin + HOUR + 70, input_tokens=4), Call(begin + HOUR + 900, input_tokens=5000)]
    # A process that exports once.
    short = Process("once", "b", begin + 1000, begin + 1010, [Call(begin + 1001, input_tokens=123)])
    processes = (web, first, again, fast, faster, short)
    history.receive(*processes)
    bill(record, *processes)

    result = reconcile(history, "--max-difference=0")

    assert result.code == 0, result.text
    assert result.report["difference_tokens"] == 0
    assert result.report["explanations"] == []
    counted = result.report["models"][SNAPSHOT]["prometheus"]
    assert counted["requests"] == sum(len(one.calls) for one in processes) - len(early)
    assert all(not any(cell["difference"][key] for key in ("requests", "input_tokens", "output_tokens"))
               for cell in result.report["buckets"])  # fmt: skip


def test_a_planted_loss_is_found_to_the_token(
    start: Start, record: UsageRecord, reconcile: Reconcile
) -> None:
    """A process that is killed before its last export has lost exactly these tokens, in this bucket."""
    history = start()
    begin = history.start
    web = Process("shop", "a", begin, begin + 8 * HOUR - 400)
    web.calls = [call for hour in range(7) for call in calls(begin + hour * HOUR, 9, seed=hour)]
    killed = Process("shop", "b", begin, begin + 5 * HOUR + 1230, exports_at_its_end=False)
    killed.calls = calls(begin + 2 * HOUR, 3, seed=50)
    killed.calls += [
        Call(begin + 5 * HOUR + 1222, input_tokens=1234, output_tokens=567)
    ]  # 2 s after an export
    history.receive(web, killed)
    bill(record, web, killed)

    result = reconcile(history, "--max-difference=1800")

    assert result.code == 1
    assert result.report["difference_tokens"] == 1234 + 567
    assert result.counts(SNAPSHOT) == {
        "requests": 1,
        "input_tokens": 1234,
        "output_tokens": 567,
        "cached_tokens": None,
        "web_searches": None,
    }
    assert result.explained() == {"unwatched": (1801, 1)}
    [bucket] = [cell for cell in result.report["buckets"] if cell["difference"]["requests"]]
    assert bucket["start"] == _iso(begin + 5 * HOUR)
    assert "1,801 tokens  1 call that Prometheus never counted" in result.text
    assert reconcile(history, "--max-difference=1801").code == 0


@pytest.mark.parametrize("generations", [CURRENT, NEXT, BOTH], ids="+".join)
def test_both_generations_of_names_are_read_once(
    start: Start, record: UsageRecord, reconcile: Reconcile, generations: tuple[str, ...]
) -> None:
    """A process may send today's names, the next ones or both. No token is counted twice."""
    history = start()
    begin = history.start
    web = Process("shop", "a", begin, begin + 3 * HOUR, generations=generations)
    web.calls = calls(begin + HOUR, 9, cached=11, searches=2)
    plain = Process("bar", "b", begin, begin + 3 * HOUR, calls(begin + 2 * HOUR - 1000, 2, seed=9))
    history.receive(web, plain)
    bill(record, web, plain)

    result = reconcile(history, "--max-difference=0")

    assert result.code == 0, result.text
    counted = result.report["models"][SNAPSHOT]["prometheus"]
    assert counted["requests"] == 11
    assert counted["web_searches"] == 18
    assert counted["cached_tokens"] == (None if generations == CURRENT else 99)


def test_what_is_missing_is_explained(start: Start, record: UsageRecord, reconcile: Reconcile) -> None:
    """Unmetered calls, late usage, refused calls and unwatched requests are told apart."""
    history = start()
    begin = history.start
    shop = Process("shop", "a", begin, begin + 7 * HOUR)
    shop.calls = [
        *calls(begin + HOUR, 4),
        Call(begin + HOUR + 500, input_tokens=100, output_tokens=20, reason="timeout"),
        Call(begin + 2 * HOUR + 500, input_tokens=200, output_tokens=30, reason="not_found", is_counted=True),
        # Its usage becomes known two hours later: nothing is missing in the end.
        Call(begin + 2 * HOUR + 600, input_tokens=999, reason="deferred", known_at=begin + 4 * HOUR + 600),
        Call(begin + 3 * HOUR + 500, reason="x", is_refused=True),
    ]
    other = Process("shop", "b", begin, begin + 7 * HOUR)
    other.calls = calls(begin + HOUR, 2, seed=8, model=OTHER, request_model=OTHER)
    history.receive(shop, other)
    bill(record, shop, other)
    record.bill(begin + 5 * HOUR + 600, OTHER, 5000, 600)  # by a program without this package
    record.bill(begin + 5 * HOUR + 600, OTHER, 70_000, 7000, batch=True)

    result = reconcile(history, "--max-difference=5%")

    assert result.code == 1
    assert result.explained() == {"unmetered": (350, 2), "unwatched": (5600, 1)}
    assert result.report["models"][SNAPSHOT]["unmetered"] == {"deferred": 1, "not_found": 1, "timeout": 1}
    assert result.report["models"][SNAPSHOT]["late"] == {"deferred": 1}
    assert result.report["models"][SNAPSHOT]["failed"] == 1
    assert result.report["batch"]["input_tokens"] == 70_000
    assert "2 calls without usage (not_found 1, timeout 1); 200" in result.text
    by_start = {(cell["start"], cell["model"]): cell for cell in result.report["buckets"]}
    assert by_start[_iso(begin + 4 * HOUR), SNAPSHOT]["cause"] == "late"
    assert by_start[_iso(begin + 2 * HOUR), SNAPSHOT]["difference"]["input_tokens"] == 200 + 999
    # One model, by the name of its requests.
    assert reconcile(history, f"--model={MODEL}", "--max-difference=350").code == 0
    assert reconcile(history, f"--model={OTHER}").report["difference_tokens"] == 5600


def test_a_request_model_with_several_snapshots_is_one_row(
    start: Start, record: UsageRecord, reconcile: Reconcile
) -> None:
    """Without a response model nothing says which snapshot an unmetered call belongs to."""
    history = start()
    begin = history.start
    newer = "gpt-5.4-mini-2026-09-01"
    shop = Process("shop", "a", begin, begin + 4 * HOUR)
    shop.calls = [*calls(begin, 2), *calls(begin + HOUR, 2, seed=2, model=newer)]
    shop.calls += [Call(begin + 2 * HOUR + 400, model=newer, input_tokens=40, reason="not_stored")]
    history.receive(shop)
    bill(record, shop)

    result = reconcile(history, "--max-difference=40")

    assert result.code == 0
    assert list(result.report["models"]) == [f"{SNAPSHOT} + {newer}"]
    assert result.explained() == {"unmetered": (40, 1)}


def test_calls_at_the_borders_are_named(start: Start, record: UsageRecord, reconcile: Reconcile) -> None:
    """A call just before the end is exported after it. The report says so."""
    history = start()
    begin = history.start
    shop = Process("shop", "a", begin + 20, begin + 7 * HOUR)
    late = Call(begin + 6 * HOUR - 5, input_tokens=77, output_tokens=1)
    shop.calls = [*calls(begin + HOUR, 3), late]
    history.receive(shop)
    bill(record, shop)

    result = reconcile(history, "--max-difference=0", hours=6)

    assert result.code == 1
    assert result.report["borders"][1] == {
        "time": _iso(begin + 6 * HOUR), "window_s": 120, "calls": 1, "tokens": 78,
    }  # fmt: skip
    assert "1 call with 78 tokens: counted in the 120 s after" in result.text
    assert reconcile(history, "--max-difference=0", hours=7).code == 0


def test_names_and_labels_with_dots_are_read(start: Start, record: UsageRecord, reconcile: Reconcile) -> None:
    """Prometheus 3 can keep the names of OpenTelemetry as they are."""
    history = start("otlp: {translation_strategy: NoTranslation}\n")
    begin = history.start
    shop = Process("shop", "a", begin, begin + 4 * HOUR, calls(begin + HOUR, 5))
    shop.calls += [Call(begin + 2 * HOUR + 900, input_tokens=5, reason="timeout")]
    restarted = Process("shop", "a", begin + 4 * HOUR + 60, begin + 5 * HOUR, generations=BOTH)
    restarted.calls = calls(begin + 4 * HOUR, 2, seed=3)
    history.receive(shop, restarted)
    bill(record, shop, restarted)

    result = reconcile(history, "--max-difference=5", "--match=job=shop")

    assert result.code == 0, result.text
    assert result.explained() == {"unmetered": (5, 1)}


def test_other_services_and_providers_are_left_out(
    start: Start, record: UsageRecord, reconcile: Reconcile
) -> None:
    """`--match` and `--project-id` choose the same part of both records."""
    history = start()
    begin = history.start
    shop = Process("shop", "a", begin, begin + 2 * HOUR, calls(begin, 5))
    bar = Process("bar", "b", begin, begin + 2 * HOUR, calls(begin, 5, seed=4))
    history.receive(shop, bar)
    bill(record, shop)
    for call in bar.calls:
        record.bill(call.at, call.model, call.input_tokens, call.output_tokens, project="proj_bar")

    assert reconcile(history, "--max-difference=0").code == 0
    assert reconcile(history, "--max-difference=0", "--match=job=shop").code == 1
    options = ("--match=job=shop", "--project-id=proj_shop")
    assert reconcile(history, "--max-difference=0", *options).code == 0
    assert reconcile(history, "--max-difference=0", "--provider=groq").code == 1


def test_random_histories_agree(start: Start, record: UsageRecord, reconcile: Reconcile) -> None:
    """Whatever processes come, go, restart and share a name, the sums are those of their calls."""
    history = start()
    begin, chance = history.start, random.Random(18)  # noqa: S311
    processes = []
    for number in range(12):
        moment = begin + chance.randrange(HOUR)
        while moment < begin + 6 * HOUR:
            end = min(moment + chance.randrange(120, 3 * HOUR), begin + 8 * HOUR - 600)
            times = sorted(chance.uniform(moment + 61, end) for _ in range(chance.randrange(1, 9)))
            lived = [
                Call(at, input_tokens=chance.randrange(1, 3000), output_tokens=chance.randrange(1, 500))
                for at in times
                if HOUR - at % HOUR > 90  # exported in its bucket
            ]
            # Half of them have a name of their own. Of the others the next one has the same, and its first
            # export shows counters that have fallen.
            name = f"{number}-{moment}" if number % 2 else f"{number}"
            first = Call(moment + 1)
            processes.append(Process("shop", name, moment, end, [first, *lived] if lived else []))
            moment = int(end) + chance.randrange(70, HOUR)
    history.receive(*processes)
    bill(record, *processes)

    result = reconcile(history, "--max-difference=0")

    assert result.code == 0, result.text
    everything = sum(len(process.calls) for process in processes)
    assert result.report["models"][SNAPSHOT]["prometheus"]["requests"] == everything


def _plan(request: SeenRequest) -> Plan:
    fate = {"lost": "lost"}.get(request.json["input"], "kept")
    end = Hold() if request.json["input"] != "whole" else None
    answer = Answer(usage=usage(1000, 200, cached=400))
    return Plan(answer, cut_after=5 if end else None, end=end, fate=fate)  # type: ignore[arg-type]


@pytest.mark.parametrize("opt_in", ["", "gen_ai_latest_experimental", "gen_ai_latest_experimental/dup"])
def test_real_calls_by_way_of_the_collector(
    tmp_path: Path,
    record: UsageRecord,
    reconcile: Reconcile,
    monkeypatch: pytest.MonkeyPatch,
    opt_in: str,
) -> None:
    """Calls of the SDK agree with the server, by way of our Collector configuration and a scrape."""
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", opt_in)
    config = tmp_path / "prometheus.yml"
    api = ResponsesAPI(_plan)
    with Collector(tmp_path / "collector") as collector, ScriptedServer(api) as server:
        config.write_text(
            "scrape_configs: [{job_name: otel-services, honor_labels: true, scrape_interval: 200ms, "
            f"static_configs: [{{targets: ['127.0.0.1:{collector.prometheus_port}']}}]}}]\n",
            "utf-8",
        )
        with Prometheus(tmp_path / "data", config) as prometheus:
            resource = Resource.create({"service.name": "shop", "service.instance.id": "1"})
            endpoint = f"http://{collector.grpc_endpoint}"
            tracer_provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            tracer_provider.add_span_processor(
                BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=True))
            )
            reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=endpoint, insecure=True))
            meter_provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
            ResponsesUsageInstrumentor().instrument(
                tracer_provider=tracer_provider,
                meter_provider=meter_provider,
                config=Config(retrieval_timeout=3, exit_timeout=10),
            )
            try:
                # `gpt-...` names the provider, since the server is on loopback.
                _call(server.url, "whole", "whole", "closed", "closed", "lost")
            finally:
                ResponsesUsageInstrumentor().uninstrument()
                tracer_provider.shutdown()
                meter_provider.shutdown()
            wait_until(lambda: prometheus.query("sum(openai_responses_calls_total) == 5"), "calls")
            if opt_in != "gen_ai_latest_experimental":
                wait_until(lambda: prometheus.query("sum(gen_ai_client_token_usage_count) == 8"), "tokens")
            wait_until(
                lambda: prometheus.query('{__name__=~".*cache.*input_tokens_total"} == 1600'), "cached tokens"
            )
            for response in api.stored.values():
                told = response["usage"]
                cached = told["input_tokens_details"]["cached_tokens"]
                record.bill(
                    time.time(), response["model"], told["input_tokens"], told["output_tokens"], cached=cached
                )
            begin = int(time.time()) // 86400 * 86400 - 86400
            history = History(prometheus, begin)
            # Two days and the next: midnight may pass meanwhile. The range is over by the clock of the test.
            monkeypatch.setattr(time, "time", lambda: float(begin + 4 * 86400))
            [provider] = {
                labels["metric"]["gen_ai_provider_name"]
                for labels in prometheus.query("openai_responses_calls_total")
            }
            result = reconcile(
                history, "--max-difference=1200", "--bucket=1d", f"--provider={provider}", hours=72
            )

    assert result.code == 0, result.text
    assert result.explained() == {"unmetered": (1200, 1)}
    [cell] = result.report["models"].values()
    assert cell["unmetered"] == {"not_found": 1}
    assert cell["prometheus"] == {
        "requests": 4,
        "input_tokens": 4000,
        "output_tokens": 800,
        "cached_tokens": 1600,
        "web_searches": None,
    }


def _call(url: str, *kinds: str) -> None:
    client = openai.OpenAI(api_key="sk-shop", base_url=f"{url}/v1", max_retries=0)
    for kind in kinds:
        with client.responses.create(model=MODEL, input=kind, stream=True) as stream:
            for event in stream:
                if kind != "whole" and event.type == "response.output_text.delta":
                    break

"""Rules, dashboards and the queries of the docs give the truth if another instrumentation exports as well.

A service with OpenTelemetry's own instrumentation and ours exports to the stack. So the token metric has two
scopes. The server knows what was used.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from embedded.answer import Answer, usage
from embedded.http_server import Hold, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI, error
from environments import environment
from programs import ROOT, wait_until
from stack import EXAMPLE, MODEL, Stack, hasten

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = (
    "opentelemetry-instrumentation-genai-openai>=1.3b0,<2",
    "opentelemetry-distro>=0.51b0",
    "opentelemetry-exporter-otlp>=1.30,<2",
    "openai>=1.66,<4",
)
NEIGHBOURS = ROOT / "tests" / "neighbours"
PAGE = (ROOT / "docs" / "neighbours.md").read_text("utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text("utf-8")
USAGE = json.loads((EXAMPLE / "grafana" / "dashboards" / "usage.json").read_text("utf-8"))

TOKENS = "gen_ai_client_token_usage"
OURS, THEIRS = "otel_responses_usage", "opentelemetry.instrumentation.genai.openai"
SERVICE = "shop"  # it has a budget
OTHER = "gpt-5.4"  # a model without chat completions, and without a price
CACHED = 0.4  # of the input tokens of every call, so that every share of tokens is the same
WHOLE = ("drained", "manager-drained", "raw-drained", "create")
EARLY = ("closed", "left-with", "manager-left", "raw-closed")
CHAT = "chat-completion"
CALLS = (
    *((MODEL, scenario) for scenario in (*WHOLE, *EARLY, "lost", "refused", CHAT)),
    *((OTHER, scenario) for scenario in ("drained", "closed")),
)
ROUNDS = 2

# The prices and the budgets of the example, in dollars and tokens.
INPUT, CACHED_INPUT, OUTPUT = 0.75e-6, 0.075e-6, 4.5e-6
TOKEN_BUDGET, SPEND_BUDGET, HOURS = 500e6, 1000, 30 * 24


class Api(ResponsesAPI):
    """Answers each scenario. Every answer has other numbers of tokens, which are added up."""

    def __init__(self) -> None:
        super().__init__(self._plan_of)
        self.calls = 0
        self.tokens: Counter[tuple[str, str, str]] = Counter()  # by scenario, model and type

    def __call__(self, request: SeenRequest) -> Reply:
        if not request.path.endswith("/chat/completions"):
            return super().__call__(request)
        counts = self._counts(request)
        message = {"role": "assistant", "content": "A span."}
        return Reply.json(
            {
                "id": f"chatcmpl-{self.calls}",
                "object": "chat.completion",
                "created": 1_800_000_000,
                "model": request.json["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
                "usage": {
                    "prompt_tokens": counts["input_tokens"],
                    "completion_tokens": counts["output_tokens"],
                    "total_tokens": counts["total_tokens"],
                    "prompt_tokens_details": {
                        "cached_tokens": counts["input_tokens_details"]["cached_tokens"]
                    },
                },
            }
        )

    def _plan_of(self, request: SeenRequest) -> Plan | Reply:
        scenario = request.headers["x-scenario"]
        if scenario == "refused":
            return error(401, "Incorrect API key provided.", code="invalid_api_key")
        if scenario == "lost":
            return Plan(cut_after=8, end=Hold(), fate="lost")
        answer = Answer(
            pieces=tuple(f"piece {n} " for n in range(12)),
            usage=self._counts(request),
            model=request.json["model"],
        )
        return Plan(answer, cut_after=8, end=Hold()) if scenario in EARLY else Plan(answer)

    def _counts(self, request: SeenRequest) -> dict[str, Any]:
        self.calls += 1
        scenario, model = request.headers["x-scenario"], request.json["model"]
        counts = usage(1000 * self.calls**2, 40 + self.calls, cached=400 * self.calls**2)
        self.tokens[scenario, model, "input"] += counts["input_tokens"]
        self.tokens[scenario, model, "output"] += counts["output_tokens"]
        return counts

    def used(self, *scenarios: str) -> Counter[tuple[str, ...]]:
        """The tokens by model and type: of these scenarios, or of all."""
        sums: Counter[tuple[str, ...]] = Counter()
        for (scenario, model, kind), count in self.tokens.items():
            if not scenarios or scenario in scenarios:
                sums[model, kind] += count
        return sums


@dataclass
class Shop:
    """The stack after some rounds of the service's calls, and what the server knows."""

    stack: Stack
    api: Api
    first: Counter[tuple[str, ...]] = field(default_factory=Counter)  # the tokens of the first round

    def ask(self, promql: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The answer to a query, by the values of these labels."""
        answer: dict[tuple[str, ...], float] = {}
        for one in self.stack.prometheus.query(promql):
            key = tuple(one["metric"].get(label, "") for label in labels)
            assert key not in answer, f"two series of {key}"
            answer[key] = float(one["value"][1])
        return answer

    def number(self, promql: str) -> float:
        """The answer to a query that has one series."""
        ((_, number),) = self.ask(promql).items()
        return number

    def wait_for(self, calls: int) -> None:
        """Wait until the rules have recorded so many calls, and all rules have been evaluated after that."""
        recorded = hasten("sum(sum_over_time(job_model_ending:openai_responses_calls:increase1m[1h]))")
        wait_until(lambda: self.ask(recorded) == {(): calls}, f"{calls} calls", 60)
        # Cached tokens change the dollars some minutes later.
        tokens = "job_model_tier_window_type:openai_responses_cached_tokens:increase1m"
        cached = hasten(f"sum(sum_over_time({tokens}[1h]))")
        expected = CACHED * sum(count for (_, kind), count in self.api.used().items() if kind == "input")
        wait_until(lambda: self.ask(cached) == pytest.approx({(): expected}), f"{expected} cached tokens", 60)
        now = time.time()
        last = "max(timestamp(job:openai_responses_spend_budget:burn1d))"
        wait_until(lambda: self.ask(last).get((), 0) > now, "evaluation of the last rule", 60)

    def in_the_last_hour(self, recorded: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The sums of an increment that the rules have recorded."""
        return self.ask(hasten(f"sum by ({', '.join(labels)}) (sum_over_time({recorded}[1h]))"), *labels)

    def panel(self, title: str, number: int = 0) -> str:
        """A query of a panel of the usage dashboard, for this service."""
        panel = next(panel for panel in USAGE["panels"] if panel["title"] == title)
        query: str = panel["targets"][number]["expr"]
        for variable, value in {
            "$job": SERVICE,
            "$model": ".*",
            "$__range": "6h",
            "$__interval": "6h",
        }.items():
            query = query.replace(variable, value)
        assert "$" not in query
        return hasten(query)


def play(service: subprocess.Popen[str]) -> None:
    """Let the service make a round of its calls, and export."""
    assert service.stdin
    assert service.stdout
    service.stdin.write("\n")
    service.stdin.flush()
    assert service.stdout.readline() == "exported\n", f"the service has ended: {service.wait(20)}"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The service has made two rounds of calls, and the rules have recorded them."""
    python = environment("neighbour-genai", *PACKAGES)
    api = Api()
    with contextlib.ExitStack() as running:
        stack = running.enter_context(Stack(tmp_path_factory.mktemp("beside")))
        server = running.enter_context(ScriptedServer(api))
        arguments = [f"{model}:{scenario}" for model, scenario in CALLS]
        service = running.enter_context(
            subprocess.Popen(  # noqa: S603  # the project's own program
                [
                    python.with_name("opentelemetry-instrument"),
                    python,
                    NEIGHBOURS / "service.py",
                    *arguments,
                ],
                env={
                    **stack.settings(SERVICE, server),
                    "PYTHONPATH": str(ROOT / "src"),
                    "OTEL_METRIC_EXPORT_INTERVAL": "600000",  # it exports when it is asked to
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        running.callback(service.terminate)
        shop = Shop(stack, api)
        for round_ in range(1, ROUNDS + 1):
            play(service)
            shop.first = shop.first or api.used()
            calls = round_ * sum(scenario != CHAT for _, scenario in CALLS)
            shop.wait_for(calls)
        yield shop


MODEL_AND_TYPE = ("gen_ai_request_model", "gen_ai_token_type")
BY_MODEL_AND_TYPE = "sum by (gen_ai_request_model, gen_ai_token_type)"


def test_tokens_add_up_over_both_scopes(shop: Shop) -> None:
    """The sum over all scopes is what was used. Each call is in one of them."""
    assert f"`{BY_MODEL_AND_TYPE}`" in PAGE
    assert (
        shop.ask(f"{BY_MODEL_AND_TYPE} (gen_ai_client_token_usage_sum)", *MODEL_AND_TYPE) == shop.api.used()
    )
    for scope, scenarios in {THEIRS: (*WHOLE, CHAT), OURS: EARLY}.items():
        selected = f'{BY_MODEL_AND_TYPE} (gen_ai_client_token_usage_sum{{otel_scope_name="{scope}"}})'
        assert shop.ask(selected, *MODEL_AND_TYPE) == shop.api.used(*scenarios)


@pytest.mark.parametrize(
    "histogram",
    [
        TOKENS,
        "gen_ai_client_operation_duration_seconds",
        "gen_ai_client_operation_time_to_first_chunk_seconds",
    ],
)
def test_both_scopes_have_the_same_buckets(shop: Shop, histogram: str) -> None:
    """A quantile over all scopes is right only if their buckets are the same."""
    found: dict[str, set[str]] = {}
    for scope, bound in shop.ask(
        f"sum by (otel_scope_name, le) ({histogram}_bucket)", "otel_scope_name", "le"
    ):
        found.setdefault(scope, set()).add(bound)
    assert found.keys() == {OURS, THEIRS} if histogram == TOKENS else found.keys() <= {OURS, THEIRS}
    assert len({frozenset(bounds) for bounds in found.values()}) == 1


def test_every_call_is_in_the_times_once(shop: Shop) -> None:
    """Durations and times to the first chunk have no call twice."""
    made = Counter(scenario for _, scenario in CALLS for _ in range(ROUNDS))
    durations = shop.number("sum(gen_ai_client_operation_duration_seconds_count)")
    assert durations == made.total()
    streamed = made.total() - made["create"] - made["refused"] - made[CHAT]
    assert shop.number("sum(gen_ai_client_operation_time_to_first_chunk_seconds_count)") == streamed
    errors = shop.in_the_last_hour(
        "job_model_error:gen_ai_client_operation_duration_seconds_count:increase1m"
    )
    assert errors == {(): made["refused"]}


def test_the_rules_record_what_was_used(shop: Shop) -> None:
    """The increments that spend and budgets start from are the tokens that were used."""
    recorded = "job_model_type:gen_ai_client_token_usage:increase1m"
    assert shop.in_the_last_hour(recorded, *MODEL_AND_TYPE) == shop.api.used()


def test_cached_tokens_are_those_of_each_call_once(shop: Shop) -> None:
    """The Collector's counters have the input tokens of every call once, and the cached ones among them."""
    for metric, part in {"input_tokens": 1.0, "cached_input_tokens": CACHED}.items():
        expected = {
            (model,): part * count for (model, kind), count in shop.api.used().items() if kind == "input"
        }
        counted = shop.ask(
            f"sum by (gen_ai_request_model) (openai_responses_spans_{metric}_total)", "gen_ai_request_model"
        )
        assert counted == pytest.approx(expected)
        recorded = f"job_model_tier_window:openai_responses_spans_{metric}:increase1m"
        assert shop.in_the_last_hour(recorded, "gen_ai_request_model") == pytest.approx(expected)


def spent(shop: Shop) -> float:
    """What the tokens of the model with a price cost."""
    used = shop.api.used()
    price = (1 - CACHED) * INPUT + CACHED * CACHED_INPUT
    return used[MODEL, "input"] * price + used[MODEL, "output"] * OUTPUT


def test_spend_and_budgets_are_of_what_was_used(shop: Shop) -> None:
    """Dollars and burn rates are those of the tokens that were used."""
    used = shop.api.used()
    dollars = shop.in_the_last_hour(
        "job_model:openai_responses_spend_dollars:increase1m", "gen_ai_request_model"
    )
    assert dollars == pytest.approx({(MODEL,): spent(shop)})
    tokens = used[MODEL, "input"] + used[MODEL, "output"]
    assert shop.ask(
        "job_model:openai_responses_token_budget:burn1h", "gen_ai_request_model"
    ) == pytest.approx({(MODEL,): tokens / TOKEN_BUDGET * HOURS})
    burn = shop.number("job:openai_responses_spend_budget:burn1h")
    assert burn == pytest.approx(spent(shop) / SPEND_BUDGET * HOURS)


def test_the_usage_dashboard_shows_what_was_used(shop: Shop) -> None:
    """The panels of the usage dashboard have the tokens, the dollars and the calls once."""
    used, calls = shop.api.used(), ROUNDS * sum(scenario != CHAT for _, scenario in CALLS)
    assert shop.number(shop.panel("Tokens")) == used.total()
    assert shop.number(shop.panel("Calls")) == calls
    assert shop.number(shop.panel("Spent")) == pytest.approx(spent(shop))
    assert shop.number(shop.panel("Cached")) == pytest.approx(CACHED)
    refused, lost = ROUNDS, ROUNDS
    assert shop.number(shop.panel("Unmetered")) == pytest.approx(lost / (calls - refused))
    assert shop.ask(shop.panel("Cached input"), "gen_ai_request_model") == pytest.approx(
        {(MODEL,): CACHED, (OTHER,): CACHED}
    )
    for number, kind in {1: "input", 2: "output"}.items():
        assert shop.ask(shop.panel("Who spends it", number), "gen_ai_request_model") == {
            (model,): count for (model, of_kind), count in used.items() if of_kind == kind
        }


def test_the_queries_of_the_reference_give_what_was_used(shop: Shop) -> None:
    """They see what was added after the first value of a series: the second round.

    `increase` extrapolates, so its numbers are not exact.
    """
    [block] = re.findall(r"```promql\n(.*?)```", REFERENCE, re.DOTALL)
    tokens, unknown = block.splitlines()
    added = shop.api.used() - shop.first
    assert shop.ask(tokens, *MODEL_AND_TYPE) == pytest.approx(added, rel=0.25)
    calls = sum(scenario != CHAT for _, scenario in CALLS)
    assert shop.number(unknown) == pytest.approx(2 / calls, rel=0.05)  # the lost and the refused one
    alone = unknown.replace('{openai_responses_usage_source=""}', '{openai_responses_usage_source="",REST}')
    alone = alone.replace("total[", "total{REST}[").replace(
        "REST", 'openai_responses_stream_outcome!="error"'
    )
    assert shop.number(alone) == pytest.approx(1 / (calls - 1), rel=0.05)

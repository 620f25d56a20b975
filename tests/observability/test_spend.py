"""Spend is right to the cent: the rules against the books of the server.

The server answers each call with other numbers and writes down what they cost by the price table. The
service is a process of its own with the real SDK. Its telemetry passes the real Collector and Prometheus.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from embedded.answer import new_id, usage
from embedded.http_server import Hold, Reply, ScriptedServer, SeenRequest
from observed import HANGING_S
from programs import wait_until
from stack import MODEL, Stack, hasten, price_examples

if TYPE_CHECKING:
    from collections.abc import Iterator

# It has tokens of the example's prices, and no prices of tools of its own.
OTHER = "gpt-5.4-nano"
PRICES = (
    price_examples()
    + """
      - record: openai_responses:price_dollars:per_million_tokens
        expr: vector(0.2)
        labels: {gen_ai_request_model: gpt-5.4-nano, gen_ai_token_type: input, tier: default}
      - record: openai_responses:price_dollars:per_million_tokens
        expr: vector(1.25)
        labels: {gen_ai_request_model: gpt-5.4-nano, gen_ai_token_type: output, tier: default}
"""
)

# Each argument is `MODEL:CALL` or `MODEL:CALL:TENANT`. The call is the prompt, by which the server knows what
# it must answer.
SERVICE = """
import sys
import time

import openai
from opentelemetry import baggage, context

client = openai.OpenAI(api_key="sk-till", max_retries=1)
WINDOW = {"background": True, "background_options": {"completion_window": "2h"}}


def play(model, call, tenant=None):
    about = {"model": model, "input": call, "extra_headers": {"x-tenant": tenant or ""}}
    context.attach(baggage.set_baggage("tenant.id", tenant) if tenant else baggage.clear())
    kind = call.partition("-")[0]
    if kind == "window":
        deferred = client.responses.create(**about, **WINDOW)
        assert deferred.usage is None
        later.append(deferred.id)
    elif kind == "compact":
        client.responses.compact(**about)
    elif kind == "whole":
        client.responses.create(**about)
    else:
        with client.responses.create(**about, stream=True) as stream:
            for event in stream:
                if kind == "closed" and event.type == "response.output_text.delta":
                    break


later = []
rounds, *calls = sys.argv[1:]
for _ in range(int(rounds)):
    for call in calls:
        play(*call.split(":"))
        time.sleep(0.02)
for response_id in later:
    # Twice: its tokens count once.
    client.responses.retrieve(response_id)
    client.responses.retrieve(response_id)
"""


@dataclass(frozen=True)
class Bill:
    """What one call uses. Numbers are multiplied by the number of the call, so that no two are alike."""

    tier: str | None = "default"
    input: int = 30_011
    cached: int = 0
    written: int = 0
    output: int = 1_009
    searches: int | None = None
    images: tuple[int, int] = (0, 0)
    items: tuple[str, ...] = ()


BILLS = {
    "stream": Bill(),
    "whole": Bill(),
    "whole-untiered": Bill(tier=None, cached=20_000),
    "stream-flex": Bill(tier="flex", cached=10_000, written=5_000),
    "stream-cached": Bill(cached=17_001, written=9_002),
    "closed": Bill(cached=25_000),
    "window": Bill(),
    "window-cached": Bill(cached=25_000, written=2_000),
    "compact": Bill(tier=None, input=192_000, cached=90_000, output=3_000),
    # The API bills fewer searches than there are items: opening a page is one, too.
    "stream-search": Bill(searches=3, items=("web_search_call",) * 4),
    "whole-search": Bill(searches=2, items=("web_search_call",) * 2),
    "whole-free-search": Bill(searches=0, items=("web_search_call",)),
    "stream-files": Bill(items=("file_search_call",) * 3 + ("mcp_call",)),
    "whole-priority": Bill(tier="priority", items=("code_interpreter_call", "file_search_call")),
    "whole-image": Bill(images=(70, 4_160), items=("image_generation_call",)),
}
NOT_EXACT = ("window-cached", "whole-priority")
CALLS = (
    *(f"{MODEL}:{call}" for call in BILLS if call not in NOT_EXACT),
    *(f"{OTHER}:{call}" for call in ("stream", "whole-search", "stream-files")),
)
ROUNDS = 3


def prices() -> dict[tuple[str, frozenset[tuple[str, str]]], Decimal]:
    """The price of each row of the table, by its kind and its labels; a tier `default` is none."""
    rows = {}
    for rule in yaml.safe_load(PRICES)["groups"][0]["rules"]:
        labels = {key: value for key, value in rule["labels"].items() if (key, value) != ("tier", "default")}
        kind = rule["record"].rpartition(":")[2]
        rows[kind, frozenset(labels.items())] = Decimal(rule["expr"][len("vector(") : -1])
    return rows


class Till:
    """A Responses API that knows what each of its answers costs."""

    def __init__(self) -> None:
        self.prices = prices()
        self.dollars = Decimal(0)
        self.by_tenant: defaultdict[str, Decimal] = defaultdict(Decimal)
        self.by_tier: Counter[tuple[str, str]] = Counter()  # tokens by tier and window
        self.unpriced: Counter[str] = Counter()
        self.calls = 0
        self._later: dict[str, dict[str, Any]] = {}

    def __call__(self, request: SeenRequest) -> Reply:
        """What the server answers."""
        if request.method == "GET":
            return Reply.json(self._later[request.path.rpartition("/")[2]])
        asked = request.json
        self.calls += 1
        bill = BILLS[asked["input"]]
        window = (asked.get("background_options") or {}).get("completion_window")
        body = self._body(bill, asked)
        before = self.dollars
        self._charge(bill, asked["model"], window, body["usage"])
        self.by_tenant[request.headers["x-tenant"]] += self.dollars - before
        if request.path.endswith("/compact"):
            names = ("id", "created_at", "usage")
            return Reply.json(
                {name: body[name] for name in names} | {"object": "response.compaction", "output": []}
            )
        self._later[body["id"]] = body
        if window:
            return Reply.json({**body, "status": "queued", "output": [], "usage": None, "tool_usage": None})
        if not asked.get("stream"):
            return Reply.json(body)
        begun = {**body, "status": "in_progress", "service_tier": "auto", "usage": None, "output": []}
        delta = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": "Hi", "logprobs": []}
        events = [
            {"type": "response.created", "sequence_number": 0, "response": begun},
            {"type": "response.output_text.delta", "sequence_number": 1, **delta},
            {"type": "response.completed", "sequence_number": 2, "response": body},
        ]
        if asked["input"] == "closed":
            return Reply.sse(events[:2], end=Hold())
        return Reply.sse(events)

    def _body(self, bill: Bill, asked: dict[str, Any]) -> dict[str, Any]:
        n = self.calls
        body: dict[str, Any] = {
            "id": new_id(),
            "object": "response",
            "created_at": int(time.time()),
            "status": "completed",
            "background": bool(asked.get("background")),
            "model": asked["model"],
            "output": [
                {"id": f"item_{n}_{place}", "type": kind, "status": "completed"}
                for place, kind in enumerate(bill.items)
            ],
            "usage": usage(
                n * bill.input, n * bill.output, cached=n * bill.cached, cache_write=n * bill.written
            ),
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
        if bill.tier:
            body["service_tier"] = bill.tier
        if bill.searches is not None or any(bill.images):
            inputs, outputs = (n * count for count in bill.images)
            body["tool_usage"] = {
                "web_search": {"num_requests": n * (bill.searches or 0)},
                "image_gen": {
                    "input_tokens": inputs,
                    "output_tokens": outputs,
                    "total_tokens": inputs + outputs,
                },
            }
        return body

    def _charge(self, bill: Bill, model: str, window: str | None, used: dict[str, Any]) -> None:
        details = used["input_tokens_details"]
        cached, written = details["cached_tokens"], details["cache_write_tokens"]
        kinds = {
            "input": used["input_tokens"] - cached - written,
            "cached_input": cached,
            "cache_write_input": written,
            "output": used["output_tokens"],
        }
        tier = bill.tier or "default"
        price_of = {"tier": tier if tier != "default" else None, "window": window}
        for kind, count in kinds.items():
            labels = {"gen_ai_request_model": model, "gen_ai_token_type": kind, **price_of}
            self._add("per_million_tokens", labels, count, 1_000_000)
        self.by_tier[tier, window or ""] += used["total_tokens"]
        # Searches that are billed, and calls of other tools.
        n = self.calls
        tools = Counter(
            kind for kind in bill.items if kind not in ("web_search_call", "image_generation_call")
        )
        tools["web_search_request"] = n * (bill.searches or 0)
        for kind, count in tools.items():
            labels = {"openai_responses_tool_type": kind, "gen_ai_request_model": model}
            self._add("per_thousand_tool_calls", labels, count, 1_000)
        for kind, count in zip(("input", "output"), bill.images, strict=True):
            labels = {
                "openai_responses_tool_type": "image_generation_call",
                "gen_ai_token_type": kind,
                "gen_ai_request_model": model,
            }
            self._add("per_million_tool_tokens", labels, n * count, 1_000_000)

    def _add(self, kind: str, labels: dict[str, str | None], count: int, per: int) -> None:
        if not count:
            return
        own = {key: value for key, value in labels.items() if value}
        general = {key: value for key, value in own.items() if key != "gen_ai_request_model"}
        price = self.prices.get((kind, frozenset(own.items())))
        if price is None:
            price = self.prices.get((kind, frozenset(general.items())))
        if price is None:
            self.unpriced[" ".join(own.values())] += count
        else:
            self.dollars += price * count / per


@dataclass
class Shop:
    """The stack, whose price table is that of the example with its commented rows."""

    stack: Stack
    till: dict[str, Till] = field(default_factory=dict)

    @contextmanager
    def service(self, name: str, *calls: str, rounds: int = 1, **settings: str) -> Iterator[Till]:
        """A service of this name that makes these calls, and its server."""
        till = self.till[name] = Till()
        program = self.stack.directory / "till.py"
        program.write_text(SERVICE, "utf-8")
        instrument = Path(sys.executable).with_name("opentelemetry-instrument")
        with ScriptedServer(till) as server:
            subprocess.run(  # noqa: S603  # the project's own program
                [instrument, sys.executable, program, str(rounds), *calls],
                env={
                    **self.stack.settings(name, server),
                    "OTEL_METRIC_EXPORT_INTERVAL": "1000",
                    "OTEL_BSP_SCHEDULE_DELAY": "200",
                    **settings,
                },
                check=True,
                timeout=HANGING_S,
            )
            yield till

    def ask(self, promql: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The answer to a query, by the values of these labels."""
        found = self.stack.prometheus.query(hasten(promql))
        return {
            tuple(one["metric"].get(label, "") for label in labels): float(one["value"][1]) for one in found
        }

    def spent(self, name: str) -> float:
        """The dollars of the last hour, by the rules."""
        spend = "job_model:openai_responses_spend_dollars:increase1m"
        return self.ask(f'sum(sum_over_time({spend}{{job="{name}"}}[1h]))').get((), 0.0)

    def settled(self, name: str) -> float:
        """The dollars of the last hour, when six minutes have not changed them."""
        seen = [0.0]

        def is_settled() -> bool:
            seen.append(round(self.spent(name), 9))
            return seen[-1] > 0 and len(seen) > 12 and len(set(seen[-12:])) == 1

        wait_until(is_settled, f"dollars of {name} that stay as they are", 60, interval=1)
        return seen[-1]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The stack is running, and what appears is new to it."""
    with Stack(tmp_path_factory.mktemp("spend"), prices=PRICES) as stack:
        yield Shop(stack)


def test_spend_is_right_to_the_cent(shop: Shop) -> None:
    """Two tiers, a window, a compaction, cached tokens, searches, images and files cost what they cost."""
    with shop.service("till", *CALLS, rounds=ROUNDS) as till:
        assert till.calls == ROUNDS * len(CALLS)
    dollars = shop.settled("till")
    assert dollars == pytest.approx(float(till.dollars), abs=0.000_001)
    assert round(dollars, 2) == float(round(till.dollars, 2))
    assert till.dollars > 10
    tokens = shop.ask(
        "sum by (tier, window) (sum_over_time("
        'job_model_tier_window_type:gen_ai_client_token_usage:increase1m{job="till"}[1h]))',
        "tier",
        "window",
    )
    assert tokens == {key: float(count) for key, count in till.by_tier.items()}
    assert tokens.keys() == {("default", ""), ("flex", ""), ("default", "2h")}
    assert shop.ask('{__name__=~".+unpriced.+", job="till"}') == {}
    scale = shop.ask('max(job_model_tier_window:openai_responses_spans_scale:ratio1h{job="till"})')
    assert scale == {(): 1.0}


def test_deferred_usage_comes_once(shop: Shop) -> None:
    """A call with a window is deferred, and its usage is late usage when the application has fetched it."""
    deferred = 'openai_responses_usage_missing_reason="deferred", job="till"'
    calls = f"sum(sum_over_time(job_model_ending:openai_responses_calls:increase1m{{{deferred}}}[1h]))"
    late = f"sum(sum_over_time(job_model_reason:openai_responses_late_usage:increase1m{{{deferred}}}[1h]))"
    assert shop.ask(calls) == shop.ask(late) == {(): ROUNDS * sum("window" in call for call in CALLS)}


def test_metrics_of_cached_tokens_make_spend_right_where_spans_are_sampled(shop: Shop) -> None:
    """With the next names of the conventions, cached tokens do not need spans, also those of a window."""
    calls = (*CALLS, f"{MODEL}:window-cached")
    settings = {
        "OTEL_TRACES_SAMPLER": "traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.2",
        "OTEL_SEMCONV_STABILITY_OPT_IN": "gen_ai_latest_experimental/dup",
    }
    with shop.service("sampled", *calls, rounds=ROUNDS, **settings) as till:
        pass
    dollars = shop.settled("sampled")
    assert dollars == pytest.approx(float(till.dollars), abs=0.000_001)


def test_without_them_cached_tokens_are_estimated_where_spans_are_sampled(shop: Shop) -> None:
    """Half of the spans are enough for cached tokens, as long as their share stays the same."""
    call = f"{MODEL}:stream-cached"
    with shop.service(
        "estimated", call, rounds=80, OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0.5"
    ) as till:
        pass
    shop.settled("estimated")
    cached = shop.ask(
        "sum(sum_over_time("
        'job_model_tier_window_type:openai_responses_cached_tokens:increase1m{job="estimated"}[1h]))'
    )[()]
    bill = BILLS["stream-cached"]
    true = sum(n * (bill.cached + bill.written) for n in range(1, till.calls + 1))
    assert cached == pytest.approx(true, rel=0.1)


def test_a_tier_and_a_tool_without_a_price_are_reported_and_not_billed(shop: Shop) -> None:
    """Dollars do not have them. A share says how much that is, and of what."""
    with shop.service("unpriced", f"{MODEL}:whole", f"{MODEL}:whole-priority") as till:
        pass
    assert till.unpriced
    dollars = shop.settled("unpriced")
    assert dollars == pytest.approx(float(till.dollars), abs=0.000_001)
    total = sum(till.by_tier.values())
    shares = shop.ask(
        'job_model_tier_window_type:openai_responses_unpriced_tokens:ratio1h{job="unpriced"}',
        "gen_ai_request_model",
        "gen_ai_token_type",
        "tier",
    )
    assert {" ".join(key): share * total for key, share in shares.items()} == pytest.approx(
        {key: count for key, count in till.unpriced.items() if "_call" not in key}
    )
    assert shop.ask(
        'job_model_tool_type:openai_responses_unpriced_tool_uses:ratio1h{job="unpriced"}',
        "openai_responses_tool_type",
        "unit",
    ) == {("code_interpreter_call", "calls"): 0.5}


def test_spend_of_tenants_is_right_to_the_cent(shop: Shop) -> None:
    """Each tenant costs what its calls cost, and so do calls without a tenant."""
    calls = [f"{call}{tenant}" for call in CALLS for tenant in ("", ":acme", ":zeta")]
    with shop.service("tenants", *calls, OTEL_RESPONSES_USAGE_BAGGAGE_KEYS="tenant.id") as till:
        pass
    dollars = shop.settled("tenants")
    assert dollars == pytest.approx(float(till.dollars), abs=0.000_001)
    spend = "tenant_job_model:openai_responses_spend_dollars:increase1m"
    spent = shop.ask(f'sum by (tenant_id) (sum_over_time({spend}{{job="tenants"}}[1h]))', "tenant_id")
    billed = {(name,): float(share) for name, share in till.by_tenant.items()}
    assert spent == pytest.approx(billed, abs=0.000_001)
    assert billed.keys() == {("",), ("acme",), ("zeta",)}
    month = shop.ask("sum by (tenant_id) (tenant_month:openai_responses_spend_dollars:sum)", "tenant_id")
    del billed[("",)]
    assert month == pytest.approx(billed, abs=0.000_001)

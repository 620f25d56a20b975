"""The stack of examples/observability, run from the same files, in which a minute takes two seconds."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from embedded.answer import Answer, usage
from embedded.http_server import Cut, Hold, Reply, ScriptedServer, SeenRequest
from embedded.responses_api import Plan, ResponsesAPI, error
from programs import ROOT, Alertmanager, Collector, Jaeger, Prometheus, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Self

EXAMPLE = ROOT / "examples" / "observability"
RULES = EXAMPLE / "prometheus"

FASTER = 30
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
DURATION = re.compile(r"\b(\d+)([smhdw])\b")

MODEL = "gpt-5.4-mini"
# The size of a call: the service `shop` of budgets.yml can afford some 400 of them in a month.
BILLED = usage(1_000_000, 200_000, cached=400_000)

# The headers of an answer of a server that limits rates.
LIMITS = {
    "x-ratelimit-limit-tokens": "2000000",
    "x-ratelimit-remaining-tokens": "1500000",
    "x-ratelimit-limit-requests": "500",
    "x-ratelimit-remaining-requests": "499",
}

# What becomes of a call is the one word of its prompt.
SHOP = """
import itertools
import os
import sys
import time

import openai
from opentelemetry import baggage, context

# A call belongs to the next of these tenants, if there are any.
tenants = itertools.cycle(os.environ.get("TENANTS", "").split())
clients = {key: openai.OpenAI(api_key=key, max_retries=0) for key in ("sk-shop", "sk-lost")}
WINDOW = {"background": True, "extra_body": {"background_options": {"completion_window": "2h"}}}


def play(call):
    # Calls whose responses are not to be found have a key, and so a circuit, of their own.
    client = clients["sk-lost" if call == "lost" else "sk-shop"]
    if call == "deferred":
        deferred = client.responses.create(model="gpt-5.4-mini", input=call, **WINDOW)
        client.responses.retrieve(deferred.id)
        return
    if call in ("tools", "repeated"):
        client.with_options(max_retries=1).responses.create(model="gpt-5.4-mini", input=call)
        return
    stream = client.responses.create(model="gpt-5.4-mini", input=call, stream=True)
    if call == "abandoned":
        next(stream)
        return  # and nobody holds it any more
    with stream:
        for event in stream:
            if call in ("closed", "lost") and event.type == "response.output_text.delta":
                break


rounds, *calls = sys.argv[1:]
for _ in range(int(rounds)):
    for call in calls:
        token = None
        if os.environ.get("TENANTS"):
            token = context.attach(baggage.set_baggage("tenant.id", next(tenants)))
        try:
            play(call)
        except openai.OpenAIError:
            pass
        finally:
            if token is not None:
                context.detach(token)
        time.sleep(0.05)
"""


def hasten(text: str) -> str:
    """The text with every duration in it so many times shorter."""
    return DURATION.sub(lambda found: f"{int(found[1]) * SECONDS[found[2]] * 1000 // FASTER}ms", text)


def price_examples() -> str:
    """The price table with its commented rows taken in."""
    text = (RULES / "prices.yml").read_text("utf-8")
    return re.sub(r"(?m)^      # (- record|  expr|  labels):", r"      \1:", text)


def with_tools(request: SeenRequest) -> Reply:
    """An answer of hosted tools. Its tier and one of the tools have no price."""
    body = Answer(usage=BILLED).response(request.json)
    body["service_tier"] = "priority"
    kinds = ("web_search_call", "file_search_call", "image_generation_call", "code_interpreter_call")
    body["output"] += [{"id": f"item_{kind}", "type": kind, "status": "completed"} for kind in kinds]
    images = {"input_tokens": 50, "output_tokens": 4000, "total_tokens": 4050}
    body["tool_usage"] = {"web_search": {"num_requests": 2}, "image_gen": images}
    return Reply.json(body, headers=LIMITS)


def plan(request: SeenRequest) -> Plan | Reply:
    """What the server does about a call."""
    answer = Answer(usage=BILLED)
    if request.json["input"] == "tools":
        return with_tools(request)
    if request.json["input"] == "repeated" and request.headers["x-stainless-retry-count"] == "0":
        refused = error(503, "Overloaded.", code="server_error")
        return replace(refused, headers={**refused.headers, "retry-after-ms": "1"})
    plans: dict[str, Plan | Reply] = {
        "whole": Plan(answer, pace=0.01),
        "closed": Plan(answer, pace=0.01, end=Hold()),
        "abandoned": Plan(answer, pace=0.01, end=Hold()),
        "cut": Plan(answer, cut_after=6, end=Cut()),
        "truncated": Plan(answer, cut_after=6),
        "lost": Plan(answer, pace=0.01, fate="lost"),
        "refused": error(429, "Slow down.", code="rate_limit_exceeded"),
        "deferred": Plan(answer),
        "repeated": Plan(answer),
    }
    return plans[request.json["input"]]


@dataclass(frozen=True)
class Notice:
    """One alert in a message of Alertmanager's: who was told, and what."""

    receiver: str
    status: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def alert(self) -> str:
        """The alert's name."""
        return self.labels["alertname"]


class Stack:
    """Collector, Jaeger, Prometheus, Alertmanager and somebody who is told; services that make calls."""

    def __init__(self, directory: Path, *, prices: str | None = None) -> None:
        """The stack of a directory of its own, with another price table if there is one."""
        self.directory = directory
        self._prices = prices
        self.notices: list[Notice] = []
        self.jaeger = Jaeger(directory / "jaeger")
        self.collector = Collector(directory / "collector", JAEGER_OTLP_ENDPOINT=self.jaeger.otlp_endpoint)
        self._told = ScriptedServer(self._be_told)
        self._openai = ScriptedServer(ResponsesAPI(plan))
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as starting:
            for part in (self._told, self._openai, self.jaeger, self.collector):
                starting.enter_context(part)
            config = self._copy(
                "alertmanager", {"host.docker.internal:9095": self._told.url.removeprefix("http://")}
            )
            self.alertmanager = starting.enter_context(
                Alertmanager(self.directory / "alertmanager", config / "alertmanager.yml")
            )
            config = self._copy(
                "prometheus",
                {
                    "otel-collector:8889": f"127.0.0.1:{self.collector.prometheus_port}",
                    "otel-collector:8888": f"127.0.0.1:{self.collector.metrics_port}",
                    "alertmanager:9093": f"127.0.0.1:{self.alertmanager.port}",
                },
            )
            self.prometheus = starting.enter_context(
                Prometheus(
                    self.directory / "prometheus",
                    config / "prometheus.yml",
                    f"--query.lookback-delta={hasten('5m')}",
                )
            )
            # From now on what appears is new.
            wait_until(lambda: self.prometheus.query("openai_responses:watched"), "watching Prometheus")
            self._running = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _copy(self, name: str, addresses: Mapping[str, str]) -> Path:
        """The configuration directory of that name as people use it, but hastened and at these addresses."""
        copy = self.directory / "configuration" / name
        shutil.copytree(EXAMPLE / name, copy)
        for path in copy.glob("*.yml"):
            # A price table has no durations. What looks like one is the label of a completion window.
            text = path.read_text("utf-8")
            text = self._prices or text if path.name == "prices.yml" else hasten(text)
            for address, here in addresses.items():
                text = text.replace(address, here)
            path.write_text(text, "utf-8")
        return copy

    def _be_told(self, request: SeenRequest) -> Reply:
        self.notices += [
            Notice(request.path, alert["status"], alert["labels"], alert["annotations"])
            for alert in request.json["alerts"]
        ]
        return Reply.json({})

    def notice(self, alert: str, status: str, timeout: float = 60, **labels: str) -> Notice:
        """Wait for that message about an alert with these labels."""

        def found() -> Notice | None:
            for notice in list(self.notices):
                if (notice.alert, notice.status) == (
                    alert,
                    status,
                ) and labels.items() <= notice.labels.items():
                    return notice
            return None

        told: Notice = wait_until(found, f"{status} {alert}", timeout)
        return told

    def settings(self, name: str, openai: ScriptedServer | None = None) -> dict[str, str]:
        """The environment of a service that exports to the Collector and calls this server, or the own."""
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "OPENAI_"))},
            "OPENAI_BASE_URL": f"{(openai or self._openai).url}/v1",
            "OTEL_SERVICE_NAME": name,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.collector.grpc_endpoint}",
            "OTEL_LOGS_EXPORTER": "none",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @contextlib.contextmanager
    def service(
        self, name: str, *calls: str, rounds: int = 1, tenants: str = ""
    ) -> Iterator[Callable[[], int]]:
        """A process without a line of telemetry that makes these calls; it yields how to wait for its end.

        If it has tenants, they make the calls in turn.
        """
        environment = {
            **self.settings(name),
            **({"TENANTS": tenants, "OTEL_RESPONSES_USAGE_BAGGAGE_KEYS": "tenant.id"} if tenants else {}),
            "OTEL_METRIC_EXPORT_INTERVAL": "1000",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
        program = self.directory / "shop.py"
        program.write_text(SHOP, "utf-8")
        instrument = Path(sys.executable).with_name("opentelemetry-instrument")
        process = subprocess.Popen(  # noqa: S603
            [instrument, sys.executable, program, str(rounds), *calls], env=environment
        )
        try:
            yield lambda: process.wait(60)
        finally:
            process.terminate()
            process.wait(20)

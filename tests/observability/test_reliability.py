"""Nothing is lost between a service and Jaeger, or the loss shows in a metric.

`scripts/test tests/observability/test_reliability.py -s` prints the figures that docs/reliability.md has, and
OUTAGE_S makes Jaeger's outage longer.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from programs import Collector, Jaeger, Toxiproxy, samples, wait_until
from traffic import Traffic, show

if TYPE_CHECKING:
    from pathlib import Path

# Less than the timeout of the exporter, 10 s.
BAD_S = 5.0
BATCH = 512  # spans that the SDK exports at once, at most
OUTAGE_S = float(os.environ.get("OUTAGE_S", "8"))


@pytest.fixture
def jaeger(tmp_path: Path) -> Jaeger:
    """A Jaeger that has not been started."""
    return Jaeger(tmp_path / "jaeger")


@pytest.fixture
def collector(tmp_path: Path, jaeger: Jaeger) -> Collector:
    """A Collector that has not been started, and sends to that Jaeger."""
    return Collector(tmp_path / "collector", JAEGER_OTLP_ENDPOINT=jaeger.otlp_endpoint)


def assert_whole(title: str, traffic: Traffic, jaeger: Jaeger, collector: Collector) -> None:
    """What went in has come out: every span in Jaeger, every token in Prometheus' format."""
    sent = traffic.spans
    began = time.monotonic()
    arrived = jaeger.wait_for("busy", len(sent))
    waited = time.monotonic() - began
    known = tokens(collector)
    show(
        f"{title}: {len(sent)} spans in, {len(arrived)} out, {waited:.1f} s after the last;"
        f" tokens in {sum(traffic.tokens.values())}, out {sum(known.values())}"
    )
    assert arrived == sent
    assert len(jaeger.spans("busy", limit=50_000)) == len(sent)
    assert known == traffic.tokens


def tokens(collector: Collector) -> dict[str, int]:
    """The tokens of the traffic that Prometheus would find, by type."""
    text = collector.scrape()
    return {
        kind: int(samples(text, "gen_ai_client_token_usage_sum", gen_ai_token_type=kind, job="busy"))
        for kind in ("input", "output")
    }


def test_a_collector_that_is_killed_in_mid_load_loses_nothing(jaeger: Jaeger, collector: Collector) -> None:
    """After SIGKILL and a restart every span is in Jaeger once, and every token in the metrics."""
    with jaeger, collector, Traffic(collector.grpc_endpoint) as traffic:
        for _ in range(2):
            traffic.burst(1500)
            collector.kill()
            traffic.run(1)
            collector.start()
        traffic.run(1)
        traffic.finish()
        assert_whole("Collector killed twice", traffic, jaeger, collector)


def test_a_collector_that_is_killed_while_jaeger_is_away_keeps_its_queue(
    jaeger: Jaeger, collector: Collector
) -> None:
    """What was accepted for a Jaeger that is not there outlives the Collector's process."""
    with collector, Traffic(collector.grpc_endpoint) as traffic:
        traffic.run(3)
        collector.kill()
        collector.start()
        traffic.finish()
        with jaeger:
            assert_whole("Collector killed with a full queue", traffic, jaeger, collector)


def test_an_outage_of_jaeger_costs_nothing(jaeger: Jaeger, collector: Collector) -> None:
    """Spans wait on disk while Jaeger is away, which the queue's size shows, and arrive when it is back."""
    with jaeger, collector, Traffic(collector.grpc_endpoint) as traffic:
        traffic.run(1)
        jaeger.kill()
        traffic.run(OUTAGE_S)
        queued = collector.metric("otelcol_exporter_queue_size")
        jaeger.start()
        traffic.run(1)
        traffic.finish()
        assert_whole(f"Jaeger away for {OUTAGE_S:.0f} s", traffic, jaeger, collector)
        assert queued > 0
        assert collector.metric("otelcol_exporter_send_failed_spans") == 0
        wait_until(lambda: collector.metric("otelcol_exporter_queue_size") == 0, "empty queue")


def test_a_collector_that_is_not_there_at_the_start_is_waited_for(
    jaeger: Jaeger, collector: Collector
) -> None:
    """A service that is up before its Collector loses nothing, as long as its exporter's patience lasts."""
    with jaeger, Traffic(collector.grpc_endpoint) as traffic:
        traffic.run(3)
        with collector:
            traffic.run(2)
            traffic.finish()
            assert_whole("Collector 3 s late", traffic, jaeger, collector)


BAD_NETWORKS: dict[str, tuple[str, str, dict[str, int]]] = {
    "latency of 200 to 800 ms": ("latency", "downstream", {"latency": 500, "jitter": 300}),
    "every connection reset": ("reset_peer", "downstream", {"timeout": 0}),
    "no answers": ("timeout", "downstream", {"timeout": 0}),
    "half-open connections": ("timeout", "upstream", {"timeout": 0}),
    "1 KB/s": ("bandwidth", "upstream", {"rate": 1}),
    "late closes": ("slow_close", "downstream", {"delay": 400}),
}


@pytest.mark.parametrize("name", BAD_NETWORKS)
def test_a_bad_network_to_the_collector_costs_nothing(
    name: str, tmp_path: Path, jaeger: Jaeger, collector: Collector
) -> None:
    """What a service exports while the network is bad for some seconds arrives when it is good again."""
    kind, stream, attributes = BAD_NETWORKS[name]
    with jaeger, collector, Toxiproxy(tmp_path / "toxiproxy") as toxiproxy:
        proxy = toxiproxy.proxy(collector.grpc_endpoint)
        with Traffic(proxy.address) as traffic:
            traffic.run(1)
            proxy.add(kind, stream, **attributes)
            traffic.run(BAD_S)
            proxy.heal()
            traffic.run(1)
            traffic.finish()
            assert_whole(f"Network to the Collector, {name}", traffic, jaeger, collector)


def test_what_a_full_queue_refuses_shows_in_metrics(
    jaeger: Jaeger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The Collector counts what it refuses for want of room, and the SDK to the span what is lost by that."""
    monkeypatch.setenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "true")
    collector = Collector(
        tmp_path / "collector", JAEGER_OTLP_ENDPOINT=jaeger.otlp_endpoint, OTELCOL_QUEUE_BYTES="3000000"
    )
    with collector, Traffic(collector.grpc_endpoint, timeout=1) as traffic:
        traffic.burst(6000, per_second=2000)
        traffic.finish()
        refused = collector.metric("otelcol_receiver_refused_spans")
        assert collector.metric("otelcol_exporter_enqueue_failed_spans") == refused
        failures = "\n".join(line for line in collector.scrape().splitlines() if "error_type=" in line)
        given_up = samples(failures, "otel_sdk_exporter_span_exported_total")
        no_room = samples(failures, "otel_sdk_processor_span_processed_total", error_type="queue_full")
        sent, lost, known = traffic.spans, given_up + no_room, tokens(collector)
        with jaeger:
            arrived = jaeger.wait_for("busy", int(len(sent) - lost))
    show(
        f"Queue full: {len(sent)} spans in, {len(arrived)} out, {given_up:.0f} given up by the exporter,"
        f" {no_room:.0f} without room in the SDK; refused by the Collector, retries included: {refused:.0f}"
    )
    assert arrived < sent
    assert known == traffic.tokens
    # A batch whose answer comes after the deadline is given up, and arrives all the same.
    late = BATCH * sum("DEADLINE_EXCEEDED" in record.getMessage() for record in caplog.records)
    assert len(sent) <= len(arrived) + lost <= len(sent) + late
    assert given_up > 0
    assert refused > 0  # not always as many: on a busy machine a batch is given up before it is sent

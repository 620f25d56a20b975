"""What calls cost the Collector: bytes, CPU, memory, disk and series, as a table.

CPU time is the Collector's own count, so a busy machine does little harm. Every request is one that a
service sent about real calls, with ids of its own.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from programs import COLLECTOR_CONFIG, ROOT, Collector, Prometheus, get, samples, wait_until
from traffic import MODEL, Traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

GATEWAY = ROOT / "examples" / "gateway" / "gateway.yaml"
TAIL_SAMPLING = GATEWAY.with_name("tail-sampling.yaml")
TRACES = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
METRICS = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
BATCH = 512  # the SDK's
REQUESTS = 200
PROCESSES = 200
DECISION_WAIT = 20  # longer than it takes to send the requests


def main() -> None:
    """Measure one thing after the other."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        spans, metrics = record()
        requests = [renewed(spans) for _ in range(REQUESTS)]
        count = len(requests) * BATCH
        measure_look_ups(spans)
        say("a span of a call, as the SDK sends it", len(requests[0]) / BATCH, "bytes")
        say("the same, compressed", len(gzip.compress(requests[0])) / BATCH, "bytes")
        with server(lambda *_: None) as endpoint:
            for title, configs in {"agent": (COLLECTOR_CONFIG,), "gateway": (GATEWAY,)}.items():
                with Collector(directory / title, *configs, JAEGER_OTLP_ENDPOINT=endpoint) as collector:
                    measure_flow(title, collector, requests, count)
            tail = Collector(
                directory / "tail",
                GATEWAY,
                TAIL_SAMPLING,
                JAEGER_OTLP_ENDPOINT=endpoint,
                TAIL_TRACES="1000000",
                TAIL_DECISION_WAIT=f"{DECISION_WAIT}s",
            )
            with tail:
                measure_waiting(tail, requests, count)
        with Collector(directory / "queue", JAEGER_OTLP_ENDPOINT="127.0.0.1:1") as collector:
            measure_queue(collector, requests, count)
        with Collector(directory / "series", JAEGER_OTLP_ENDPOINT="127.0.0.1:1") as collector:
            measure_series(directory, collector, metrics)


def say(what: str, number: float, unit: str) -> None:
    """Print a row of the table."""
    print(f"| {what} | {number:,.{0 if number >= 10 else 2}f} {unit} |", flush=True)  # noqa: T201


def record() -> tuple[ExportTraceServiceRequest, ExportMetricsServiceRequest]:
    """A full batch of spans, and all metrics of a process, as the SDK sent them about real calls."""
    kept: dict[str, list[bytes]] = {TRACES: [], METRICS: []}
    with server(lambda method, request: kept[method].append(request)) as endpoint:
        with Traffic(endpoint) as traffic:
            wait_until(lambda: len(traffic.spans) >= BATCH, f"{BATCH} spans", 60)
        spans, *more = map(ExportTraceServiceRequest.FromString, kept[TRACES])
    batch = spans.resource_spans[0].scope_spans[0].spans
    for request in more:
        batch.extend(request.resource_spans[0].scope_spans[0].spans)
    del batch[BATCH:]
    return spans, ExportMetricsServiceRequest.FromString(kept[METRICS][-1])


def renewed(request: ExportTraceServiceRequest) -> bytes:
    """The same spans with other ids."""
    for span in request.resource_spans[0].scope_spans[0].spans:
        span.trace_id, span.span_id = os.urandom(16), os.urandom(8)
    return request.SerializeToString()


@contextmanager
def server(take: Callable[[str, bytes], None]) -> Iterator[str]:
    """An OTLP server that hands requests over as they are, and its address."""
    grpc_server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    for method in (TRACES, METRICS):
        _, service, name = method.split("/")
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
            lambda request, _context, method=method: take(method, request) or b""
        )
        handlers = grpc.method_handlers_generic_handler(service, {name: handler})
        grpc_server.add_generic_rpc_handlers((handlers,))
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield f"127.0.0.1:{port}"
    grpc_server.stop(grace=None).wait()


def send(endpoint: str, method: str, requests: Iterable[bytes]) -> None:
    """Send requests over four connections, as fast as they are taken."""
    left = iter(requests)
    lock = threading.Lock()

    def work(_: int) -> None:
        options = [("grpc.use_local_subchannel_pool", True)]
        with grpc.insecure_channel(endpoint, options) as channel:
            export = channel.unary_unary(method)
            while True:
                with lock:
                    request = next(left, None)
                if request is None:
                    return
                export(request, wait_for_ready=True, timeout=60)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def measure_look_ups(request: ExportTraceServiceRequest) -> None:
    """How often the API is asked for calls that ended early, a server that has ended the response as well."""
    attempts = [
        attribute.value.int_value
        for span in request.resource_spans[0].scope_spans[0].spans
        for attribute in span.attributes
        if attribute.key == "openai_responses.retrieval.attempts"
    ]
    say("GETs per call that ended early", sum(attempts) / len(attempts), "")


def measure_flow(title: str, collector: Collector, requests: list[bytes], count: int) -> None:
    """CPU and memory of a Collector that passes spans on as they come."""
    send(collector.grpc_endpoint, TRACES, requests[:20])
    wait_until(lambda: collector.metric("otelcol_exporter_queue_size") == 0, "empty queue")
    before = collector.metric("otelcol_process_cpu_seconds")
    send(collector.grpc_endpoint, TRACES, requests)
    peak = collector.metric("otelcol_process_memory_rss")
    wait_until(
        lambda: collector.metric("otelcol_exporter_sent_spans") == count + 20 * BATCH, "last span", 120
    )
    spent = collector.metric("otelcol_process_cpu_seconds") - before
    say(f"CPU of the {title} per span", spent / count * 1e6, "µs")
    say(f"spans per second and core of the {title}", count / spent, "")
    say(f"memory of the {title} under that load", peak / 1e6, "MB")


def measure_waiting(collector: Collector, requests: list[bytes], count: int) -> None:
    """Memory of traces of one span that wait for their decision, and CPU until it and after it."""
    before = collector.metric("otelcol_process_memory_rss")
    spent = collector.metric("otelcol_process_cpu_seconds")
    send(collector.grpc_endpoint, TRACES, requests)
    held = collector.metric("otelcol_process_memory_rss") - before
    say("memory of tail sampling per trace that waits", held / count, "bytes")
    taken = collector.metric("otelcol_process_cpu_seconds")
    say("CPU of tail sampling per span that comes in", (taken - spent) / count * 1e6, "µs")
    decided = "otelcol_processor_tail_sampling_global_count_traces_sampled"
    wait_until(lambda: collector.metric(decided) == count, "last decision", 120)
    kept = collector.metric(decided, sampled="true")
    wait_until(lambda: collector.metric("otelcol_exporter_sent_spans") == kept, "last span", 120)
    spent = collector.metric("otelcol_process_cpu_seconds") - taken
    say("CPU per trace that is kept, with all decisions", spent / kept * 1e6, "µs")


def measure_queue(collector: Collector, requests: list[bytes], count: int) -> None:
    """Disk of spans that wait for Jaeger."""
    send(collector.grpc_endpoint, TRACES, requests)
    files = (collector.directory / "queue").iterdir()
    size = sum(file.stat().st_blocks * 512 for file in files)
    say("disk of the queue per span that waits", size / count, "bytes")
    queued = collector.metric("otelcol_exporter_queue_size")
    say("the same, as the queue counts it against its limit", queued / count, "bytes")


def measure_series(directory: Path, collector: Collector, request: ExportMetricsServiceRequest) -> None:
    """Series of a process, and what many processes cost Collector and Prometheus."""
    empty = collector.metric("otelcol_process_memory_rss")
    instance = next(
        attribute
        for attribute in request.resource_metrics[0].resource.attributes
        if attribute.key == "service.instance.id"
    )

    def processes() -> Iterator[bytes]:
        for number in range(PROCESSES):
            instance.value.string_value = f"{number:036d}"
            yield request.SerializeToString()

    send(collector.grpc_endpoint, METRICS, processes())
    text = collector.scrape()
    own = [line for line in text.splitlines() if f'instance="{0:036d}"' in line]
    by_name: dict[str, int] = {}
    for line in own:
        name = line.partition("{")[0]
        name = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        by_name[name] = by_name.get(name, 0) + 1
    say(f"series of a process with one model ({MODEL})", len(own), "")
    for name, number in sorted(by_name.items()):
        say(f"of them `{name}`", number, "")
    series = len(own) * PROCESSES
    say("text per series and scrape", len(text) / series, "bytes")
    grown = collector.metric("otelcol_process_memory_rss") - empty
    say("memory of the agent per series", grown / series, "bytes")

    scrape = {
        "job_name": "calls",
        "honor_labels": True,
        "static_configs": [{"targets": [f"127.0.0.1:{collector.prometheus_port}"]}],
    }
    config = directory / "prometheus.yml"
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}))
    with Prometheus(directory / "prometheus", config) as prometheus:

        def number(name: str) -> float:
            return samples(get(f"{prometheus.url}/metrics"), name)

        empty = number("process_resident_memory_bytes")
        wait_until(lambda: number("prometheus_tsdb_head_series") >= series, f"{series} series", 60)
        time.sleep(5)  # some scrapes more
        grown = number("process_resident_memory_bytes") - empty
        say("memory of Prometheus per series", grown / series, "bytes")


if __name__ == "__main__":
    main()

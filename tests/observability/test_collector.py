"""The Collector configuration is whole and keeps what it has accepted; a later test runs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

TEXT = (Path(__file__).parents[2] / "collector-config.yaml").read_text("utf-8")
CONFIG: dict[str, Any] = yaml.safe_load(TEXT)
SERVICE = CONFIG["service"]
PIPELINES = SERVICE["pipelines"]
# Exporters that hand data on when they please, and so have no queue.
SCRAPED = {"prometheus"}
DEFAULT = re.compile(r"\$\{env:(\w+):-([^}]*)\}")


def by_default(value: object) -> str:
    """A value as it is where no environment variable is set."""
    return DEFAULT.sub(r"\2", str(value))


def endpoints(node: object) -> list[str]:
    """Every address that something listens on or sends to, at any depth."""
    if isinstance(node, list):
        return [endpoint for item in node for endpoint in endpoints(item)]
    if not isinstance(node, dict):
        return []
    own = [node["endpoint"]] if "endpoint" in node else []
    own += [f"{node['host']}:{node['port']}"] if "host" in node else []
    return own + [endpoint for item in node.values() for endpoint in endpoints(item)]


@pytest.mark.parametrize("kind", ["receivers", "processors", "exporters"])
def test_every_component_is_defined_and_used(kind: str) -> None:
    """What the pipelines name is configured, and what is configured is in a pipeline."""
    used = {name for pipeline in PIPELINES.values() for name in pipeline[kind]}
    assert used - set(CONFIG["connectors"]) == set(CONFIG[kind])


def test_every_extension_is_defined_and_started() -> None:
    """The service starts the extensions that are configured."""
    assert sorted(SERVICE["extensions"]) == sorted(CONFIG["extensions"])


def test_traces_and_metrics_are_taken_over_grpc_and_http() -> None:
    """Both signals of the package have a pipeline that begins at OTLP, at the usual port of each protocol."""
    begin = {signal for signal, pipeline in PIPELINES.items() if pipeline["receivers"] == ["otlp"]}
    assert begin == {"traces", "metrics"}
    protocols = CONFIG["receivers"]["otlp"]["protocols"]
    assert {name: by_default(protocol["endpoint"]) for name, protocol in protocols.items()} == {
        "grpc": "localhost:4317",
        "http": "localhost:4318",
    }


def test_traces_go_to_jaeger_and_metrics_to_prometheus() -> None:
    """Jaeger gets OTLP, and Prometheus finds a scrape endpoint with exemplars."""
    assert "otlp_grpc/jaeger" in PIPELINES["traces"]["exporters"]
    assert PIPELINES["metrics"]["exporters"] == ["prometheus"]
    assert CONFIG["exporters"]["prometheus"]["enable_open_metrics"] is True


@pytest.mark.parametrize("signal", ["traces", "metrics"])
def test_memory_is_limited_before_anything_else(signal: str) -> None:
    """The memory limiter is the first processor of what is received, and redaction the next."""
    assert PIPELINES[signal]["processors"][:2] == ["memory_limiter", "redaction"]


def test_nothing_is_held_in_memory_between_receiver_and_queue() -> None:
    """No processor batches: batches are made behind the queue on disk."""
    assert not [name for name in CONFIG["processors"] if name.partition("/")[0] == "batch"]


@pytest.mark.parametrize("exporter", sorted(set(CONFIG["exporters"]) - SCRAPED))
def test_a_batch_fits_into_a_grpc_message(exporter: str) -> None:
    """A batch is smaller than the 4 MiB that a gRPC server takes by default, which is an error for good."""
    queue = CONFIG["exporters"][exporter]["sending_queue"]
    assert queue["sizer"] == queue["batch"].get("sizer", queue["sizer"]) == "bytes"
    assert queue["batch"]["min_size"] <= queue["batch"]["max_size"] < 4 * 1024 * 1024 < queue["queue_size"]


@pytest.mark.parametrize("exporter", sorted(set(CONFIG["exporters"]) - SCRAPED))
def test_what_is_sent_on_is_queued_on_disk_and_retried_for_good(exporter: str) -> None:
    """An exporter that sends has a queue in a storage that is there, and never drops a batch that failed."""
    settings = CONFIG["exporters"][exporter]
    queue, retry = settings["sending_queue"], settings["retry_on_failure"]
    assert queue["storage"] in SERVICE["extensions"]
    assert queue.get("enabled", True)
    assert retry.get("enabled", True)
    assert retry["max_elapsed_time"] == "0s"


def test_every_address_is_on_loopback_and_can_be_set() -> None:
    """By default nothing leaves loopback; each address is an environment variable, and no two are equal."""
    found = endpoints(CONFIG)
    addresses = [by_default(endpoint) for endpoint in found]
    assert len(found) == 6
    assert all(DEFAULT.match(endpoint) for endpoint in found)
    assert {address.rpartition(":")[0] for address in addresses} == {"localhost"}
    assert len(set(addresses)) == len(addresses)


def test_the_collector_tells_how_it_is() -> None:
    """Its own metrics can be scraped and its health be asked for."""
    [reader] = SERVICE["telemetry"]["metrics"]["readers"]
    assert set(reader["pull"]["exporter"]) == {"prometheus"}
    assert SERVICE["telemetry"]["metrics"]["level"] != "none"
    assert "health_check" in SERVICE["extensions"]


def test_one_variable_has_one_default() -> None:
    """A variable that is used twice means the same in both places."""
    defaults: dict[str, set[str]] = {}
    for variable, default in DEFAULT.findall(TEXT):
        defaults.setdefault(variable, set()).add(default)
    assert {variable: values for variable, values in defaults.items() if len(values) > 1} == {}

"""The compose file is whole and starts the programs with the files that the other tests run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from observed import HANGING_S
from programs import COLLECTOR_CONFIG, JAEGER_CONFIG, ROOT, run
from stack import EXAMPLE

COMPOSE = EXAMPLE / "compose.yaml"
FILE: dict[str, Any] = yaml.safe_load(COMPOSE.read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
# A bind mount or a volume: where from, where to, and whether it may be written.
MOUNTS = [tuple(mount.split(":")) for service in SERVICES.values() for mount in service["volumes"]]
SCRATCH = {"otel-collector"}  # the image has nothing but the Collector


def loaded(path: str) -> Any:
    """A configuration file of the example."""
    return yaml.safe_load((EXAMPLE / path).read_text("utf-8"))


def listening(name: str) -> set[int]:
    """The ports of a service: those it is told by its environment, else those it is known for."""
    known = {"prometheus": {9090}, "alertmanager": {9093}, "grafana": {3000}}
    told = SERVICES[name].get("environment", {})
    addresses = [value.split(":") for key, value in told.items() if key.endswith("_ENDPOINT")]
    ports = {int(port) for host, port in addresses if host not in SERVICES}
    return known.get(name, ports | {int(told[key]) for key in told if key.endswith("_PORT")})


def test_the_file_follows_the_schema() -> None:
    """The Compose specification's own schema has no objection."""
    checker = Path(sys.executable).with_name("check-jsonschema")
    command = [checker, "--builtin-schema", "vendor.compose-spec", COMPOSE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGING_S, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout


def test_releases_are_pinned() -> None:
    """Each image has the tag of one release, Collector and Prometheus of the one that the tests build."""
    tags = {name: service["image"].rpartition(":")[2] for name, service in SERVICES.items()}
    assert all(re.fullmatch(r"v?\d+\.\d+\.\d+", tag) for tag in tags.values())
    built = yaml.safe_load((ROOT / "collector-builder.yaml").read_text("utf-8"))
    assert tags["otel-collector"] == built["dist"]["version"]
    # Prometheus' module of 3.16.0 is v0.316.0.
    major, minor, patch = tags["prometheus"].removeprefix("v").split(".")
    module = (ROOT / "scripts" / "programs" / "prometheus" / "go.mod").read_text("utf-8")
    assert f"prometheus/prometheus v0.{major}{minor:0>2}.{patch}\n" in module


def test_ports_are_on_loopback() -> None:
    """Nothing is published beyond this machine, and no port twice."""
    ports = [port.split(":") for service in SERVICES.values() for port in service["ports"]]
    assert {address for address, _, _ in ports} == {"127.0.0.1"}
    assert len({published for _, published, _ in ports}) == len(ports)


def test_what_is_mounted_is_there() -> None:
    """A mounted file is in the repository and is not written to; a volume is declared and is used."""
    volumes = {source for source, *_ in MOUNTS if not source.startswith(".")}
    assert volumes == set(FILE["volumes"])
    files = [(source, rest) for source, *rest in MOUNTS if source.startswith(".")]
    assert all((EXAMPLE / source).exists() and rest[-1] == "ro" for source, rest in files)
    assert {(EXAMPLE / source).resolve() for source, _ in files} >= {COLLECTOR_CONFIG, JAEGER_CONFIG}


def test_every_file_of_the_example_is_used() -> None:
    """No configuration lies about that no service is given."""
    given = [(EXAMPLE / source).resolve() for source, *_ in MOUNTS if source.startswith(".")]
    files = [
        path for path in EXAMPLE.rglob("*") if path.suffix in {".json", ".yaml", ".yml"} and path != COMPOSE
    ]
    assert [path for path in files if not any(path.is_relative_to(mount) for mount in given)] == []


@pytest.mark.parametrize("name", sorted(set(SERVICES) - SCRATCH))
def test_health_is_asked_for(name: str) -> None:
    """A service that can be asked from inside is asked at a port that it listens on."""
    command = SERVICES[name]["healthcheck"]["test"]
    assert command[0] == "CMD"
    [port] = re.findall(r"http://127\.0\.0\.1:(\d+)/", command[-1])
    assert int(port) in listening(name)


def test_services_find_each_other() -> None:
    """Every address that a configuration names is a service of the file, at a port that it listens on."""
    prometheus = loaded("prometheus/prometheus.yml")
    sources = loaded("grafana/provisioning/datasources/datasources.yaml")["datasources"]
    scraped = [static for job in prometheus["scrape_configs"] for static in job["static_configs"]]
    told = [
        static for manager in prometheus["alerting"]["alertmanagers"] for static in manager["static_configs"]
    ]
    addresses = [
        *(target for static in (*scraped, *told) for target in static["targets"]),
        *(source["url"].removeprefix("http://") for source in sources),
        SERVICES["otel-collector"]["environment"]["JAEGER_OTLP_ENDPOINT"],
    ]
    assert len(addresses) == 7
    for address in addresses:
        name, _, port = address.partition(":")
        assert int(port) in listening(name), address


def test_published_ports_are_listened_on() -> None:
    """Behind every published port there is a listener."""
    for name, service in SERVICES.items():
        assert {int(port.rpartition(":")[2]) for port in service["ports"]} <= listening(name)


@pytest.mark.parametrize(
    ("name", "program", "config"),
    [("otel-collector", "otelcol", COLLECTOR_CONFIG), ("jaeger", "jaeger", JAEGER_CONFIG)],
)
def test_the_environment_is_read(name: str, program: str, config: Path) -> None:
    """A variable that is set is one that the configuration asks for, and the result is valid."""
    environment = SERVICES[name]["environment"]
    asked = set(re.findall(r"\$\{env:(\w+)", config.read_text("utf-8")))
    assert set(environment) <= asked
    run(program, "validate", f"--config={config}", **environment)


@pytest.mark.parametrize("name", ["prometheus", "alertmanager"])
def test_the_flags_are_known(name: str) -> None:
    """The program has every flag that it is started with."""
    known = set(re.findall(r"--(?:\[no-\])?([\w.-]+)", run(name, "--help")))
    flags = [argument.removeprefix("--").partition("=")[0] for argument in SERVICES[name]["command"]]
    assert set(flags) <= known


def test_dashboards_are_where_grafana_looks() -> None:
    """Grafana loads the directory that the dashboards are mounted at, and begins with one of them."""
    [provider] = loaded("grafana/provisioning/dashboards/dashboards.yaml")["providers"]
    mounts = {target: source for source, target, *_ in MOUNTS}
    dashboards = EXAMPLE / mounts[provider["options"]["path"]]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (dashboards / home.name).exists()
    assert str(home.parent) == provider["options"]["path"]

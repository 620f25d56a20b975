"""The real programs behind the telemetry, started on loopback with the configuration files that people use.

`scripts/get-observability` finds or makes them. Each is a context manager, listens on free ports, keeps its
files in a directory of the test's, and can be killed and started again as the same Collector or Jaeger.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from observed import HANGING_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from typing_extensions import Self

ROOT = Path(__file__).parents[1]
COLLECTOR_CONFIG = ROOT / "collector-config.yaml"
JAEGER_CONFIG = ROOT / "examples" / "observability" / "jaeger.yaml"

# Below the range from which the system takes the ports of outgoing connections: a port that is free now is
# free a moment later, also for a program that is started a second time. Each is given out once.
PORTS = iter(random.sample(range(20_000, 32_000), 12_000))
# Everything is on loopback, where a proxy of the user's could not find it.
OPENER = build_opener(ProxyHandler({}))


@cache
def _found() -> dict[str, str]:
    """The path of every program that is there."""
    listing = subprocess.run(  # noqa: S603
        [ROOT / "scripts" / "get-observability", "--find"], capture_output=True, text=True, check=False
    )
    lines = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    return {name: path for name, _version, path in lines}


def available(name: str) -> str:
    """The program's path; without it the test is skipped, and fails in CI."""
    if name not in _found():
        _missing(f"{name} is not there: scripts/get-observability gets it, or says how")
    return _found()[name]


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def faketime() -> str:
    """The path of the library that fakes clocks; without it the test is skipped, and fails in CI."""
    for path in sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")):
        return str(path)
    _missing("libfaketime is not there: on Debian and Ubuntu it is in the package libfaketime")


def run(name: str, *arguments: str | Path, **settings: str) -> str:
    """What the program prints, having been content with its arguments."""
    done = subprocess.run(  # noqa: S603
        [available(name), *arguments],
        env={"PATH": os.environ["PATH"], **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANGING_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    for port in PORTS:
        with socket.socket() as probe:
            # As servers do, so that connections of a server that was killed are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("every port has been given out")


def wait_until(there: Callable[[], object], what: str, timeout: float = 20.0, interval: float = 0.05) -> Any:
    """The first true answer; TimeoutError if there is none in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if answer := there():
            return answer
        time.sleep(interval)
    raise TimeoutError(f"no {what} within {timeout} s")


def get(url: str, headers: Mapping[str, str] | None = None) -> str:
    """The body of a GET, which must succeed."""
    with OPENER.open(Request(url, headers=dict(headers or {})), timeout=30) as answer:  # noqa: S310
        body: bytes = answer.read()
    return body.decode()


def samples(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels, in Prometheus' text format; 0 if there are none."""
    found = 0.0
    for line in text.splitlines():
        series, _, rest = line.partition("} ") if "{" in line else line.partition(" ")
        own, _, pairs = series.partition("{")
        if own == name and all(f'{label}="{value}"' in pairs for label, value in labels.items()):
            found += float(rest.split()[0])
    return found


class Program:
    """A program that runs from `start` to `stop` or `kill`, and tells by HTTP when it is ready."""

    name: str

    def __init__(self, directory: Path, *arguments: str | Path, **settings: str) -> None:
        self.path = available(self.name)
        self.directory = directory
        self.log = directory / f"{self.name}.log"
        self.arguments: tuple[str | Path, ...] = arguments
        self.settings = settings
        # Addresses by name, in place of those that the machine knows.
        self.hosts: dict[str, tuple[str, ...]] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def ready_url(self) -> str:
        """Where to ask whether it is ready."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process under way."""
        assert self._process
        return self._process.pid

    def start(self) -> Self:
        """Ready for work when it returns."""
        self.launch()
        try:
            wait_until(self._ready, f"ready {self.name}", 30)
        except BaseException:
            self.kill()
            raise
        return self

    def launch(self) -> None:
        """Start, and do not wait."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [*self._among_hosts(), self.path, *self.arguments],
                cwd=self.directory,
                env={"PATH": os.environ["PATH"], "OTEL_TRACES_SAMPLER": "always_off", **self.settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """End it by SIGKILL, as a crash or a lack of memory does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in good order."""
        self._end(signal.SIGTERM)

    def tail(self) -> str:
        """The last of what it said."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-25:])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _among_hosts(self) -> list[str]:
        """What runs a command with a hosts file of its own, in a mount namespace of its own."""
        if not self.hosts:
            return []
        namespace = ("unshare", "--map-root-user", "--mount")
        if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False).returncode:  # noqa: S603
            _missing("a mount namespace, for a name with several addresses, cannot be had here")
        file = self.directory / "hosts"
        lines = [f"{address} {name}\n" for name, addresses in self.hosts.items() for address in addresses]
        file.write_text("".join(lines))
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        return [*namespace, "sh", "-c", script, str(file)]

    def _ready(self) -> bool:
        assert self._process
        if self._process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self._process.returncode}:\n{self.tail()}")
        try:
            get(self.ready_url)
        except (URLError, OSError):
            return False
        return True

    def _end(self, how: signal.Signals) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                raise AssertionError(f"{self.name} did not end:\n{self.tail()}") from None


class Collector(Program):
    """An OpenTelemetry Collector; later configurations are laid over the first."""

    name = "otelcol"

    def __init__(self, directory: Path, *configs: Path, **settings: str) -> None:
        self.grpc_port, self.http_port, self.prometheus_port, self.metrics_port, self.health_port = (
            free_port() for _ in range(5)
        )
        super().__init__(
            directory,
            *(f"--config={config}" for config in configs or (COLLECTOR_CONFIG,)),
            **{
                "OTLP_GRPC_ENDPOINT": self.grpc_endpoint,
                "OTLP_HTTP_ENDPOINT": f"127.0.0.1:{self.http_port}",
                "PROMETHEUS_ENDPOINT": f"127.0.0.1:{self.prometheus_port}",
                "OTELCOL_METRICS_HOST": "127.0.0.1",
                "OTELCOL_METRICS_PORT": str(self.metrics_port),
                "HEALTH_CHECK_ENDPOINT": f"127.0.0.1:{self.health_port}",
                "OTELCOL_QUEUE_DIRECTORY": str(directory / "queue"),
                **settings,
            },
        )

    @property
    def grpc_endpoint(self) -> str:
        """Where OTLP is taken by gRPC."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_endpoint(self) -> str:
        """Where OTLP is taken by HTTP."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def ready_url(self) -> str:
        """The health check."""
        return f"http://127.0.0.1:{self.health_port}/"

    def scrape(self, accept: str = "text/plain") -> str:
        """The metrics of the services, in the format that Prometheus gets if it asks for this one."""
        return get(f"http://127.0.0.1:{self.prometheus_port}/metrics", {"accept": accept})

    def metric(self, name: str, **labels: str) -> float:
        """The Collector's own number, summed over all series with these labels."""
        return samples(get(f"http://127.0.0.1:{self.metrics_port}/metrics"), name, **labels)


class Jaeger(Program):
    """A Jaeger that keeps its traces on disk."""

    name = "jaeger"

    def __init__(self, directory: Path, config: Path = JAEGER_CONFIG, **settings: str) -> None:
        self.otlp_port, self.http_port, grpc_port, metrics_port, self.health_port = (
            free_port() for _ in range(5)
        )
        super().__init__(
            directory,
            f"--config={config}",
            **{
                "JAEGER_OTLP_ENDPOINT": self.otlp_endpoint,
                "JAEGER_HTTP_ENDPOINT": f"127.0.0.1:{self.http_port}",
                "JAEGER_GRPC_ENDPOINT": f"127.0.0.1:{grpc_port}",
                "JAEGER_HEALTH_ENDPOINT": f"127.0.0.1:{self.health_port}",
                "JAEGER_METRICS_HOST": "127.0.0.1",
                "JAEGER_METRICS_PORT": str(metrics_port),
                "JAEGER_DIRECTORY": str(directory / "traces"),
                **settings,
            },
        )

    @property
    def otlp_endpoint(self) -> str:
        """Where OTLP is taken by gRPC."""
        return f"127.0.0.1:{self.otlp_port}"

    @property
    def ready_url(self) -> str:
        """The health check."""
        return f"http://127.0.0.1:{self.health_port}/status"

    def traces(self, service: str, limit: int = 1000, **more: str) -> list[dict[str, Any]]:
        """The service's traces, as Jaeger's page gets them."""
        query = urlencode({"service": service, "limit": limit, "lookback": "1h", **more})
        return self._data(f"traces?{query}")

    def spans(self, service: str, limit: int = 1000) -> list[dict[str, Any]]:
        """The spans of all its traces."""
        return [span for trace in self.traces(service, limit) for span in trace["spans"]]

    def ids(self, service: str) -> set[tuple[str, str]]:
        """Trace and span id of every span of the service."""
        return {(span["traceID"], span["spanID"]) for span in self.spans(service, limit=50_000)}

    def wait_for(self, service: str, spans: int, timeout: float = 40.0) -> set[tuple[str, str]]:
        """The ids, as soon as there are so many, or what there is when the time is up."""
        with suppress(TimeoutError):
            # Each look reads all of them, so not too often.
            wait_until(lambda: len(self.ids(service)) >= spans, f"{spans} spans", timeout, interval=0.5)
        return self.ids(service)

    def services(self) -> list[str]:
        """The services it knows."""
        return self._data("services")

    def _data(self, path: str) -> list[Any]:
        answer = json.loads(get(f"http://127.0.0.1:{self.http_port}/api/{path}"))
        return answer["data"] or []


class Toxiproxy(Program):
    """A toxiproxy, through which connections go that are to meet with a bad network."""

    name = "toxiproxy"

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        super().__init__(directory, "-host", "127.0.0.1", "-port", str(self.port))

    @property
    def ready_url(self) -> str:
        """Its version."""
        return f"http://127.0.0.1:{self.port}/version"

    def proxy(self, upstream: str) -> Proxy:
        """A new proxy in front of a server, given as host and port."""
        proxy = Proxy(self, f"proxy-{free_port()}")
        made = self.ask("POST", "/proxies", name=proxy.name, listen="127.0.0.1:0", upstream=upstream)
        proxy.address = made["listen"]
        return proxy

    def ask(self, method: str, path: str, **body: object) -> Any:
        """Send a request to its API, and return the answer."""
        data = json.dumps(body).encode() if body else None
        request = Request(
            f"http://127.0.0.1:{self.port}{path}",
            data,
            {"content-type": "application/json"},
            method=method,
        )
        with OPENER.open(request, timeout=10) as answer:
            return json.loads(answer.read() or "null")


class Proxy:
    """A way to a server. Without toxics it is a good one."""

    def __init__(self, toxiproxy: Toxiproxy, name: str) -> None:
        self.name = name
        self.address = ""
        self._toxiproxy = toxiproxy
        self._toxics: list[str] = []

    @property
    def url(self) -> str:
        """The origin to point a client at."""
        return f"http://{self.address}"

    def add(self, kind: str, stream: str = "downstream", **attributes: int) -> None:
        """Add a toxic, for new connections and for those that are open: `add("latency", latency=100)`."""
        name = f"{kind}-{stream}-{len(self._toxics)}"
        self._toxics.append(name)
        self._toxiproxy.ask(
            "POST",
            f"/proxies/{self.name}/toxics",
            name=name,
            type=kind,
            stream=stream,
            attributes=attributes,
        )

    def heal(self) -> None:
        """Remove all toxics."""
        while self._toxics:
            self._toxiproxy.ask("DELETE", f"/proxies/{self.name}/toxics/{self._toxics.pop()}")


class Prometheus(Program):
    """A Prometheus with exemplars."""

    name = "prometheus"

    def __init__(self, directory: Path, config: Path, *arguments: str) -> None:
        self.port = free_port()
        super().__init__(
            directory,
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--enable-feature=exemplar-storage",
            *arguments,
        )

    @property
    def url(self) -> str:
        """Where its API is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def ready_url(self) -> str:
        """The readiness probe."""
        return f"{self.url}/-/ready"

    def api(self, path: str, **parameters: str | float) -> Any:
        """What its API answers, as in `api("targets")`."""
        answer = json.loads(get(f"{self.url}/api/v1/{path}?{urlencode(parameters)}"))
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, promql: str) -> list[dict[str, Any]]:
        """The series of an instant query: `metric` has the labels, `value` time and number."""
        result: list[dict[str, Any]] = self.api("query", query=promql)["result"]
        return result

    def exemplars(self, promql: str) -> list[dict[str, Any]]:
        """The exemplars of the last hour."""
        now = time.time()
        when = {"start": now - 3600, "end": now + 60}
        found: list[dict[str, Any]] = self.api("query_exemplars", query=promql, **when)
        return found


class Alertmanager(Program):
    """An Alertmanager that is no cluster."""

    name = "alertmanager"

    def __init__(self, directory: Path, config: Path, *arguments: str) -> None:
        self.port = free_port()
        super().__init__(
            directory,
            f"--config.file={config}",
            f"--storage.path={directory / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--cluster.listen-address=",
            *arguments,
        )

    @property
    def url(self) -> str:
        """Where Prometheus and people find it."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def ready_url(self) -> str:
        """The readiness probe."""
        return f"{self.url}/-/ready"

    def alerts(self) -> list[dict[str, Any]]:
        """The alerts it holds."""
        held: list[dict[str, Any]] = json.loads(get(f"{self.url}/api/v2/alerts"))
        return held

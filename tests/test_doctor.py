"""`doctor` names what is wrong: with real exporters, a real receiver and endpoints that misbehave."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import pytest
import trustme

import otel_responses_usage
from embedded.otlp_receiver import OtlpReceiver
from observed import HANGING_S
from otel_responses_usage._commands import main

ENDPOINT, PROTOCOL = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"
HTTP = "http/protobuf"
SECRET = "canary-secret-4711"
UNRESOLVED = "http://collector.invalid:4317"


@dataclass(frozen=True)
class Told:
    """What a run of `doctor` said."""

    code: int
    findings: list[dict[str, str]]
    output: str

    def names(self, level: str) -> set[str]:
        """The findings of this level."""
        return {finding["name"] for finding in self.findings if finding["level"] == level}

    def found(self, name: str) -> str:
        """What was found, of the one finding with this name."""
        [found] = [finding["found"] for finding in self.findings if finding["name"] == name]
        return found


def doctor(*arguments: str, cwd: Path | None = None, **environ: str) -> Told:
    """Run the command in a process of its own, with this environment and no other."""
    done = subprocess.run(  # noqa: S603  # the command of this package
        [sys.executable, "-m", "otel_responses_usage", "doctor", "--json", *arguments],
        env={"PATH": os.environ["PATH"], "OTEL_SERVICE_NAME": "shop", **environ},
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
        cwd=cwd,
    )
    output = done.stdout + done.stderr
    assert done.stdout.startswith("{"), output
    return Told(done.returncode, json.loads(done.stdout)["findings"], output)


# --- endpoints that misbehave


class Places:
    """Endpoints on loopback, each with a way of its own."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.receiver = stack.enter_context(OtlpReceiver())
        self.grpc, self.http = self.receiver.grpc_endpoint, self.receiver.http_endpoint
        self.unauthorized = self._status(stack, 401)
        self.busy = self._status(stack, 503)
        self.refusing = f"http://127.0.0.1:{free_port()}"
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        self.silent = f"http://127.0.0.1:{silent.getsockname()[1]}"
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        self.tls = self._status(stack, 200, context)
        self.authority = str(folder / "authority.pem")
        authority.cert_pem.write_to_path(self.authority)
        server = grpc.server(ThreadPoolExecutor(2))
        server.add_generic_rpc_handlers((Refusing(),))
        self.grpc_unauthorized = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        stack.callback(lambda: server.stop(None).wait())

    @staticmethod
    def _status(stack: ExitStack, status: int, tls: ssl.SSLContext | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Print nothing: clients that misbehave are what is tested."""

        server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        return f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"


class Refusing(grpc.GenericRpcHandler):
    """Takes no credentials."""

    def service(self, _: Any) -> Any:
        def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"not with {SECRET}")
            raise AssertionError("abort raises")

        return grpc.unary_unary_rpc_method_handler(refuse)


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# --- whole runs, with the misconfiguration that is planted and the problems that are to be named

Environ = Callable[[Places], dict[str, str]]

PLANTED: dict[str, tuple[Environ, set[str]]] = {
    "nothing, over gRPC": (lambda at: {ENDPOINT: at.grpc}, set()),
    "nothing, over HTTP": (lambda at: {ENDPOINT: at.http, PROTOCOL: HTTP}, set()),
    "gRPC to the port for HTTP": (lambda at: {ENDPOINT: at.http}, {"protocol-mismatch"}),
    "HTTP to the port for gRPC": (lambda at: {ENDPOINT: at.grpc, PROTOCOL: HTTP}, {"protocol-mismatch"}),
    "no scheme": (lambda at: {ENDPOINT: at.grpc.removeprefix("http://")}, {"endpoint-scheme"}),
    "nobody there": (lambda at: {ENDPOINT: at.refusing}, {"endpoint-refused"}),
    "an unknown host": (lambda _: {ENDPOINT: UNRESOLVED}, {"endpoint-unresolved"}),
    "plain to TLS": (
        lambda at: {ENDPOINT: at.tls.replace("https", "http"), PROTOCOL: HTTP},
        {"tls-expected"},
    ),
    "TLS to plain": (lambda at: {ENDPOINT: at.grpc.replace("http", "https")}, {"tls-unexpected"}),
    "an unknown certificate": (lambda at: {ENDPOINT: at.tls, PROTOCOL: HTTP}, {"certificate"}),
    "a path twice": (
        lambda at: {ENDPOINT: f"{at.http}/v1/traces", PROTOCOL: HTTP},
        {"endpoint-path"},
    ),
    "a wrong key, HTTP": (
        lambda at: {ENDPOINT: at.unauthorized, PROTOCOL: HTTP, HEADERS: f"api-key={SECRET}"},
        {"delivery-unauthorized"},
    ),
    "a wrong key, gRPC": (
        lambda at: {ENDPOINT: at.grpc_unauthorized, HEADERS: f"authorization=Bearer%20{SECRET}"},
        {"delivery-unauthorized"},
    ),
    "a busy server": (
        lambda at: {ENDPOINT: at.busy, PROTOCOL: HTTP, "OTEL_EXPORTER_OTLP_TIMEOUT": "3"},
        {"delivery-rejected"},
    ),
    "a proxy that is away": (
        lambda at: {
            ENDPOINT: at.http,
            PROTOCOL: HTTP,
            "http_proxy": f"http://user:{SECRET}@{at.refusing.removeprefix('http://')}",
        },
        {"proxy-failed"},
    ),
    "a misspelt exporter": (
        lambda at: {ENDPOINT: at.grpc, "OTEL_TRACES_EXPORTER": "oltp"},
        {"exporter-unknown"},
    ),
    "this package disabled": (
        lambda at: {ENDPOINT: at.grpc, "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "openai_responses_usage"},
        {"instrumentation-disabled"},
    ),
    "the SDK disabled": (lambda at: {ENDPOINT: at.grpc, "OTEL_SDK_DISABLED": "true"}, {"sdk-disabled"}),
    "no trace sampled": (
        lambda at: {ENDPOINT: at.grpc, "OTEL_TRACES_SAMPLER": "always_off"},
        {"sampling-off"},
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Told]]:
    """All runs, six at a time: they mostly wait."""
    with ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        folder = tmp_path_factory.mktemp("doctor")
        places = Places(stack, folder)
        tellings = {
            name: pool.submit(
                doctor,
                *("--timeout", str(HANGING_S)),  # they share a machine that may be busy
                cwd=folder,
                **{"OTEL_EXPORTER_OTLP_TIMEOUT": "1", **environ(places)},
            )
            for name, (environ, _) in PLANTED.items()
        }
        told = {name: telling.result() for name, telling in tellings.items()}
        received = {span.name for span in places.receiver.spans} | set(places.receiver.metrics)
        assert received == {"otel-responses-usage doctor", "openai_responses.doctor"}
        yield told


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_misconfiguration_is_named_and_nothing_else(runs: dict[str, Told], name: str) -> None:
    """The problems are those that were planted, and the exit code tells whether there are any."""
    told, expected = runs[name], PLANTED[name][1]
    assert told.names("problem") == expected, told.output
    assert told.code == (1 if expected else 0)


def test_a_test_that_is_stopped_says_so_and_blames_nobody(tmp_path: Path) -> None:
    """On a machine that is too slow for the time limit nothing is taken for a fault."""
    told = doctor("--timeout", "0.3", cwd=tmp_path, **{ENDPOINT: f"http://127.0.0.1:{free_port()}"})
    assert told.names("problem") - {"endpoint-refused"} == {"test-call-late"}, told.output
    assert told.code == 1


def test_a_run_without_problems_says_what_it_has_tried(runs: dict[str, Told]) -> None:
    """A test span, a test metric and test calls are named with where they went."""
    told = runs["nothing, over HTTP"]
    assert {"versions", "providers", "traces", "metrics", "patches", "test-call"} <= told.names("ok")
    assert re.search(r"test span was delivered to http://127.0.0.1:\d+/v1/traces", told.found("traces"))


def test_no_output_has_a_secret(runs: dict[str, Told]) -> None:
    """Keys, passwords and values of headers are not told, however they came into a message."""
    assert [name for name, told in runs.items() if SECRET in told.output] == []


# --- the command


def test_a_wrong_command_has_the_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A program that is not there, and an option that is not."""
    assert main(["doctor", "--run", "no-such-program"]) == 2
    assert main(["doctor", "--run"]) == 2
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--no-such-option"])
    assert exit_.value.code == 2
    assert "no-such-program" in capsys.readouterr().err


def test_the_report_is_text_of_80_columns_with_what_to_do(tmp_path: Path) -> None:
    """People get words: the level, what was found, and what to do. `--accept` takes a problem for a note."""
    environ = {ENDPOINT: f"http://127.0.0.1:{free_port()}", "OTEL_TRACES_EXPORTER": "none"}
    done = subprocess.run(  # noqa: S603  # the command of this package
        [
            Path(sys.executable).with_name("otel-responses-usage"),
            "doctor",
            *("--accept", "traces-off", "--accept", "endpoint-refused"),
        ],
        env={"PATH": os.environ["PATH"], "OTEL_EXPORTER_OTLP_TIMEOUT": "1", **environ},
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "  note     OTEL_TRACES_EXPORTER is none. [traces-off]" in lines
    assert any(line.startswith("           Do: Unset OTEL_TRACES_EXPORTER") for line in lines)
    assert lines[-1] == "No problems, 3 notes. docs/doctor.md explains each by its name."


def test_an_installed_package_does_not_name_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Only a clone has the documentation beside the package."""
    package = Path(otel_responses_usage.__file__).parent
    shutil.copytree(package, tmp_path / "lib" / "site-packages" / package.name)
    done = subprocess.run(  # a copy of the command of this package
        [sys.executable, "-m", "otel_responses_usage", "doctor"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(tmp_path / "lib" / "site-packages"),
            "OTEL_SERVICE_NAME": "shop",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
            ENDPOINT: f"http://127.0.0.1:{free_port()}",
        },
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
        cwd=tmp_path,
    )
    assert "[endpoint-refused]" in " ".join(done.stdout.split())
    assert done.stdout.endswith('The page "doctor" of the documentation explains each by its\nname.\n')


def test_the_instrumentation_does_not_import_the_commands() -> None:
    """An application pays nothing for the commands, neither by the import nor by `instrument()`."""
    program = (
        "import sys, otel_responses_usage as package\n"
        "package.ResponsesUsageInstrumentor().instrument()\n"
        "import openai\n"
        "print([name for name in sys.modules if '_commands' in name or name == 'argparse'])\n"
    )
    done = subprocess.run(  # noqa: S603  # written above
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGING_S, check=True
    )
    assert "_commands" not in done.stdout

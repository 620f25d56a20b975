"""Runs Phoenix on loopback, sends the demo's calls there, and stays until Ctrl-C. See `examples/look/run`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = Path(__file__).parents[1] / "demo.py"
PORT = 6006
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 5.0
# No proxy knows what is on loopback.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NotRunningError(Exception):
    """Phoenix did not start, or it stopped by itself."""


def main(program: str) -> None:
    for stopping in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stopping, _interrupt)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="phoenix-") as directory,
            phoenix(program, Path(directory)) as url,
        ):
            subprocess.run([sys.executable, DEMO], env=os.environ | telemetry_to(url), check=False)  # noqa: S603
            print(
                f"\nThe calls are in Phoenix: {project(url)}\nCtrl-C stops it and deletes its data.",
                flush=True,
            )
            while True:
                answer(f"{url}/healthz")
                time.sleep(2)
    except KeyboardInterrupt:
        print("\nStopped.")
    except NotRunningError as error:
        sys.exit(str(error))


@contextlib.contextmanager
def phoenix(program: str, directory: Path) -> Iterator[str]:
    """Start Phoenix with its data in the directory and stop it in the end; the value is its address."""
    port = free_port(int(os.environ.get("PHOENIX_PORT", PORT)))
    log = directory / "phoenix.log"
    print(f"Starting Phoenix on port {port}; the first start takes up to half a minute ...", flush=True)
    settings = {
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(free_port(0)),
        "PHOENIX_WORKING_DIR": str(directory),
        # Nothing of it leaves the machine, and it has no assistant that runs commands.
        "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
        "PHOENIX_TELEMETRY_ENABLED": "false",
        "PHOENIX_DISABLE_AGENT_ASSISTANT": "true",
    }
    with log.open("wb") as said:
        # In a session of its own: Ctrl-C of a terminal reaches this program alone, which then stops Phoenix.
        process = subprocess.Popen(  # noqa: S603 - installed by `run`
            [program, "serve"], env=os.environ | settings, stdout=said, stderr=said, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(f"{url}/healthz"):
            if process.poll() is not None or time.monotonic() > deadline:
                end = log.read_text("utf-8", "replace")[-2000:]
                raise NotRunningError(f"{end}\nPhoenix did not start.")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def telemetry_to(url: str) -> dict[str, str]:
    """The environment that sends spans to Phoenix, which takes no metrics."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_METRICS_EXPORTER": "none",
    }


def project(url: str) -> str:
    """The address of the page with the calls."""
    projects = json.loads(answer(f"{url}/v1/projects"))["data"]
    [default] = [project["id"] for project in projects if project["name"] == "default"]
    return f"{url}/projects/{default}"


def answer(url: str) -> bytes:
    """Return what is at the address."""
    try:
        with OPENER.open(url, timeout=10) as response:
            return bytes(response.read())
    except OSError as error:
        raise NotRunningError(f"Phoenix does not answer any more: {error}") from error


def free_port(wanted: int) -> int:
    """Return this port, or another if it is taken."""
    for port in (wanted, 0):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            return int(listener.getsockname()[1])
    raise NotRunningError("There is no free port.")


def _answers(url: str) -> bool:
    try:
        return bool(answer(url) or True)
    except NotRunningError:
        return False


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(sys.argv[1])

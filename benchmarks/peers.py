"""The same streams through the same SDK with each public instrumentation, with ours and with none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

_ROOT = Path(__file__).parents[1]
_SDK = ("openai==3.54.0", "opentelemetry-sdk", "typing-extensions")
# Distribution by the name of its switch in `peer`.
DISTRIBUTIONS = {
    "none": "openai",
    "ours": "otel-responses-usage",
    "openinference": "openinference-instrumentation-openai",
    "traceloop": "opentelemetry-instrumentation-openai",
    "ddtrace": "ddtrace",
    "genai": "opentelemetry-instrumentation-genai-openai",
    "logfire": "logfire",
}
_MEASURES = ("event, sync", "event, async", "call, sync", "call, async")


class Peer:
    """An instrumentation in an environment and a process of its own."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.costs: list[dict[str, float]] = []
        self.spans = 0
        self._python = directory / name / "bin" / "python"
        # Ours is what it is now, and not what it was when the directory was made.
        if not self._python.exists() or name == "ours":
            _install(name, directory / name, self._python)
        self.version = self._asked("import importlib.metadata as m; print(m.version(sys.argv[1]))")
        self._process = subprocess.Popen(  # noqa: S603
            [self._python, "-m", "benchmarks.peer", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env=_environment(),
        )

    def measure(self) -> None:
        """Have it measure once."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("no pipes")
        with contextlib.suppress(BrokenPipeError):  # one that has failed at its start
            stdin.write("\n")
            stdin.flush()
        answer = json.loads(stdout.readline() or '{"costs": {}, "spans": 0}')
        self.costs.append(answer["costs"])
        self.spans = answer["spans"]

    def stop(self) -> None:
        """End its process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def _asked(self, script: str) -> str:
        done = subprocess.run(  # noqa: S603
            [self._python, "-c", f"import sys; {script}", DISTRIBUTIONS[self.name]],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()


def report(*, quick: bool) -> str:
    """Install, measure, and return the Markdown table; `BENCH_PEERS` names a directory to keep and reuse."""
    kept = os.environ.get("BENCH_PEERS")
    with tempfile.TemporaryDirectory() as directory:
        peers = [Peer(name, Path(kept or directory)) for name in DISTRIBUTIONS]
        try:
            for turn in range(3 if quick else 15):
                for peer in peers if turn % 2 else reversed(peers):
                    peer.measure()
        finally:
            for peer in peers:
                peer.stop()
    return _table(peers)


def _table(peers: list[Peer]) -> str:
    none = peers[0]
    lines = [
        "| instrumentation | version | " + " | ".join(_MEASURES) + " |",
        "| --- | --- |" + " ---: |" * len(_MEASURES),
    ]
    for peer in peers:
        cells = []
        for measure in _MEASURES:
            pairs = [
                (mine[measure], base[measure])
                for mine, base in zip(peer.costs, none.costs, strict=True)
                if measure in mine and measure in base
            ]
            cells.append(_cell(peer, none, pairs, per_event=measure.startswith("event")))
        named = f"`{DISTRIBUTIONS[peer.name]}`" if peer is not none else "none: `openai` itself"
        lines.append(f"| {named} | {peer.version} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(peer: Peer, none: Peer, pairs: list[tuple[float, float]], *, per_event: bool) -> str:
    if not pairs:
        return "fails"
    own = median(base for _, base in pairs)
    if peer is none:
        return f"{own / 1000:,.1f} us"
    if not peer.spans:
        return "sees nothing"
    added = median(mine - base for mine, base in pairs)
    return f"{added:+,.0f} ns" if per_event else f"{added / 1000:+,.0f} us"


def _install(name: str, directory: Path, python: Path) -> None:
    distribution = f"{_ROOT}" if name == "ours" else DISTRIBUTIONS[name]
    wanted = [*_SDK, *([] if name == "none" else [distribution])]
    uv = shutil.which("uv")
    if uv is not None:
        _run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(directory))
        _run(uv, "pip", "install", "--quiet", "--python", str(python), *wanted)
    else:
        _run(sys.executable, "-m", "venv", "--clear", str(directory))
        _run(str(python), "-m", "pip", "install", "--quiet", *wanted)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603


def _environment() -> dict[str, Any]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(["examples", "."]), "PYTHONWARNINGS": "ignore"}

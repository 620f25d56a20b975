"""One measurement in a process of its own: `python -m benchmarks.one event`; prints its rows as JSON."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import asdict

from .row import Row


def rows_of(name: str, *, quick: bool) -> list[Row]:
    """Run a measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.one", name, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return [Row(**row) for row in json.loads(done.stdout)]


def main() -> None:
    """Run the measurement that is named in this process."""
    name, *options = sys.argv[1:]
    rows = importlib.import_module(f"benchmarks.{name}").rows(quick="--quick" in options)
    sys.stdout.write(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()

"""Environments with other packages than the development environment. They are kept in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "otel-responses-usage"
# Seconds to wait before each try: an index can fail for a moment.
TRIES = (0.0, 2.0, 10.0)
TIMEOUT_S = 300.0


class InstallError(Exception):
    """The packages could not be installed."""


_failures: dict[Path, InstallError] = {}
"""What could not be installed is not tried again by the next test."""


def environment(name: str, *requirements: str) -> Path:
    """Return the Python of an environment with these packages.

    Each combination of a Python and requirements is installed once. Remove its folder to get newer releases.
    If the packages cannot be installed, the test is skipped, and in CI it fails.
    """
    key = hashlib.sha256(repr((sys.version_info[:3], requirements)).encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{key}"
    python, stamp = folder / "bin" / "python", folder / "complete"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may install the same
        if stamp.exists() and subprocess.run([python, "-c", ""], check=False).returncode == 0:  # noqa: S603
            return python
        if folder not in _failures:
            try:
                _install(folder, python, requirements)
            except InstallError as error:
                _failures[folder] = error
            else:
                stamp.touch()
                return python
    if os.environ.get("CI"):
        raise _failures[folder]
    pytest.skip(f"packages could not be installed: {_failures[folder]}")


def _install(folder: Path, python: Path, requirements: tuple[str, ...]) -> None:
    problem = _run(sys.executable, "-m", "venv", "--clear", str(folder))
    if problem:
        raise InstallError(problem)
    # uv is faster, and pip knows the user's settings for pip.
    commands = [(str(python), "-m", "pip", "install", "--disable-pip-version-check")]
    if importlib.util.find_spec("uv"):
        commands.insert(0, (sys.executable, "-m", "uv", "pip", "install", "--python", str(python)))
    for pause_s in TRIES:
        time.sleep(pause_s)
        for command in commands:
            problem = _run(*command, "--quiet", *requirements)
            if not problem:
                return
    raise InstallError(problem)


def _run(*command: str) -> str:
    """Run a command; return what is wrong, or nothing."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"not done after {TIMEOUT_S:.0f} s"
    return done.stderr.strip()[-2000:] or "failed" if done.returncode else ""

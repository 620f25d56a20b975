"""What the checks look at: the environment, how the application is started, and what a run has shown."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from .child import Run
from .report import NO_REPORT, Report

_SECRET_NAME: Final = re.compile(r"key|token|secret|passw|credential|authorization", re.IGNORECASE)
_USER_INFO: Final = re.compile(r"(?<=//)[^/\s@]+@")
_QUERY: Final = re.compile(r"(?<=\w)\?[^\s'\"]+")
_SHORTEST_SECRET: Final = 4
_HIDDEN: Final = "***"


@dataclass(frozen=True)
class Situation:
    """What the checks look at.

    Attributes:
        environ: The environment of the application.
        zero_code: Whether it is started with `opentelemetry-instrument`.
        command: The command of `--run`; empty for the test with programs of this package.
        run: How that went. `None` before it.

    """

    environ: Mapping[str, str]
    zero_code: bool
    command: tuple[str, ...] = ()
    run: Run | None = None

    def value(self, name: str) -> str:
        """Return the value of a variable. Empty if it is not set."""
        return self.environ.get(name, "").strip()

    def first_of(self, *names: str) -> str:
        """Return the value of the first of these variables that is set."""
        return next((value for name in names if (value := self.value(name))), "")

    @property
    def is_trial(self) -> bool:
        """Whether a program of this package was run, and not the application."""
        return not self.command

    @property
    def report(self) -> Report:
        """What the probe saw."""
        return self.run.report if self.run is not None else NO_REPORT

    @property
    def state(self) -> dict[str, Any]:
        """The state of the process that made the calls."""
        process = self.report.main
        return process.state if process is not None else {}


def nearest(name: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """Return the known name that a misspelt name is nearest to."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def entry_point_names(group: str) -> set[str]:
    """Return the names of all installed entry points of a group."""
    return {entry.name for entry in metadata.entry_points(group=group)}


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


class Redactor:
    """Takes secrets out of texts: values of the environment that are secret, and user names in addresses."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Collect the secrets of the environment."""
        secrets: set[str] = set()
        for name, value in environ.items():
            if name.endswith("_HEADERS"):
                for part in value.split(","):
                    secret = part.partition("=")[2].strip() or part.strip()
                    secrets |= {secret, unquote(secret), *unquote(secret).split()}
            elif _SECRET_NAME.search(name) and not name.startswith("OTEL_"):
                secrets.add(value.strip())
            if "://" in value:
                secrets |= _user_info(value)
        # A scheme of authorization is no secret, and neither is a word like `none`.
        secrets -= {"Bearer", "Basic", "bearer", "basic", "true", "false", "none"}
        self._secrets = sorted(
            (one for one in secrets if len(one) >= _SHORTEST_SECRET), key=len, reverse=True
        )

    def clean(self, text: str) -> str:
        """Return the text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return _QUERY.sub(f"?{_HIDDEN}", _USER_INFO.sub(f"{_HIDDEN}@", text))


def _user_info(url: str) -> set[str]:
    try:
        parts = urlsplit(url)
        found = {parts.password or "", parts.netloc.rpartition("@")[0]}
    except ValueError:
        return set()
    return found | {unquote(one) for one in found}


def clean_url(url: str) -> str:
    """Return an address without user name, password and query."""
    return _QUERY.sub("", _USER_INFO.sub("", url))


def in_container() -> bool:
    """Whether this process runs in a container, as far as can be seen."""
    return os.path.exists("/.dockerenv") or "KUBERNETES_SERVICE_HOST" in os.environ  # noqa: PTH110

"""Writes measured tables into the pages of the documentation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

_DOCS = Path(__file__).parents[1] / "docs"
PERFORMANCE, COMPARISON = _DOCS / "performance.md", _DOCS / "comparison.md"
# The page of each part.
PARTS = {"costs": PERFORMANCE, "peers": PERFORMANCE, "growth": PERFORMANCE, "comparison": COMPARISON}


def write(name: str, text: str) -> None:
    """Replace a part of its page. Comments mark its beginning and its end."""
    path = PARTS[name]
    marked = re.compile(rf"(<!-- begin {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
    written, number = marked.subn(lambda match: f"{match[1]}\n{text}\n{match[2]}", path.read_text("utf-8"))
    if number != 1:
        raise ValueError(f"{path.name} has {number} parts with the name {name}")
    path.write_text(written, "utf-8")


def conditions() -> str:
    """Return with what and where the measurements are made."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("openai", "opentelemetry-sdk")
    )
    cores = os.cpu_count()
    return f"{platform.python_implementation()} {platform.python_version()}, {versions}, {cores} cores"


def load() -> str:
    """Return the load averages of the machine."""
    return " ".join(f"{load:.1f}" for load in os.getloadavg())

"""Writes measured tables into the page on performance."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def write(name: str, text: str) -> None:
    """Replace a part of the page. Comments mark its beginning and its end."""
    page = PAGE.read_text("utf-8")
    marked = re.compile(rf"(<!-- begin {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
    written, number = marked.subn(lambda match: f"{match[1]}\n{text}\n{match[2]}", page)
    if number != 1:
        raise ValueError(f"the page has {number} parts with the name {name}")
    PAGE.write_text(written, "utf-8")


def conditions() -> str:
    """Return with what and where the measurements are made."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("openai", "opentelemetry-sdk")
    )
    cores = os.cpu_count()
    return f"{platform.python_implementation()} {platform.python_version()}, {versions}, {cores} cores"


def load() -> str:
    """Return how busy the machine is."""
    return "load average " + " ".join(f"{load:.1f}" for load in os.getloadavg())

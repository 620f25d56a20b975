"""Checks of other instrumentations of the same calls."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Final, NamedTuple

from .findings import Area, Finding, find, fine
from .situation import Situation, installed_version
from .versions import ENTRY_POINT, INSTRUMENTORS


class _Neighbour(NamedTuple):
    """What is known of another instrumentation.

    Attributes:
        distribution: Its name in the package index.
        meaning: What its presence means.
        has_spans: Whether it makes spans of the same calls.

    """

    distribution: str
    meaning: str
    has_spans: bool = True


_ONE_SPAN: Final = "its span is used, and what it lacks is added"
_KNOWN: Final = (
    _Neighbour(
        "opentelemetry-instrumentation-genai-openai", f"{_ONE_SPAN}; it records tokens of whole calls"
    ),
    _Neighbour("opentelemetry-instrumentation-openai-v2", f"{_ONE_SPAN}; it records tokens of whole calls"),
    _Neighbour("openinference-instrumentation-openai", _ONE_SPAN),
    _Neighbour("openinference-instrumentation-openai-agents", _ONE_SPAN),
    _Neighbour("opentelemetry-instrumentation-openai", f"{_ONE_SPAN} beside it"),
    _Neighbour("logfire", _ONE_SPAN),
    _Neighbour("langfuse", f"{_ONE_SPAN} beside it"),
    _Neighbour("pydantic-ai-slim", f"{_ONE_SPAN}; it records tokens of whole calls"),
    _Neighbour("agent-framework-core", f"{_ONE_SPAN}; it records tokens of whole calls"),
    _Neighbour("ddtrace", "its spans are not OpenTelemetry's, both work", has_spans=False),
    _Neighbour("opentelemetry-instrumentation-httpx", "its HTTP spans are below ours", has_spans=False),
    _Neighbour(
        "opentelemetry-instrumentation-aiohttp-client", "its HTTP spans are below ours", has_spans=False
    ),
)
# Instrumentations of HTTP clients and the like, that are none of `openai`.
_SIGN: Final = "openai"


def check_neighbours(situation: Situation) -> Iterator[Finding]:
    """Check which other instrumentations are installed, and what that means."""
    disabled = situation.value("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS") if situation.zero_code else ""
    off = {name.strip() for name in disabled.split(",")}
    entries = list(metadata.entry_points(group=INSTRUMENTORS))
    found = []
    for neighbour in _KNOWN:
        version = installed_version(neighbour.distribution)
        if version is None:
            continue
        found.append(neighbour)
        names = {entry.name for entry in entries if _distribution_of(entry) == neighbour.distribution}
        state = ", switched off by OTEL_PYTHON_DISABLED_INSTRUMENTATIONS" if names and names <= off else ""
        yield find("neighbour", f"{neighbour.distribution} {version}{state}: {neighbour.meaning}.")
    known = {neighbour.distribution for neighbour in _KNOWN}
    for entry in entries:
        distribution = _distribution_of(entry)
        if (
            entry.name != ENTRY_POINT
            and _SIGN in entry.name
            and distribution not in known
            and entry.name not in off
        ):
            yield find("neighbour-unknown", f"{distribution or entry.value} instruments {entry.name}.")
    if situation.value("OTEL_RESPONSES_USAGE_SPANS").lower() == "always" and any(
        one.has_spans for one in found
    ):
        yield find("neighbour-twice", "OTEL_RESPONSES_USAGE_SPANS is always.")
    if not found:
        yield fine(Area.NEIGHBOURS, "neighbours", "No other instrumentation of these calls is installed.")


def _distribution_of(entry: metadata.EntryPoint) -> str:
    distribution = getattr(entry, "dist", None)
    return (distribution.metadata["Name"] or "").lower() if distribution is not None else ""

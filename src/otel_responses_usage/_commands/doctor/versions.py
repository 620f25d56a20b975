"""Checks of what is installed."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata, util
from typing import Final

from ..._instrumentor import ResponsesUsageInstrumentor
from .findings import Area, Finding, find, fine
from .situation import Situation, entry_point_names, installed_version

PACKAGE: Final = "otel-responses-usage"
ENTRY_POINT: Final = "openai_responses_usage"
INSTRUMENTORS: Final = "opentelemetry_instrumentor"
_SHOWN: Final = (
    PACKAGE,
    "openai",
    "opentelemetry-api",
    "opentelemetry-sdk",
    "opentelemetry-instrumentation",
    "opentelemetry-distro",
    "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry-exporter-otlp-proto-http",
    "wrapt",
)
# Distributions whose requirements are checked.
_CHECKED: Final = ("opentelemetry-", "otel-", "openinference-")


def check_versions(_: Situation) -> Iterator[Finding]:
    """Check what is installed, and whether it fits."""
    found = {name: version for name in _SHOWN if (version := installed_version(name)) is not None}
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    yield fine(Area.VERSIONS, "versions", f"Python {platform.python_version()}, {told}")
    if ENTRY_POINT not in entry_point_names(INSTRUMENTORS):
        yield find("entry-point-missing", f"No entry point {ENTRY_POINT} is installed.")
    yield from _check_openai()
    if util.find_spec("opentelemetry.sdk") is None:
        yield find("sdk-missing", "opentelemetry-sdk is not installed.")
    yield from _check_requirements()


def _check_openai() -> Iterator[Finding]:
    version = installed_version("openai")
    if version is None:
        yield find("openai-missing", "The openai SDK is not installed here.")
        return
    [supported] = ResponsesUsageInstrumentor().instrumentation_dependencies()
    if not _fits(supported, version):
        yield find("openai-unsupported", f"openai {version} is installed, supported is {supported}.")


def _check_requirements() -> Iterator[Finding]:
    from packaging.requirements import InvalidRequirement, Requirement

    told = set()
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if not name.startswith(_CHECKED):
            continue
        for text in distribution.requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = installed_version(requirement.name)
            if version is None:
                conflict = f"{name} requires {requirement.name}, which is not installed."
            elif not requirement.specifier.contains(version, prereleases=True):
                conflict = (
                    f"{name} {distribution.version} requires {requirement.name}{requirement.specifier}, "
                )
                conflict += f"installed is {version}."
            else:
                continue
            if conflict not in told:
                told.add(conflict)
                yield find("version-conflict", conflict)


def _fits(requirement: str, version: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(version, prereleases=True)

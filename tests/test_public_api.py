"""What a user of the package sees of it."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
from enum import Enum
from importlib import resources
from pathlib import Path

import pytest

import otel_responses_usage
from otel_responses_usage import Config, MissingReason, Outcome, ResponsesUsageInstrumentor, UsageSource

REPOSITORY = Path(__file__).parent.parent
CHANGELOG = REPOSITORY / "CHANGELOG.md"
PUBLIC = otel_responses_usage.__all__


def test_the_public_names_are_these() -> None:
    """A name is public on purpose; whatever else can be imported is not."""
    assert sorted(PUBLIC) == [
        "CallRecord",
        "Config",
        "MissingReason",
        "Outcome",
        "ResponsesUsageInstrumentor",
        "Usage",
        "UsageSource",
        "__version__",
    ]
    assert dir(otel_responses_usage) == sorted(PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'Spans'"):
        getattr(otel_responses_usage, "Spans")  # noqa: B009


def test_what_few_applications_need_is_imported_when_it_is_needed() -> None:
    """A process that is not told of its calls does not import what tells it."""
    program = """
import sys
from otel_responses_usage import ResponsesUsageInstrumentor as Instrumentor

late = ("_call_record", "_call.delivery", "_telemetry.call_record")
loaded = lambda: [name for name in late if f"otel_responses_usage.{name}" in sys.modules]
Instrumentor().instrument()
print(*loaded())
from otel_responses_usage import CallRecord
print(*loaded())
"""
    python = [sys.executable, "-c", program]
    said = subprocess.run(python, check=True, capture_output=True, text=True).stdout  # noqa: S603
    assert said.splitlines() == ["", "_call_record"]


def methods_of(name: str) -> list[str]:
    """The methods that a public class adds to what it is made of."""
    owner = getattr(otel_responses_usage, name)
    found = [
        method
        for method, value in vars(owner).items()
        if not method.startswith("_")
        and (inspect.isroutine(value) or isinstance(value, (property, classmethod)))
    ]
    return [] if issubclass(owner, Enum) else found


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_every_public_name_has_a_promise(name: str) -> None:
    """A class and each of its methods says in its first line what its user may rely on."""
    owner = getattr(otel_responses_usage, name)
    for thing in [owner, *(getattr(owner, method) for method in methods_of(name))]:
        # `vars`: a docstring that is inherited is another's promise, and a dataclass makes one up.
        promise = thing.__doc__ or ""
        assert promise.strip(), thing
        assert not promise.startswith(f"{name}("), thing


@pytest.mark.parametrize("name", ["CallRecord", "Config", "Usage"])
def test_every_field_is_explained(name: str) -> None:
    """The docstring of a class with fields has a line for each of them."""
    owner = getattr(otel_responses_usage, name)
    assert owner.__annotations__
    for field in owner.__annotations__:
        assert re.search(rf"^\s+{field}: \w", owner.__doc__, re.MULTILINE), field


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (UsageSource, "stream response retrieval observation tail"),
        (
            MissingReason,
            """
            no_response_id not_stored deferred not_found unauthorized unsupported no_usage timeout
            transport_error overload circuit_open disabled shutdown
            """,
        ),
        (
            Outcome,
            "completed incomplete failed error cut truncated closed cancelled abandoned exit",
        ),
    ],
)
def test_the_values_are_those_of_the_contract(values: type[Enum], expected: str) -> None:
    """Dashboards are built on these words."""
    assert [value.value for value in values] == expected.split()


def test_the_package_is_typed() -> None:
    """Type checkers use the annotations of the installed package."""
    assert resources.files(otel_responses_usage).joinpath("py.typed").is_file()


def test_auto_instrumentation_finds_the_instrumentor() -> None:
    """`opentelemetry-instrument` loads the class by its entry point."""
    [entry] = importlib.metadata.entry_points(
        group="opentelemetry_instrumentor", name="openai_responses_usage"
    )
    assert entry.load() is ResponsesUsageInstrumentor
    assert entry.dist is not None
    assert entry.dist.name == "otel-responses-usage"


def test_the_instrumentor_names_what_it_instruments() -> None:
    """The range of the SDK is that of the `instruments` extra, or auto-instrumentation would skip it."""
    [needed] = ResponsesUsageInstrumentor().instrumentation_dependencies()
    [extra] = [
        requirement
        for requirement in importlib.metadata.requires("otel-responses-usage") or []
        if re.search(r"extra == .instruments.", requirement)
    ]

    def bounds(requirement: str) -> set[str]:
        return set(requirement.partition(";")[0].replace(" ", "").removeprefix("openai").split(","))

    assert bounds(needed) == bounds(extra)


def test_the_settings_are_a_public_value() -> None:
    """A `Config` can be made, compared and printed by whoever configures in code."""
    assert Config(max_pending=1) == Config(max_pending=1) != Config()
    assert "max_pending=1" in repr(Config(max_pending=1))


@pytest.mark.skipif(not CHANGELOG.exists(), reason="there is no change log yet")
def test_the_change_log_ends_with_this_version() -> None:
    """The newest entry of the change log is the version that is being built."""
    newest = re.search(r"^## \[?v?(\d[^\]\s]*)", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == otel_responses_usage.__version__ == importlib.metadata.version("otel-responses-usage")

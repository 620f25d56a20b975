"""The modules stand on floors, and imports only go down."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import otel_responses_usage

PACKAGE = Path(otel_responses_usage.__file__).parent
NAME = "otel_responses_usage"

FLOORS = (
    {"_semconv", "_config", "_usage", "_response", "_outcome", "_request", "_fault", "_imports"},
    {"_sse", "_state", "_body", "_job", "_retrieval", "_circuit"},
    {"_telemetry", "_loop", "_lookup", "_worker", "_recovery"},
    {"_invocation", "_ledger"},
    {"_surfaces"},
    {"_instrumentor", "__init__"},
)
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

# Who may look at a neighbour of its own floor.
NEIGHBOURS = {
    ("_response", "_usage"),
    ("_outcome", "_response"),
    ("_body", "_sse"),
    ("_retrieval", "_job"),
    ("_circuit", "_job"),
    ("_body", "_state"),
    ("_recovery", "_worker"),
    ("_recovery", "_lookup"),
    ("_worker", "_loop"),
    ("_worker", "_lookup"),
    ("_lookup", "_loop"),
    ("_ledger", "_invocation"),
    ("__init__", "_instrumentor"),
}

SDK = {"openai", "wrapt", "httpx", "httpx2", "httpcore", "httpcore2"}

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """The module, with its folder: `_sse`, `_surfaces._http`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def floor_name(module: str) -> str:
    """The name that stands on a floor: a folder's modules stand there together."""
    return module.partition(".")[0]


def imports_of(file: Path) -> tuple[set[str], set[str]]:
    """The modules of this package that a file imports, and the names of foreign packages."""
    package = ["", *file.relative_to(PACKAGE).parts[:-1]]
    own: set[str] = set()
    foreign: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            foreign |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[1 : len(package) - node.level + 1]
            named = [node.module] if node.module else [alias.name for alias in node.names]
            own |= {".".join([*base, module]) for module in named}
    return own, foreign


IMPORTS = {name_of(file): imports_of(file) for file in FILES}


def test_every_module_stands_on_a_floor() -> None:
    """A new module is given a floor here before it is given anything to do."""
    assert {floor_name(module) for module in IMPORTS} <= set(FLOOR_OF)


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_go_down(module: str) -> None:
    """A module knows what is below it, and of its own floor only the listed neighbours."""
    here = floor_name(module)
    for other in IMPORTS[module][0]:
        there = floor_name(other)
        assert other in IMPORTS or f"{other}.__init__" in IMPORTS, f"{other} is a module"
        if here == there == "_surfaces":
            continue
        assert FLOOR_OF[there] < FLOOR_OF[here] or (here, there) in NEIGHBOURS, f"{module} imports {other}"


def test_no_two_modules_need_each_other() -> None:
    """Every module can be understood after those that it imports."""
    left = {module: set(own) for module, (own, _) in IMPORTS.items()}
    left = {
        module: {f"{other}.__init__" if f"{other}.__init__" in left else other for other in own}
        for module, own in left.items()
    }
    while left:
        free = {module for module, own in left.items() if not own & left.keys()}
        assert free, f"in a circle: {sorted(left)}"
        left = {module: own for module, own in left.items() if module not in free}


@pytest.mark.parametrize("module", [module for module in IMPORTS if FLOOR_OF.get(floor_name(module), 0) <= 1])
def test_facts_and_decisions_need_only_the_standard_library(module: str) -> None:
    """The two lowest floors can be read, tested and reused without any other package."""
    assert IMPORTS[module][1] <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "module", [module for module in IMPORTS if floor_name(module) not in {"_surfaces", "_instrumentor"}]
)
def test_the_sdk_is_known_to_the_surfaces_alone(module: str) -> None:
    """A new line of the SDK or of its HTTP library is a matter of one folder."""
    assert not IMPORTS[module][1] & SDK


def test_the_package_imports_itself_by_relative_names() -> None:
    """No import hides from this test by its spelling."""
    assert not [module for module, (_, foreign) in IMPORTS.items() if NAME in foreign]

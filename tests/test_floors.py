"""The rooms of the package stand on floors, and imports only go down."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import otel_responses_usage

PACKAGE = Path(otel_responses_usage.__file__).parent
NAME = "otel_responses_usage"

# A room is a folder, or a file of the package itself. Rooms of one floor do not know each other.
FLOORS = (
    {"_facts", "_callback", "_fault", "_story", "_version"},
    {"_call_record"},
    {"_config"},
    {"_answer", "_lookup", "_telemetry"},
    {"_call"},
    {"_surfaces"},
    {"_instrumentor"},
    {"__init__", "_commands"},
    {"__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# What decides and does not act: no thread, no socket, nothing but the standard library.
PURE_ROOMS = {"_facts", "_answer", "_callback", "_config", "_fault", "_story", "_version"}
PURE_MODULES = {"_lookup.job", "_lookup.retrieval", "_lookup.circuit", "_lookup.imports"}

SDK = {"openai", "wrapt", "httpx", "httpx2", "httpcore", "httpcore2"}

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """The module, with its folder: `_sse`, `_surfaces._http`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module: str) -> str:
    """The room that a module belongs to."""
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


def test_every_room_stands_on_a_floor() -> None:
    """A new room is given a floor here before it is given anything to do."""
    assert {room_of(module) for module in IMPORTS} == set(FLOOR_OF)


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_go_down(module: str) -> None:
    """A module knows its own room and the rooms of lower floors."""
    here = room_of(module)
    for other in IMPORTS[module][0]:
        there = room_of(other)
        assert other in IMPORTS or f"{other}.__init__" in IMPORTS, f"{other} is a module"
        assert here == there or FLOOR_OF[there] < FLOOR_OF[here], f"{module} imports {other}"


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


@pytest.mark.parametrize(
    "module", [module for module in IMPORTS if room_of(module) in PURE_ROOMS or module in PURE_MODULES]
)
def test_facts_and_decisions_need_only_the_standard_library(module: str) -> None:
    """What things are and what is decided can be read, tested and reused without any other package."""
    assert IMPORTS[module][1] <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "module", [module for module in IMPORTS if room_of(module) not in {"_surfaces", "_instrumentor"}]
)
def test_the_sdk_is_known_to_the_surfaces_alone(module: str) -> None:
    """A new line of the SDK or of its HTTP library is a matter of one folder."""
    assert not IMPORTS[module][1] & SDK


def test_the_package_imports_itself_by_relative_names() -> None:
    """No import hides from this test by its spelling."""
    assert not [module for module, (_, foreign) in IMPORTS.items() if NAME in foreign]

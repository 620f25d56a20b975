"""What the scripts do to the machine: their environments, and what they say before what takes long."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from observed import HANGING_S

ROOT = Path(__file__).parents[1]
MARK = "made-by-scripts"

# A Python that makes environments of nothing. Its pip installs a uv. Both write down what they are asked for.
PYTHON = """#!/bin/bash
case "$*" in
    --version) echo 'Python 3.12.0' ;;
    '-m venv '*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" && echo "venv ${@: -1}" >>"$LOG" ;;
    *'install uv') cp "$0" "$(dirname "$0")/uv" ;;
    'pip install'*) echo "uv ${@: -1}" >>"$LOG" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts, and the stand-in for Python first on the PATH."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("programs"))
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "path").mkdir()
    python = tmp_path / "path" / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def bash(checkout: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command after `source scripts/_environment`, as scripts do."""
    return subprocess.run(  # noqa: S603 - the project's own file
        ["/bin/bash", "-c", f"set -euo pipefail; source scripts/_environment; {command}"],
        cwd=checkout,
        env={"PATH": f"{checkout}/path:{os.environ['PATH']}", "LOG": f"{checkout}/log"},
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
    )


def log(checkout: Path) -> list[str]:
    """What was made and installed so far."""
    path = checkout / "log"
    return path.read_text().splitlines() if path.exists() else []


def test_one_environment_serves_all_scripts(checkout: Path) -> None:
    """The first script makes the environment, larger ones add to it, and smaller ones find it as it is."""
    for groups in ("demo examples dev", "examples dev", "dev", "demo examples dev"):
        done = bash(checkout, f"environment {groups}; command -v python")
        assert done.stdout == f"{checkout}/.venv/bin/python\n", done.stderr
    assert log(checkout) == ["venv .venv", "uv demo", "uv examples", "uv dev"]
    assert (checkout / ".venv" / MARK).exists()


def test_an_environment_is_made_anew_when_the_requirements_have_changed(checkout: Path) -> None:
    """What was in it before is gone then."""
    bash(checkout, "environment dev")
    (checkout / ".venv" / "old").touch()
    (checkout / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    bash(checkout, "environment demo")
    assert log(checkout) == ["venv .venv", "uv dev", "venv .venv", "uv demo"]
    assert not (checkout / ".venv" / "old").exists()


def test_an_environment_of_the_user_is_left_alone(checkout: Path) -> None:
    """A `.venv` from elsewhere keeps every file, and the scripts say where theirs is."""
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").touch()
    done = bash(checkout, "environment demo; command -v python")
    assert done.stdout == f"{checkout}/.venvs/scripts/bin/python\n"
    assert ".venv was not made by these scripts, so they use .venvs/scripts." in done.stderr
    assert os.listdir(checkout / ".venv") == ["mine"]  # noqa: PTH208 - names alone
    assert (checkout / ".venvs" / ".gitignore").read_text() == "*\n"
    bash(checkout, "environment dev")
    assert log(checkout) == ["venv .venvs/scripts", "uv demo", "uv dev"]


def test_nothing_is_done_where_both_places_are_taken(checkout: Path) -> None:
    """The scripts stop and say what to do."""
    for name in (".venv", ".venvs/scripts"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "mine").touch()
    done = bash(checkout, "environment demo")
    assert done.returncode == 1
    assert "They do not touch either. Remove or rename one of the two." in done.stderr
    assert log(checkout) == []


def test_an_environment_from_before_the_mark_is_still_that_of_the_scripts(checkout: Path) -> None:
    """It has a stamp of one of the groups."""
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "dev-3641393042-4407").touch()
    bash(checkout, "environment demo")
    assert log(checkout) == ["venv .venv", "uv demo"]


def test_an_environment_that_was_not_finished_is_made_anew(checkout: Path) -> None:
    """The mark is there before anything else is."""
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / MARK).touch()
    (checkout / ".venv" / "half").touch()
    bash(checkout, "environment demo")
    assert log(checkout) == ["venv .venv", "uv demo"]
    assert not (checkout / ".venv" / "half").exists()


def test_building_says_beforehand_what_it_takes(checkout: Path) -> None:
    """The minutes, the gigabytes, and that the programs have no pages, before Go is run at all."""
    go = checkout / "path" / "go"
    go.write_text("#!/bin/bash\necho 'Go runs' >&2; exit 1\n")
    go.chmod(0o755)
    shutil.copytree(ROOT / "scripts" / "programs", checkout / "scripts" / "programs")
    shutil.copy(ROOT / "collector-builder.yaml", checkout)
    # Only what the script needs, so that it finds no program of the machine and asks no package index.
    for name in (
        "awk",
        "basename",
        "cat",
        "cksum",
        "cut",
        "dirname",
        "mkdir",
        "mktemp",
        "nice",
        "rm",
        "sed",
        "tail",
        "tee",
        "tr",
    ):
        (checkout / "path" / name).symlink_to(shutil.which(name) or "")
    done = subprocess.run(  # noqa: S603 - the project's own file
        ["/bin/bash", checkout / "scripts" / "get-observability"],
        env={"PATH": f"{checkout}/path", "HOME": str(checkout)},
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
    )
    assert done.returncode == 1
    before, _, after = done.stderr.partition("Go runs")
    assert after
    assert "To be built with Go, once: otelcol jaeger prometheus promtool." in before
    assert "9 minutes on a new machine with 2 cores, and leave some 7 GB in the caches of Go." in before
    assert "without their web pages" in before

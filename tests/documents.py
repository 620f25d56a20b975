"""The Markdown of the repository, read for tests: pages, tables, headings, links and blocks of code."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").rglob("README.md"))]
DOCUMENTS = [*PAGES, *READMES]

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
_MARK = re.compile(r"<!-- (?P<mark>[^>]+) -->\n+$")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_SOURCE = re.compile(r"(?:srcset|src)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, and the comment before it."""

    page: Path
    language: str
    text: str
    mark: str

    @property
    def id(self) -> str:
        return f"{name_of(self.page)}: {self.text.strip().splitlines()[0][:40]}"


def name_of(page: Path) -> str:
    """The path of a page from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(*languages: str, pages: list[Path] = DOCUMENTS) -> list[Block]:
    """The blocks of code in these languages."""
    found = []
    for page in pages:
        text = page.read_text("utf-8")
        for match in _FENCE.finditer(text):
            if match["language"] in languages:
                mark = _MARK.search(text[: match.start()])
                found.append(
                    Block(
                        page, match["language"], textwrap.dedent(match["text"]), mark["mark"] if mark else ""
                    )
                )
    return found


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return _FENCE.sub("", page.read_text("utf-8"))


def links(page: Path) -> list[tuple[str, str]]:
    """The relative links of a page: path and anchor. Each may be empty."""
    return _LINK.findall(prose(page))


def pictures(page: Path) -> list[str]:
    """What the HTML of a page loads."""
    return _SOURCE.findall(prose(page))


def headings(page: Path) -> list[str]:
    """The headings of a page without their marks."""
    return re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)


def anchor(heading: str) -> str:
    """The anchor that a forge makes of a heading: GitHub's rule."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def table(page: Path, first_heading: str) -> list[list[str]]:
    """The rows below the table head that begins with these words, cell by cell."""
    _, found, rest = page.read_text("utf-8").partition(f"\n| {first_heading} |")
    assert found, f"no table {first_heading}"
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def sections(page: Path, above: str, mark: str = "###") -> dict[str, str]:
    """The sections with this mark below a heading, by their own heading."""
    _, found, rest = page.read_text("utf-8").partition(f"\n{above}\n")
    assert found, f"no heading {above}"
    level = above.split(" ")[0]
    part = re.split(rf"^{level} ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    pieces = re.split(rf"^{mark} (.+)$", part, flags=re.MULTILINE)[1:]
    return dict(zip(pieces[::2], pieces[1::2], strict=True))

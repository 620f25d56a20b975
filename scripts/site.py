"""Builds the documentation as a site: the pages of `docs`, and every file of the repository they link to.

On the forge a page can link to a program or to a folder. A site has no such files. So each becomes a page of
the site below `repository/`, and the links lead there. Zensical then checks each link and each anchor.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
DOCS = PurePosixPath("docs")
# The target of a Markdown link, or of a picture in HTML.
LINK = re.compile(r'(?:(?<=\]\()|(?<=src=")|(?<=srcset="))(?![a-z]+:|#)([^)"#\s]+)(#[^)"\s]*)?(?=[)"])')
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json", "": "sh"}


def source_of(target: PurePosixPath) -> PurePosixPath:
    """Return the file that stands for a target: for a folder its README, if there is one."""
    readme = target / "README.md"
    return readme if (ROOT / readme).is_file() else target


def place_of(source: PurePosixPath) -> PurePosixPath:
    """Return where the site has a file or folder of the repository."""
    if source.is_relative_to(DOCS):
        return source.relative_to(DOCS)
    if source.suffix == ".md":
        return "repository" / source
    if (ROOT / source).is_dir():
        return "repository" / source / "files.md"
    return "repository" / source.with_name(source.name + ".md")


def links_of(text: str) -> Iterator[re.Match[str]]:
    """Yield the relative links of a page, without those in its code blocks."""
    code = [match.span() for match in re.finditer(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)]
    for link in LINK.finditer(text):
        if not any(start <= link.start() < end for start, end in code):
            yield link


def resolve(page: PurePosixPath, link: str) -> PurePosixPath:
    """Return the target of a relative link, from the root of the repository."""
    return PurePosixPath(os.path.normpath(page.parent / link))


def text_of(source: PurePosixPath) -> str:
    """Return the Markdown of a page: a page as it is, a program as a code block, a folder as a list."""
    path = ROOT / source
    if path.is_dir():
        names = sorted(f"- `{one.name}`" for one in path.iterdir() if not one.name.startswith(("__", ".")))
        return "\n".join([f"# {source}", "", *names, ""])
    text = path.read_text("utf-8")
    if source.suffix == ".md":
        return text
    return f"# {source.name}\n\n`{source}`\n\n````{LANGUAGES.get(source.suffix, 'text')}\n{text}````\n"


def stage(target: Path) -> int:
    """Write the pages, and what they lead to, into a folder. Return how many links lead nowhere."""
    waiting = [
        PurePosixPath(path.relative_to(ROOT).as_posix()) for path in sorted((ROOT / DOCS).rglob("*.*"))
    ]
    staged = set(waiting)
    broken = 0
    while waiting:
        source = waiting.pop()
        place = place_of(source)
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        if source.is_relative_to(DOCS) and source.suffix != ".md":  # pictures and styles
            shutil.copyfile(ROOT / source, target / place)
            continue
        text = text_of(source)
        for link in reversed(list(links_of(text)) if source.suffix == ".md" else []):
            linked = source_of(resolve(source, link[1]))
            if not (ROOT / linked).exists():
                print(f"{source}: {link[1]} is not there", file=sys.stderr)
                broken += 1
                continue
            if linked not in staged:
                staged.add(linked)
                waiting.append(linked)
            relative = os.path.relpath(place_of(linked), place.parent)
            text = text[: link.start()] + relative + (link[2] or "") + text[link.end() :]
        (target / place).write_text(text, "utf-8")
    return broken


def main() -> int:
    """Build the site. A link or an anchor that leads nowhere fails the build."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".site", help="default: .site")
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copyfile(ROOT / "zensical.toml", folder / "zensical.toml")
    broken = stage(folder / "docs")
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, check=False)
    return 1 if broken else built.returncode


if __name__ == "__main__":
    sys.exit(main())

"""The documentation: every page, link, anchor and snippet holds, on the forge and as a site."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from documents import (
    DOCS,
    DOCUMENTS,
    PAGES,
    ROOT,
    Block,
    anchor,
    blocks,
    headings,
    links,
    name_of,
    pictures,
    prose,
    sections,
)
from embedded.answer import Answer, usage
from embedded.http_server import ScriptedServer
from embedded.otlp_receiver import OtlpReceiver
from embedded.responses_api import Plan, ResponsesAPI
from observed import HANGING_S
from otel_responses_usage import MissingReason
from programs import run

ALERTS = ROOT / "examples" / "observability" / "prometheus" / "alerts.yml"

# --- Markdown, as the forge shows it ---


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files and sections that a page links to are there."""
    for path, section in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if section:
            assert section in {anchor(heading) for heading in headings(target)}, f"{path}#{section}"


# A page may refer to a picture that the demo makes before it is there.
AWAITED = {"docs/pictures/demo-light.svg", "docs/pictures/demo-dark.svg"}


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_every_picture_is_there(page: Path) -> None:
    """Pictures in the HTML of a page are there."""
    missing = {path for path in pictures(page) if not (page.parent / path).exists()}
    assert {name_of((page.parent / path).resolve()) for path in missing} <= AWAITED


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_headings_of_a_page_differ(page: Path) -> None:
    """The anchors of a page are unique. The forge and the site number others differently."""
    anchors = [anchor(heading) for heading in headings(page)]
    assert len(set(anchors)) == len(anchors)


def test_every_page_can_be_found() -> None:
    """Each page is in the navigation of the site, and the navigation has no other."""
    config = (ROOT / "zensical.toml").read_text("utf-8")
    assert sorted(re.findall(r'"([\w-]+\.md)"', config)) == [page.name for page in PAGES]


# What stopped readers.
RIDDLES = (
    "as whom",
    "blamed for",
    "errand",
    "for nobody",
    "gets that piece as two",
    "hands out twice",
    "heard enough",
    "in the durations only",
    "in peace",
    "judged apart",
    "let by",
    "looked at apart",
    "nobody hears",
    "nobody knows",
    "on whose",
    "what it came to",
    "who waits",
    "whoever",
)
TEXTS = [
    *DOCUMENTS,
    *sorted((ROOT / "examples").rglob("*.py")),
    *sorted((ROOT / "examples").rglob("*.y*ml")),
    *sorted((ROOT / "examples").rglob("*.json")),
    *sorted((ROOT / "src").rglob("*.py")),
    ROOT / "collector-config.yaml",
]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_the_words_are_plain(path: Path) -> None:
    """No page, docstring or comment has a phrase that readers had to read twice."""
    text = re.sub(r"\s+(# )?", " ", path.read_text("utf-8").lower())
    assert [riddle for riddle in RIDDLES if re.search(rf"\b{riddle}\b", text)] == []


# --- Sections that something else needs ---


def test_every_missing_reason_has_its_section() -> None:
    """Troubleshooting has a section for each reason, with its cause and what to do, and no other."""
    found = sections(DOCS / "troubleshooting.md", "## Missing reasons")
    assert sorted(heading.strip("`") for heading in found) == sorted(reason.value for reason in MissingReason)
    assert all("**Cause.**" in text and "**What to do.**" in text for text in found.values())


def test_every_alert_has_its_section() -> None:
    """The runbook has a section for each alert, with its severity and what to do, and no other."""
    rules = [
        rule
        for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    text = (DOCS / "operations.md").read_text("utf-8")
    found = dict(re.findall(r"^### (OpenAI\w+)\n\n\*\*(Page|Ticket)\.\*\*", text, re.MULTILINE))
    assert found == {rule["alert"]: rule["labels"]["severity"].capitalize() for rule in rules}
    for rule in rules:
        if link := rule["annotations"].get("runbook_url"):
            assert link.endswith("#" + anchor(rule["alert"]))


# --- The site ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `scripts/docs` builds it. A dead link or anchor fails the build."""
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, ROOT / "scripts" / "site.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGING_S, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    return folder / "site"


class Html(HTMLParser):
    """The anchors of a page, what it links to, and what a browser loads for it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if tag == "link" and values.get("rel") in {"stylesheet", "icon", "preload"}:
            self.loaded.add(values["href"])
        if "src" in values:
            self.loaded.add(values["src"])


@cache
def html(page: Path) -> Html:
    return Html(page)


def site_pages(site: Path) -> Iterator[Path]:
    return (page for page in sorted(site.rglob("*.html")) if page.name != "404.html")


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    """Each link between pages has its page and its anchor in what was built."""
    broken = []
    for page in site_pages(site):
        for link in html(page).links | html(page).loaded:
            path, section = unquote(urlsplit(link).path), urlsplit(link).fragment
            if urlsplit(link).scheme or link.startswith("data:"):
                continue
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            has_anchor = not section or target.suffix != ".html" or section in html(target).anchors
            if not (target.exists() and has_anchor):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.parametrize(
    ("link", "is_there"),
    [
        ("reference.md#reference", True),
        ("../scripts/site.py", True),
        ("missing.md", False),
        ("reference.md#missing", False),
        ("../scripts/missing.py", False),
    ],
)
def test_a_dead_link_fails_the_build(link: str, is_there: bool, tmp_path: Path) -> None:
    """A page, an anchor or a file that is not there is an error."""
    for folder in ("scripts", "docs"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "scripts" / "site.py", tmp_path / "scripts")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    (tmp_path / "docs" / "reference.md").write_text("# Reference\n")
    (tmp_path / "docs" / "index.md").write_text(f"# Index\n\n[link]({link})\n")
    command = [sys.executable, tmp_path / "scripts" / "site.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGING_S, check=False)  # noqa: S603
    assert (done.returncode == 0) == is_there, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_anchors_are_those_of_the_forge(site: Path, page: Path) -> None:
    """A link to a section works on the forge and on the site."""
    assert {anchor(heading) for heading in headings(page)} <= html(site / f"{page.stem}.html").anchors


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures come with the site."""
    loaded = {
        link
        for page in site_pages(site)
        for link in html(page).loaded
        if "//" in link and not link.startswith("data:")
    }
    assert loaded == set()


# --- Snippets: each runs, or is part of a program that runs, or is checked ---


def is_quoted(block: Block) -> bool:
    """Whether a block is part of a program that its page links to. Other tests run that program."""
    for path, _ in links(block.page):
        file = (block.page.parent / path).resolve()
        if path and file.suffix == ".py" and block.text.strip() in file.read_text("utf-8"):
            return True
    return False


PYTHON = blocks("python")


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.id)
def test_python_snippets_run(block: Block, tmp_path: Path) -> None:
    """A snippet runs as it stands and complains of nothing, or is quoted from a program that is tested."""
    if is_quoted(block):
        return
    program = tmp_path / "snippet.py"
    program.write_text(block.text)
    done = _run_beside_servers([sys.executable, "-W", "error", str(program)], tmp_path)
    assert done.stderr == ""


def test_the_record_of_a_call_has_what_was_billed(tmp_path: Path) -> None:
    """The snippet with `on_call` prints the tokens of the server."""
    [block] = [block for block in PYTHON if "on_call=" in block.text]
    (tmp_path / "snippet.py").write_text(block.text)
    assert _run_beside_servers([sys.executable, "snippet.py"], tmp_path).stdout == "gpt-5.4-mini 871\n"


def _run_beside_servers(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    api = ResponsesAPI(lambda _: Plan(Answer(usage=usage(14, 871))))
    with ScriptedServer(api) as server, OtlpReceiver() as receiver:
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OPENAI_API_KEY": "sk-docs",
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint,
        }
        done = subprocess.run(  # noqa: S603  # the pages' own
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANGING_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done


@pytest.mark.parametrize("name", ["getting-started", "troubleshooting"])
def test_the_way_to_a_first_span_works(name: str, tmp_path: Path) -> None:
    """With the program of the page, its command prints a span with the tokens that the server billed."""
    [app] = [
        block
        for block in PYTHON
        if "for event in stream" in block.text and block.page.stem == "getting-started"
    ]
    (tmp_path / "app.py").write_text(app.text)
    [command] = [
        block.text
        for block in blocks("sh", pages=[DOCS / f"{name}.md"])
        if "--traces_exporter console" in block.text
    ]
    done = _run_beside_servers(["bash", "-euc", command], tmp_path)
    assert '"name": "chat gpt-5.4-mini"' in done.stdout
    assert '"gen_ai.usage.output_tokens": 871' in done.stdout
    assert '"openai_responses.usage.source": "stream"' in done.stdout


# Programs that the pages use and that are not part of this repository or its environment.
FOREIGN = {
    "cd": "of the shell",
    "export": "of the shell",
    "curl": "of the system",
    "docker": "needs containers; the compose file is checked in tests/observability",
    "echo": "of the shell",
    "sed": "of the system",
    "open": "of the system",
    "otelcol-contrib": "the Collector; its configurations run in tests/observability",
    "promtool": "of Prometheus; run in tests/observability",
    "python": "of the environment",
}
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.id)
def test_shell_snippets_are_right(block: Block) -> None:
    """The shell accepts a snippet, and its programs, files, options and extras are there."""
    subprocess.run(["bash", "-nc", block.text], check=True)  # noqa: S603, S607
    text = block.text.replace("\\\n", " ")
    here = block.page.parent
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if not words:
            continue
        program = words[0]
        if program == ".venv/bin/python":  # the scripts make it
            assert (ROOT / words[1]).is_file(), line
        elif "/" in program:
            script = ROOT / program
            assert os.access(script, os.X_OK), line
            source = script.read_text("utf-8")
            if "python -m benchmarks" in source:
                source += (ROOT / "benchmarks" / "__main__.py").read_text("utf-8")
            if not source.startswith(
                "#!/usr/bin/env bash\n# Checks everything"
            ):  # that one takes pytest's options
                options = [word for word in words if word.startswith("--")]
                assert all(option in source for option in options), line
        else:
            assert program in FOREIGN or (Path(sys.executable).parent / program).exists(), line
        for extras in re.findall(r"\[([a-z,]+)\]", line):
            assert all(f"\n{extra} = [" in PROJECT for extra in extras.split(",")), line
        for word in words[1:]:
            is_written = words[words.index(word) - 1] == ">"
            if re.fullmatch(r"[\w./-]+\.(yaml|yml|json|toml)", word) and not is_written:
                assert (ROOT / word).exists() or (here / word).exists(), line


@pytest.mark.parametrize("block", blocks("promql"), ids=lambda block: block.id)
def test_queries_are_right(block: Block, tmp_path: Path) -> None:
    """Prometheus accepts each query."""
    rules = [{"record": f"snippet:{n}", "expr": line} for n, line in enumerate(block.text.splitlines())]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "snippets", "rules": rules}]}))
    assert "SUCCESS" in run("promtool", "check", "rules", path)


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.id)
def test_yaml_snippets_are_right(block: Block) -> None:
    """A snippet is YAML."""
    assert yaml.safe_load(block.text)


def test_every_snippet_has_a_language() -> None:
    """A block has a language that a test knows, or is a picture."""
    known = {"python", "sh", "promql", "yaml", "text"}
    found = {
        (name_of(page), language)
        for page in DOCUMENTS
        for language in re.findall(
            r"^ *```(\w*)\n.*?^ *```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
    }
    assert {(page, language) for page, language in found if language not in known} == set()


@cache
def known_variables() -> str:
    """Everything in which an environment variable may be defined."""
    installed = Path(yaml.__file__).parents[1] / "opentelemetry"
    files = [
        *installed.rglob("environment_variables.py"),
        *installed.rglob("environment_variables/__init__.py"),
    ]
    files += [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "examples").rglob("*.y*ml"),
        *(ROOT / "examples").rglob("*.py"),
    ]
    files += [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    files += [
        ROOT / "collector-config.yaml",
        *(ROOT / "tests").glob("**/*.py"),
        *installed.rglob("auto_instrumentation/*.py"),
    ]
    files += [*installed.rglob("instrumentation/_semconv.py"), *(installed / "sdk").rglob("*.py")]
    return "\n".join(path.read_text("utf-8") for path in files)


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_environment_variables_exist(page: Path) -> None:
    """Every variable that a page names is read by somebody."""
    named = set(
        re.findall(
            r"\b(?:OTEL|OTELCOL|OPENAI|TAIL|PROMETHEUS|HEALTH_CHECK)_[A-Z_]+\b", page.read_text("utf-8")
        )
    )
    ours = {name for name in named if name.startswith("OTEL_RESPONSES_USAGE_")}
    assert {name for name in named - ours if name not in known_variables()} == set()


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_commands_in_the_text_exist(page: Path) -> None:
    """Every script that a page names is a program of this repository."""
    named = set(re.findall(r"`(scripts/[\w-]+|examples/[\w/]+/run)\b", prose(page)))
    assert {name for name in named if not os.access(ROOT / name, os.X_OK)} == set()

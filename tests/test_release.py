"""What a release consists of: version, changelog, files, metadata, and the workflows that make it."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest
import yaml

import otel_responses_usage
from embedded.answer import Answer, usage
from embedded.http_server import Hold, ScriptedServer
from embedded.otlp_receiver import OtlpReceiver
from embedded.responses_api import Plan, ResponsesAPI
from observed import HANGING_S
from programs import ROOT, run

VERSION = otel_responses_usage.__version__
URL = "https://git.example/shop/otel-responses-usage"
NAME = f"otel_responses_usage-{VERSION}"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

Build = Callable[..., Path]


def command(*words: str | Path, cwd: Path = ROOT, **environ: str) -> str:
    """Run a command that must succeed, and return what it prints."""
    done = subprocess.run(  # noqa: S603
        words,
        cwd=cwd,
        env={**os.environ, "no_proxy": "127.0.0.1", **environ},
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources() -> list[str]:
    """The files of the repository, committed or not. Without git these are those of a source distribution."""
    return command("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build the source distribution and, from it, the wheel, with an address of the repository or without."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a repository")
    tree = tmp_path_factory.mktemp("tree")
    for name in sources():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    built: dict[str, Path] = {}

    def make(url: str = URL) -> Path:
        if url not in built:
            built[url] = tmp_path_factory.mktemp("dist")
            command(
                sys.executable, "-m", "build", "--no-isolation", "--outdir", built[url], ".",
                cwd=tree, REPOSITORY_URL=url, SOURCE_DATE_EPOCH="1795996800",
            )  # fmt: skip
        return built[url]

    return make


def wheel_of(dist: Path) -> zipfile.ZipFile:
    [wheel] = dist.glob("*.whl")
    return zipfile.ZipFile(wheel)


def metadata_of(dist: Path) -> Message:
    return email.message_from_bytes(wheel_of(dist).read(f"{NAME}.dist-info/METADATA"))


def test_the_wheel_has_the_package_and_nothing_else(build: Build) -> None:
    """Every module of the package is in the wheel, and beside it only metadata, the licence and the SBOM."""
    package = {
        name.removeprefix("src/") for name in sources() if name.startswith("src/") and (ROOT / name).is_file()
    }
    info = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    info |= {"sboms/otel-responses-usage.cdx.json"}
    assert set(wheel_of(build()).namelist()) == package | {f"{NAME}.dist-info/{name}" for name in info}


def test_the_source_distribution_can_build_the_wheel(build: Build) -> None:
    """It has the package, what the build needs and what a reader needs. The wheel above was built from it."""
    [archive] = build().glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.removeprefix(f"{NAME}/") for name in tar.getnames()}
    assert {name for name in names if not name.startswith("src/")} == {
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "SECURITY.md",
        "collector-config.yaml",
        "hatch_build.py",
        "pyproject.toml",
    }


def test_the_index_takes_both_files(build: Build) -> None:
    """Metadata is valid, and the description can be rendered."""
    command(sys.executable, "-m", "twine", "check", "--strict", *build().iterdir())


def test_the_metadata_is_right(build: Build) -> None:
    """Version, licence, entry points and addresses are those of this repository."""
    metadata = metadata_of(build())
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert addresses["Source"] == URL
    assert all(address.startswith(URL) for address in addresses.values())
    entry_points = wheel_of(build()).read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert "otel-responses-usage = otel_responses_usage._commands:main" in entry_points
    pythons = {
        line.rpartition(" ")[2]
        for line in metadata.get_all("Classifier", [])
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    }
    assert pythons == {"3.10", "3.11", "3.12", "3.13"}
    assert metadata["Requires-Python"] == ">=3.10"


LINK = re.compile(r'\]\(([^)\s]+)\)|\b(?:src|srcset|href)="([^"]*)"')


def targets(text: str) -> list[str]:
    """The targets of all links, outside of code."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [markdown or html for markdown, html in LINK.findall(prose)]


def test_links_on_the_index_are_absolute(build: Build) -> None:
    """A link to a file leads to that file at the tag of the version."""
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = metadata_of(build()).get_payload()
    assert isinstance(shown, str)
    relative = [target for target in targets(readme) if not re.match(r"https?:|#", target)]
    assert relative
    assert len(targets(shown)) == len(targets(readme))
    assert [target for target in targets(shown) if not re.match(r"https?:|#", target)] == []
    for target in relative:
        ends = [other for other in targets(shown) if other.endswith(f"/v{VERSION}/{target}")]
        assert ends, target
        is_folder = (ROOT / target.partition("#")[0]).is_dir()
        assert {other.removeprefix(f"{URL}/").partition("/")[0] for other in ends} <= (
            {"tree"} if is_folder else {"blob", "raw"}
        )


@pytest.mark.parametrize(
    ("text", "with_address", "without"),
    [
        ("[a](b.md)", "[a](URL/blob/v1/b.md)", "a"),
        ("[a](b.md#c) [d](#e)", "[a](URL/blob/v1/b.md#c) [d](#e)", "a [d](#e)"),
        ("[a](docs) ![b](c.svg)", "[a](URL/tree/v1/docs) ![b](URL/raw/v1/c.svg)", "a b"),
        ("[![a](b.svg)](c.md)", "[![a](URL/raw/v1/b.svg)](URL/blob/v1/c.md)", "a"),
        (
            "[![a](https://b/c.svg)](d.md)",
            "[![a](https://b/c.svg)](URL/blob/v1/d.md)",
            "![a](https://b/c.svg)",
        ),
        ("[a](https://b/) <https://c/>", "[a](https://b/) <https://c/>", "[a](https://b/) <https://c/>"),
        ('<img src="b.svg">', '<img src="URL/raw/v1/b.svg">', '<img src="">'),
        ('<a href="b.md">', '<a href="URL/blob/v1/b.md">', '<a href="">'),
        (
            "```\n[a](b.md)\n```\n[a](b.md)",
            "```\n[a](b.md)\n```\n[a](URL/blob/v1/b.md)",
            "```\n[a](b.md)\n```\na",
        ),
    ],
)
def test_links_are_rewritten(text: str, with_address: str, without: str) -> None:
    """Files, folders and images have addresses of their own; code stays as it is."""
    specification = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.description(text, ROOT, "https://x", "v1") == with_address.replace("URL", "https://x")
    assert module.description(text, ROOT, "", "v1") == without


def test_without_an_address_no_link_leads_nowhere(build: Build) -> None:
    """A build by hand does not know the repository. The text of a relative link stays, and the link goes."""
    metadata = metadata_of(build(""))
    shown = metadata.get_payload()
    assert isinstance(shown, str)
    assert metadata.get_all("Project-URL") is None
    assert [target for target in targets(shown) if target and not re.match(r"https?:|#", target)] == []
    assert "docs/performance.md" not in "".join(targets(shown))


def test_the_sbom_names_what_the_package_asks_for(build: Build) -> None:
    """It is a valid CycloneDX document, with this version and the requirements of the metadata."""
    from cyclonedx.schema import SchemaVersion  # takes a second, in every process that collects the tests
    from cyclonedx.validation.json import JsonStrictValidator

    text = wheel_of(build()).read(f"{NAME}.dist-info/sboms/otel-responses-usage.cdx.json").decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    assert document["metadata"]["component"]["purl"] == f"pkg:pypi/otel-responses-usage@{VERSION}"
    required = {
        re.split(r"[<>=!~ ;\[]", line)[0]
        for line in metadata_of(build()).get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert {component["name"] for component in document["components"]} == required


def test_the_same_sources_make_the_same_files(build: Build, tmp_path: Path) -> None:
    """Anybody can build a release again and compare it."""
    [archive] = build().glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    again = tmp_path / "again"
    command(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", again, ".",
        cwd=tmp_path / NAME, SOURCE_DATE_EPOCH="1795996800",
    )  # fmt: skip
    for file in again.iterdir():
        assert file.read_bytes() == (build() / file.name).read_bytes(), file.name


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty environment."""
    folder = tmp_path_factory.mktemp("empty")
    command(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


def install(python: Path, *requirements: str) -> None:
    """Install packages: by uv, which is faster, or by pip, which knows the user's index."""
    problems = []
    for installer in (
        (sys.executable, "-m", "uv", "pip", "install", "--python", python),
        (python, "-m", "pip", "--disable-pip-version-check", "install"),
    ):
        done = subprocess.run(  # noqa: S603
            [*installer, "--quiet", *requirements],
            capture_output=True,
            text=True,
            timeout=HANGING_S,
            check=False,
        )
        if done.returncode == 0:
            return
        problems.append(done.stderr)
    if os.environ.get("CI"):
        pytest.fail("\n".join(problems))
    pytest.skip("packages could not be installed")


def run_by_hand(python: Path, directory: Path) -> OtlpReceiver:
    """Run the example of the README in an environment, and return what arrived over OTLP."""
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    [program] = [text for text in programs if "MeterProvider(" in text]
    (directory / "by_hand.py").write_text(program, "utf-8")
    api = ResponsesAPI(lambda _: Plan(Answer(usage=usage(14, 871)), cut_after=6, end=Hold()))
    with ScriptedServer(api) as server, OtlpReceiver() as receiver:
        environment = {
            "PATH": os.environ["PATH"],
            "OPENAI_API_KEY": "sk-release",
            "OPENAI_BASE_URL": f"{server.url}/v1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint,
        }
        words = [str(python), "by_hand.py"]
        subprocess.run(words, cwd=directory, env=environment, check=True, timeout=HANGING_S)  # noqa: S603
    return receiver


def test_it_is_installed_and_upgraded(build: Build, empty: Path, tmp_path: Path) -> None:
    """In an empty environment 0.1.0 is installed and upgraded, and the example by hand runs with both."""
    first = command("git", "log", "-S## 0.1.0", "--format=%H", "--", "CHANGELOG.md").split()
    if not first:
        pytest.skip("the history does not have 0.1.0")
    old = tmp_path / "old"
    old.mkdir()
    archive = tmp_path / "old.tar"
    command("git", "archive", "--output", archive, first[-1])
    with tarfile.open(archive) as tar:
        tar.extractall(old, filter="data")
    command(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, old)
    [old_wheel] = tmp_path.glob("*.whl")
    [new_wheel] = build().glob("*.whl")

    asked = "import importlib.metadata as m; print(m.version('otel-responses-usage'))"
    install(empty, f"otel-responses-usage[instruments,otlp] @ {old_wheel.as_uri()}")
    assert command(empty, "-c", asked, cwd=tmp_path) == "0.1.0\n"
    [span] = run_by_hand(empty, tmp_path).spans
    assert span.attributes["gen_ai.usage.output_tokens"] == 871

    install(empty, "--upgrade", f"otel-responses-usage[instruments,otlp] @ {new_wheel.as_uri()}")
    assert command(empty, "-c", asked, cwd=tmp_path) == f"{VERSION}\n"
    receiver = run_by_hand(empty, tmp_path)
    [span] = receiver.spans
    assert span.attributes["gen_ai.usage.output_tokens"] == 871
    assert span.scope.version == VERSION
    assert command(empty.with_name("otel-responses-usage"), "--version", cwd=tmp_path).endswith(
        f"{VERSION}\n"
    )
    # Nothing of the old release is left.
    package = next(empty.parents[1].glob("lib/python3*/site-packages/otel_responses_usage"))
    files = {str(file.relative_to(package.parent)) for file in package.rglob("*")}
    files = {name for name in files if name.endswith((".py", ".typed"))}
    assert files == {name for name in wheel_of(build()).namelist() if ".dist-info" not in name}
    assert not [
        line
        for line in command(empty, "-m", "pip", "check", cwd=tmp_path).splitlines()
        if "responses" in line
    ]


def check_release(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "scripts" / "check-release"), f"--root={root}", *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=HANGING_S, check=False)  # noqa: S603


def test_version_changelog_and_tags_agree() -> None:
    """The newest section of the changelog is that of the version, and no tag says otherwise."""
    done = check_release(ROOT)
    if f"The tag v{VERSION} is on another commit" in done.stderr:
        pytest.skip("the next version is not chosen yet")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"v{VERSION}\n", "")


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A repository whose versions 0.1.0 and 0.2.0 are released."""
    (tmp_path / "src/otel_responses_usage").mkdir(parents=True)
    shown(
        tmp_path, "0.2.0", "# Changelog\n\n## 0.2.0 - 2026-11-30\n\nNew.\n\n## 0.1.0 - 2026-11-23\n\nOld.\n"
    )
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@localhost")
    command("git", "init", "-q", "-b", "main", ".", cwd=tmp_path)
    command("git", "add", ".", cwd=tmp_path)
    command(*git, "commit", "-q", "-m", "a", cwd=tmp_path)
    command(*git, "tag", "v0.1.0", cwd=tmp_path)
    command(*git, "commit", "-q", "--allow-empty", "-m", "b", cwd=tmp_path)
    command(*git, "tag", "v0.2.0", cwd=tmp_path)
    return tmp_path


def shown(root: Path, version: str, changelog: str) -> None:
    """Write both files."""
    (root / "src/otel_responses_usage/_version.py").write_text(f'__version__: Final = "{version}"\n', "utf-8")
    (root / "CHANGELOG.md").write_text(changelog, "utf-8")


def test_a_release_that_agrees_is_accepted(released: Path) -> None:
    """The tag is printed, or the notes."""
    assert check_release(released, "--tag=v0.2.0").stdout == "v0.2.0\n"
    assert check_release(released, "--notes").stdout == "New.\n"


@pytest.mark.parametrize(
    ("version", "changelog", "message"),
    [
        ("0.3.0", "## 0.2.0 - 2026-11-30\n\n## 0.1.0 - 2026-11-23\n", "is 0.2.0, not 0.3.0."),
        (
            "0.3.0",
            "## 0.3.0\n\n## 0.2.0 - 2026-11-30\n\n## 0.1.0 - 2026-11-23\n",
            "0.3.0 of CHANGELOG.md has no date",
        ),
        ("0.3.0", "## 0.3.0 - 2026-12-01\n\n## 0.1.0 - 2026-11-23\n", "has no section for the tag v0.2.0"),
        ("0.1.1", "## 0.1.1 - 2026-12-01\n\n## 0.1.0 - 2026-11-23\n", "The tag v0.2.0 is newer"),
        ("0.1.0", "## 0.1.0 - 2026-11-23\n\n## 0.2.0 - 2026-11-30\n", "not in order"),
        ("0.1.0", "## 0.1.0 - 2026-11-23\n", "is on another commit: this version is out already"),
        ("0.2.0", "", "is missing, not 0.2.0"),
    ],
)
def test_a_release_that_does_not_agree_is_refused(
    released: Path, version: str, changelog: str, message: str
) -> None:
    """What is wrong is said, and no tag is printed."""
    shown(released, version, changelog)
    done = check_release(released)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr


def test_another_tag_is_refused(released: Path) -> None:
    """A tag that was made by hand has to be that of the version."""
    assert "The tag is v0.2.1, and the version is 0.2.0." in check_release(released, "--tag=v0.2.1").stderr


def test_the_linters_find_nothing_in_the_workflows() -> None:
    """The first knows the syntax of workflows, the second what makes them unsafe."""
    run("actionlint", "-shellcheck=", "-pyflakes=", *WORKFLOWS)
    command(Path(sys.executable).with_name("zizmor"), "--offline", "--persona=pedantic", ROOT / ".github")


def test_the_workflows_take_only_pinned_actions() -> None:
    """An action is named by the hash of a commit, and a comment has its release."""
    assert WORKFLOWS
    for path in WORKFLOWS:
        used = re.findall(r"uses: (\S+)(.*)", path.read_text("utf-8"))
        assert used
        for action, comment in used:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), f"{path.name}: {action}"
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{path.name}: {action}"


def test_no_job_may_write_but_those_of_a_release() -> None:
    """Workflows have no permissions, and a job has the few that it needs."""
    writing = set()
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text("utf-8"))
        assert workflow["permissions"] == {}
        for name, job in workflow["jobs"].items():
            assert job["timeout-minutes"]
            writing |= {(path.name, name, what) for what, may in job["permissions"].items() if may == "write"}
    assert writing == {
        ("release.yml", "publish", "attestations"),
        ("release.yml", "publish", "id-token"),
        ("release.yml", "tag", "contents"),
    }


def test_the_workflows_run_what_is_there() -> None:
    """Each script in a workflow is a program of this repository."""
    scripts = {
        script
        for path in WORKFLOWS
        for script in re.findall(r"(?:scripts|\.ci)/[\w-]+", path.read_text("utf-8"))
    }
    assert len(scripts) >= 4
    assert {script for script in scripts if not os.access(ROOT / script, os.X_OK)} == set()

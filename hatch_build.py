"""What the build adds: a description for the package index, links to the repository, and an SBOM.

The package index shows the README without the repository around it, so a relative link leads nowhere there.
The variable REPOSITORY_URL names the repository, and the release workflow sets it. With it, relative links
become absolute. Without it, their text stays and the link goes.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface
from packaging.requirements import Requirement

_FENCE: Final = re.compile(r"^(```+|~~~+)")
_IMAGE: Final = re.compile(r"!\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)")
_LINK: Final = re.compile(r"\[(?P<text>(?:[^\[\]]|!\[[^\[\]]*\]\([^)\s]+\))*)\]\((?P<target>[^)\s]+)\)")
_HTML: Final = re.compile(r'\b(?P<name>src|srcset|href)="(?P<target>[^"]+)"')
_ABSOLUTE: Final = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)


class MetadataHook(MetadataHookInterface):
    """Sets `readme` and `urls`. A source distribution has both already."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the fields."""
        root = Path(self.root)
        url = os.environ.get("REPOSITORY_URL", "").rstrip("/")
        if "readme" not in metadata:
            text = (root / "README.md").read_text("utf-8")
            metadata["readme"] = {
                "content-type": "text/markdown",
                "text": description(text, root, url, f"v{metadata['version']}"),
            }
        if url and "urls" not in metadata:
            metadata["urls"] = {
                "Documentation": f"{url}#readme",
                "Changelog": f"{url}/blob/main/CHANGELOG.md",
                "Issues": f"{url}/issues",
                "Source": url,
            }


class BuildHook(BuildHookInterface[Any]):
    """Adds a software bill of materials to the wheel (PEP 770): `.dist-info/sboms/`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  # the interface
        """Write the file, and name it to the builder."""
        if self.target_name != "wheel":
            return
        self._directory = tempfile.TemporaryDirectory()
        path = Path(self._directory.name) / f"{self.metadata.core.name}.cdx.json"
        path.write_text(json.dumps(sbom(self.metadata.core, self.metadata.version), indent=2) + "\n", "utf-8")
        build_data["sbom_files"].append(str(path))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the file. The wheel has it."""
        if self.target_name == "wheel":
            self._directory.cleanup()


def description(text: str, root: Path, url: str, revision: str) -> str:
    """Return a Markdown text whose links work outside of the repository.

    Args:
        text: The text, as it is in the repository.
        root: The folder to which its links are relative.
        url: The address of the repository, or nothing.
        revision: The tag that the links lead to.

    """

    def absolute(target: str, *, is_image: bool) -> str:
        path = target.partition("#")[0].rstrip("/")
        kind = "raw" if is_image else "tree" if (root / path).is_dir() else "blob"
        return f"{url}/{kind}/{revision}/{target}"

    def replaced(found: re.Match[str], *, is_image: bool) -> str:
        if _ABSOLUTE.match(found["target"]):
            return found[0]
        if not url:
            return found["text"]
        return f"{'!' * is_image}[{found['text']}]({absolute(found['target'], is_image=is_image)})"

    def image(found: re.Match[str]) -> str:
        return replaced(found, is_image=True)

    def link(found: re.Match[str]) -> str:
        return replaced(found, is_image=False)

    def attribute(found: re.Match[str]) -> str:
        if _ABSOLUTE.match(found["target"]):
            return found[0]
        target = absolute(found["target"], is_image=found["name"] != "href") if url else ""
        return f'{found["name"]}="{target}"'

    lines, fence = [], ""
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.startswith(fence) and not line.strip(fence[0] + "\n "):
            fence = ""
        elif not fence:
            # Images first: the text of a link can be an image.
            line = _LINK.sub(link, _IMAGE.sub(image, line))
            line = _HTML.sub(attribute, line)
        lines.append(line)
    return "".join(lines)


def sbom(core: Any, version: str) -> dict[str, Any]:
    """Return a CycloneDX document: the package, and the packages that it asks for.

    The wheel has no code of others in it. The requirements have no versions: the installer chooses them.
    """
    reference = f"pkg:pypi/{core.name}@{version}"
    components: list[dict[str, Any]] = []
    for text in core.dependencies:
        requirement = Requirement(text)
        components.append(
            {
                "type": "library",
                "bom-ref": f"pkg:pypi/{requirement.name}",
                "name": requirement.name,
                "purl": f"pkg:pypi/{requirement.name}",
                "scope": "required",
                "properties": [{"name": "python:requirement", "value": str(requirement)}],
            }
        )
    references = sorted(component["bom-ref"] for component in components)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # The same for the same build, so that a wheel can be reproduced.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, reference)}",
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "component": {
                "type": "library",
                "bom-ref": reference,
                "name": core.name,
                "version": version,
                "description": core.description,
                "licenses": [{"license": {"id": core.license_expression}}],
                "purl": reference,
            },
        },
        "components": sorted(components, key=lambda component: str(component["bom-ref"])),
        "dependencies": [
            {"ref": reference, "dependsOn": references},
            *({"ref": one, "dependsOn": []} for one in references),
        ],
    }

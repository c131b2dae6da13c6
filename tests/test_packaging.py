"""What the package says of itself to Python, to type checkers and to the package index."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import lorica

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCE = PYPROJECT["project"]["urls"]["Source"]


def test_every_public_name_is_there() -> None:
    assert set(lorica.__all__) <= set(dir(lorica))
    assert all(getattr(lorica, name) is not None for name in lorica.__all__)
    assert lorica.__version__ == version("lorica") == PYPROJECT["project"]["version"]
    with pytest.raises(AttributeError, match="'absent'"):
        _ = lorica.absent


def test_type_checkers_read_the_annotations() -> None:
    assert (Path(lorica.__file__).parent / "py.typed").is_file()


def test_links_of_the_rendered_readme_lead_into_the_repository() -> None:
    """The package index shows the README where no relative link works; images need the file, not a page around it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rendered = readme
    for substitution in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        rendered = re.sub(substitution["pattern"], substitution["replacement"], rendered)
    before, after = (re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", text) for text in (readme, rendered))
    assert len(before) == len(after)
    assert {kind for kind, target in before if not target.startswith("http")} == {"", "!"}
    for (kind, relative), (_, absolute) in zip(before, after, strict=True):
        if relative.startswith("http"):
            assert absolute == relative
        else:
            assert absolute == f"{SOURCE}/{'raw' if kind else 'blob'}/main/{relative}"


def test_all_addresses_of_the_project_are_one() -> None:
    urls = PYPROJECT["project"]["urls"].values()
    assert all(url == SOURCE or url.startswith(f"{SOURCE}/") for url in urls)
    for url in urls:
        folder = re.fullmatch(rf"{SOURCE}/(?:tree|blob)/main/(.+)", url)
        assert folder is None or (ROOT / folder[1]).exists()


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_what_github_reads_is_valid(schema: str, files: str) -> None:
    found = sorted(map(str, ROOT.glob(files)))
    assert found
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *found]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_citation_is_that_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lorica.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert citation["repository-code"] == SOURCE


def test_privacy_flaws_are_reported_in_private() -> None:
    private = f"{SOURCE}/security/advisories/new"
    links = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text(encoding="utf-8"))
    assert private in [link["url"] for link in links["contact_links"]]
    assert private in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["demo", "test", "docs"])
def test_make_says_what_it_installs_before_it_does(target: str, tmp_path: Path) -> None:
    """Installing takes minutes, and pip is quiet."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--dry-run", f"VENV={tmp_path}/new", target]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.splitlines() if re.search("echo|pip install|venv ", line)]
    slow = [index for index, line in enumerate(lines) if "echo" not in line and "--no-deps" not in line]
    assert len(slow) == 3
    for index in slow:
        assert lines[index - 1].startswith("echo"), lines[index]
        assert "-m venv" in lines[index] or re.search(r"about \d+ MB.*minute", lines[index - 1])

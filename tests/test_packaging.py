"""What the package says of itself to Python, to type checkers and to the package index."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

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

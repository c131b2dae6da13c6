"""Docs that are generated are up to date, and what they name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from lorica.config import load
from lorica.methods.base import registry

ROOT = Path(__file__).parent.parent


def test_the_configuration_page_is_what_the_models_say() -> None:
    spec = importlib.util.spec_from_file_location("configuration_docs", ROOT / "scripts" / "configuration_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == module.render(), "run: python scripts/configuration_docs.py"
    assert not re.search(r"\| +\|$", text, flags=re.M), "a key without a description"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_point_to_files(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_the_readme_lists_every_method() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(rows) == sorted(registry())


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    assert load(path).name == path.stem

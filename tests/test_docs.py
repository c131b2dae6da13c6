"""Docs that are generated are up to date, and what they name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from lorica.methods.base import registry

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_what_the_models_say() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == script("configuration_docs").render(), "run: python scripts/configuration_docs.py"
    assert not re.search(r"\| +\|$", text, flags=re.M), "a key without a description"


def test_the_methods_page_is_what_the_methods_say_and_send() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text == script("methods_docs").render(), "run: python scripts/methods_docs.py"
    sections = re.findall(r"^#+ `?(.*?)`?$", text, flags=re.M)
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) == set(registry())
    assert set(registry()) <= set(sections)


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "examples/README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))],
)
def test_links_point_to_files(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_the_readme_lists_every_method() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(rows) == sorted(registry())


def test_the_attacks_of_the_threat_model_are_tests() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert sorted(named - set(re.findall(r"def (test_\w+)", sources))) == []

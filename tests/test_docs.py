"""Docs that are generated are up to date, and what they name exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorica.methods.base import registry
from tests.scripts import load_script

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"


def test_the_configuration_page_is_what_the_models_say() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == load_script(SCRIPTS / "configuration_docs.py").render(), "run: python scripts/configuration_docs.py"
    assert not re.search(r"\| +\|$", text, flags=re.M), "a key without a description"


@pytest.mark.integration
def test_the_methods_page_is_what_the_methods_say_and_send() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text == load_script(SCRIPTS / "methods_docs.py").render(), "run: python scripts/methods_docs.py"
    sections = re.findall(r"^#+ `?(.*?)`?$", text, flags=re.M)
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) == set(registry())
    assert set(registry()) <= set(sections)


PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "benchmarks/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))


def anchors(page: Path) -> set[str]:
    """Those that GitHub and the site give a page's headings."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_point_to_files_and_headings(page: str) -> None:
    path = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        linked = path.parent / target if target else path
        assert linked.exists(), f"{page} links to {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{page} links to {target}#{anchor}"


@pytest.mark.integration
def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: a page that the navigation lacks, or a link or anchor that leads nowhere, is an error."""
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {entry["location"] for entry in json.loads((tmp_path / "search/search_index.json").read_text())["docs"]}
    assert {"faq/#which-epsilon-should-i-choose", "configuration/#privacy", "api/#lorica.load_adapter"} <= found
    interface = (tmp_path / "api/index.html").read_text(encoding="utf-8")
    assert "PreTrainedModel" in interface
    owners = (tmp_path / "privacy/index.html").read_text(encoding="utf-8")
    assert "https://github.com/lorica-project/lorica/blob/main/README.md" in owners
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)="(https?:[^"]+)', page.read_text()
        )
        assert loaded == [], f"{page} loads from elsewhere"


def test_the_readme_lists_every_method() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(rows) == sorted(registry())


def test_the_attacks_of_the_threat_model_are_tests() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert sorted(named - set(re.findall(r"def (test_\w+)", sources))) == []

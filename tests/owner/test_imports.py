"""An owner's worker loads what it needs to train, and nothing that draws."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorica

SOURCE = Path(lorica.__file__).parents[1]
UNWANTED = {"matplotlib", "lorica.reporting", "lorica.server", "lorica.methods", "lorica.run"}


@pytest.mark.integration
def test_a_node_loads_no_plots_and_no_server() -> None:
    found = "import sys, lorica.owner.node; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout.split()
    assert "lorica.owner.client" in modules
    assert not UNWANTED & set(modules)


def test_no_module_of_a_node_says_that_it_imports_plots_or_the_server() -> None:
    """Imports inside of functions left out."""
    found: set[str] = set()
    left = ["lorica.owner.node"]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        if name.split(".")[0] == "lorica":
            left += [name.rpartition(".")[0]] if "." in name else []
            left += imported(name)
    assert {"lorica.owner.client", "torch"} <= found
    assert not UNWANTED & found


def imported(name: str) -> Iterator[str]:
    """Modules that a module of Lorica imports when it is loaded."""
    path = SOURCE / Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        # Not a module, but something in one.
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)

"""Examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import lorica

SOURCE = Path(lorica.__file__).parent
EXAMPLES = sorted(path for path in SOURCE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_examples_give_what_they_say(path: Path) -> None:
    """All of them are run; `torch` is imported for those whose module has only tensors."""
    module = importlib.import_module(".".join(["lorica", *path.relative_to(SOURCE).with_suffix("").parts]))
    found = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.FAIL_FAST)
    assert found.failed == 0
    assert found.attempted == path.read_text(encoding="utf-8").count(">>> ")

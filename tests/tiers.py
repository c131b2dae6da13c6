"""Cases of a parametrised test that run in another tier than the others."""

from __future__ import annotations

from typing import Any

import pytest


def integration(*cases: Any) -> list[Any]:
    """Cases for the integration tests; a tuple has the values of several parameters."""
    return _marked(pytest.mark.integration, cases)


def slow(*cases: Any) -> list[Any]:
    """Cases for the slow tests; a tuple has the values of several parameters."""
    return _marked(pytest.mark.slow, cases)


def _marked(mark: pytest.MarkDecorator, cases: tuple[Any, ...]) -> list[Any]:
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark) for case in cases]

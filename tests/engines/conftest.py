"""What the tests of engines share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from lorica.run.result import Result
from tests.reports import draw_nothing


@pytest.fixture(autouse=True)
def models_checked_once(checked_once: None) -> None:
    """A server and its nodes all check the same tiny models."""


@pytest.fixture(scope="session")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Overrides -> the run of two organisations' data, which are always the same, by the local engine."""
    from tests.engines.organisations import Organisations
    from tests.engines.test_flower_engine import local

    @cache
    def run(*overrides: str) -> Result:
        with pytest.MonkeyPatch.context() as patched:
            draw_nothing(patched)
            return local(Organisations(tmp_path_factory.mktemp("local")), "local", *overrides)

    return run

"""What the tests of engines share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def models_checked_once(checked_once: None) -> None:
    """A server and its nodes all check the same tiny models."""

"""What many tests share: tiny models and a home of its own for every test."""

from __future__ import annotations

import os
from pathlib import Path

# No test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """Ledgers of each test in its own folder; calibrated noise multipliers shared, since they cost a second each."""
    home = tmp_path / "lorica-home"
    home.mkdir()
    (home / "cache").symlink_to(cache)
    monkeypatch.setenv("LORICA_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")

"""What many tests share: a home of its own for every test, one cache, and how many examples Hypothesis draws."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# No test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# --hypothesis-profile chooses another.
hypothesis.settings.register_profile("quick", max_examples=25, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=250, deadline=None)
hypothesis.settings.load_profile("quick")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lorica's cache, shared by all workers of this run of the tests: a calibrated noise multiplier costs a second."""
    base = tmp_path_factory.getbasetemp()
    # A worker's folder is below that of the run.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "lorica-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def shared_home(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[None]:
    """Lorica's home for fixtures that several tests share."""
    with pytest.MonkeyPatch.context() as patched:
        use_home(tmp_path_factory.mktemp("shared") / "lorica-home", patched, cache)
        yield


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """Ledgers of each test in its own folder."""
    return use_home(tmp_path / "lorica-home", monkeypatch, cache)


def use_home(home: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    home.mkdir()
    (home / "cache").symlink_to(cache)
    monkeypatch.setenv("LORICA_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def some_digits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make a run small: 600 of the digits to train on and 120 to test on."""
    from pyarrow import parquet

    from lorica.tasks import digits

    folder = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 600), ("test", 120)):
        parquet.write_table(digits.table(split, "image", "label").slice(0, count), folder / f"{split}.parquet")
    return [f"task.{split}={folder / split}.parquet" for split in ("train", "test")]


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a small run."""
    monkeypatch.setattr("lorica.run.rounds.write_report", lambda folder: None)

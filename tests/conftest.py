"""What many tests share: a home of its own for every test, one cache, and how many examples Hypothesis draws."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.reports import draw_nothing

# No test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# As many processes as there are cores compute at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Every commit of a ledger waits for the disk. Temporary folders in memory do not wait.
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**31:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

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
    draw_nothing(monkeypatch)


@pytest.fixture(scope="session")
def checked_once() -> Iterator[None]:
    """A model that has passed `check_isolation` on a batch passes it again: whole runs of these tests start alike."""
    from lorica.adapters import loading

    check, passed = loading.check_isolation, set()

    def once(model: Any, losses: Any, trained: Any, batch: Any, tolerance: float, base: str) -> None:
        kind = (str(model), type(losses.__self__.objective), sorted(trained), tolerance)
        tensors = [*model.state_dict().values(), *batch.inputs.values(), batch.labels, batch.row_weights()]
        digest = hashlib.sha256(repr((kind, batch.example_of_row)).encode())
        for tensor in tensors:
            digest.update(tensor.detach().float().contiguous().numpy())
        if digest.digest() not in passed:
            check(model, losses, trained, batch, tolerance, base)
            passed.add(digest.digest())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "check_isolation", once)
        yield

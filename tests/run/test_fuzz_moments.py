"""A run that is killed at any moment, or whose disk fails at any moment, ends as if nothing had been.

`LORICA_FUZZ_SEED` chooses other moments.
"""

from __future__ import annotations

import errno
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorica
from lorica.errors import UserError
from lorica.privacy.ledger_file import read_ledger
from lorica.reporting.budget import read_budget
from lorica.reporting.html import write_report
from lorica.run.result import Result
from tests.fuzzing import draws_of
from tests.killed import run_until

ROUNDS, CLIENTS = 2, 2
SMALL = [
    f"federation.clients={CLIENTS}",
    f"federation.rounds={ROUNDS}",
    "federation.partition=iid",
    "federation.local_steps=1",
    "federation.batch_size=16",
    "privacy.epsilon=null",
    "privacy.noise_multiplier=1.5",
    "privacy.noise=reproducible",
]
ERRORS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO]


def overrides(root: Path, some_digits: list[str]) -> list[str]:
    return [*SMALL, *some_digits, f"output={root}", f"privacy.ledger={root}/ledger.sqlite"]


def files_of(root: Path) -> set[Path]:
    """All files but what a killed process left in the cache, which another one may still be writing."""
    return {path.relative_to(root) for path in root.rglob("*") if "cache" not in path.relative_to(root).parts}


class Moments:
    """An undisturbed run to compare with, and its number of events and its seconds."""

    def __init__(self, root: Path, some_digits: list[str]) -> None:
        self.some_digits = some_digits
        started = time.perf_counter()
        self.events = run_until(overrides(root, some_digits), root).events
        self.seconds = time.perf_counter() - started
        self.result = lorica.Experiment.load(overrides=overrides(root, some_digits)).run()
        self.files = files_of(root)

    def check(self, root: Path, event: int = 0, error: int | None = None, seconds: float = 0.0) -> bool:
        """Disturb a run at this moment and run it again; whether it was disturbed at all."""
        own = overrides(root, self.some_digits)
        first = run_until(own, root, event, error, seconds)
        assert first.expected, first.error
        # What people look at meanwhile.
        with suppress(UserError):
            read_budget(root / "ledger.sqlite", 1e-5)
        if event % 10 == 0:
            with suppress(UserError):
                write_report(root / "digits-as-lora")
        result = lorica.Experiment.load(overrides=own).run()
        self.compare(root, result)
        return first.killed or bool(first.error)

    def compare(self, root: Path, result: Result) -> None:
        mine, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (result, self.result))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
        assert [row["score"] for row in result.metrics] == [row["score"] for row in self.result.metrics]
        assert result.privacy["clients"] == self.result.privacy["clients"]
        assert files_of(root) == self.files
        assert (result.folder / "report.html").stat().st_size > 0
        book = read_ledger(root / "ledger.sqlite")
        assert (len(book.entries), book.problem) == (ROUNDS * CLIENTS, None)


def at(root: Path, patched: pytest.MonkeyPatch) -> Path:
    """An empty place for a run, its ledger and Lorica's home."""
    root.mkdir()
    patched.setenv("LORICA_HOME", str(root / "home"))
    return root


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory, some_digits: list[str]) -> Moments:
    with pytest.MonkeyPatch.context() as patched:
        return Moments(at(tmp_path_factory.mktemp("undisturbed") / "root", patched), some_digits)


def spread(count: int, most: int, name: str) -> list[int]:
    """Numbers from 1 to `most`, evenly spread."""
    offset = draws_of(name).random()
    return sorted({1 + int((place + offset) * most / count) for place in range(min(count, most))})


@pytest.mark.integration
@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_before_any_event_a_run_ends_as_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: Moments, count: int
) -> None:
    assert moments.events > 100
    for event in spread(count, moments.events, "kill"):
        root = at(tmp_path / str(event), monkeypatch)
        assert moments.check(root, event), event
        shutil.rmtree(root)


@pytest.mark.slow
def test_killed_at_any_instant_a_run_ends_as_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: Moments
) -> None:
    """Within SQLite, too, whose writes are no events."""
    draws = draws_of("instant")
    for number in range(50):
        moments.check(at(tmp_path / str(number), monkeypatch), seconds=draws.uniform(0.1, 1.2 * moments.seconds))


@pytest.mark.integration
@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_a_disk_that_fails_at_any_event_is_one_error_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: Moments, count: int
) -> None:
    disturbed = 0
    for number, event in enumerate(spread(count, moments.events, "disk")):
        root = at(tmp_path / str(event), monkeypatch)
        disturbed += moments.check(root, event, ERRORS[number % len(ERRORS)])
        shutil.rmtree(root)
    # An error that only costs a cache entry disturbs nothing.
    assert disturbed >= count / 4

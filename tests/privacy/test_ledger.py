"""The ledger never forgets, never under-counts, and answers a repeated request with the stored reply."""

import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorica.errors import UserError
from lorica.privacy.accounting import Steps, epsilon, epsilon_from_rdp, total_rdp
from lorica.privacy.ledger import (
    Ledger,
    Release,
    find_ledger,
    ledger_beside,
    lifetime_above,
    lifetime_epsilon,
    read_ledger,
    unprotected,
)
from lorica.privacy.released import _release

RELEASE = Release(
    dataset="data",
    records="alice",
    run="one",
    client=0,
    round=1,
    sampling_rate=0.1,
    noise_multiplier=1.2,
    clip_norm=1.0,
    steps=5,
    noise="secure",
    request="first",
)


def test_what_is_charged_is_there_for_another_process(tmp_path: Path) -> None:
    Ledger(tmp_path / "l.sqlite").charge(RELEASE, b"reply")
    again = Ledger(tmp_path / "l.sqlite")
    assert again.releases("data") == [RELEASE]
    assert again.releases("other data") == []
    assert again.steps("one", 0) == 5
    assert again.steps("one", 1) == again.steps("two", 0) == 0


def test_a_repeated_request_gets_the_stored_reply_until_the_next_round(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    assert ledger.recall("one", 0, "first") is None
    ledger.charge(RELEASE, b"reply")
    assert ledger.recall("one", 0, "first") == b"reply"
    for other in (("two", 0, "first"), ("one", 1, "first"), ("one", 0, "second")):
        assert ledger.recall(*other) is None
    ledger.charge(replace(RELEASE, round=2, request="second"), b"next")
    assert ledger.recall("one", 0, "first") is None
    assert ledger.recall("one", 0, "second") == b"next"
    assert ledger.steps("one", 0) == 10


def test_every_commit_is_synced(tmp_path: Path) -> None:
    connection = Ledger(tmp_path / "l.sqlite")._connect()
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    connection.close()


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.sqlite").write_bytes(b"something else entirely, and long enough to be read as a page" * 20)
    with pytest.raises(UserError, match=r"privacy\.ledger"):
        Ledger(tmp_path / "l.sqlite")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"privacy\.ledger"):
        Ledger(tmp_path / "file" / "l.sqlite")


def test_a_full_disk_refuses_the_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(tmp_path / "l.sqlite")
        connection.execute("PRAGMA max_page_count = 3")
        return connection

    monkeypatch.setattr(ledger, "_connect", connect)
    with pytest.raises(UserError, match="full"):
        ledger.charge(RELEASE, b"x" * 100_000)
    monkeypatch.undo()
    assert ledger.releases("data") == []


def test_runs_on_the_same_records_compose() -> None:
    runs = [replace(RELEASE, run=str(index), round=round_number) for index in range(3) for round_number in (1, 2)]
    assert lifetime_epsilon(runs, "alice", 1e-5) == epsilon([Steps(0.1, 1.2, 30)], 1e-5)
    planned = Steps(0.1, 1.2, 10)
    assert lifetime_epsilon(runs, "alice", 1e-5, planned) == epsilon([Steps(0.1, 1.2, 40)], 1e-5)


def test_other_clients_of_the_same_run_hold_other_records() -> None:
    both = [RELEASE, replace(RELEASE, records="bob", client=1, noise_multiplier=0.5)]
    assert lifetime_epsilon(both, "alice", 1e-5) == epsilon([RELEASE.cost], 1e-5)


def test_a_run_with_another_partition_counts_its_worst_client() -> None:
    others = [
        replace(RELEASE, run="two", records="carol", client=0, noise_multiplier=2.0),
        replace(RELEASE, run="two", records="dave", client=1, noise_multiplier=0.9),
    ]
    worst = epsilon_from_rdp(total_rdp([RELEASE.cost]) + total_rdp([others[1].cost]), 1e-5)
    assert lifetime_epsilon([RELEASE, *others], "alice", 1e-5) == pytest.approx(worst)
    # It can only over-count: the record was with one of the two.
    for other in others:
        assert lifetime_epsilon([RELEASE, *others], "alice", 1e-5) >= epsilon([RELEASE.cost, other.cost], 1e-5)


def test_releases_without_secret_noise_are_counted_apart() -> None:
    rows = [RELEASE, replace(RELEASE, run="two", noise="reproducible"), replace(RELEASE, run="three", noise="none")]
    assert lifetime_epsilon(rows, "alice", 1e-5) == epsilon([RELEASE.cost], 1e-5)
    assert unprotected(rows) == 2


def test_what_stays_with_the_owner_is_kept_with_its_release(tmp_path: Path) -> None:
    """Until the client's next round; a release without anything new to keep leaves it alone."""
    ledger = Ledger(tmp_path / "l.sqlite")
    assert ledger.kept("one", 0) == {}
    ledger.charge(RELEASE, b"reply", {"x.B": _release(torch.tensor([1.0, 2.0]))})
    ledger.charge(replace(RELEASE, steps=0, request="projection"), b"sketch")
    again = Ledger(tmp_path / "l.sqlite")
    assert torch.equal(again.kept("one", 0)["x.B"].tensor, torch.tensor([1.0, 2.0]))
    assert again.kept("one", 1) == again.kept("two", 0) == {}
    again.charge(replace(RELEASE, round=2, request="next"), b"reply", {"x.B": _release(torch.tensor([3.0]))})
    assert again.kept("one", 0)["x.B"].tensor.item() == 3.0
    with pytest.raises(AttributeError):
        again.charge(replace(RELEASE, round=3), b"reply", {"raw": torch.zeros(1)})  # type: ignore[dict-item]


def test_a_ledger_of_an_earlier_version_is_used_on(tmp_path: Path) -> None:
    """Its file has no column for what stays with the owner; nothing that it holds is lost."""
    path = tmp_path / "l.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE releases (id INTEGER PRIMARY KEY, time REAL NOT NULL, dataset TEXT NOT NULL, "
            "owner TEXT NOT NULL, run TEXT NOT NULL, client INTEGER NOT NULL, round INTEGER NOT NULL, "
            "sampling_rate REAL NOT NULL, noise_multiplier REAL NOT NULL, clip_norm REAL NOT NULL, "
            "steps INTEGER NOT NULL, noise TEXT NOT NULL, request TEXT NOT NULL, reply BLOB)"
        )
        connection.execute(
            "INSERT INTO releases VALUES "
            "(1, 0.0, 'data', 'alice', 'one', 0, 1, 0.1, 1.2, 1.0, 5, 'secure', 'first', X'00')"
        )
    assert read_ledger(path) == [(0.0, RELEASE)]
    ledger = Ledger(path)
    assert ledger.releases("data") == [RELEASE]
    ledger.charge(replace(RELEASE, round=2, request="second"), b"next", {"x": _release(torch.ones(1))})
    assert ledger.steps("one", 0) == 10
    assert set(ledger.kept("one", 0)) == {"x"}


def test_where_a_server_names_clients_every_release_counts() -> None:
    rows = [
        RELEASE,
        replace(RELEASE, client=1, records="the same records in another order"),
        replace(RELEASE, run="two", dataset="other columns of the same records"),
    ]
    assert lifetime_epsilon(rows, None, 1e-5) == epsilon([Steps(0.1, 1.2, 15)], 1e-5)
    assert lifetime_epsilon(rows, None, 1e-5, Steps(0.1, 1.2, 5)) == epsilon([Steps(0.1, 1.2, 20)], 1e-5)


@pytest.mark.parametrize("records", ["alice", None])
@pytest.mark.parametrize("factor", [0.5, 0.999, 1.001, 2.0, 100.0])
def test_a_limit_is_passed_exactly_where_the_epsilon_is_above_it(records: str | None, factor: float) -> None:
    """Below the Rényi bound too, which alone would refuse more."""
    rows = [RELEASE, replace(RELEASE, run="two", records="carol", noise_multiplier=2.0)]
    for planned in (None, Steps(0.2, 0.9, 30)):
        life = lifetime_epsilon(rows, records, 1e-5, planned)
        above = lifetime_above(life * factor, rows, records, 1e-5, planned)
        assert above == (life if factor < 1 else None)


def test_reading_a_ledger_changes_nothing_and_gives_times(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.touch()
    path = ledger_beside(data)
    before = time.time()
    Ledger(path).charge(RELEASE, b"reply")
    Ledger(path).charge(replace(RELEASE, dataset="more"), b"reply")
    content = path.read_bytes()
    assert find_ledger(data) == find_ledger(path) == path
    (first, one), (second, two) = read_ledger(path)
    assert (one, two) == (RELEASE, replace(RELEASE, dataset="more"))
    assert before <= first <= second <= time.time()
    assert Ledger(path).releases() == [one, two]
    assert path.read_bytes() == content


def test_reading_makes_no_ledger(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    for problem in ("no such file", "there is no ledger next to it"):
        with pytest.raises(UserError, match=rf"ledger = .*data\.csv.*{problem}"):
            find_ledger(data)
        data.touch()
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER)")
    with pytest.raises(UserError, match=r"other\.sqlite.*cannot be read as a ledger"):
        read_ledger(find_ledger(other))
    with pytest.raises(UserError, match="cannot be read"):
        read_ledger(tmp_path / "absent.sqlite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "lorica-home", "other.sqlite"]

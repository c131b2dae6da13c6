"""The ledger never forgets, charges before anything is computed, and answers a request again with the stored reply."""

import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.errors import UserError
from lorica.privacy import database
from lorica.privacy.ledger import Earlier, Ledger, Release
from lorica.privacy.ledger_file import find_ledger, ledger_beside, read_ledger
from lorica.privacy.ledger_rows import insert
from lorica.privacy.plan import Refused
from lorica.privacy.released import _release
from tests.ledgers import write

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
    write(Ledger(tmp_path / "l.sqlite"), RELEASE, b"reply")
    again = Ledger(tmp_path / "l.sqlite")
    assert again.releases("data") == [RELEASE]
    assert again.releases("other data") == []
    assert again.steps("one", 0) == 5
    assert again.steps("one", 1) == again.steps("two", 0) == 0


def test_a_repeated_request_gets_the_stored_reply_until_the_round_after_the_next(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    assert ledger.recall("one", 0, "first") is None
    write(ledger, RELEASE, b"reply")
    assert ledger.recall("one", 0, "first") == b"reply"
    for other in (("two", 0, "first"), ("one", 1, "first"), ("one", 0, "second")):
        assert ledger.recall(*other) is None
    write(ledger, replace(RELEASE, round=2, request="second"), b"next")
    assert ledger.recall("one", 0, "first") == b"reply"
    assert ledger.recall("one", 0, "second") == b"next"
    write(ledger, replace(RELEASE, round=3, request="third"), b"last")
    assert ledger.recall("one", 0, "first") is None
    assert ledger.recall("one", 0, "second") == b"next"
    assert ledger.steps("one", 0) == 15


def test_the_same_attempt_is_charged_once_and_has_the_same_seed(tmp_path: Path) -> None:
    """Whoever repeats it draws the same noise; the seed is erased with the reply."""
    ledger = Ledger(tmp_path / "l.sqlite")
    first = ledger.charge(RELEASE)
    assert first.seed is not None
    assert len(first.seed) == 32
    assert ledger.releases() == [RELEASE]
    assert Ledger(tmp_path / "l.sqlite").charge(RELEASE) == first
    assert ledger.releases() == [RELEASE]
    assert first.seed in (tmp_path / "l.sqlite").read_bytes()
    assert ledger.attach(first, b"reply") == b"reply"
    assert first.seed not in (tmp_path / "l.sqlite").read_bytes()
    assert ledger.charge(replace(RELEASE, request="second")).seed != first.seed


def test_of_two_processes_in_the_same_attempt_one_answers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    one, other = ledger.charge(RELEASE), ledger.charge(RELEASE)
    assert ledger.attach(one, b"first", {"x": _release(torch.ones(1))}) == b"first"
    assert ledger.attach(other, b"rounded otherwise", {"x": _release(torch.zeros(1))}) == b"first"
    assert ledger.kept("one", 0, 9)["x"].tensor.item() == 1.0


@pytest.mark.parametrize(
    "change", [{"records": "bob"}, {"noise_multiplier": 1.3}, {"request": "other"}, {"steps": 6}, {"dataset": "more"}]
)
def test_anything_else_is_another_release(tmp_path: Path, change: dict[str, Any]) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    first = ledger.charge(RELEASE)
    assert ledger.charge(replace(RELEASE, **change)).seed not in (first.seed, None)
    assert len(ledger.releases()) == 2
    # What the client keeps may have changed since the first attempt, which is not repeated then.
    assert ledger.charge(RELEASE).seed != first.seed
    assert len(ledger.releases()) == 3


def test_what_is_allowed_does_not_count_the_attempt_itself(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    write(ledger, RELEASE)
    second = replace(RELEASE, round=2, request="second")
    seen: list[tuple[int, list[Release]]] = []

    def allow(earlier: Earlier) -> None:
        seen.append((earlier.steps("one", 0), earlier.costs()))

    ledger.charge(second, allow)
    ledger.charge(second, allow)
    cost = Release("", "", "", 0, 0, 0.1, 1.2, 0.0, 5, "secure", "")
    assert seen == [(5, [cost])] * 2

    def refuse(earlier: Earlier) -> None:
        raise Refused

    for release in (second, replace(RELEASE, round=3)):
        with pytest.raises(Refused):
            ledger.charge(release, refuse)
    assert ledger.releases() == [RELEASE, second]


def test_every_commit_is_synced_and_what_is_erased_overwritten(tmp_path: Path) -> None:
    with database.transaction(Ledger(tmp_path / "l.sqlite").path) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert connection.execute("PRAGMA secure_delete").fetchone()[0] == 1


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.sqlite").write_bytes(b"something else entirely, and long enough to be read as a page" * 20)
    with pytest.raises(UserError, match=r"privacy\.ledger"):
        Ledger(tmp_path / "l.sqlite")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"privacy\.ledger"):
        Ledger(tmp_path / "file" / "l.sqlite")


def test_a_full_disk_refuses_the_charge_and_keeps_what_was_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    connect = database._connect

    def limited(path: Path, mode: str) -> sqlite3.Connection:
        connection = connect(path, mode)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    with monkeypatch.context() as patched:
        patched.setattr(database, "_connect", limited)
        with pytest.raises(UserError, match="full"):
            ledger.charge(replace(RELEASE, request="x" * 100_000))
    assert ledger.releases() == []
    charge = ledger.charge(RELEASE)
    with monkeypatch.context() as patched:
        patched.setattr(database, "_connect", limited)
        with pytest.raises(UserError, match="full"):
            ledger.attach(charge, b"x" * 100_000)
    assert ledger.releases() == [RELEASE]
    assert ledger.charge(RELEASE) == charge


def test_what_stays_with_the_owner_is_kept_with_its_release(tmp_path: Path) -> None:
    """A release without anything new to keep leaves it alone. What was kept up to an earlier round is still there."""
    ledger = Ledger(tmp_path / "l.sqlite")
    assert ledger.kept("one", 0, 1) == {}
    write(ledger, RELEASE, b"reply", {"x.B": _release(torch.tensor([1.0, 2.0]))})
    write(ledger, replace(RELEASE, steps=0, request="projection"), b"sketch")
    again = Ledger(tmp_path / "l.sqlite")
    assert torch.equal(again.kept("one", 0, 1)["x.B"].tensor, torch.tensor([1.0, 2.0]))
    assert again.kept("one", 1, 9) == again.kept("two", 0, 9) == {}
    for number in (5, 6, 7):
        tensor = torch.tensor([float(number)])
        write(again, replace(RELEASE, round=number, request=f"in {number}"), b"reply", {"x.B": _release(tensor)})
        # A server that goes back to its last checkpoint but one evaluates what was kept before it.
        for earlier in (number - 1, number):
            assert again.kept("one", 0, earlier)["x.B"].tensor.numel() == (2 if earlier == 4 else 1)
    assert [again.kept("one", 0, number)["x.B"].tensor[0].item() for number in (5, 6, 7)] == [5.0, 6.0, 7.0]
    assert again.kept("one", 0, 4) == {}
    with pytest.raises(AttributeError):
        write(again, replace(RELEASE, round=3), b"reply", {"raw": torch.zeros(1)})  # type: ignore[dict-item]


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
    assert read_ledger(path).entries == [(0.0, RELEASE)]
    ledger = Ledger(path)
    assert ledger.releases("data") == [RELEASE]
    write(ledger, replace(RELEASE, round=2, request="second"), b"next", {"x": _release(torch.ones(1))})
    assert ledger.steps("one", 0) == 10
    assert set(ledger.kept("one", 0, 9)) == {"x"}
    # Its rows are a chain from now on.
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE releases SET steps = 1 WHERE id = 1")
    with pytest.raises(UserError, match="not the ledger last used"):
        Ledger(path)


def test_both_noise_multipliers_of_shared_noise_are_kept(tmp_path: Path) -> None:
    """In the row, in its link, and in what Lorica's home knows of other ledgers."""
    path = tmp_path / "l.sqlite"
    row = replace(RELEASE, noise_multiplier=2.0, own_noise_multiplier=1.0)
    write(Ledger(path), RELEASE, b"reply")
    write(Ledger(path), row, b"reply")
    write(Ledger(path), replace(row, round=2, own_noise_multiplier=0.9), b"reply")
    assert Ledger(path).releases()[:2] == [RELEASE, row]
    found = {one.noise_multiplier: one.own_noise_multiplier for one in Ledger(path).exposures()}
    # The least own noise of each exposure.
    assert found == {RELEASE.noise_multiplier: RELEASE.noise_multiplier, 2.0: 0.9}
    assert row.by_own_noise() == replace(row, noise_multiplier=1.0, own_noise_multiplier=None)
    assert RELEASE.by_own_noise() == RELEASE
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE releases SET own_noise_multiplier = 2.0 WHERE id = 2")
    with pytest.raises(UserError, match="not the ledger last used"):
        Ledger(path)


def test_a_ledger_without_shared_noise_keeps_its_links(tmp_path: Path) -> None:
    """A column that was added later changes no link of the rows before it."""
    path = tmp_path / "l.sqlite"
    write(Ledger(path), RELEASE, b"reply")
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE releases DROP COLUMN own_noise_multiplier")
        connection.execute("ALTER TABLE reservations DROP COLUMN own_noise_multiplier")
    assert read_ledger(path).problem is None
    assert Ledger(path).releases() == [RELEASE]


def test_reading_a_ledger_changes_nothing_and_gives_times(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.touch()
    path = ledger_beside(data)
    before = time.time()
    write(Ledger(path), RELEASE, b"reply")
    write(Ledger(path), replace(RELEASE, dataset="more"), b"reply")
    content = path.read_bytes()
    assert find_ledger(data) == find_ledger(path) == path
    (first, one), (second, two) = read_ledger(path).entries
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


def test_replies_of_a_run_that_has_ended_are_deleted_when_the_next_one_ends(tmp_path: Path) -> None:
    """Not before: the server of the last run may have stopped before it wrote its result, and ask again."""
    ledger = Ledger(tmp_path / "l.sqlite")
    runs = [replace(RELEASE, run=name, request=name) for name in ("one", "two", "three")]
    for run in runs:
        write(ledger, run, b"reply")
    ledger.end("one")
    ledger.end("one", 0)
    assert ledger.recall("one", 0, "one") == b"reply"
    ledger.end("two", 0)
    # "three" goes on.
    assert [ledger.recall(run.run, 0, run.run) is not None for run in runs] == [False, True, True]
    # A run that is resumed after its end goes on too.
    write(ledger, replace(runs[1], round=2, request="again"))
    ledger.end("three")
    assert ledger.recall("two", 0, "again") == b"reply"
    assert ledger.steps("one", 0) == 5


def test_costs_are_the_sums_of_all_rows_also_those_of_another_process(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    ledger, other = Ledger(path), Ledger(path)
    assert ledger.costs() == []
    shared = replace(RELEASE, noise_multiplier=2.0, own_noise_multiplier=1.0)
    for writer, row in ((ledger, RELEASE), (other, replace(RELEASE, run="two")), (other, shared)):
        write(writer, row)
    cost = Release("", "", "", 0, 0, 0.1, 1.2, 0.0, 10, "secure", "")
    assert ledger.costs() == [cost, replace(cost, noise_multiplier=2.0, steps=5, own_noise_multiplier=1.0)]
    write(ledger, replace(RELEASE, client=3, noise="none", steps=1))
    assert other.costs() == [*ledger.costs()[:2], replace(cost, noise="none", steps=1)]
    # All of what a policy asks about, row by row.
    assert sum(one.steps for one in other.costs()) == sum(row.steps for row in ledger.releases())
    assert ledger.charged("one") == {0: (10, 2), 3: (1, 1)}
    assert ledger.datasets("two") == {0: {"data"}}


def test_a_message_reads_no_rows_of_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own count of steps does not grow with the rows of other runs."""

    def steps(rows: int) -> int:
        ledger = Ledger(tmp_path / f"{rows}.sqlite")
        with database.transaction(ledger.path) as connection:
            tip = ledger.identity
            for number in range(rows):
                insert(connection, replace(RELEASE, run="past", round=number, request=str(number)), tip)
                (tip,) = connection.execute("SELECT chain FROM releases ORDER BY id DESC").fetchone()
        ledger = Ledger(ledger.path)
        ledger.costs()
        done = [0]
        connect = database._connect

        def counting(path: Path, mode: str) -> sqlite3.Connection:
            connection = connect(path, mode)
            connection.set_progress_handler(lambda: done.__setitem__(0, done[0] + 1) or 0, 10)
            return connection

        with monkeypatch.context() as patched:
            patched.setattr(database, "_connect", counting)
            for number in (1, 2):
                request = str(number)
                assert ledger.recall("one", 0, request) is None
                assert ledger.last_round("one", 0) == number - 1
                ledger.kept("one", 0, number)
                charge = ledger.charge(replace(RELEASE, round=number, request=request), lambda earlier: earlier.costs())
                ledger.attach(charge, b"reply")
                ledger.costs()
                ledger.elsewhere("alice", reserved=True)
                ledger.steps("one", 0)
        return done[0]

    assert steps(1000) < 1.2 * steps(10)


def test_a_ledger_without_an_index_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    write(Ledger(path), RELEASE, b"reply")
    with sqlite3.connect(path) as connection:
        connection.execute("DROP INDEX releases_by_client")
        connection.execute("DROP TABLE ended")
    assert Ledger(path).recall("one", 0, "first") == b"reply"
    with sqlite3.connect(path) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT steps FROM releases WHERE run = '' AND client = 0"
        ).fetchall()
    assert "releases_by_client" in str(plan)

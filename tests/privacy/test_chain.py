"""A ledger that was deleted, replaced, edited or set back to an older copy is refused until the owner agrees."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from lorica.errors import UserError
from lorica.privacy.chain import Broken, Head, link, verify
from lorica.privacy.ledger import Ledger, Release
from lorica.privacy.ledger_file import accept_ledger, find_ledger, read_ledger
from tests.ledgers import write
from tests.privacy.test_ledger import RELEASE


def three_rows(path: Path) -> list[Release]:
    """A ledger with three rows, of a data file beside it."""
    ledger = Ledger(path)
    releases = [replace(RELEASE, round=number, request=str(number)) for number in (1, 2, 3)]
    for release in releases:
        write(ledger, release)
    return releases


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def recomputed(path: Path) -> None:
    """What an attacker does who knows how links are made."""
    change(path, "DELETE FROM releases WHERE id = 2")
    with closing(sqlite3.connect(path)) as connection, connection:
        (previous,) = connection.execute("SELECT identity FROM ledger").fetchone()
        columns = "time, dataset, owner, run, client, round, sampling_rate, noise_multiplier, clip_norm, steps, noise"
        rows = connection.execute(f"SELECT id, {columns}, request, unit FROM releases ORDER BY id").fetchall()
        # Two rows more, so that there are not fewer than before.
        for number, *content in [*rows, (7, *rows[-1][1:]), (8, *rows[-1][1:])]:
            previous = hashlib.sha256(json.dumps([previous, *content]).encode()).hexdigest()
            marks = ", ".join("?" * (len(content) + 2))
            connection.execute(
                f"INSERT OR REPLACE INTO releases (id, {columns}, request, unit, chain) VALUES ({marks})",
                (number, *content, previous),
            )


ATTACKS: dict[str, Callable[[Path], None]] = {
    "first row deleted": lambda path: change(path, "DELETE FROM releases WHERE id = 1"),
    "last row deleted": lambda path: change(path, "DELETE FROM releases WHERE id = 3"),
    "all rows deleted": lambda path: change(path, "DELETE FROM releases"),
    "steps edited": lambda path: change(path, "UPDATE releases SET steps = 1 WHERE id = 2"),
    "noise edited": lambda path: change(path, "UPDATE releases SET noise_multiplier = 9.0 WHERE id = 3"),
    "records edited": lambda path: change(path, "UPDATE releases SET owner = 'nobody' WHERE id = 1"),
    "rows exchanged": lambda path: change(
        path,
        "UPDATE releases SET id = 9 WHERE id = 1",
        "UPDATE releases SET id = 1 WHERE id = 2",
        "UPDATE releases SET id = 2 WHERE id = 9",
    ),
    "row and links made anew": recomputed,
    "file deleted": lambda path: path.unlink(),
    "file emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_ledger_that_is_not_what_it_was_is_refused(tmp_path: Path, attack: str) -> None:
    path = tmp_path / "l.sqlite"
    three_rows(path)
    opened = Ledger(path)
    whole = path.read_bytes()
    ATTACKS[attack](path)
    with pytest.raises(UserError, match=rf"{path}.*not the ledger last used.*--accept"):
        Ledger(path)
    if attack == "last row deleted":
        # By a process, too, that had opened it before.
        with pytest.raises(UserError, match="not the ledger"):
            opened.charge(replace(RELEASE, round=4))
    # The first remedy.
    path.unlink(missing_ok=True)
    path.write_bytes(whole)
    assert len(Ledger(path).releases()) == 3


def test_an_older_copy_is_refused_even_at_another_place(tmp_path: Path) -> None:
    path, copy = tmp_path / "l.sqlite", tmp_path / "elsewhere" / "l.sqlite"
    write(Ledger(path), RELEASE)
    copy.parent.mkdir()
    shutil.copy(path, copy)
    write(Ledger(path), replace(RELEASE, round=2, request="second"))
    for place in (copy, path):
        shutil.copy(copy, place) if place != copy else None
        with pytest.raises(UserError, match="it has 1 rows, but had 2"):
            Ledger(place)


def test_a_copy_that_goes_on_makes_the_original_the_older_one(tmp_path: Path) -> None:
    """Otherwise the budget could be spent once by each copy."""
    path, copy = tmp_path / "l.sqlite", tmp_path / "copy.sqlite"
    write(Ledger(path), RELEASE)
    shutil.copy(path, copy)
    write(Ledger(copy), replace(RELEASE, request="by the copy"))
    with pytest.raises(UserError, match="not the ledger"):
        Ledger(path)


def test_a_new_ledger_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "l.sqlite", tmp_path / "other.sqlite"
    three_rows(path)
    write(Ledger(other), RELEASE)
    shutil.copy(other, path)
    with pytest.raises(UserError, match="another ledger was used here"):
        Ledger(path)


def test_a_ledger_may_move_and_an_empty_one_be_deleted(tmp_path: Path) -> None:
    path, place = tmp_path / "l.sqlite", tmp_path / "new-home" / "l.sqlite"
    releases = three_rows(path)
    place.parent.mkdir()
    path.rename(place)
    assert Ledger(place).releases() == releases
    # What comes next at the old place is another one.
    Ledger(path)
    path.unlink()
    Ledger(path)


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_owner_can_accept_the_loss(tmp_path: Path, attack: str) -> None:
    path = tmp_path / "data.csv.ledger.sqlite"
    (tmp_path / "data.csv").touch()
    three_rows(path)
    ATTACKS[attack](path)
    if path.is_file() and path.stat().st_size:
        assert read_ledger(path).problem is not None
    accept_ledger(find_ledger(tmp_path / "data.csv", lost=True))
    ledger = Ledger(path)
    write(ledger, replace(RELEASE, round=9, request="afterwards"))
    assert read_ledger(path).problem is None
    assert Ledger(path).releases() == ledger.releases()


def test_a_row_whose_head_was_not_noted_before_a_crash_is_no_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    write(ledger, RELEASE)
    with monkeypatch.context() as patched:
        patched.setattr("lorica.privacy.home.Home.remember", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            ledger.charge(replace(RELEASE, round=2))
    assert len(Ledger(path).releases()) == 2
    change(path, "DELETE FROM releases WHERE id = 2")
    with pytest.raises(UserError, match="not the ledger"):
        Ledger(path)


def test_links_are_hashes_of_all_that_came_before() -> None:
    rows, previous = [], "identity"
    for content in (["a", 1, 0.5], ["b", 2, float("inf")]):
        previous = link(previous, content)
        rows.append((*content, previous))
    assert rows[0][-1] == hashlib.sha256(b'["identity", "a", 1, 0.5]').hexdigest()
    assert verify("identity", rows, None) == verify("identity", rows, Head(1, rows[0][-1])) == Head(2, previous)
    for wrong in (Head(1, previous), Head(2, rows[0][-1]), Head(3, previous)):
        with pytest.raises(Broken):
            verify("identity", rows, wrong)
    with pytest.raises(Broken):
        verify("another identity", rows, None)

"""The ledger as a file: find it, read it, release a reservation, accept a loss."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorica.errors import UserError
from lorica.files import home_folder
from lorica.paths import user_path
from lorica.privacy import database, record_sets
from lorica.privacy.chain import Broken, verify
from lorica.privacy.exposures import Exposure, merged
from lorica.privacy.home import Home, index_in
from lorica.privacy.ledger import Ledger
from lorica.privacy.ledger_rows import (
    CHARGED,
    Release,
    add_columns,
    chained,
    exposures_of,
    link_all,
    names_of,
    prepare,
    release_of,
)


@dataclass(frozen=True)
class Book:
    """The content of a ledger, opened read-only.

    Attributes:
        entries: time (seconds since 1970) and content of every release, oldest first.
        own: exposures in the file; empty if an earlier version of Lorica wrote it.
        problem: why the file is not the ledger last used here; None if it is.
        indexed: fingerprints of the records stored in the file.
        names: id -> name of the runs, where it is known.
    """

    path: Path
    entries: list[tuple[float, Release]]
    own: list[Exposure]
    problem: str | None
    indexed: frozenset[str]
    names: dict[str, str]

    def members(self, records: Collection[str]) -> record_sets.Members:
        """As `Ledger.members`."""
        if self.indexed.isdisjoint(records):
            return {}
        with database.reading(self.path, only=True) as connection:
            found = record_sets.members(connection, records)
        return record_sets.united(found, {name: own for name, own in Home().members(records).items() if name in found})

    def exposures(self) -> list[Exposure]:
        """As `Ledger.exposures`."""
        return merged([*self.own, *Home().exposures()])

    def unindexed(self, dataset: str) -> list[Release]:
        """As `Ledger.unindexed`."""
        releases = [release for _, release in self.entries if release.dataset == dataset]
        return [release for release in releases if release.records not in self.indexed]


def ledger_beside(data: Path) -> Path:
    """Default path of the ledger of a data file or folder."""
    return data.parent / f"{data.name}.ledger.sqlite"


def find_ledger(path: Path, lost: bool = False) -> Path:
    """Find the ledger next to a data file or folder; a path of a ledger is returned as it is.

    Args:
        lost: also find a ledger that was there before and is now missing.

    Raises:
        UserError: there is no such file, or no ledger next to it.
    """
    path = user_path("ledger", path).absolute()
    beside = ledger_beside(path)
    if os.path.isfile(beside) or (lost and Home().at(beside)):
        return beside
    if lost and Home().at(path):
        return path
    if not path.exists():
        raise UserError("ledger", str(path), "no such file", "give the path of a ledger or of its data")
    if path.is_dir() or not _is_database(path):
        problem = f"not a ledger, and there is no ledger next to it ({beside.name})"
        raise UserError("ledger", str(path), problem, "give the path of the ledger itself")
    return path


def working_copy(path: Path, folder: Path) -> Ledger:
    """A copy of a ledger, and of all that Lorica's home knows of ledgers: what is charged to it is charged to nothing
    else. A ledger that does not exist yet is a new one.

    Args:
        folder: where the copy goes; readable by the owner alone, like the ledger.

    Raises:
        UserError: as `Ledger`.
    """
    home = Home(folder)
    for source, target in ((index_in(home_folder()), home.path), (path, folder / "ledger.sqlite")):
        if source.is_file():
            database.create(target)
            with database.reading(source, only=True) as stored, closing(sqlite3.connect(target)) as copied:
                stored.backup(copied)
    if home.at(path) and not path.exists():
        return Ledger(path, home)
    return Ledger(folder / "ledger.sqlite", home)


def read_ledger(path: Path) -> Book:
    """Read a ledger without changing it.

    Raises:
        UserError: the file is not a ledger.
    """
    with _readable(path), closing(sqlite3.connect(":memory:")) as connection:
        with database.reading(path, only=True) as stored:
            stored.backup(connection)
        # An older version of Lorica may have created the ledger: the copy in memory gets the missing columns.
        add_columns(connection)
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        rows = connection.execute(f"SELECT {CHARGED} FROM releases ORDER BY id").fetchall()
        entries = [(row[0], release_of(row[1:])) for row in rows]
        if "ledger" not in tables:
            return Book(path, entries, [], None, frozenset(), {})
        (identity,) = connection.execute("SELECT identity FROM ledger").fetchone()
        home, problem = Home(), None
        if home.at(path) - {identity}:
            problem = "another ledger was used here"
        try:
            verify(identity, chained(connection), home.head(identity))
        except Broken as broken:
            problem = str(broken)
        indexed = frozenset(row[0] for row in connection.execute("SELECT records FROM record_sets"))
        return Book(path, entries, exposures_of(connection, identity), problem, indexed, names_of(connection))


def release_reservation(path: Path, run: str) -> None:
    """Release the unused reservation of the run with this name, or whose id starts with `run`.

    Raises:
        UserError: no such run has a reservation, or several have.
    """
    ledger = Ledger(path)
    names = ledger.run_names()
    held = sorted({one.run for one in ledger.exposures() if one.ledger == ledger.identity and one.outstanding})
    found = [one for one in held if one.startswith(run) or names.get(one) == run]
    if len(found) != 1:
        problem = "no such run has a reservation" if not found else "several runs have this name or start of an id"
        remedy = f"choose one of: {', '.join(held)}" if held else "remove --release, since nothing is reserved"
        raise UserError("--release", run, problem, remedy)
    ledger.end(found[0])


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def accept_ledger(path: Path) -> None:
    """Accept a ledger that is older than before, changed or deleted, and continue with it or with a new one.

    Lost rows that are known from Lorica's home folder still count for their records.

    Raises:
        UserError: the file is not a ledger, or cannot be written.
    """
    home = Home()
    if not path.is_file():
        home.forget(path, None)
        return
    with _readable(path), database.transaction(path) as connection:
        identity = prepare(connection)
        head = link_all(connection, identity)
    home.forget(path, identity)
    home.remember(identity, path, head)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        problem = f"cannot be read as a ledger ({error})"
        raise UserError("ledger", str(path), problem, "give the path of a ledger") from error

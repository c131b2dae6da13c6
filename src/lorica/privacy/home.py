"""An index of all ledgers of this account, in Lorica's home folder: the head of each chain, and the charged records.

It detects that a ledger was deleted, that an older copy was restored, or that the data was copied to a place without a
ledger. If the index is deleted as well, nothing on this machine can detect that.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorica.errors import UserError
from lorica.files import home_folder, private_folder
from lorica.privacy import database, record_sets
from lorica.privacy.chain import Head
from lorica.privacy.exposures import Exposure
from lorica.privacy.unit import PrivacyUnit

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS heads (ledger TEXT PRIMARY KEY, path TEXT NOT NULL, rows INTEGER NOT NULL, "
    "link TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS exposures (ledger TEXT, run TEXT, client INTEGER, records TEXT, unit TEXT, noise TEXT, "
    "sampling_rate REAL, noise_multiplier REAL, steps INTEGER, planned INTEGER, releases INTEGER, "
    "own_noise_multiplier REAL, "
    "PRIMARY KEY (ledger, run, client, records, unit, noise, sampling_rate, noise_multiplier))",
)


def _exposure(row: sqlite3.Row | tuple[object, ...]) -> Exposure:
    ledger, run, client, records, unit, noise, rate, noise_multiplier, *counts, own = row
    terms = (noise, rate, noise_multiplier, *counts, noise_multiplier if own is None else own)
    return Exposure(ledger, run, client, records, PrivacyUnit.parse(str(unit)), *terms)  # type: ignore[arg-type]


def _row(exposure: Exposure) -> tuple[object, ...]:
    return tuple(str(value) if isinstance(value, PrivacyUnit) else value for value in vars(exposure).values())


def index_in(home: Path) -> Path:
    """The index's file in a home folder."""
    return home / "ledgers" / "index.sqlite"


class Home:
    """The index `ledgers/index.sqlite` in Lorica's home folder.

    Args:
        folder: takes the place of Lorica's home.

    Raises:
        UserError: the file cannot be opened or written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = index_in(folder or home_folder())
        with self._errors():
            private_folder(self.path.parent)
            database.create(self.path)
            with database.transaction(self.path) as connection:
                record_sets.prepare(connection)
                for statement in _SCHEMA:
                    connection.execute(statement)
                # A column that older versions of Lorica did not create.
                if "own_noise_multiplier" not in {row[1] for row in connection.execute("PRAGMA table_info(exposures)")}:
                    connection.execute("ALTER TABLE exposures ADD COLUMN own_noise_multiplier REAL")

    def key(self) -> bytes:
        """The secret key of this account, for digests that others must not be able to guess."""
        with self._reading() as connection:
            (key,) = connection.execute("SELECT key FROM record_key").fetchone()
        return bytes(key)

    def head(self, ledger: str) -> Head | None:
        """The last known head of the ledger with this id; None if unknown."""
        with self._reading() as connection:
            row = connection.execute("SELECT rows, link FROM heads WHERE ledger = ?", (ledger,)).fetchone()
        return None if row is None else Head(*row)

    def at(self, path: Path) -> set[str]:
        """Ids of the ledgers with at least one release that were last used at a path."""
        with self._reading() as connection:
            found = connection.execute("SELECT ledger FROM heads WHERE path = ? AND rows > 0", (_place(path),))
            return {row[0] for row in found}

    def file_of(self, ledger: str) -> Path | None:
        """Where the ledger with this id was last used; None if unknown."""
        with self._reading() as connection:
            row = connection.execute("SELECT path FROM heads WHERE ledger = ?", (ledger,)).fetchone()
        return None if row is None else Path(row[0])

    def remember(self, ledger: str, path: Path, head: Head, exposures: Iterable[Exposure] = ()) -> None:
        """Store a ledger's head, path and exposures. Known counts never decrease."""
        with self.writing() as connection:
            connection.execute(
                "INSERT INTO heads VALUES (?, ?, ?, ?) ON CONFLICT (ledger) DO UPDATE SET path = excluded.path, "
                "link = CASE WHEN excluded.rows > rows THEN excluded.link ELSE link END, "
                "rows = MAX(rows, excluded.rows)",
                (ledger, _place(path), head.rows, head.link),
            )
            self.note(connection, exposures)

    @staticmethod
    def note(connection: sqlite3.Connection, exposures: Iterable[Exposure]) -> None:
        """Write exposures within a transaction. Steps and releases never decrease."""
        connection.executemany(
            "INSERT INTO exposures VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "steps = MAX(steps, excluded.steps), planned = MAX(planned, excluded.planned), "
            "releases = MAX(releases, excluded.releases), own_noise_multiplier = "
            "MIN(COALESCE(own_noise_multiplier, noise_multiplier), excluded.own_noise_multiplier)",
            [_row(exposure) for exposure in exposures],
        )

    def forget(self, path: Path, ledger: str | None) -> None:
        """Accept that a ledger is lost or older: delete the heads at its path. Exposures are kept."""
        with self.writing() as connection:
            connection.execute("DELETE FROM heads WHERE path = ? OR ledger = ?", (_place(path), ledger))

    @staticmethod
    def end(connection: sqlite3.Connection, ledger: str, run: str, client: int | None = None) -> None:
        """Release, within a transaction, the unused reservation of a run or of one of its clients."""
        connection.execute(
            "UPDATE exposures SET planned = 0 WHERE ledger = ? AND run = ? AND client = COALESCE(?, client)",
            (ledger, run, client),
        )

    def members(self, records: Collection[str]) -> record_sets.Members:
        """`record_sets.members`."""
        with self._reading() as connection:
            return record_sets.members(connection, records)

    def exposures(self) -> list[Exposure]:
        """The exposures of all ledgers."""
        with self._reading() as connection:
            return [_exposure(row) for row in connection.execute("SELECT * FROM exposures")]

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A write transaction. No other ledger of this account can be charged meanwhile."""
        with self._errors(), database.transaction(self.path) as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._errors(), database.reading(self.path) as connection:
            yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, ValueError) as error:
            # SQLite's operational errors, such as those of a full disk, are no damage.
            if isinstance(error, sqlite3.OperationalError):
                raise self._unusable(error) from error
            raise UserError(
                "LORICA_HOME",
                str(self.path),
                f"the index of all ledgers is damaged ({error})",
                "restore it from a copy; if there is none, delete it, and it is written again from the ledgers as they "
                "are used (what was released from lost ledgers is then forgotten)",
            ) from error
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            "LORICA_HOME",
            str(self.path),
            f"the index of all ledgers cannot be used ({error})",
            "make the file and its folder writable, or set the environment variable LORICA_HOME to another folder",
        )


def _place(path: Path) -> str:
    return str(path.expanduser().resolve())

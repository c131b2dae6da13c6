"""The rows of a ledger, and the SQL that reads and writes them within a transaction."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from lorica.privacy import record_sets
from lorica.privacy.accounting import Steps
from lorica.privacy.chain import Broken, Head, link
from lorica.privacy.exposures import Exposure, merged
from lorica.privacy.randomness import secret_seed
from lorica.privacy.unit import RECORD, PrivacyUnit

_SCHEMA = (
    """
    CREATE TABLE IF NOT EXISTS releases (
        id INTEGER PRIMARY KEY,
        time REAL NOT NULL,
        dataset TEXT NOT NULL, owner TEXT NOT NULL, run TEXT NOT NULL, client INTEGER NOT NULL, round INTEGER NOT NULL,
        sampling_rate REAL NOT NULL, noise_multiplier REAL NOT NULL, clip_norm REAL NOT NULL, steps INTEGER NOT NULL,
        noise TEXT NOT NULL, request TEXT NOT NULL, reply BLOB, kept BLOB, unit TEXT NOT NULL DEFAULT 'record',
        seed BLOB, chain TEXT, own_noise_multiplier REAL, reply_sha256 BLOB, kept_sha256 BLOB
    )
    """,
    "CREATE TABLE IF NOT EXISTS ledger (identity TEXT NOT NULL)",
    # For people: ids decide, and a server may choose any name.
    "CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, name TEXT NOT NULL)",
    """
    CREATE TABLE IF NOT EXISTS reservations (
        run TEXT NOT NULL, client INTEGER NOT NULL, owner TEXT NOT NULL, unit TEXT NOT NULL, noise TEXT NOT NULL,
        sampling_rate REAL NOT NULL, noise_multiplier REAL NOT NULL, steps INTEGER NOT NULL, time REAL NOT NULL,
        own_noise_multiplier REAL, PRIMARY KEY (run, client)
    )
    """,
    # Runs that have ended, whose replies are still stored.
    "CREATE TABLE IF NOT EXISTS ended (run TEXT NOT NULL, client INTEGER NOT NULL, PRIMARY KEY (run, client))",
    "CREATE INDEX IF NOT EXISTS releases_by_client ON releases (run, client, round)",
)
# Columns that older versions of Lorica did not create.
_ADDED = {
    "releases": {
        "kept": "BLOB",
        "unit": "TEXT NOT NULL DEFAULT 'record'",
        "seed": "BLOB",
        "chain": "TEXT",
        "own_noise_multiplier": "REAL",
        "reply_sha256": "BLOB",
        "kept_sha256": "BLOB",
    },
    "reservations": {"own_noise_multiplier": "REAL"},
}


@dataclass(frozen=True)
class Release:
    """One row of the ledger: the release in one reply.

    Attributes:
        dataset: fingerprint of the whole training data.
        records: fingerprint of the records of this client (the column `owner`).
        run: id of the run.
        steps: number of noisy gradients behind the reply.
        noise: `secure`, `reproducible` or `none`.
        request: digest of the request; the same request gets the stored reply again.
        unit: the unit of privacy.
        noise_multiplier: `σ` of the guarantee.
        own_noise_multiplier: `σ` of the client's own noise, if the members of a secure sum share the noise and
            `noise_multiplier` is that of the sum; otherwise None.
    """

    dataset: str
    records: str
    run: str
    client: int
    round: int
    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    noise: str
    request: str
    unit: PrivacyUnit = RECORD
    own_noise_multiplier: float | None = None

    @property
    def cost(self) -> Steps:
        return Steps(self.sampling_rate, self.noise_multiplier, self.steps)

    def by_own_noise(self) -> Release:
        """The release as an adversary sees it who gets this client's own reply."""
        own = self.own_noise_multiplier
        return self if own is None else replace(self, noise_multiplier=own, own_noise_multiplier=None)


COLUMNS = ", ".join("owner" if field.name == "records" else field.name for field in fields(Release))


CHARGED = f"time, {COLUMNS}"
TERMS = "run, client, owner, unit, noise, sampling_rate, noise_multiplier"


def release_of(row: tuple[Any, ...]) -> Release:
    return Release(*(*row[:-2], PrivacyUnit.parse(row[-2]), row[-1]))


def _row_of(release: Release) -> tuple[Any, ...]:
    return tuple(str(value) if isinstance(value, PrivacyUnit) else value for value in vars(release).values())


@dataclass(frozen=True)
class Charge:
    """A row of the ledger without a reply yet.

    Attributes:
        row: id of the row.
        seed: secret seed of the batches and the noise; None for reproducible noise.
    """

    row: int
    seed: bytes | None


def prepare(connection: sqlite3.Connection) -> str:
    """Create or upgrade the tables, and return the id of the ledger."""
    for statement in _SCHEMA:
        connection.execute(statement)
    add_columns(connection)
    record_sets.prepare(connection)
    found = connection.execute("SELECT identity FROM ledger").fetchone()
    if found is not None:
        return str(found[0])
    identity = uuid.uuid4().hex
    connection.execute("INSERT INTO ledger VALUES (?)", (identity,))
    link_all(connection, identity)
    return identity


def add_columns(connection: sqlite3.Connection) -> None:
    """Add the columns that an older version of Lorica did not create."""
    for table, added in _ADDED.items():
        columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        for name, kind in added.items():
            if columns and name not in columns:
                connection.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")


def link_all(connection: sqlite3.Connection, identity: str) -> Head:
    """Link all existing rows into a new chain."""
    rows = connection.execute(f"SELECT id, {CHARGED} FROM releases ORDER BY id").fetchall()
    previous = identity
    for row, *content in rows:
        previous = link(previous, content)
        connection.execute("UPDATE releases SET chain = ? WHERE id = ?", (previous, row))
    return Head(len(rows), previous)


def chained(connection: sqlite3.Connection) -> Iterator[tuple[object, ...]]:
    return connection.execute(f"SELECT {CHARGED}, chain FROM releases ORDER BY id")


@dataclass(frozen=True)
class Tip:
    """The last row of a chain that this process has read.

    Attributes:
        head: number and link of that row.
        row: its id; 0 if there is none.
    """

    head: Head
    row: int


def tip_of(connection: sqlite3.Connection, head: Head) -> Tip:
    """The last row of a chain that has just been read to its end."""
    (row,) = connection.execute("SELECT COALESCE(MAX(id), 0) FROM releases").fetchone()
    return Tip(head, row)


def advanced(connection: sqlite3.Connection, tip: Tip, seen: Head | None) -> Tip:
    """The present end of the chain, reading only the rows that were written after `tip`.

    Args:
        seen: the last head, stored in another place.

    Raises:
        Broken: the row of `tip` has changed, or the chain does not contain `seen`.
    """
    rows = connection.execute("SELECT id, chain FROM releases WHERE id >= ? ORDER BY id", (max(tip.row, 1),)).fetchall()
    if tip.row and (not rows or rows.pop(0) != (tip.row, tip.head.link)):
        raise Broken("rows are missing")
    ahead = 0 if seen is None else seen.rows - tip.head.rows
    if seen is not None and ahead > 0 and (ahead > len(rows) or rows[ahead - 1][1] != seen.link):
        raise Broken("rows are missing")
    return Tip(Head(tip.head.rows + len(rows), rows[-1][1]), rows[-1][0]) if rows else tip


def erase_seeds(connection: sqlite3.Connection, run: str, client: int | None) -> None:
    """Erase the seeds of a run's rows, or of those of one client."""
    where, values = _of(run, client)
    connection.execute(f"UPDATE releases SET seed = NULL {where} AND seed IS NOT NULL", values)


def insert(connection: sqlite3.Connection, release: Release, previous: str) -> Charge:
    """Add a row to the end of the chain, whose last link is `previous`."""
    seed = None if release.noise == "reproducible" else secret_seed()
    erase_seeds(connection, release.run, release.client)
    connection.execute("DELETE FROM ended WHERE run = ? AND client = ?", (release.run, release.client))
    values = (time.time(), *_row_of(release), seed)
    marks = ", ".join("?" * len(values))
    row = connection.execute(f"INSERT INTO releases ({CHARGED}, seed) VALUES ({marks})", values).lastrowid
    assert row is not None
    # As stored: SQLite may have converted an integer to a float.
    content = connection.execute(f"SELECT {CHARGED} FROM releases WHERE id = ?", (row,)).fetchone()
    connection.execute("UPDATE releases SET chain = ? WHERE id = ?", (link(previous, content), row))
    return Charge(row, seed)


def names_of(connection: sqlite3.Connection) -> dict[str, str]:
    """Id -> name of the runs in a ledger; of those that an older version of Lorica wrote, no name is known."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone() is None:
        return {}
    return dict(connection.execute("SELECT run, name FROM runs WHERE name <> ''"))


def exposures_of(
    connection: sqlite3.Connection, identity: str, run: str | None = None, client: int | None = None
) -> list[Exposure]:
    """The exposures in a ledger's rows and reservations, by default of all runs."""
    where, values = _of(run, client)
    own = "COALESCE(own_noise_multiplier, noise_multiplier)"
    done = f"SELECT {TERMS}, SUM(steps), 0, COUNT(*), MIN({own}) FROM releases {where} GROUP BY {TERMS}"
    planned = f"SELECT {TERMS}, 0, steps, 0, {own} FROM reservations {where}"
    rows = [row for query in (done, planned) for row in connection.execute(query, values)]
    return merged(
        Exposure(identity, run, client, records, PrivacyUnit.parse(unit), *rest)
        for run, client, records, unit, *rest in rows
    )


def _of(run: str | None, client: int | None) -> tuple[str, tuple[str | int, ...]]:
    """The condition for the rows of a run, or of one of its clients, and its values."""
    if run is None:
        return "", ()
    return ("WHERE run = ?", (run,)) if client is None else ("WHERE run = ? AND client = ?", (run, client))


class Sums:
    """Steps and releases of all rows by their terms, kept up to date by reading the new rows only."""

    def __init__(self) -> None:
        self._row = 0
        self._found: dict[tuple[Any, ...], list[int]] = {}

    def update(self, connection: sqlite3.Connection) -> Sums:
        """Read the rows written since the last call. Rows are never changed or deleted, and a transaction reads the
        rows of others before it adds its own."""
        (last,) = connection.execute("SELECT COALESCE(MAX(id), 0) FROM releases").fetchone()
        terms = f"{TERMS}, own_noise_multiplier"
        query = f"SELECT SUM(steps), COUNT(*), {terms} FROM releases WHERE id > ? GROUP BY {terms}"
        for steps, releases, *key in connection.execute(query, (self._row,)):
            total = self._found.setdefault(tuple(key), [0, 0])
            total[0] += steps
            total[1] += releases
        self._row = last
        return self

    def steps(self) -> dict[tuple[Any, ...], int]:
        """Steps by `TERMS`."""
        found: dict[tuple[Any, ...], int] = {}
        for key, (steps, _) in self._found.items():
            found[key[:-1]] = found.get(key[:-1], 0) + steps
        return found

    def costs(self, besides: Release | None) -> list[Release]:
        """All rows, summed over runs, clients and records: one release for each kind of noise, unit and (q, σ).

        Args:
            besides: one row that is left out.
        """
        found: dict[tuple[Any, ...], list[int]] = {}
        left_out = []
        if besides is not None:
            own = (besides.run, besides.client, besides.records, str(besides.unit), besides.noise)
            key = (*own, besides.sampling_rate, besides.noise_multiplier, besides.own_noise_multiplier)
            left_out.append((key, [-besides.steps, -1]))
        for key, (steps, releases) in [*self._found.items(), *left_out]:
            total = found.setdefault(key[3:], [0, 0])
            total[0] += steps
            total[1] += releases
        return [
            Release("", "", "", 0, 0, rate, sigma, 0.0, steps, noise, "", PrivacyUnit.parse(unit), own)
            for (unit, noise, rate, sigma, own), (steps, releases) in found.items()
            if releases
        ]


def terms_in_row(exposure: Exposure) -> tuple[Any, ...]:
    """An exposure's `TERMS`."""
    own = (exposure.run, exposure.client, exposure.records, str(exposure.unit))
    return (*own, exposure.noise, exposure.sampling_rate, exposure.noise_multiplier)


def reserve(connection: sqlite3.Connection, planned: Exposure) -> None:
    """Write the reservation of a client for a run in place of an earlier one."""
    values = (*terms_in_row(planned), planned.planned, time.time(), planned.own_noise_multiplier)
    columns = f"{TERMS}, steps, time, own_noise_multiplier"
    marks = ", ".join("?" * len(values))
    connection.execute(f"INSERT OR REPLACE INTO reservations ({columns}) VALUES ({marks})", values)


def end(connection: sqlite3.Connection, run: str, client: int | None) -> None:
    """As `lorica.privacy.ledger.Ledger.end`."""
    where, values = _of(run, client)
    connection.execute(f"DELETE FROM reservations {where}", values)
    erase_seeds(connection, run, client)
    connection.execute(
        "UPDATE releases SET reply = NULL WHERE id IN (SELECT releases.id FROM ended CROSS JOIN releases "
        "USING (run, client) WHERE ended.run <> ? AND reply IS NOT NULL)",
        (run,),
    )
    connection.execute("DELETE FROM ended WHERE run <> ?", (run,))
    connection.execute(f"INSERT OR IGNORE INTO ended SELECT DISTINCT run, client FROM releases {where}", values)


def as_release(exposure: Exposure, steps: int) -> Release:
    """Steps of an exposure as one row."""
    own = exposure.own_noise_multiplier
    return Release(
        dataset="",
        records=exposure.records,
        run=exposure.run,
        client=exposure.client,
        round=0,
        sampling_rate=exposure.sampling_rate,
        noise_multiplier=exposure.noise_multiplier,
        clip_norm=0.0,
        steps=steps,
        noise=exposure.noise,
        request="",
        unit=exposure.unit,
        own_noise_multiplier=None if own == exposure.noise_multiplier else own,
    )


def pending_of(connection: sqlite3.Connection, release: Release) -> Charge | None:
    """The client's latest row in the run, if it is this release and has no reply yet."""
    row = connection.execute(
        f"SELECT id, seed, reply, {COLUMNS} FROM releases WHERE run = ? AND client = ? ORDER BY id DESC LIMIT 1",
        (release.run, release.client),
    ).fetchone()
    if row is None or row[2] is not None or release_of(row[3:]) != release:
        return None
    # Older versions wrote such rows without a seed.
    return None if row[1] is None and release.noise != "reproducible" else Charge(row[0], row[1])


def steps_of(connection: sqlite3.Connection, run: str, client: int, besides: int = 0) -> int:
    query = "SELECT COALESCE(SUM(steps), 0) FROM releases WHERE run = ? AND client = ? AND id <> ?"
    return int(connection.execute(query, (run, client, besides)).fetchone()[0])

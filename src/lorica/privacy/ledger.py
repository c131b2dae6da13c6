"""The owner's record of every release, in SQLite beside the data, written before the first record is sampled for it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch

from lorica.errors import UserError
from lorica.privacy import database
from lorica.privacy.accounting import Steps
from lorica.privacy.randomness import secret_seed
from lorica.privacy.released import Released, _release
from lorica.privacy.unit import RECORD, PrivacyUnit

_SCHEMA = """
CREATE TABLE IF NOT EXISTS releases (
    id INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    dataset TEXT NOT NULL, owner TEXT NOT NULL, run TEXT NOT NULL, client INTEGER NOT NULL, round INTEGER NOT NULL,
    sampling_rate REAL NOT NULL, noise_multiplier REAL NOT NULL, clip_norm REAL NOT NULL, steps INTEGER NOT NULL,
    noise TEXT NOT NULL, request TEXT NOT NULL, reply BLOB, kept BLOB, unit TEXT NOT NULL DEFAULT 'record', seed BLOB
)
"""
# A ledger outlives the version of Lorica that made it.
_ADDED = {"kept": "BLOB", "unit": "TEXT NOT NULL DEFAULT 'record'", "seed": "BLOB"}


@dataclass(frozen=True)
class Release:
    """One row: what one reply was made of.

    Attributes:
        dataset: fingerprint of the whole training data.
        records: fingerprint of the records of this client (the column `owner`).
        run: identity of the run.
        steps: noisy gradients that the reply is a function of.
        noise: `secure`, `reproducible` or `none`.
        request: digest of everything the server asked for; the same request gets the stored reply again.
        unit: what was sampled and clipped as one.
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

    @property
    def cost(self) -> Steps:
        return Steps(self.sampling_rate, self.noise_multiplier, self.steps)


_COLUMNS = ", ".join("owner" if field.name == "records" else field.name for field in fields(Release))


def _release_of(row: tuple[Any, ...]) -> Release:
    return Release(*(*row[:-1], PrivacyUnit.parse(row[-1])))


def _row_of(release: Release) -> tuple[Any, ...]:
    return tuple(str(value) if isinstance(value, PrivacyUnit) else value for value in vars(release).values())


@dataclass(frozen=True)
class Charge:
    """A row of the ledger that waits for its reply.

    Attributes:
        row: its id.
        seed: secret, of the batches and the noise that the release is made with; None for reproducible noise.
    """

    row: int
    seed: bytes | None


class Ledger:
    """Releases of one data set over its whole life.

    A release is charged before the first record is sampled for it, and its reply is stored in the same row before it
    leaves. So whatever ends an attempt, be it an error, a signal or a power cut, what it may have given away is in the
    ledger. If the same request comes again, the owner sends the stored reply; if there is none yet, it repeats the
    attempt with the row's own seed, which gives the very same release. Either way nothing is charged twice, and no
    noise is drawn twice.

    Raises:
        UserError: the file cannot be opened or written, or is no ledger.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            database.create(path)
            with database.transaction(path) as connection:
                connection.execute(_SCHEMA)
                columns = {row[1] for row in connection.execute("PRAGMA table_info(releases)")}
                for name, kind in _ADDED.items():
                    if name not in columns:
                        connection.execute(f"ALTER TABLE releases ADD COLUMN {name} {kind}")

    def charge(self, release: Release, allow: Callable[[Earlier], None] | None = None) -> Charge:
        """Write one release and sync it to disk, before anything of it is computed.

        The client's latest row is used again where it is the very same release and has no reply: then this is the same
        attempt once more. An attempt that another release of the client in this run has come after is charged anew,
        since what the client keeps may have changed.

        Args:
            allow: called with what was charged before, the attempt's own row left out; nothing is written if it raises.
                No other release can come between its look and this one.

        Raises:
            UserError: the row cannot be written.
            ValueError: fewer than no steps, which would give budget back.
        """
        if release.steps < 0:
            raise ValueError(f"a release has {release.steps} steps")
        seed = None if release.noise == "reproducible" else secret_seed()
        with self._errors(), database.transaction(self.path) as connection:
            pending = _pending(connection, release)
            if allow is not None:
                allow(Earlier(connection, pending))
            if pending is not None:
                return pending
            connection.execute(
                "UPDATE releases SET seed = NULL WHERE run = ? AND client = ?", (release.run, release.client)
            )
            values = (time.time(), *_row_of(release), seed)
            marks = ", ".join("?" * len(values))
            row = connection.execute(
                f"INSERT INTO releases (time, {_COLUMNS}, seed) VALUES ({marks})", values
            ).lastrowid
            assert row is not None
            return Charge(row, seed)

    def attach(self, charge: Charge, reply: bytes, kept: Mapping[str, Released] | None = None) -> bytes:
        """Store the reply of a charged release and sync it to disk; returns the reply that may leave.

        That is the stored one if another process was faster. The seed is erased, and replies of the client's earlier
        rounds in this run are dropped: a server that has gone on cannot need them.

        Args:
            kept: noisy tensors that stay with the owner and that its later replies in this run depend on.

        Raises:
            UserError: the row cannot be written.
        """
        state = None if kept is None else safetensors.torch.save({name: value.tensor for name, value in kept.items()})
        with self._errors(), database.transaction(self.path) as connection:
            connection.execute(
                "UPDATE releases SET reply = ?, kept = ?, seed = NULL WHERE id = ? AND reply IS NULL",
                (reply, state, charge.row),
            )
            run, client, number, stored = connection.execute(
                "SELECT run, client, round, reply FROM releases WHERE id = ?", (charge.row,)
            ).fetchone()
            connection.execute(
                "UPDATE releases SET reply = NULL, kept = NULL WHERE run = ? AND client = ? AND round < ?",
                (run, client, number),
            )
            return bytes(stored)

    def recall(self, run: str, client: int, request: str) -> bytes | None:
        """The stored reply to a request that was answered before, or None."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT reply FROM releases WHERE run = ? AND client = ? AND request = ? AND reply IS NOT NULL",
                (run, client, request),
            ).fetchone()
        return row[0] if row else None

    def kept(self, run: str, client: int) -> dict[str, Released]:
        """What the client's latest release in this run left with the owner; empty if nothing did."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT kept FROM releases WHERE run = ? AND client = ? AND kept IS NOT NULL ORDER BY id DESC LIMIT 1",
                (run, client),
            ).fetchone()
        # They were released when they were written: `attach` takes nothing else.
        # Cloned for PyTorch's alignment, on which rounding can depend.
        tensors = safetensors.torch.load(row[0]) if row else {}
        return {name: _release(value.clone()) for name, value in tensors.items()}

    def steps(self, run: str, client: int) -> int:
        """Steps that a client has been charged for in a run."""
        with self._reading() as connection:
            return _steps(connection, run, client)

    def last_round(self, run: str, client: int) -> int:
        """The latest round that a client was charged for in a run; 0 if there is none."""
        with self._reading() as connection:
            query = "SELECT COALESCE(MAX(round), 0) FROM releases WHERE run = ? AND client = ?"
            return int(connection.execute(query, (run, client)).fetchone()[0])

    def releases(self, dataset: str | None = None) -> list[Release]:
        """All releases of a data set, oldest first; by default of all data sets in the file."""
        with self._reading() as connection:
            query = f"SELECT {_COLUMNS} FROM releases WHERE dataset = COALESCE(?, dataset) ORDER BY id"
            return [_release_of(row) for row in connection.execute(query, (dataset,))]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._errors(), database.reading(self.path) as connection:
            yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                "privacy.ledger",
                str(self.path),
                f"the ledger cannot be used ({error})",
                "make the place writable, or give another one with privacy.ledger=PATH",
            ) from error


@dataclass(frozen=True)
class Earlier:
    """What was charged before a release, read under the ledger's lock."""

    _connection: sqlite3.Connection
    _pending: Charge | None

    def steps(self, run: str, client: int) -> int:
        """Steps that a client has been charged for in a run."""
        return _steps(self._connection, run, client, self._besides)

    def releases(self) -> list[Release]:
        """All releases in the file, oldest first."""
        query = f"SELECT {_COLUMNS} FROM releases WHERE id <> ? ORDER BY id"
        return [_release_of(row) for row in self._connection.execute(query, (self._besides,))]

    @property
    def _besides(self) -> int:
        return 0 if self._pending is None else self._pending.row


def _pending(connection: sqlite3.Connection, release: Release) -> Charge | None:
    """The client's latest row in the run, if it is this release and still without a reply."""
    row = connection.execute(
        f"SELECT id, seed, reply, {_COLUMNS} FROM releases WHERE run = ? AND client = ? ORDER BY id DESC LIMIT 1",
        (release.run, release.client),
    ).fetchone()
    if row is None or row[2] is not None or _release_of(row[3:]) != release:
        return None
    # Versions before this one wrote such rows without a seed.
    return None if row[1] is None and release.noise != "reproducible" else Charge(row[0], row[1])


def _steps(connection: sqlite3.Connection, run: str, client: int, besides: int = 0) -> int:
    query = "SELECT COALESCE(SUM(steps), 0) FROM releases WHERE run = ? AND client = ? AND id <> ?"
    return int(connection.execute(query, (run, client, besides)).fetchone()[0])


def ledger_beside(data: Path) -> Path:
    """Where the ledger of a data file or folder is."""
    return data.parent / f"{data.name}.ledger.sqlite"


def find_ledger(path: Path) -> Path:
    """The ledger of a data file or folder, or the ledger itself.

    Raises:
        UserError: there is no such file, or no ledger beside it.
    """
    path = path.expanduser().absolute()
    beside = ledger_beside(path)
    if beside.is_file():
        return beside
    if not path.exists():
        raise UserError("ledger", str(path), "no such file", "give a ledger, or the data that it lies beside")
    if path.is_dir() or not _is_database(path):
        problem = f"no ledger, and none lies beside it ({beside.name})"
        raise UserError("ledger", str(path), problem, "give the ledger's own path")
    return path


def read_ledger(path: Path) -> list[tuple[float, Release]]:
    """Time (seconds since 1970) and content of every release, oldest first. Writes nothing, and makes no file.

    Raises:
        UserError: it is no ledger.
    """
    try:
        with database.reading(path, only=True) as connection:
            known = {row[1] for row in connection.execute("PRAGMA table_info(releases)")}
            # A ledger outlives the version of Lorica that made it.
            columns = _COLUMNS if "unit" in known else _COLUMNS.replace("unit", "'record'")
            rows = connection.execute(f"SELECT time, {columns} FROM releases ORDER BY id").fetchall()
    except sqlite3.Error as error:
        problem = f"it cannot be read as a ledger ({error})"
        raise UserError("ledger", str(path), problem, "give the path of a ledger") from error
    return [(row[0], _release_of(row[1:])) for row in rows]


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"

"""The owner's record of every release: an SQLite file next to the data, written before a release leaves."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from lorica.errors import UserError
from lorica.privacy.accounting import Steps, epsilon, epsilon_above, epsilon_from_rdp, total_rdp
from lorica.privacy.released import Released, _release
from lorica.privacy.unit import RECORD, PrivacyUnit

_SCHEMA = """
CREATE TABLE IF NOT EXISTS releases (
    id INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    dataset TEXT NOT NULL, owner TEXT NOT NULL, run TEXT NOT NULL, client INTEGER NOT NULL, round INTEGER NOT NULL,
    sampling_rate REAL NOT NULL, noise_multiplier REAL NOT NULL, clip_norm REAL NOT NULL, steps INTEGER NOT NULL,
    noise TEXT NOT NULL, request TEXT NOT NULL, reply BLOB, kept BLOB, unit TEXT NOT NULL DEFAULT 'record'
)
"""


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


class Ledger:
    """All releases of a data set over its lifetime.

    A reply is stored in the transaction that charges it. If the same request is repeated (a resumed run, a lost reply),
    the owner sends the stored release: this costs nothing, and no noise is drawn twice. A crash between charging and
    sending can only overcount.

    Raises:
        UserError: the file cannot be opened or written, or is not a ledger.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute(_SCHEMA)
                columns = {row[1] for row in connection.execute("PRAGMA table_info(releases)")}
                # An older version of Lorica may have created the ledger.
                if "kept" not in columns:
                    connection.execute("ALTER TABLE releases ADD COLUMN kept BLOB")
                if "unit" not in columns:
                    connection.execute("ALTER TABLE releases ADD COLUMN unit TEXT NOT NULL DEFAULT 'record'")
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def charge(
        self,
        release: Release,
        reply: bytes | None,
        kept: Mapping[str, Released] | None = None,
        allow: Callable[[list[Release]], None] | None = None,
    ) -> None:
        """Write one release with its reply and sync it to disk, before the reply leaves.

        Stored replies of the client's earlier rounds in this run are deleted: the server no longer needs them.

        Args:
            reply: None if the work failed.
            kept: noisy tensors that stay with the owner and are needed for its later replies in this run.
            allow: called with all earlier releases; nothing is written if it raises. The ledger stays locked, so no
                other release can be charged between this check and the charge.

        Raises:
            UserError: the row cannot be written.
            ValueError: a negative number of steps, which would refund budget.
        """
        if release.steps < 0:
            raise ValueError(f"a release cannot have {release.steps} steps")
        state = None if kept is None else safetensors.torch.save({name: value.tensor for name, value in kept.items()})
        try:
            with closing(self._connect()) as connection, connection:
                connection.execute(
                    "UPDATE releases SET reply = NULL, kept = NULL WHERE run = ? AND client = ? AND round < ?",
                    (release.run, release.client, release.round),
                )
                # The update has locked the file against other writers.
                if allow is not None:
                    earlier = connection.execute(f"SELECT {_COLUMNS} FROM releases ORDER BY id")
                    allow([_release_of(row) for row in earlier])
                values = (time.time(), *_row_of(release), reply, state)
                marks = ", ".join("?" * len(values))
                connection.execute(f"INSERT INTO releases (time, {_COLUMNS}, reply, kept) VALUES ({marks})", values)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def recall(self, run: str, client: int, request: str) -> bytes | None:
        """The stored reply to an earlier request, or None."""
        with closing(self._connect()) as connection:
            row = connection.execute(
                "SELECT reply FROM releases WHERE run = ? AND client = ? AND request = ? AND reply IS NOT NULL",
                (run, client, request),
            ).fetchone()
        return row[0] if row else None

    def kept(self, run: str, client: int) -> dict[str, Released]:
        """The tensors that the client kept from its latest release in this run; empty if none."""
        with closing(self._connect()) as connection:
            row = connection.execute(
                "SELECT kept FROM releases WHERE run = ? AND client = ? AND kept IS NOT NULL ORDER BY id DESC LIMIT 1",
                (run, client),
            ).fetchone()
        # They are released: `charge` accepts nothing else. Cloned for PyTorch's alignment, which can affect rounding.
        tensors = safetensors.torch.load(row[0]) if row else {}
        return {name: _release(value.clone()) for name, value in tensors.items()}

    def steps(self, run: str, client: int) -> int:
        """Number of steps charged to a client in a run."""
        with closing(self._connect()) as connection:
            query = "SELECT COALESCE(SUM(steps), 0) FROM releases WHERE run = ? AND client = ?"
            return int(connection.execute(query, (run, client)).fetchone()[0])

    def last_round(self, run: str, client: int) -> int:
        """The latest round charged to a client in a run; 0 if there is none."""
        with closing(self._connect()) as connection:
            query = "SELECT COALESCE(MAX(round), 0) FROM releases WHERE run = ? AND client = ?"
            return int(connection.execute(query, (run, client)).fetchone()[0])

    def releases(self, dataset: str | None = None) -> list[Release]:
        """All releases of a data set (default: of all data sets in the file), oldest first."""
        with closing(self._connect()) as connection:
            query = f"SELECT {_COLUMNS} FROM releases WHERE dataset = COALESCE(?, dataset) ORDER BY id"
            return [_release_of(row) for row in connection.execute(query, (dataset,))]

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60)
        # Every commit must reach the disk before a release may leave.
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            "privacy.ledger",
            str(self.path),
            f"the ledger cannot be used ({error})",
            "make the file and its folder writable, or set privacy.ledger=PATH to another file",
        )


def ledger_beside(data: Path) -> Path:
    """Default path of the ledger of a data file or folder."""
    return data.parent / f"{data.name}.ledger.sqlite"


def find_ledger(path: Path) -> Path:
    """Find the ledger next to a data file or folder; a path of a ledger is returned as it is.

    Raises:
        UserError: there is no such file, or no ledger next to it.
    """
    path = path.expanduser().absolute()
    beside = ledger_beside(path)
    if beside.is_file():
        return beside
    if not path.exists():
        raise UserError("ledger", str(path), "no such file", "give the path of a ledger or of its data")
    if path.is_dir() or not _is_database(path):
        problem = f"not a ledger, and there is no ledger next to it ({beside.name})"
        raise UserError("ledger", str(path), problem, "give the path of the ledger itself")
    return path


def read_ledger(path: Path) -> list[tuple[float, Release]]:
    """Time (seconds since 1970) and content of every release, oldest first. Opens the file read-only.

    Raises:
        UserError: the file is not a ledger.
    """
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=60)) as connection:
            known = {row[1] for row in connection.execute("PRAGMA table_info(releases)")}
            # An older version of Lorica may have created the ledger.
            columns = _COLUMNS if "unit" in known else _COLUMNS.replace("unit", "'record'")
            rows = connection.execute(f"SELECT time, {columns} FROM releases ORDER BY id").fetchall()
    except sqlite3.Error as error:
        problem = f"cannot be read as a ledger ({error})"
        raise UserError("ledger", str(path), problem, "give the path of a ledger") from error
    return [(row[0], _release_of(row[1:])) for row in rows]


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def lifetime_epsilon(
    releases: Iterable[Release],
    records: str | None,
    delta: float,
    planned: Steps | None = None,
    unit: PrivacyUnit = RECORD,
) -> float:
    """ε at `delta` of everything ever released about any one of `records`, plus `planned` future steps.

    Infinite if releases have different units of privacy, because they do not compose: protecting single records does
    not protect a group, and removing one record from a group changes the group rather than removing it, so that its
    clipped gradient can move by 2C.

    Releases of exactly these records compose by PLD. In a simulation, other runs may have divided the same data set
    differently. It is then unknown which client of such a run had a given record, so the bound uses the most expensive
    client at each Rényi order: `max_k RDP_k(α)`. Releases with seeded noise or none are not private and are left out;
    `unprotected` counts them.

    Args:
        records: fingerprint of a client's records, if this process divided the data among the clients. None at a node,
            where the server chooses the client numbers: then all releases compose by PLD.
    """
    own, foreign = _composed(releases, records, planned, unit)
    return epsilon_from_rdp(total_rdp(own) + foreign, delta) if np.any(foreign) else epsilon(own, delta)


def lifetime_above(
    limit: float,
    releases: Iterable[Release],
    records: str | None,
    delta: float,
    planned: Steps | None = None,
    unit: PrivacyUnit = RECORD,
) -> float | None:
    """`lifetime_epsilon` if it is above `limit`, else None; as cheap as `epsilon_above`."""
    own, foreign = _composed(releases, records, planned, unit)
    if not np.any(foreign):
        return epsilon_above(limit, own, delta)
    life = epsilon_from_rdp(total_rdp(own) + foreign, delta)
    return life if life > limit else None


def _composed(
    releases: Iterable[Release], records: str | None, planned: Steps | None, unit: PrivacyUnit
) -> tuple[list[Steps], np.ndarray]:
    """Steps on exactly these records, and the summed RDP curves of the worst client in each differently divided run."""
    private = [release for release in releases if release.noise == "secure"]
    own = [release.cost for release in private if records in (None, release.records)]
    own_runs = {release.run for release in private if records in (None, release.records)}
    own += [planned] if planned else []
    foreign: dict[str, dict[int, list[Steps]]] = {}
    for release in private:
        if release.run not in own_runs:
            foreign.setdefault(release.run, {}).setdefault(release.client, []).append(release.cost)
    unlike = any(release.unit != unit for release in private)
    curve = total_rdp([]) + (float("inf") if unlike else 0.0)
    for clients in foreign.values():
        curve = curve + np.max([total_rdp(steps) for steps in clients.values()], axis=0)
    return own, curve


def unprotected(releases: Iterable[Release]) -> int:
    """Number of releases with seeded noise or none."""
    return sum(release.noise != "secure" for release in releases)

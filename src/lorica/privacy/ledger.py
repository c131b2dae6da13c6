"""The owner's record of every release: an SQLite file next to the data, written before any record is sampled."""

from __future__ import annotations

import hashlib
import shlex
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorica.errors import UserError
from lorica.privacy import database, record_sets
from lorica.privacy.chain import Broken, verify
from lorica.privacy.exposures import Exposure, merged
from lorica.privacy.home import Home
from lorica.privacy.ledger_rows import (
    COLUMNS,
    TERMS,
    Charge,
    Release,
    Sums,
    advanced,
    as_release,
    chained,
    end,
    exposures_of,
    insert,
    names_of,
    pending_of,
    prepare,
    release_of,
    reserve,
    steps_of,
    terms_in_row,
    tip_of,
)
from lorica.privacy.released import Released, _release
from lorica.tensors import decode, encode

__all__ = ["Charge", "Earlier", "Ledger", "Release"]


KEPT_ROUNDS = 2
"""Number of rounds whose replies are kept, and of checkpoints that a server keeps."""


class Ledger:
    """All releases of a data set over its lifetime.

    A release is charged before the first record is sampled for it, and its reply is stored in the same row before it
    leaves. However an attempt ends (an error, a signal, a power failure), the ledger has recorded what it may have
    revealed. If the request is repeated, the owner sends the stored reply; if there is none yet, it repeats the attempt
    with the seed in the row, which gives the same release. In both cases nothing is charged twice, and no noise is
    drawn twice.

    The rows form a hash chain, whose head is stored in Lorica's home folder (`Home`). A ledger with missing or changed
    rows is refused, and so is a new file in place of a deleted one.

    Attributes:
        identity: random id of the file and its copies.

    Args:
        home: what remembers the ledger; by default that of this account.

    Raises:
        UserError: the file cannot be opened or written, is not a ledger, or is not the ledger last used here.
    """

    def __init__(self, path: Path, home: Home | None = None) -> None:
        self.path = path
        self._home = Home() if home is None else home
        self._introduced: set[str] = set()
        self._named: tuple[str, str] | None = None
        self._members: dict[tuple[str, str], bool] = {}
        self._sums = Sums()
        with self._errors():
            expected = self._home.at(path)
            if expected and not path.exists():
                raise Broken("it was deleted or moved")
            database.create(path)
            with database.transaction(path) as connection:
                self.identity = prepare(connection)
            if expected and self.identity not in expected:
                raise Broken("another ledger was used here")
            # Read before the rows, because another process may be adding some.
            seen = self._home.head(self.identity)
            with database.reading(path) as connection:
                head = verify(self.identity, chained(connection), seen)
                self._tip = tip_of(connection, head)
            self._home.remember(self.identity, path, head)

    def charge(self, release: Release, allow: Callable[[Earlier], None] | None = None) -> Charge:
        """Write one release to the ledger and to Lorica's home folder and sync it to disk, before it is computed.

        If the client's latest row is the same release and has no reply, this is a repeated attempt and the row is
        reused. If another release of the client in this run followed, the attempt is charged again, because the tensors
        kept by the client may have changed.

        Args:
            allow: called with all earlier charges, without the row of this attempt; nothing is written if it raises.
                The ledger stays locked, so no other release can be charged between this check and the charge.

        Raises:
            UserError: the row cannot be written.
            ValueError: a negative number of steps, which would refund budget.
        """
        if release.steps < 0:
            raise ValueError(f"a release cannot have {release.steps} steps")
        with self._errors(), database.transaction(self.path) as connection:
            # The whole chain was verified when the file was opened.
            tip = advanced(connection, self._tip, self._home.head(self.identity))
            charge = pending_of(connection, release)
            if allow is not None:
                allow(Earlier(connection, None if charge is None else charge.row, release, self._sums))
            if charge is None:
                charge = insert(connection, release, tip.head.link)
                tip = advanced(connection, tip, None)
            exposures = exposures_of(connection, self.identity, release.run, release.client)
        self._tip = tip
        # After the row: a crash in between leaves a charge without a release, which is then repeated.
        self._home.remember(self.identity, self.path, tip.head, exposures)
        return charge

    def attach(self, charge: Charge, reply: bytes, kept: Mapping[str, Released] | None = None) -> bytes:
        """Store the reply of a charged release, sync it to disk, and return the reply that may leave.

        If another process stored a reply first, that one is returned. The seed is erased, and replies to the client in
        this run are deleted unless they belong to the last `KEPT_ROUNDS` rounds: the server may go back to the last but
        one of its checkpoints, and ask for these again.

        Args:
            kept: noisy tensors that stay with the owner and are needed for its later replies in this run.

        Raises:
            UserError: the row cannot be written.
        """
        state = None if kept is None else encode({name: value.tensor for name, value in kept.items()})
        with self._errors(), database.transaction(self.path) as connection:
            connection.execute(
                "UPDATE releases SET reply = ?, reply_sha256 = ?, kept = ?, kept_sha256 = ?, seed = NULL "
                "WHERE id = ? AND reply IS NULL",
                (reply, _sha256(reply), state, _sha256(state), charge.row),
            )
            run, client, number, *stored = connection.execute(
                "SELECT run, client, round, reply, reply_sha256 FROM releases WHERE id = ?", (charge.row,)
            ).fetchone()
            over = (run, client, number - KEPT_ROUNDS)
            connection.execute(
                "UPDATE releases SET reply = NULL WHERE run = ? AND client = ? AND round <= ? AND reply IS NOT NULL",
                over,
            )
            # What the client kept last in these rounds is still its own, if it took no part in later ones.
            connection.execute(
                "UPDATE releases SET kept = NULL WHERE run = ? AND client = ? AND kept IS NOT NULL AND round < "
                "(SELECT MAX(round) FROM releases WHERE run = ? AND client = ? AND round <= ? AND kept IS NOT NULL)",
                (run, client, *over),
            )
            return _whole(*stored)

    def recall(self, run: str, client: int, request: str) -> bytes | None:
        """The stored reply to an earlier request, or None."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT reply, reply_sha256 FROM releases "
                "WHERE run = ? AND client = ? AND request = ? AND reply IS NOT NULL",
                (run, client, request),
            ).fetchone()
            return _whole(*row) if row else None

    def kept(self, run: str, client: int, round_number: int) -> dict[str, Released]:
        """The tensors that the client kept from its latest release in this run up to a round; empty if none."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT kept, kept_sha256 FROM releases WHERE run = ? AND client = ? AND round <= ? "
                "AND kept IS NOT NULL ORDER BY id DESC LIMIT 1",
                (run, client, round_number),
            ).fetchone()
            state = decode(_whole(*row)) if row else {}
        # They are released: `attach` accepts nothing else.
        return {name: _release(value) for name, value in state.items()}

    def steps(self, run: str, client: int) -> int:
        """Number of steps charged to a client in a run."""
        with self._reading() as connection:
            return steps_of(connection, run, client)

    def last_round(self, run: str, client: int) -> int:
        """The latest round charged to a client in a run; 0 if there is none."""
        with self._reading() as connection:
            query = "SELECT COALESCE(MAX(round), 0) FROM releases WHERE run = ? AND client = ?"
            return int(connection.execute(query, (run, client)).fetchone()[0])

    def charged(self, run: str) -> dict[int, tuple[int, int]]:
        """Client -> number of steps and of releases charged to it in a run."""
        with self._reading() as connection:
            query = "SELECT client, SUM(steps), COUNT(*) FROM releases WHERE run = ? GROUP BY client"
            return {client: (steps, releases) for client, steps, releases in connection.execute(query, (run,))}

    def datasets(self, run: str) -> dict[int, set[str]]:
        """Client -> the data sets that its releases in a run are about: one, unless the data have changed."""
        found: dict[int, set[str]] = {}
        with self._reading() as connection:
            query = "SELECT DISTINCT client, dataset FROM releases WHERE run = ?"
            for client, dataset in connection.execute(query, (run,)):
                found.setdefault(client, set()).add(dataset)
        return found

    def releases(self, dataset: str | None = None) -> list[Release]:
        """All releases of a data set (default: of all data sets in the file), oldest first."""
        with self._reading() as connection:
            query = f"SELECT {COLUMNS} FROM releases WHERE dataset = COALESCE(?, dataset) ORDER BY id"
            return [release_of(row) for row in connection.execute(query, (dataset,))]

    def costs(self) -> list[Release]:
        """The cost of all releases in the file: one row for each kind of noise, unit and (q, σ), with all its steps."""
        with self._reading() as connection:
            return self._sums.update(connection).costs(besides=None)

    def introduce(self, sets: Mapping[str, record_sets.Tags]) -> None:
        """Store the records behind fingerprints, here and in Lorica's home folder.

        They are then recognised in other files, orders and ledgers.

        Args:
            sets: `Records.fingerprint()` -> `Records.tags`.
        """
        new = {records: tags for records, tags in sets.items() if records not in self._introduced}
        if not new:
            return
        with self._errors(), database.transaction(self.path) as connection:
            record_sets.add(connection, new)
            exposures = [one for one in exposures_of(connection, self.identity) if one.records in new]
        with self._home.writing() as connection:
            record_sets.add(connection, new)
            self._home.note(connection, exposures)
        self._introduced |= new.keys()

    def members(self, records: Collection[str]) -> record_sets.Members:
        """Of each set of records, which are in another set, in this or any other ledger. Sets that were never stored
        (`introduce`) are left out."""
        with self._reading() as connection:
            found = record_sets.members(connection, records)
        return record_sets.united(found, self._home.members(records))

    def exposures(self) -> list[Exposure]:
        """All known exposures, from this and all other ledgers."""
        with self._reading() as connection:
            own = exposures_of(connection, self.identity)
        return merged([*own, *self._home.exposures()])

    def unindexed(self, dataset: str) -> list[Release]:
        """Releases of a data set whose records were never stored, by earlier versions of Lorica."""
        with self._reading() as connection:
            query = (
                f"SELECT {COLUMNS} FROM releases WHERE dataset = ? AND owner NOT IN (SELECT records FROM record_sets)"
            )
            return [release_of(row) for row in connection.execute(f"{query} ORDER BY id", (dataset,))]

    def elsewhere(self, records: str, reserved: bool = False) -> list[Release]:
        """Releases of any of a client's records that are not in this file: in other ledgers, or lost.

        Args:
            reserved: include steps that other runs have reserved.
        """
        with self._reading() as connection:
            here = self._sums.update(connection).steps()
            if reserved:
                for *terms, steps in connection.execute(f"SELECT {TERMS}, steps FROM reservations"):
                    here[tuple(terms)] = max(here.get(tuple(terms), 0), steps)
        found = []
        for one in self._home.exposures():
            steps = one.cost(reserved).count
            if one.ledger == self.identity:
                steps -= here.get(terms_in_row(one), 0)
            if steps > 0:
                found.append((one, steps))
        unasked = {one.records for one, _ in found if (records, one.records) not in self._members}
        if unasked:
            members = self._home.members([records]).get(records, {})
            self._members |= {(records, name): name in members for name in unasked}
        return [as_release(one, steps) for one, steps in found if self._members[records, one.records]]

    def introduce_run(self, run: str, name: str) -> None:
        """Store the name of a run, by which the owner's account of the ledger shows it."""
        if self._named == (run, name):
            return
        with self._errors(), database.transaction(self.path) as connection:
            connection.execute("INSERT OR REPLACE INTO runs VALUES (?, ?)", (run, name))
        self._named = (run, name)

    def run_names(self) -> dict[str, str]:
        """Id -> name of the runs in this ledger, where it is known."""
        with self._reading() as connection:
            return names_of(connection)

    def file_of(self, ledger: str) -> Path:
        """Where the ledger with this id was last used."""
        return self.path if ledger == self.identity else self._home.file_of(ledger) or self.path

    def reserve(
        self, planned: Sequence[Exposure], allow: Callable[[list[Release]], None] = lambda reserved: None
    ) -> None:
        """Reserve the budgets of clients for a whole run before its first step. Later charges use up the reservations.

        A resumed run replaces its own reservations.

        Args:
            planned: one for each client of the run.
            allow: called with the unused reservations of others in this file; nothing is reserved if it raises. The
                ledger stays locked, so no other run can reserve or be charged between this check and the reservation.

        Raises:
            UserError: a reservation cannot be written.
        """
        ours = {(one.run, one.client) for one in planned}
        with self._errors(), database.transaction(self.path) as connection, self._home.writing() as home:
            holders = set(connection.execute("SELECT run, client FROM reservations")) - ours
            others = [one for holder in sorted(holders) for one in exposures_of(connection, self.identity, *holder)]
            allow([as_release(one, one.outstanding) for one in others if one.outstanding])
            for one in planned:
                reserve(connection, one)
                self._home.end(home, self.identity, one.run, one.client)
                self._home.note(home, exposures_of(connection, self.identity, one.run, one.client))

    def end(self, run: str, client: int | None = None) -> None:
        """End a run, for all its clients in this file or for one of them: release the unused reservations, and erase
        the seeds of rows without a reply.

        Replies of runs that ended before are deleted. Those of this run are kept until the next one ends: its server
        may have stopped before it wrote the result.
        """
        with self._errors(), database.transaction(self.path) as connection:
            end(connection, run, client)
        with self._home.writing() as home:
            self._home.end(home, self.identity, run, client)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._errors(), database.reading(self.path) as connection:
            yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Broken as problem:
            raise UserError(
                "privacy.ledger",
                str(self.path),
                f"this is not the ledger last used here: {problem}",
                "restore the newest copy of the file, or if it is lost, accept the loss with "
                f"lorica budget {shlex.quote(str(self.path))} --accept",
            ) from None
        except _DamagedReply as problem:
            raise UserError(
                "privacy.ledger",
                str(self.path),
                f"the ledger is damaged ({problem})",
                "restore the newest copy of the file, or set name to a new run",
            ) from None
        except (sqlite3.Error, ValueError) as error:
            if isinstance(error, sqlite3.OperationalError):
                raise self._unusable(error) from error
            raise UserError(
                "privacy.ledger",
                str(self.path),
                f"the ledger is damaged ({error})",
                "restore the newest copy of the file; if there is none, move the file away and accept the loss with "
                f"lorica budget {shlex.quote(str(self.path))} --accept",
            ) from error
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            "privacy.ledger",
            str(self.path),
            f"the ledger cannot be used ({error})",
            "make the file and its folder writable, or set privacy.ledger=PATH to another file",
        )


class _DamagedReply(Exception):
    """A stored reply is not what was stored."""


def _sha256(content: bytes | None) -> bytes | None:
    return None if content is None else hashlib.sha256(content).digest()


def _whole(content: bytes, checksum: bytes | None) -> bytes:
    """The stored bytes, checked. Earlier versions of Lorica stored no checksum."""
    if checksum is not None and checksum != _sha256(content):
        raise _DamagedReply("a stored reply does not match its checksum")
    return bytes(content)


@dataclass(frozen=True)
class Earlier:
    """The charges before a release, read under the ledger's lock."""

    _connection: sqlite3.Connection
    _pending: int | None
    _release: Release
    _sums: Sums

    def steps(self, run: str, client: int) -> int:
        """Number of steps charged to a client in a run."""
        return steps_of(self._connection, run, client, self._pending or 0)

    def costs(self) -> list[Release]:
        """As `Ledger.costs`."""
        return self._sums.update(self._connection).costs(None if self._pending is None else self._release)

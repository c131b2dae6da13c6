"""SQLite files of an owner, accessible to the owner's account only and synced before a commit returns."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lorica.files import create_private

# Checking a budget under the lock can take some seconds.
WAIT_SECONDS = 300.0


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """A write transaction on an existing database. When the context ends, all of it is on disk, or nothing.

    Other processes cannot write, or start such a transaction, meanwhile.

    Raises:
        sqlite3.Error: the file is missing, damaged, or cannot be written.
    """
    with closing(_connect(path, "rw")) as connection:
        # Every commit must reach the disk before a release may leave.
        connection.execute("PRAGMA synchronous = FULL")
        # Overwrite erased content, in particular the seeds of the noise.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("BEGIN IMMEDIATE")
        # Commits at the end, rolls back after an error.
        with connection:
            yield connection


@contextmanager
def reading(path: Path, only: bool = False) -> Iterator[sqlite3.Connection]:
    """A consistent snapshot of an existing database.

    Args:
        only: open the file read-only, unless a process was killed in the middle of a write, which is then rolled back.

    Raises:
        sqlite3.Error: the file is missing or damaged.
    """
    with closing(_connect(path, "ro" if only and not _interrupted(path) else "rw")) as connection:
        connection.execute("BEGIN")
        yield connection


def _interrupted(path: Path) -> bool:
    """Whether a killed process left a journal that must be rolled back before the file can be read."""
    with closing(_connect(path, "ro")) as connection:
        try:
            connection.execute("SELECT 1 FROM sqlite_master")
        except sqlite3.OperationalError as error:
            return error.sqlite_errorname == "SQLITE_READONLY_ROLLBACK"
    return False


def create(path: Path) -> None:
    """Create an empty database if there is none. SQLite gives its journal the same permissions.

    Raises:
        OSError: the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    create_private(path)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=WAIT_SECONDS, isolation_level=None)

"""The records that a client trained on, stored as keyed digests in an SQLite file: recognisable but not readable.

A digest is 64 bits of keyed BLAKE2b (RFC 7693), with a secret key for each file. Without the key, nobody can test
whether a guessed record is in the file. Two records have the same digest with probability 2⁻⁶⁴, which can only
overcount.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from lorica.privacy.randomness import secret_seed

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS record_key (key BLOB NOT NULL)",
    # `records` is the fingerprint of a client's records; `digests` uint64 and `counts` int32, as in `Records.tags`.
    "CREATE TABLE IF NOT EXISTS record_sets (records TEXT PRIMARY KEY, digests BLOB NOT NULL, counts BLOB NOT NULL)",
)


def prepare(connection: sqlite3.Connection) -> None:
    """Create the tables and the key if they are missing."""
    for statement in SCHEMA:
        connection.execute(statement)
    if connection.execute("SELECT 1 FROM record_key").fetchone() is None:
        connection.execute("INSERT INTO record_key VALUES (?)", (secret_seed(),))


def add(connection: sqlite3.Connection, records: str, tags: Callable[[], tuple[np.ndarray, np.ndarray]]) -> None:
    """Store the records of a fingerprint, if they are not stored yet.

    Args:
        tags: `Records.tags`.
    """
    if connection.execute("SELECT 1 FROM record_sets WHERE records = ?", (records,)).fetchone() is not None:
        return
    (key,) = connection.execute("SELECT key FROM record_key").fetchone()
    values, counts = tags()
    content, width = np.ascontiguousarray(values).tobytes(), values.shape[1]
    digests = b"".join(
        blake2b(content[start : start + width], key=key, digest_size=8).digest()
        for start in range(0, len(content), width)
    )
    row = (records, digests, counts.astype("<i4").tobytes())
    connection.execute("INSERT INTO record_sets VALUES (?, ?, ?)", row)


def members(connection: sqlite3.Connection, records: str) -> dict[str, np.ndarray]:
    """Fingerprint of another set -> (n,) bool: which of the n records of this set it contains.

    Sets without any of the records are left out. Empty if this set is not stored.
    """
    own = connection.execute("SELECT digests, counts FROM record_sets WHERE records = ?", (records,)).fetchone()
    if own is None:
        return {}
    digests, counts = np.frombuffer(own[0], "<u8"), np.frombuffer(own[1], "<i4")
    starts = np.cumsum(counts) - counts
    known, places = np.unique(digests, return_inverse=True)
    found = {}
    for name, content in connection.execute("SELECT records, digests FROM record_sets"):
        other = np.frombuffer(content, "<u8")
        nearest = np.minimum(np.searchsorted(known, other), len(known) - 1)
        inside = np.zeros(len(known), dtype=bool)
        inside[nearest[known[nearest] == other]] = True
        if inside.any():
            found[str(name)] = np.asarray(np.logical_or.reduceat(inside[places], starts))
    return found

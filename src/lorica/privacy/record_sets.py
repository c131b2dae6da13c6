"""The records that a client trained on, stored as keyed digests in an SQLite file: recognisable but not readable.

A digest is 64 bits of keyed BLAKE2b (RFC 7693), with a secret key for each file. Without the key, nobody can test
whether a guessed record is in the file. Two records have the same digest with probability 2⁻⁶⁴, which can only
overcount.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping
from hashlib import blake2b

import numpy as np
from scipy.sparse import csr_array

from lorica.privacy.randomness import secret_seed

Tags = Callable[[], tuple[np.ndarray, np.ndarray]]
"""`lorica.tasks.records.Records.tags`."""
Members = dict[str, dict[str, np.ndarray]]
"""Fingerprint of a set -> fingerprint of another -> (n,) bool: which of the n records of the first it contains."""

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


def add(connection: sqlite3.Connection, sets: Mapping[str, Tags]) -> None:
    """Store the records of fingerprints that are not stored yet.

    Args:
        sets: fingerprint -> `Records.tags`.
    """
    known = {row[0] for row in connection.execute("SELECT records FROM record_sets")}
    (key,) = connection.execute("SELECT key FROM record_key").fetchone()
    for records, tags in sets.items():
        if records in known:
            continue
        values, counts = tags()
        content, width = np.ascontiguousarray(values).tobytes(), values.shape[1]
        digests = b"".join(
            blake2b(content[start : start + width], key=key, digest_size=8).digest()
            for start in range(0, len(content), width)
        )
        row = (records, digests, counts.astype("<i4").tobytes())
        connection.execute("INSERT INTO record_sets VALUES (?, ?, ?)", row)


def members(connection: sqlite3.Connection, wanted: Collection[str]) -> Members:
    """For each of the wanted sets: fingerprint of another set -> (n,) bool, which of the n records it contains.

    Sets without any of the records are left out, and so are wanted sets that are not stored. Takes time and memory
    proportional to the number of stored records and of pairs of sets that share one.
    """
    rows = connection.execute("SELECT records, digests, counts FROM record_sets").fetchall()
    chosen = [place for place, row in enumerate(rows) if row[0] in wanted]
    if not chosen:
        return {}
    digests = [np.frombuffer(content, "<u8") for _, content, _ in rows]
    ends = np.cumsum([len(own) for own in digests])
    known, columns = np.unique(np.concatenate(digests), return_inverse=True)
    which = np.split(columns, ends[:-1])
    contains = csr_array((np.ones(len(columns)), columns, np.concatenate([[0], ends])), shape=(len(rows), len(known)))
    shared = contains[chosen] @ contains.T
    seen = np.full(len(known), -1)
    found: Members = {}
    for number, place in enumerate(chosen):
        counts = np.frombuffer(rows[place][2], "<i4")
        starts = np.cumsum(counts) - counts
        found[str(rows[place][0])] = inside = {}
        for other in shared.indices[shared.indptr[number] : shared.indptr[number + 1]]:
            seen[which[other]] = other
            inside[str(rows[other][0])] = np.asarray(np.logical_or.reduceat(seen[which[place]] == other, starts))
    return found


def united(first: Members, second: Members) -> Members:
    """What either of two files knows."""
    found = {records: dict(inside) for records, inside in first.items()}
    for records, others in second.items():
        own = found.setdefault(records, {})
        for name, inside in others.items():
            own[name] = own[name] | inside if name in own else inside
    return found

"""A hash chain over a ledger's rows: a row that was changed, deleted or put elsewhere breaks it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Broken(Exception):
    """A ledger is not what it was when it was last seen. The message is for its owner."""


@dataclass(frozen=True)
class Head:
    """How far a chain had come: its number of rows and its last link."""

    rows: int
    link: str


def link(previous: str, content: Sequence[object]) -> str:
    """`SHA-256(JSON of [previous link, content…])`, hexadecimal."""
    return hashlib.sha256(json.dumps([previous, *content]).encode()).hexdigest()


def verify(identity: str, rows: Iterable[Sequence[object]], seen: Head | None) -> Head:
    """Follow a chain from its first row to its last, and past the place where it was last seen.

    Args:
        identity: of the ledger; the first row is linked to it.
        rows: content and link of each row, the link last.
        seen: the head that is remembered elsewhere.

    Raises:
        Broken: a row does not follow from the one before it, or the chain does not lead through `seen`.
    """
    previous, count, passed = identity, 0, seen is None or seen.rows == 0
    for count, (*content, found) in enumerate(rows, 1):
        if found != link(previous, content):
            raise Broken(f"row {count} does not follow from the rows before it: rows were changed or deleted")
        previous = str(found)
        passed = passed or (seen is not None and count == seen.rows and previous == seen.link)
    if seen is not None and count < seen.rows:
        raise Broken(f"it has {count} rows, and had {seen.rows} when it was last used")
    if not passed:
        raise Broken("its rows are not those that it had when it was last used")
    return Head(count, previous)

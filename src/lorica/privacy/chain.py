"""A hash chain over the rows of a ledger, which detects changed, deleted and moved rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Broken(Exception):
    """A ledger differs from its last known state. The message is for its owner."""


@dataclass(frozen=True)
class Head:
    """The end of a chain: its number of rows and its last link."""

    rows: int
    link: str


def link(previous: str, content: Sequence[object]) -> str:
    """`SHA-256(JSON of [previous link, content…])`, hexadecimal.

    Empty columns at the end are left out, so that rows keep their links when columns are added.
    """
    filled = list(content)
    while filled and filled[-1] is None:
        filled.pop()
    return hashlib.sha256(json.dumps([previous, *filled]).encode()).hexdigest()


def verify(identity: str, rows: Iterable[Sequence[object]], seen: Head | None) -> Head:
    """Verify a chain from its first row to its last, including the head that was last seen.

    Args:
        identity: id of the ledger, to which the first row is linked.
        rows: content of each row, followed by its link.
        seen: the last head, stored in another place.

    Raises:
        Broken: a link is wrong, or the chain does not contain `seen`.
    """
    previous, count, passed = identity, 0, seen is None or seen.rows == 0
    for count, (*content, found) in enumerate(rows, 1):
        if found != link(previous, content):
            raise Broken(f"row {count} or a row before it was changed or deleted")
        previous = str(found)
        passed = passed or (seen is not None and count == seen.rows and previous == seen.link)
    if seen is not None and count < seen.rows:
        raise Broken(f"it has {count} rows, but had {seen.rows} when it was last used")
    if not passed:
        raise Broken("its rows have changed since it was last used")
    return Head(count, previous)

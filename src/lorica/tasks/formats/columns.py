"""Columns of any file: those that a task needs, and how large a table may be."""

from __future__ import annotations

import difflib
from pathlib import Path

from lorica.errors import UserError

# Beyond them a run would take days or the machine's memory: a small compressed file may expand to any size.
MOST_RECORDS = 20_000_000
MOST_BYTES = 8 * 2**30
SHOWN = 30
LONGEST_NAME = 100


def check_columns(available: list[str], name: str, wanted: dict[str, str]) -> list[str]:
    """The wanted columns, once each of them is known to be among the available ones, and only once.

    Args:
        name: the file, for errors.
        wanted: columns, each with the configuration's key that names it.

    Raises:
        UserError: a column is missing, or there several times.
    """
    for column, key in wanted.items():
        if column not in available:
            nearest = difflib.get_close_matches(column, available[:1000], n=1, cutoff=0.5)
            question = f"did you mean {nearest[0]!r}? The columns are" if nearest else "the columns are"
            raise UserError(key, column, f"no such column in {name}", f"{question}: {_listed(available)}")
        if available.count(column) > 1:
            raise UserError(key, column, f"{name} has several columns with this name", "rename all but one of them")
    return list(wanted)


def check_size(path: Path, key: str, records: int, size: int) -> None:
    """Refuse a table that is larger than any run could use.

    Args:
        records: rows so far.
        size: bytes of its columns in memory so far.

    Raises:
        UserError: more than `MOST_RECORDS` records or `MOST_BYTES` bytes.
    """
    if records > MOST_RECORDS or size > MOST_BYTES:
        problem = f"it has more than {MOST_RECORDS:,} records, or more than {MOST_BYTES // 2**30} GiB once it is read"
        raise UserError(key, str(path), problem, "check the file, and split it into several files or use fewer records")


def _listed(names: list[str]) -> str:
    shown = [name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…" for name in names[:SHOWN]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in shown) + more

"""Checksums of a finished run's files: they are written last, and show that the run is whole."""

from __future__ import annotations

import json
from pathlib import Path

from lorica.errors import UserError
from lorica.files import read_json, sha256_of, write_atomically

CHECKSUMS = "checksums.json"
COVERED = (
    "config.yaml",
    "environment.json",
    "data.json",
    "metrics.jsonl",
    "decisions.jsonl",
    "privacy.json",
    "partition.json",
)


def write_checksums(folder: Path) -> None:
    """Write `checksums.json`: file -> SHA-256 (hexadecimal)."""
    sums = {name: sha256_of(folder / name) for name in COVERED if (folder / name).is_file()}
    write_atomically(folder / CHECKSUMS, json.dumps(sums, indent=2).encode())


def files_are_whole(folder: Path) -> bool:
    """Whether the run has finished and all its files are there.

    Raises:
        UserError: a file is not as it was when the run finished.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return False
    try:
        sums = read_json(path)
    except ValueError:
        raise UserError(
            CHECKSUMS, str(path), "the file is damaged", "delete it and run again, and it is written again"
        ) from None
    for name, expected in sums.items():
        if (folder / name).is_file() and sha256_of(folder / name) != expected:
            raise UserError(
                name, str(folder / name), "the file is damaged, or was changed after the run had finished", remedy(name)
            )
    return all((folder / name).is_file() for name in sums)


def remedy(name: str) -> str:
    """What to do about a damaged file of a run folder."""
    if name in ("config.yaml", "environment.json"):
        return "restore it from a copy, or delete the run folder and start a new run; what it released stays charged"
    if name in ("metrics.jsonl", "decisions.jsonl"):
        return "restore it from a copy, or delete it and run again; the report then lacks the rounds before"
    return "delete it and run again, and it is written again"

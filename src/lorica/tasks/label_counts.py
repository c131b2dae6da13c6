"""Records of each label: of public test sets always, of each client only in simulations.

A client's counts are facts about private records that no noise covers. They are written for research runs only, where
one machine holds the data of all clients (the local engine); a run with secure noise, whose folder may be shared, has
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorica.tasks.records import Records, Task

SHOWN = 12
LONGEST_NAME = 40


def label_counts(parts: Sequence[Records], label_names: list[str], owner_names: list[str] | None) -> dict[str, Any]:
    """The content of partition.json.

    Args:
        parts: each client's records.
        owner_names: each client's file or value of the owners' column; None where the division is random.
    """
    clients = []
    for number, part in enumerate(parts):
        counts = np.bincount(part.labels, minlength=len(label_names)).tolist()
        name = {} if owner_names is None else {"name": Path(owner_names[number]).name}
        clients.append({"client": number, **name, "counts": counts})
    return {"simulation": True, "labels": label_names, "clients": clients}


def public_counts(task: Task) -> list[str]:
    """What a run says about its labels and its public test sets when it starts; nothing about training records."""
    lines = [f"Labels: {_listed(list(map(_short, task.label_names)))}"] if task.has_classes else []
    for name, records in task.tests.items():
        if task.has_classes:
            counts = np.bincount(records.labels, minlength=len(task.label_names))
            found = [f"{_short(label)} {count:,}" for label, count in zip(task.label_names, counts, strict=True)]
            details = f": {_listed(found)}"
        elif task.label_names:
            details = f", numbers from {records.labels.min():g} to {records.labels.max():g}"
        else:
            details = ""
        lines.append(f"Test set{name and f' {name}'}: {len(records):,} records{details}")
    return lines


def _short(name: str) -> str:
    shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
    return shown if shown.isprintable() and shown.strip() == shown != "" else repr(shown)


def _listed(parts: list[str]) -> str:
    more = f" and {len(parts) - SHOWN:,} more" if len(parts) > SHOWN else ""
    return ", ".join(parts[:SHOWN]) + more

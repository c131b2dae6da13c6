"""Who has what: records of each label that each client holds. Only for simulations.

These counts are facts about private records that no noise covers. They are written for research runs only, where one
machine holds the data of all clients (the local engine); a run with secure noise, whose folder may be shared, has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorica.tasks.records import Records


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

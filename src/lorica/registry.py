"""What can be named in a configuration because a package registers it: methods, kinds of task, trackers."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

METHODS, TASK_KINDS, TRACKERS = "lorica.methods", "lorica.tasks", "lorica.trackers"
# GaLore-avg is not FedGaLore (arXiv 2602.01746), whose name it had.
FORMER_METHOD_NAMES = {"fed-galore": "galore-avg"}

logger = logging.getLogger(__name__)


@cache
def registered(group: str) -> Mapping[str, EntryPoint]:
    """Name -> entry point, sorted by name: Lorica's own and those of other installed packages. Imports none of them.

    Looked up once in a process: it reads a file of every installed package.
    """
    entries = sorted(entry_points(group=group), key=lambda entry: entry.name)
    return MappingProxyType({entry.name: entry for entry in entries})


@cache
def current_method_name(name: str) -> str:
    """The present name of a method that was renamed; any other name as it is. Warns once in a process.

    >>> current_method_name("as-lora")
    'as-lora'
    """
    if name not in FORMER_METHOD_NAMES:
        return name
    renamed = FORMER_METHOD_NAMES[name]
    logger.warning("the method %r is now called %r: use the new name, the old one will go", name, renamed)
    return renamed


def remedy_for_unknown(name: str, known: Iterable[str]) -> str:
    """What to do about a name that is not among the known ones: the nearest of them, and all of them."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {nearest[0]!r}? " if nearest else "") + f"Choose one of: {', '.join(known)}"

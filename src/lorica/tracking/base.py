"""What a tracker is, and how it is found: one class a file, registered as an entry point of `lorica.trackers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorica.errors import UserError
from lorica.registry import TRACKERS, registered

PROJECT = "lorica"
"""The project or experiment that runs belong to, if the tracker's own environment variable names no other."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run at its start.

    Attributes:
        id: id of the run, the same after every resume.
        folder: the run folder.
        settings: key of the configuration, such as `privacy.epsilon` -> value.
        finished: last round that an earlier process has reported, -1 if there is none.
    """

    id: str
    name: str
    folder: Path
    settings: Mapping[str, Any]
    finished: int

    @property
    def unique_name(self) -> str:
        """For trackers that know runs by name only: other runs may have the same name."""
        return f"{self.name}-{self.id[:8]}"


class Tracker(Protocol):
    """Where the metrics of one run go. Any method may raise: the run then goes on without this tracker.

    The constructor starts the run at the tracker, or continues it if `run.finished` is not -1. It raises if the tracker
    cannot be used.
    """

    def __init__(self, run: TrackedRun) -> None: ...

    def log(self, metrics: Mapping[str, float], round_number: int) -> None:
        """Store the metrics of a round. Each round comes once, in order."""
        ...

    def close(self, finished: bool) -> None:
        """End the process's part.

        Args:
            finished: whether the run has ended, or may be resumed.
        """
        ...


def find_trackers(names: Sequence[str]) -> dict[str, type[Tracker]]:
    """Name -> class of the trackers with these registered names.

    Raises:
        UserError: the package of a tracker is not installed; the remedy is the command that installs it.
    """
    return {name: _find(name) for name in names}


def _find(name: str) -> type[Tracker]:
    try:
        found: type[Tracker] = registered(TRACKERS)[name].load()
    except ImportError as error:
        problem = f"its package is not installed ({error})"
        raise UserError("report_to", name, problem, f'run pip install "lorica[{name}]"') from None
    return found

"""What others see of a run while it goes on: report.html, and the trackers in `report_to`."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from lorica.errors import UserError
from lorica.reporting.html import write_report
from lorica.run.setup import Prepared
from lorica.tracking.base import TrackedRun
from lorica.tracking.public import public_settings
from lorica.tracking.trackers import Trackers

SHARE = 0.05
"""Largest share of a run's time that drawing its report takes."""


class Progress:
    """Shows the progress of a run; as a context, it ends with the run or its interruption.

    Raises:
        UserError: a tracker cannot be used, or the run folder cannot be written.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._config, self._kinds = prepared.config, prepared.trackers
        self._trackers: Trackers | None = None
        self._initial: dict[str, Any] | None = None
        self._due: float | None = None

    def open(self, run: str, finished: int) -> None:
        """Open the trackers, before the run reserves any budget.

        Args:
            run: id of the run.
            finished: last round of an earlier process, -1 if there is none.
        """
        config = self._config
        tracked = TrackedRun(run, config.name, config.folder, public_settings(config), finished)
        self._trackers = Trackers(self._kinds, tracked)

    def round(self, row: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl. The report is drawn again if it is due."""
        assert self._trackers is not None
        if row["round"] == 0:
            # Until the first round has a checkpoint, a resumed run repeats this line too.
            self._initial = row
            return
        if self._initial is not None:
            self._trackers.log(self._initial)
            self._initial = None
        self._trackers.log(row)
        started = time.monotonic()
        if self._due is not None and started < self._due:
            return
        write_report(self._config.folder, live=True)
        now = time.monotonic()
        self._due = now + (now - started) / SHARE

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._trackers is not None:
            self._trackers.close(finished=error is None)
        if error is not None and self._due is not None:
            # The page stops loading itself again. The error matters more than one in drawing.
            with suppress(UserError):
                write_report(self._config.folder)

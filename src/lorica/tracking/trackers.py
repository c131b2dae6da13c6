"""All trackers of a run together: a tracker that fails ends for itself, and never the run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from lorica.errors import UserError
from lorica.tracking.base import TrackedRun, Tracker
from lorica.tracking.public import public_metrics

logger = logging.getLogger(__name__)


class Trackers:
    """The trackers of a run that work so far.

    Args:
        kinds: name -> class, as `find_trackers` returns them.

    Raises:
        UserError: a tracker cannot be used; names it.
    """

    def __init__(self, kinds: Mapping[str, type[Tracker]], run: TrackedRun) -> None:
        self._open: dict[str, Tracker] = {}
        for name, kind in kinds.items():
            try:
                with _printing_elsewhere():
                    self._open[name] = kind(run)
            except Exception as error:
                self.close(finished=False)
                remedy = f"correct this, or remove {name} from report_to"
                raise UserError("report_to", name, f"it cannot be used ({_line(error)})", remedy) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Report a line of metrics.jsonl."""
        metrics, number = public_metrics(row), int(row["round"])
        for name, tracker in list(self._open.items()):
            with self._dropped_if_it_fails(name):
                tracker.log(metrics, number)

    def close(self, finished: bool) -> None:
        """Close all trackers; `finished` as in `Tracker.close`."""
        for name, tracker in list(self._open.items()):
            with self._dropped_if_it_fails(name):
                tracker.close(finished)

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            with _printing_elsewhere():
                yield
        except Exception as error:
            del self._open[name]
            logger.warning("%s failed (%s): the run goes on without it, and metrics.jsonl is complete", *(name, error))


@contextmanager
def _printing_elsewhere() -> Iterator[None]:
    """Trackers print on stdout, which `lorica run --json` keeps for programs."""
    with redirect_stdout(sys.stderr):
        yield


def _line(error: Exception) -> str:
    """The first line of an error that may explain at length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

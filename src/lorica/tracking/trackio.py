"""Trackio: local by default, or in a Hugging Face Space that Trackio's own environment variables name."""

from __future__ import annotations

from collections.abc import Mapping

from trackio import init

from lorica.tracking.base import PROJECT, TrackedRun


class Trackio:
    """Show them with `trackio show`. `TRACKIO_DIR` names a folder, `TRACKIO_SPACE_ID` a Space."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = init(
            PROJECT,
            run.unique_name,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            # Only what `log` gets, and not the load of the machine.
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: Mapping[str, float], round_number: int) -> None:
        self._run.log(dict(metrics), step=round_number)

    def close(self, finished: bool) -> None:
        self._run.finish()

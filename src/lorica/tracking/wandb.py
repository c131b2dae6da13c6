"""Weights & Biases: one run for each run of Lorica, configured by W&B's own environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

# W&B reports its own errors to its makers, even offline, from its import on.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

from wandb import Settings, init

from lorica.tracking.base import PROJECT, TrackedRun


class WandB:
    """`WANDB_MODE=offline` writes to the run folder only, for `wandb sync`; `WANDB_PROJECT` names a project."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.settings),
            resume="allow",
            # Only what `log` gets: no output, code, command line or load of the machine.
            settings=Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )

    def log(self, metrics: Mapping[str, float], round_number: int) -> None:
        # W&B itself drops steps that it has.
        self._run.log(dict(metrics), step=round_number, commit=True)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)

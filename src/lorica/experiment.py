"""Run an experiment from its configuration to a finished run folder, with the configured engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorica.config import ExperimentConfig, load
from lorica.engines.local import prepare_local
from lorica.errors import UserError
from lorica.run.data import fingerprints
from lorica.run.lock import locked
from lorica.run.result import Result, finished_result, read_result
from lorica.run.rounds import OnStart, conduct


class Experiment:
    """A configured experiment.

    >>> experiment = Experiment.load()
    >>> experiment.config.method.name
    'as-lora'
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config

    @classmethod
    def load(cls, source: str | Path | dict[str, Any] | None = None, overrides: list[str] | None = None) -> Experiment:
        """Load a YAML file or a dictionary (default: the embedded digits experiment) and apply `a.b=c` overrides.

        Raises:
            UserError: names the key, the value and the remedy.

        >>> Experiment.load(overrides=["privacy.epsilon=1"]).config.privacy.epsilon
        1.0
        """
        return cls(load(source, overrides))

    def run(
        self,
        on_start: OnStart = lambda prepared, federation, finished_rounds: None,
        on_round: Callable[[dict[str, Any]], None] = lambda metrics: None,
    ) -> Result:
        """Run to the end. An interrupted run with the same name and configuration is resumed.

        Args:
            on_start: called once everything is checked and the clients have joined; its last argument is the number of
                rounds already finished.
            on_round: called with the metrics of each round, starting with those of the initial model (round 0).

        Raises:
            UserError: the configuration or the data are invalid, or another process is at the same run; raised before
                any budget is spent. Or the run diverges; the rounds before are kept.
        """
        if self.config.engine == "flower":
            return _launched(self.config)
        with locked(self.config.folder):
            data = fingerprints(self.config)
            finished = finished_result(self.config, data)
            if finished is not None:
                return finished
            prepared, engine = prepare_local(self.config)
            return conduct(prepared, engine, data, on_start, on_round)


def _launched(config: ExperimentConfig) -> Result:
    from lorica.engines.flower.launch import launch, with_absolute_paths

    config = with_absolute_paths(config)
    # The lock is not held for the run itself: the ServerApp, another process, takes it.
    with locked(config.folder):
        finished = finished_result(config, fingerprints(config))
    if finished is not None:
        return finished
    launch(config)
    if not config.folder.is_dir():
        problem = "the run has finished, but its folder is not on this machine"
        raise UserError("output", config.output, problem, "look for it on the machine of the SuperLink")
    return read_result(config.folder)

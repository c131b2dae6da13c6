"""An experiment, from its configuration to a finished run folder, over the engine that it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorica.config import ExperimentConfig, load
from lorica.engines.local import prepare_local
from lorica.errors import UserError
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
        """From a YAML file or a dictionary, by default the embedded digits experiment, with `a.b=c` overrides.

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
        """Run to the end, resuming where an earlier run of the same configuration and name stopped.

        Args:
            on_start: called once everything is checked and the clients have joined, with the number of rounds that are
                already finished.
            on_round: called with each round's metrics, the starting model's (round 0) first.

        Raises:
            UserError: before any budget is spent, for everything that the configuration or the data can get wrong.
        """
        if self.config.engine == "flower":
            return _launched(self.config)
        finished = finished_result(self.config)
        if finished is not None:
            return finished
        prepared, engine = prepare_local(self.config)
        return conduct(prepared, engine, on_start, on_round)


def _launched(config: ExperimentConfig) -> Result:
    from lorica.engines.flower.launch import launch, with_absolute_paths

    config = with_absolute_paths(config)
    finished = finished_result(config)
    if finished is not None:
        return finished
    launch(config)
    if not config.folder.is_dir():
        raise UserError("output", config.output, "the run has ended, and its folder is not here", "see the SuperLink's")
    return read_result(config.folder)

"""The `ServerApp`: runs the rounds of an experiment on the machine of the SuperLink."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lorica.adapters.base_files import base_identity, resolve_base
from lorica.config import ExperimentConfig, load
from lorica.engines.flower.engine import FlowerEngine
from lorica.errors import UserError
from lorica.messages import OWNER
from lorica.run.data import fingerprints
from lorica.run.lock import locked
from lorica.run.result import Result, finished_result
from lorica.run.rounds import conduct
from lorica.run.setup import prepare
from lorica.tasks.label_counts import public_counts
from lorica.tasks.loading import load_tests
from lorica.tasks.overlap import check_sources
from lorica.tasks.records import Task

app = ServerApp()
logger = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the experiment in the app's configuration."""
    _show_log()
    try:
        result = serve(load(json.loads(str(context.run_config["experiment"]))), grid)
    except UserError as error:
        logger.error("%s", error)
        raise
    logger.info("finished: %s", result.folder)


def _show_log() -> None:
    """Show only Lorica's log: Flower's processes log every request that they make."""
    lorica = logging.getLogger("lorica")
    lorica.setLevel(logging.INFO)
    lorica.propagate = False
    lorica.handlers = [logging.StreamHandler()]


def serve(config: ExperimentConfig, grid: Grid) -> Result:
    """Run to the end over the nodes of the grid, resuming an interrupted run.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    with locked(config.folder):
        return _serve(config, grid)


def _serve(config: ExperimentConfig, grid: Grid) -> Result:
    data = fingerprints(config)
    finished = finished_result(config, data)
    if finished is not None:
        return finished
    if config.flower.superlink is None:
        # A simulation: the training data are here too.
        check_sources(config.task)
    base = resolve_base(config.model.base)
    task = load_tests(config.task, base)
    prepared = prepare(config, task)
    engine = FlowerEngine(grid, for_nodes(config, task, prepared.start), base_identity(base), prepared.state)

    for line in public_counts(task):
        logger.info("%s", line)

    def report(metrics: dict[str, Any]) -> None:
        logger.info("%s", progress(metrics, engine))

    return conduct(prepared, engine, data, lambda prepared, federation, finished_rounds: None, report)


def for_nodes(config: ExperimentConfig, task: Task, start: dict[str, str] | None = None) -> ExperimentConfig:
    """The experiment as sent to the nodes: without the server's paths, and with the labels that all nodes must use.

    In a simulation the paths stay, because its clients divide `task.train` on the same machine. Nodes do not read
    `lora.start`, since the server sends them its tensors; in place of the folder they get its hash.
    """
    if start is not None:
        lora = config.lora.model_copy(update={"start": f"sha256:{start['sha256']}"})
        config = config.model_copy(update={"lora": lora})
    # A node has nothing to report, and may not even know the trackers.
    config = config.model_copy(update={"report_to": []})
    known: dict[str, Any] = {"labels": task.label_names} if task.has_classes else {}
    if config.flower.superlink is None:
        return config.model_copy(update={"task": config.task.model_copy(update=known)})
    base = config.model.base
    changes: dict[str, Any] = {
        "task": config.task.model_copy(update=known | {"train": OWNER, "test": "server"}),
        "model": config.model.model_copy(update={"base": Path(base).name if Path(base).exists() else base}),
        "privacy": config.privacy.model_copy(update={"ledger": None}),
    }
    return config.model_copy(update=changes | {"output": "runs"})


def progress(metrics: dict[str, Any], engine: FlowerEngine) -> str:
    """One line for the log: score, number of clients, ε spent by each, traffic, time."""
    parts = [f"round {metrics['round']:>3}"]
    if "score" in metrics:
        parts.append(f"{metrics['metric']} {100 * metrics['score']:5.1f} %   loss {metrics['loss']:.3f}")
    if "participants" in metrics:
        parts.append(f"{len(metrics['participants'])} clients")
        parts.append(f"ε {'  '.join(f'{client}: {spent:.3f}' for client, spent in engine.spent().items())}")
        up, down = (sum(metrics[key].values()) / 1e6 for key in ("bytes_up", "bytes_down"))
        parts.append(f"{up:.2f} MB up, {down:.2f} MB down")
        parts.append(f"{metrics['seconds']:.1f} s")
    return "   ".join(parts)

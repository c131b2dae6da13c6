"""Write a Flower app for an experiment and run it, in a simulation on this machine or on a SuperLink."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from lorica.config import ExperimentConfig
from lorica.engines.flower.policy_draft import draft_policy
from lorica.engines.flower.processes import connect, environment, free_port, run_app, start, stop
from lorica.errors import UserError
from lorica.files import write_atomically
from lorica.paths import user_path


def write_app(config: ExperimentConfig, folder: Path) -> None:
    """Write a Flower app for this experiment: `pyproject.toml`, `policy.yaml` and a `README.md` with the commands.

    Raises:
        UserError: the folder is not empty, or the experiment's guarantee is one of a trusted server.
    """
    import tomli_w

    if config.privacy.unit == "client":
        problem = "nodes do not trust the server, and add noise themselves"
        raise UserError("privacy.unit", "client", problem, "set privacy.unit=record")

    folder = user_path("DIR", folder)
    if folder.exists() and not folder.is_dir():
        raise UserError("DIR", str(folder), "it is a file", "choose a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError("DIR", str(folder), "the folder is not empty", "choose a new folder")
    app = {
        "project": {
            "name": app_name(config),
            "version": "1.0.0",
            "description": f"Federated LoRA fine-tuning with Lorica: {config.name}",
            "license": {"file": "LICENSE"},
            "dependencies": ["lorica[flower]"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "lorica",
                    "components": {
                        "serverapp": "lorica.engines.flower.server:app",
                        "clientapp": "lorica.engines.flower.client:app",
                    },
                    "config": {"experiment": config.model_copy(update={"engine": "flower"}).model_dump_json()},
                }
            }
        },
    }
    templates = files("lorica") / "engines" / "flower" / "templates"
    names = {"name": config.name, "clients": str(config.federation.clients)}
    write_atomically(folder / "pyproject.toml", tomli_w.dumps(app).encode())
    for name in ("README.md", "LICENSE"):
        text = Template((templates / f"{name}.template").read_text(encoding="utf-8")).substitute(names)
        write_atomically(folder / name, text.encode())
    write_atomically(folder / "policy.yaml", draft_policy(config).encode())


def app_name(config: ExperimentConfig) -> str:
    """Name of the Flower app of an experiment: letters, digits and hyphens, at most 32 characters."""
    return re.sub("[^a-z0-9]+", "-", f"lorica-{config.name}".lower())[:32].strip("-")


def with_absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    """The experiment with absolute local paths: Flower's processes run in other folders."""

    def absolute(value: str) -> str:
        path = Path(value).expanduser()
        return str(path.absolute()) if path.exists() or any(mark in value for mark in "*?") else value

    task, model = config.task, config.model
    train = absolute(task.train) if isinstance(task.train, str) else [absolute(source) for source in task.train]
    test = absolute(task.test) if isinstance(task.test, str) else {key: absolute(of) for key, of in task.test.items()}
    changes: dict[str, Any] = {
        "output": str(Path(config.output).expanduser().absolute()),
        "task": task.model_copy(update={"train": train, "test": test}),
        "model": model.model_copy(update={"base": absolute(model.base)}),
        "lora": config.lora.model_copy(update={"start": config.lora.start and absolute(config.lora.start)}),
    }
    if config.privacy.ledger is not None:
        ledger = str(Path(config.privacy.ledger).expanduser().absolute())
        changes["privacy"] = config.privacy.model_copy(update={"ledger": ledger})
    return config.model_copy(update=changes)


def launch(config: ExperimentConfig, home: Path | None = None) -> None:
    """Run an experiment as a Flower app and show its log until it finishes.

    Without `flower.superlink` the run is simulated, with a SuperLink that is stopped when this function returns.

    Args:
        home: replaces `FLWR_HOME`, whose `config.toml` defines the connection `flower.superlink`.

    Raises:
        UserError: Flower is not installed, or the run failed.
    """
    with tempfile.TemporaryDirectory(prefix="lorica-") as temporary:
        app = Path(temporary) / "app"
        write_app(config, app)
        if config.flower.superlink is not None:
            run_app(app, config.flower.superlink, environment(home))
        else:
            with simulation(Path(temporary)) as (_, around):
                run_app(app, "simulation", around, config.federation.clients)


@contextmanager
def simulation(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """A SuperLink that simulates nodes: its process, and the environment in which `flwr` calls it `simulation`.

    Args:
        folder: for Flower's state and the SuperLink's log.
    """
    port, home = free_port(), folder / "flwr"
    connect(home, "simulation", port)
    around = environment(home)
    command = ["flower-superlink", "--simulation", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    superlink = start(command, around, folder / "superlink.log", port)
    try:
        yield superlink, around
    finally:
        stop(superlink)

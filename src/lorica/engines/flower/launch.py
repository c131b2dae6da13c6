"""Write a Flower app for an experiment, and run it: simulated on this machine, or on a SuperLink."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from string import Template

from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.files import write_atomically

OFFLINE = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}
"""Without these Flower reaches for the package index and for its own servers in every run."""
START_SECONDS = 60.0


def write_app(config: ExperimentConfig, folder: Path) -> None:
    """A Flower app that runs this experiment: `pyproject.toml`, `policy.yaml` and a `README.md` with the commands.

    Raises:
        UserError: the folder holds something else.
    """
    import tomli_w

    if folder.exists() and any(folder.iterdir()):
        raise UserError("DIR", str(folder), "is not empty", "name a new folder")
    app = {
        "project": {
            "name": f"lorica-{config.name}".lower(),
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
                    "config": {"experiment": config.model_dump_json()},
                }
            }
        },
    }
    templates = files("lorica") / "engines" / "flower" / "templates"
    names = {"name": config.name, "clients": str(config.federation.clients)}
    write_atomically(folder / "pyproject.toml", tomli_w.dumps(app).encode())
    for name in ("README.md", "policy.yaml", "LICENSE"):
        text = Template((templates / f"{name}.template").read_text(encoding="utf-8")).substitute(names)
        write_atomically(folder / name, text.encode())


def with_absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    """The experiment with every local path made absolute: Flower's processes run elsewhere."""

    def absolute(value: str) -> str:
        path = Path(value).expanduser()
        return str(path.absolute()) if path.exists() or any(mark in value for mark in "*?") else value

    task, model = config.task, config.model
    train = absolute(task.train) if isinstance(task.train, str) else [absolute(source) for source in task.train]
    test = absolute(task.test) if isinstance(task.test, str) else {key: absolute(of) for key, of in task.test.items()}
    changes = {
        "output": str(Path(config.output).expanduser().absolute()),
        "task": task.model_copy(update={"train": train, "test": test}),
        "model": model.model_copy(update={"base": absolute(model.base)}),
    }
    return config.model_copy(update=changes)


def launch(config: ExperimentConfig) -> None:
    """Run an experiment as a Flower app and show its log, until it ends.

    Without `flower.superlink` it is simulated: a SuperLink of its own, gone when this function returns.

    Raises:
        UserError: Flower is not installed, or it ended with an error.
    """
    flwr = _command("flwr")
    with tempfile.TemporaryDirectory(prefix="lorica-") as temporary:
        app = Path(temporary) / "app"
        write_app(config, app)
        if config.flower.superlink is not None:
            code = subprocess.call(
                [flwr, "run", str(app), config.flower.superlink, "--stream"], env=os.environ | OFFLINE
            )
        else:
            with _simulation(Path(temporary)) as environment:
                nodes = f"num-supernodes={config.federation.clients}"
                command = [flwr, "run", str(app), "simulation", "--stream", "--federation-config", nodes]
                code = subprocess.call(command, env=environment)
    if code != 0:
        raise UserError("engine", "flower", f"`flwr run` ended with status {code}", "read its output above")


@contextmanager
def _simulation(folder: Path) -> Iterator[dict[str, str]]:
    """A SuperLink that simulates nodes; yields the environment in which `flwr` knows it as `simulation`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = folder / "flwr"
    home.mkdir()
    connection = f'[superlink.simulation]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "simulation"\n\n{connection}')
    environment = os.environ | OFFLINE | {"FLWR_HOME": str(home)}
    command = [_command("flower-superlink"), "--simulation", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "superlink.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(
                    "engine", "flower", f"the SuperLink does not start: {log.read_text()[-500:]}", "mend that"
                )
            time.sleep(0.1)
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _command(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        raise UserError("engine", "flower", f"{path} is missing", 'install it with pip install "lorica[flower]"')
    return str(path)

"""Run Flower's commands as processes on this machine: find, start and stop them, and run an app."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lorica.errors import UserError

OFFLINE = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Without these, Flower contacts the package index and its own servers in every run, and Ray contacts its own."""
START_SECONDS = 60.0
STOP_SECONDS = 10.0


def environment(home: Path | None = None) -> dict[str, str]:
    """Environment in which Flower's commands run offline and find each other in the folder of the running Python.

    Args:
        home: replaces `FLWR_HOME`, where Flower keeps its connections and apps.

    Raises:
        UserError: Flower is not installed.
    """
    folder = Path(sys.executable).parent
    path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    if shutil.which("flwr", path=path) is None:
        raise UserError("engine", "flower", "Flower is not installed", 'run pip install "lorica[flower]"')
    around = os.environ | OFFLINE | {"PATH": path} | _without_proxy()
    return around | ({} if home is None else {"FLWR_HOME": str(home)})


def _without_proxy() -> dict[str, str]:
    """Variables that keep connections to this machine off the proxies that the environment may name."""
    names = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
    return {name: ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost", "::1"])) for name in names}


def connect(home: Path, name: str, port: int, certificate: Path | None = None) -> None:
    """Define `name` as the default connection, to a SuperLink on this machine, in the `FLWR_HOME` folder `home`.

    Args:
        certificate: root certificate of the SuperLink; None for a connection without TLS.
    """
    security = "insecure = true" if certificate is None else f"root-certificates = {json.dumps(str(certificate))}"
    home.mkdir(parents=True, exist_ok=True)
    text = f'[superlink]\ndefault = "{name}"\n\n[superlink.{name}]\naddress = "127.0.0.1:{port}"\n{security}\n'
    (home / "config.toml").write_text(text, encoding="utf-8")


def free_port() -> int:
    """A free TCP port on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(command: Sequence[str], environment: Mapping[str, str], log: Path, port: int) -> subprocess.Popen[bytes]:
    """Start a background process, unaffected by Ctrl-C in this terminal, and wait until it listens on the port.

    Raises:
        UserError: it exits, or does not listen within `START_SECONDS`. Quotes the end of its log.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                end = log.read_text(errors="replace")[-500:]
                problem = f"{command[0]} did not start: {end}"
                raise UserError("engine", "flower", problem, f"fix the error above; the full log is {log}")
            time.sleep(0.1)
    except BaseException:
        stop(process)
        raise
    return process


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """Stop processes and their children: terminate them from the top, then kill those that remain."""
    families = {process: _family(process) for process in processes}
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    # A simulation keeps running when its SuperLink is gone.
    left = [member for family in families.values() for member in family if member.is_running()]
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    for member in psutil.wait_procs(left, STOP_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            member.kill()


def run_app(app: Path, superlink: str, environment: Mapping[str, str], nodes: int | None = None) -> None:
    """Run an app on a SuperLink, show its log, and return when it has finished. Ctrl-C stops the run on the SuperLink.

    Args:
        superlink: name of a connection in Flower's `config.toml`.
        nodes: number of simulated nodes; None for real nodes.

    Raises:
        UserError: the SuperLink rejected the app, or the run failed.
    """
    simulated = [] if nodes is None else ["--federation-config", f"num-supernodes={nodes}"]
    run = str(ask_flwr(environment, "run", str(app), superlink, *simulated)["run-id"])
    try:
        subprocess.call(["flwr", "log", run, superlink, "--stream"], env=environment)
        # The log ends with the server app, and the status is updated shortly afterwards.
        deadline = time.monotonic() + START_SECONDS
        status, details = _status(run, superlink, environment)
        while not status.startswith("finished") and time.monotonic() < deadline:
            time.sleep(0.5)
            status, details = _status(run, superlink, environment)
    except KeyboardInterrupt:
        subprocess.call(["flwr", "stop", run, superlink], env=environment)
        raise
    if status != "finished:completed":
        raise UserError("engine", "flower", f"run {run} is {status}: {details}", "see the log above for the cause")


def ask_flwr(environment: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """Run a `flwr` command and return its JSON output.

    Raises:
        UserError: the command failed. Quotes its output.
    """
    command = ["flwr", *arguments, "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        answer = {"success": False}
    if not answer.get("success"):
        said = answer.get("error-message") or (done.stdout + done.stderr).strip()
        raise UserError(
            "engine", "flower", f"`flwr {arguments[0]}` failed: {said}", "fix the error above and run again"
        )
    return answer


def _status(run: str, superlink: str, environment: Mapping[str, str]) -> tuple[str, str]:
    found = ask_flwr(environment, "list", superlink, "--run-id", run)["runs"][0]
    return str(found["status"]), str(found["status-details"])


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

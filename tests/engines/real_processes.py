"""A SuperLink without TLS and a SuperNode for each organisation, all real processes that a test can hold and kill."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

from lorica.config import ExperimentConfig
from lorica.engines.flower.launch import launch
from lorica.engines.flower.processes import connect, environment, free_port, start, stop
from tests.engines.organisations import Organisations

HOOKS = Path(__file__).parent / "held"


class RealProcesses:
    """Started in the context, and stopped at its end with all that they have started.

    Args:
        nodes: organisations whose node is started; by default all.
    """

    def __init__(self, organisations: Organisations, nodes: Sequence[int] | None = None) -> None:
        self.organisations, self.home = organisations, organisations.folder / "flwr"
        self.first = range(len(organisations.places)) if nodes is None else nodes
        self.port = free_port()
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self) -> RealProcesses:
        connect(self.home, "loopback", self.port)
        self.start_superlink()
        try:
            for client in self.first:
                self.start_node(client)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop(self.superlink, *self.nodes.values())
        for client in self.nodes:
            self.kill_node(client)
        self.pool.shutdown()

    def launch(self, config: ExperimentConfig) -> Future[None]:
        """Start an experiment, which goes on beside the test."""
        self.running = self.pool.submit(launch, config, self.home)
        return self.running

    def start_superlink(self) -> None:
        # The database keeps who the nodes are.
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--database", str(self.home / "superlink.db")]
        self.superlink = start(command, environment(self.home), self.home / "superlink.log", self.port)

    def kill_superlink(self, name: str = "") -> None:
        """SIGKILL to its descendants whose command line has `name`; to all and itself for an empty one."""
        family = psutil.Process(self.superlink.pid).children(recursive=True)
        chosen = [process for process in family if name in " ".join(process.cmdline())]
        assert chosen
        for process in [*chosen, *([] if name else [self.superlink])]:
            process.kill()

    def start_node(self, client: int) -> None:
        config = self.organisations.node_config(client, worker=True, worker_idle=60)
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        port = free_port()
        command = ["lorica", "flower", "node", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(port), "--node-config", given]
        own = {"PYTHONPATH": str(HOOKS), "LORICA_TEST_HOLD": str(self._holds(client))}
        log = self.organisations.folder / f"node-{client}.log"
        self.nodes[client] = start(command, environment(self._home(client)) | own, log, port)

    def kill_node(self, client: int, name: str = "") -> None:
        """SIGKILL to all processes of an organisation's machine whose command line has `name`."""
        kill_processes(self._home(client), name)

    def signal_node(self, client: int, number: signal.Signals) -> None:
        """Send a signal, such as SIGSTOP, to all processes of an organisation's machine."""
        signal_processes(self._home(client), number)

    def hold(self, client: int, moment: str) -> None:
        """The node's worker will stop at a moment (tests/engines/held), until `let_go`."""
        (self._holds(client) / moment).touch()

    def wait_for(self, client: int, moment: str) -> None:
        """Until the worker has stopped there."""
        reached = self._holds(client) / f"{moment}.reached"
        until(lambda: reached.exists() or self.running.done())
        assert not self.running.done()

    def let_go(self, client: int) -> None:
        for file in self._holds(client).iterdir():
            file.unlink()

    def _holds(self, client: int) -> Path:
        folder = self.organisations.folder / f"hold-{client}"
        folder.mkdir(exist_ok=True)
        return folder

    def _home(self, client: int) -> Path:
        return self.organisations.folder / f"flwr-{client}"


def kill_processes(home: Path, name: str = "") -> None:
    """SIGKILL to all with this `FLWR_HOME` whose command line has `name`."""
    signal_processes(home, signal.SIGKILL, name)


def signal_processes(home: Path, number: signal.Signals, name: str = "") -> None:
    """A signal to all with this `FLWR_HOME` whose command line has `name`."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(home) and name in " ".join(process.cmdline()):
                process.send_signal(number)


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait for what takes seconds, or minutes on a machine with other work."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)

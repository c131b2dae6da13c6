"""What breaks in the middle of a run costs a repetition at most: nothing is lost, and no release goes unrecorded.

The nodes' workers are real processes; a grid in this process stands for Flower's.
"""

from __future__ import annotations

import json
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Message

from lorica.engines.flower import warm
from lorica.engines.flower.launch import launch
from lorica.engines.flower.processes import connect, environment, free_port, start, stop
from lorica.engines.flower.server import serve
from lorica.errors import UserError
from lorica.experiment import read_result
from lorica.federation import TooFewReplies
from lorica.node import Node, agreed
from tests.engines.in_process import InProcessGrid
from tests.engines.organisations import Organisations
from tests.engines.test_flower_engine import assert_same, charged, grid, local
from tests.engines.test_warm import end_workers, sockets  # noqa: F401

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def fresh_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed.cache_clear()
    monkeypatch.setattr("lorica.experiment.write_report", lambda folder: None)


@pytest.fixture
def organisations(tmp_path: Path) -> Iterator[Organisations]:
    yield Organisations(tmp_path)
    end_workers(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("sockets")
@pytest.mark.parametrize(("moment", "deaths"), [("training", 1), ("charged", 1), ("training", 2)])
def test_a_node_killed_in_training_or_before_its_reply(
    organisations: Organisations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str, deaths: int
) -> None:
    here = local(organisations, "local")
    monkeypatch.setenv("LORICA_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("LORICA_TEST_MOMENT", moment)
    monkeypatch.setenv("LORICA_TEST_DEATHS", str(deaths))
    start = subprocess.Popen

    def dying(command: list[str], **settings: Any) -> Any:
        command = ["tests.engines.dying_worker" if part == warm.__name__ else part for part in command]
        return start(command, cwd=ROOT, **settings)

    monkeypatch.setattr(warm.subprocess, "Popen", dying)
    nodes = [organisations.node_config(0, worker=True, worker_idle=30), organisations.node_config(1)]
    config = organisations.experiment("flower")
    if deaths == 2:
        # A message is given to a second worker, and no third.
        with pytest.raises(TooFewReplies, match="client 0: no reply"):
            serve(config, InProcessGrid(nodes))
        assert charged(organisations, 0) == []
    there = serve(config, InProcessGrid(nodes))
    assert (tmp_path / "mark").read_bytes() == b"x" * deaths
    assert_same(here.adapter, there.adapter)
    for client in range(2):
        assert charged(organisations, client) == [(1, 2), (2, 2)]
    assert [row["steps"] for row in there.privacy["clients"]] == [4, 4]


class SlowNode(InProcessGrid):
    """The first node's first reply is not there in time."""

    def pull_messages(self, message_ids: Any) -> Any:
        trained = [number for number, message in enumerate(self.sent, 1) if message.metadata.message_type == "train"]
        late = [f"message-{number}" for number in trained[:1]]
        return super().pull_messages([identity for identity in message_ids if identity not in late])


def test_an_answer_that_comes_too_late_is_charged_though_it_does_not_count(organisations: Organisations) -> None:
    nodes = SlowNode([organisations.node_config(client) for client in range(2)])
    changes = ["flower.timeout=1", "federation.min_clients=1", "federation.rounds=3"]
    result = serve(organisations.experiment("flower", *changes), nodes)
    assert [row["participants"] for row in result.metrics[1:]] == [[1], [0, 1], [0, 1]]
    assert charged(organisations, 0) == [(1, 2), (2, 2), (3, 2)]
    # The statement counts what was charged, not what arrived.
    assert [row["steps"] for row in result.privacy["clients"]] == [6, 6]


class FullDisk(InProcessGrid):
    """No file of the first node can grow beyond `size` bytes while it answers its first request."""

    def __init__(self, node_configs: list[dict[str, Any]], size: int) -> None:
        super().__init__(node_configs)
        self.size, self.full = size, True

    def answer(self, message: Message) -> Message:
        if not self.full or message.metadata.message_type != "train":
            return super().answer(message)
        self.full = False
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, before[1]))
        try:
            return super().answer(message)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_nothing_leaves_when_the_ledgers_disk_is_full(organisations: Organisations) -> None:
    here = local(organisations, "local")
    config = organisations.experiment("flower")
    nodes = FullDisk([organisations.node_config(client) for client in range(2)], 4096)
    with pytest.raises(TooFewReplies, match="client 0: no reply"):
        serve(config, nodes)
    assert not nodes.full
    assert charged(organisations, 0) == []
    agreed.cache_clear()
    assert_same(here.adapter, serve(config, grid(organisations)).adapter)
    assert charged(organisations, 0) == [(1, 2), (2, 2)]


def test_what_was_charged_is_not_lost_when_the_nodes_folder_is_on_a_full_disk(
    organisations: Organisations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has the reply, and gives it once there is room."""
    here = local(organisations, "local")
    config = organisations.experiment("flower")

    def full(node: Node) -> None:
        raise UserError("file", "adapter.safetensors", "cannot be written (No space left on device)", "free the disk")

    with monkeypatch.context() as patched:
        patched.setattr(Node, "_save", full)
        with pytest.raises(TooFewReplies, match="client 0: no reply"):
            serve(config, grid(organisations))
    assert charged(organisations, 0) == [(1, 2)]
    agreed.cache_clear()
    assert_same(here.adapter, serve(config, grid(organisations)).adapter)
    assert charged(organisations, 0) == [(1, 2), (2, 2)]


class Plain:
    """A SuperLink without TLS and a SuperNode for each organisation, all real processes."""

    def __init__(self, organisations: Organisations) -> None:
        self.organisations, self.home = organisations, organisations.folder / "flwr"
        self.port = free_port()
        connect(self.home, "loopback", self.port)
        self.superlink = self.start_superlink()
        self.nodes = [self.start_node(client) for client in range(len(organisations.places))]

    def start_superlink(self) -> subprocess.Popen[bytes]:
        # The database keeps who the nodes are.
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--database", str(self.home / "superlink.db")]
        return start(command, environment(self.home), self.home / "superlink.log", self.port)

    def start_node(self, client: int) -> subprocess.Popen[bytes]:
        config = self.organisations.node_config(client, worker=True, worker_idle=60)
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        port, place = free_port(), self.organisations.places[client]
        command = ["lorica", "flower", "node", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(port), "--node-config", given]
        return start(command, environment(place / "flwr"), place / "node.log", port)

    def kill(self, name: str) -> None:
        """SIGKILL to the SuperLink's descendants whose command line has `name`; to all and itself for an empty one."""
        family = psutil.Process(self.superlink.pid).children(recursive=True)
        chosen = [process for process in family if name in " ".join(process.cmdline())]
        assert chosen
        for process in [*chosen, *([] if name else [self.superlink])]:
            process.kill()

    def stop(self) -> None:
        stop(self.superlink, *self.nodes)


@pytest.mark.slow
def test_the_server_app_and_the_superlink_are_killed_in_one_run(organisations: Organisations) -> None:
    """Flower's own processes. Each time the same command resumes after the last finished round."""
    changes = ["federation.rounds=3", "flower.wait=90"]
    here = local(organisations, "local", *changes)
    config = organisations.experiment("flower", *changes)
    metrics = config.folder / "metrics.jsonl"

    def run_until(lines: int, kill: Callable[[], None]) -> None:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(launch, config, plain.home)
            deadline = time.monotonic() + 120
            while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= lines):
                assert time.monotonic() < deadline
                assert not running.done()
                time.sleep(0.05)
            kill()
            with pytest.raises(UserError):
                running.result(120)

    plain = Plain(organisations)
    try:
        run_until(2, lambda: plain.kill("flwr-serverapp"))
        run_until(3, lambda: plain.kill(""))
        plain.superlink = plain.start_superlink()
        launch(config, plain.home)
    finally:
        plain.stop()
    assert [row["round"] for row in read_result(config.folder).metrics] == [0, 1, 2, 3]
    assert_same(here.adapter, config.folder / "adapter")
    for client in range(2):
        assert charged(organisations, client) == [(1, 2), (2, 2), (3, 2)]

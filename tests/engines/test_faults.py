"""What breaks in the middle of a run costs a repetition at most: nothing is lost, and no release goes unrecorded.

The integration tests run Flower's own processes, each node's worker among them; in the others a grid in this process
stands for them.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.common.constant import ErrorCode

from lorica.config import ExperimentConfig
from lorica.engines.flower.server import serve
from lorica.errors import UserError
from lorica.owner.node import Node, agreed
from lorica.run.result import Result, read_result
from lorica.server.federation import TooFewReplies
from tests.engines.in_process import InProcessGrid
from tests.engines.organisations import Organisations
from tests.engines.real_processes import RealProcesses, until
from tests.engines.test_flower_engine import assert_same, charged, grid, local
from tests.reports import draw_nothing


@pytest.fixture(autouse=True)
def fresh_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed.cache_clear()
    draw_nothing(monkeypatch)
    monkeypatch.setattr("lorica.engines.flower.engine.POLL_SECONDS", 0.01)


@pytest.fixture
def organisations(tmp_path: Path) -> Organisations:
    return Organisations(tmp_path)


class SlowNode(InProcessGrid):
    """The first node's first reply is not there in time."""

    def pull_messages(self, message_ids: Any) -> Any:
        trained = [number for number, message in enumerate(self.sent, 1) if message.metadata.message_type == "train"]
        late = [f"message-{number}" for number in trained[:1]]
        return super().pull_messages([identity for identity in message_ids if identity not in late])


@pytest.mark.integration
def test_an_answer_that_comes_too_late_is_charged_though_it_does_not_count(organisations: Organisations) -> None:
    nodes = SlowNode([organisations.node_config(client) for client in range(2)])
    changes = ["flower.timeout=0.2", "federation.min_clients=1", "federation.rounds=3"]
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


@pytest.mark.integration
def test_nothing_leaves_when_the_ledgers_disk_is_full(
    organisations: Organisations, in_one_process: Callable[..., Result]
) -> None:
    here = in_one_process("method.name=as-lora")
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
    organisations: Organisations, monkeypatch: pytest.MonkeyPatch, in_one_process: Callable[..., Result]
) -> None:
    """The ledger has the reply, and gives it once there is room."""
    here = in_one_process("method.name=as-lora")
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


def over_flower(organisations: Organisations, *changes: str) -> ExperimentConfig:
    return organisations.experiment("flower", "flower.wait=60", *changes)


def rounds(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Rows of the rounds that have ended so far, the start among them."""
    path = config.folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.integration
def test_a_killed_worker_is_replaced_in_the_same_message(organisations: Organisations) -> None:
    """Before the reply is sent, and in training."""
    here, config = local(organisations, "local"), over_flower(organisations)
    with RealProcesses(organisations) as real:
        real.hold(0, "answered")
        running = real.launch(config)
        # The second worker has round 1's reply from the ledger, so that it trains in round 2 first.
        for moment, then in (("answered", "training"), ("training", None)):
            real.wait_for(0, moment)
            real.kill_node(0, "lorica.engines.flower.warm")
            real.let_go(0)
            if then is not None:
                real.hold(0, then)
        running.result()
    assert_same(here.adapter, config.folder / "adapter")
    for client in range(2):
        assert charged(organisations, client) == [(1, 2), (2, 2)]


@pytest.mark.integration
def test_a_killed_node_ends_the_run_which_then_resumes(
    organisations: Organisations, capfd: pytest.CaptureFixture[str]
) -> None:
    """SuperNode, Flower's process for the message and worker die at once, as if the power failed."""
    here, config = local(organisations, "local"), over_flower(organisations, "flower.timeout=20")
    with RealProcesses(organisations) as real:
        for moment, in_ledger in (("charging", []), ("training", [(1, 2)]), ("answered", [(1, 2)])):
            real.hold(0, moment)
            running = real.launch(config)
            real.wait_for(0, moment)
            real.kill_node(0)
            real.let_go(0)
            with pytest.raises(UserError, match="finished:failed"):
                running.result()
            assert "client 0: no reply" in capfd.readouterr().out
            assert charged(organisations, 0) == in_ledger
            real.start_node(0)
        real.launch(config).result()
    assert_same(here.adapter, config.folder / "adapter")
    for client in range(2):
        assert charged(organisations, client) == [(1, 2), (2, 2)]


@pytest.mark.integration
def test_a_node_that_answers_late_is_charged_and_stays_in_the_run(organisations: Organisations) -> None:
    changes = ["flower.timeout=20", "federation.min_clients=1", "federation.rounds=3"]
    config = over_flower(organisations, *changes)
    with RealProcesses(organisations) as real:
        real.hold(0, "charging")
        running = real.launch(config)
        real.wait_for(0, "charging")
        until(lambda: len(rounds(config)) == 2)
        assert charged(organisations, 0) == []
        real.let_go(0)
        running.result()
    assert [row["participants"] for row in rounds(config)[1:]] == [[1], [0, 1], [0, 1]]
    assert charged(organisations, 0) == [(1, 2), (2, 2), (3, 2)]
    assert [row["steps"] for row in read_result(config.folder).privacy["clients"]] == [6, 6]


@pytest.mark.integration
def test_a_node_that_is_started_late_joins_the_running_federation(organisations: Organisations) -> None:
    changes = ["flower.wait=45", "federation.min_clients=1", "federation.rounds=6"]
    config = over_flower(organisations, *changes)
    accepted = organisations.places[1] / "data.jsonl.lorica"
    with RealProcesses(organisations, nodes=[0]) as real:
        real.hold(0, "charging")
        running = real.launch(config)
        real.wait_for(0, "charging")
        real.start_node(1)
        real.let_go(0)
        until(lambda: len(rounds(config)) == 2)
        real.hold(0, "charging")
        until(lambda: any(accepted.glob("run-*/invitation.json")))
        real.let_go(0)
        running.result()
    participants = [row["participants"] for row in rounds(config)[1:]]
    assert participants[0] == [0]
    assert participants[-1] == [0, 1]
    assert charged(organisations, 0) == [(number, 2) for number in range(1, 7)]
    assert charged(organisations, 1) == [(n, 2) for n, present in enumerate(participants, 1) if 1 in present]


@contextmanager
def disk_of_its_own(folder: Path) -> Iterator[None]:
    """What the folder holds, on a file system of 2 MB."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this account may not mount a file system")
    try:
        for name, content in before.items():
            (folder / name).write_bytes(content)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no byte of the folder's disk."""
    path = folder / "filling"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(folder).f_bavail == 0
    return path


@pytest.mark.integration
def test_a_disk_that_gets_full_at_the_node(organisations: Organisations, capfd: pytest.CaptureFixture[str]) -> None:
    """Without the ledger's row nothing is computed; what is charged waits for room, with its reply or without."""
    here, config = local(organisations, "local"), over_flower(organisations)
    place = organisations.places[0]
    with disk_of_its_own(place), RealProcesses(organisations) as real:
        for moment, in_ledger in (("charging", []), ("training", [(1, 2)]), ("answered", [(1, 2)])):
            real.hold(0, moment)
            running = real.launch(config)
            real.wait_for(0, moment)
            filling = fill(place)
            real.let_go(0)
            with pytest.raises(UserError, match="finished:failed"):
                running.result()
            assert "client 0: no reply" in capfd.readouterr().out
            assert charged(organisations, 0) == in_ledger
            filling.unlink()
        real.launch(config).result()
        assert charged(organisations, 0) == [(1, 2), (2, 2)]
    assert_same(here.adapter, config.folder / "adapter")


@pytest.mark.integration
def test_the_server_app_and_the_superlink_are_killed_in_one_run(organisations: Organisations) -> None:
    """Each time the same command resumes after the last finished round."""
    here = local(organisations, "local", "federation.rounds=3")
    # Nodes look for a SuperLink that has gone at ever longer intervals.
    config = over_flower(organisations, "federation.rounds=3", "flower.wait=90")

    def run_until(rows: int, kill: Callable[[], None]) -> None:
        running = real.launch(config)
        until(lambda: len(rounds(config)) >= rows or running.done())
        assert not running.done()
        kill()
        with pytest.raises(UserError):
            running.result(120)

    with RealProcesses(organisations) as real:
        run_until(2, lambda: real.kill_superlink("flwr-serverapp"))
        run_until(3, real.kill_superlink)
        real.start_superlink()
        real.launch(config).result()
    assert [row["round"] for row in rounds(config)] == [0, 1, 2, 3]
    assert_same(here.adapter, config.folder / "adapter")
    for client in range(2):
        assert charged(organisations, client) == [(1, 2), (2, 2), (3, 2)]


@pytest.mark.slow
def test_a_node_that_stands_still_for_a_minute_and_a_restarted_server_change_nothing(
    organisations: Organisations, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a suspended machine does, in the middle of its training; then the server's machine restarts."""
    here = local(organisations, "local", "federation.rounds=3")
    config = over_flower(organisations, "federation.rounds=3", "flower.wait=300", "flower.timeout=600")
    with RealProcesses(organisations) as real:
        real.hold(0, "training")
        running = real.launch(config)
        real.wait_for(0, "training")
        real.signal_node(0, signal.SIGSTOP)
        real.let_go(0)
        # A SuperLink gives a node up a minute after its last heartbeat.
        time.sleep(75)
        assert len(rounds(config)) == 1
        assert f"client 0 did not answer: Flower reports error {ErrorCode.NODE_UNAVAILABLE}" in capfd.readouterr().out
        real.signal_node(0, signal.SIGCONT)
        until(lambda: len(rounds(config)) == 3 or running.done())
        assert not running.done()
        real.kill_superlink()
        with pytest.raises(UserError):
            running.result(300)
        real.start_superlink()
        real.launch(config).result()
    assert_same(here.adapter, config.folder / "adapter")
    for client in range(2):
        assert charged(organisations, client) == [(1, 2), (2, 2), (3, 2)]

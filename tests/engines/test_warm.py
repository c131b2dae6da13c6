"""The worker that stays between messages: whom it lets in, how long it lives, and that it changes no answer."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lorica.engines.flower import warm
from lorica.engines.flower.warm import ask, runtime_folder
from lorica.errors import UserError
from lorica.messages import Request
from tests.engines.test_hostile_server import Owner, request


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of its own for sockets, whose paths may have a hundred characters only."""
    folder = Path(tempfile.mkdtemp(prefix="l", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def workers(folder: Path) -> list[int]:
    """Ids of the workers of nodes below a folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if f'"data":"{folder}' in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def end_workers(folder: Path) -> None:
    for pid in workers(folder):
        os.kill(pid, signal.SIGKILL)


def test_nobody_else_can_enter_the_folder_of_the_sockets(sockets: Path) -> None:
    folder = runtime_folder()
    assert folder.parent == sockets
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.getuid()
    assert runtime_folder() == folder


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o1777])
def test_a_folder_that_others_can_enter_is_refused(sockets: Path, mode: int) -> None:
    runtime_folder().chmod(mode)
    with pytest.raises(UserError, match="other accounts can access this folder"):
        runtime_folder()


def test_a_link_or_a_file_in_its_place_is_refused(sockets: Path) -> None:
    folder = runtime_folder()
    folder.rename(sockets / "elsewhere")
    folder.symlink_to(sockets / "elsewhere")
    with pytest.raises(UserError, match="other accounts can access this folder"):
        runtime_folder()


def test_another_accounts_folder_is_refused(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the right name and the right permissions, and another account made it."""
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(UserError, match="other accounts can access this folder"):
        runtime_folder()


def test_the_server_learns_of_no_path_when_there_is_no_place_for_the_socket(sockets: Path, tmp_path: Path) -> None:
    runtime_folder().chmod(0o777)
    own = {"client": 0, "data": str(tmp_path / "data.jsonl")}
    answer = ask(own, "{}", None)
    assert answer == {"refused": "the node cannot take part because of its worker; see its log"}


def test_a_connection_that_an_ending_worker_did_not_take_is_none(sockets: Path) -> None:
    """The socket still listens, nobody answers any more, and the kernel resets the connection."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(sockets / "ending"))
    listener.listen()
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(warm._try, sockets / "ending")
        select.select([listener], [], [])
        listener.close()
        assert connecting.result(10) is None


@pytest.mark.parametrize("ending", [EOFError, ConnectionResetError, BrokenPipeError])
def test_a_message_is_given_to_two_workers_and_no_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[Exception]
) -> None:
    """One that a message kills would be started for ever."""
    asked = []

    def ending_worker(*arguments: object) -> None:
        asked.append(arguments)
        raise ending

    monkeypatch.setattr(warm, "_ask_worker", ending_worker)
    own = {"client": 0, "data": str(tmp_path / "data.jsonl")}
    assert ask(own, "{}", b"request") == {"refused": "an error occurred at the node; see its log"}
    assert len(asked) == 2


def test_a_large_log_is_put_aside_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "LARGEST_LOG", 10)
    place = tmp_path / "data.lorica"
    for written, expected in (("small", None), ("a large one", None), ("another large one", "a large one")):
        path = warm.log_file(place)
        aside = place / "worker.log.1"
        assert (aside.read_text() if aside.exists() else None) == expected
        path.write_text(written)
    assert warm.log_file(place).read_text() == ""
    assert aside.read_text() == "another large one"
    assert {stat.S_IMODE(file.stat().st_mode) for file in place.iterdir()} == {0o600}


@pytest.mark.integration
@pytest.mark.usefixtures("sockets")
def test_one_worker_answers_as_this_process_would_until_it_is_killed_or_idle(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    owner = Owner(tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "org-0", tmp_path / "b" / "org-0")
    sent = owner.invitation(noise="reproducible")
    place = tmp_path / "b" / "org-0"
    paths = {"data": str(place / "data.jsonl"), "policy": str(place / "policy.yaml")}
    config = owner.organisations.node_config(0, **paths, worker=True, worker_idle=4)
    try:
        # Messages that come together start one worker.
        with ThreadPoolExecutor(3) as pool:
            plans = list(pool.map(lambda _: ask(config, sent, None), range(3)))
        assert all(plan == owner.ask(sent) for plan in plans)
        (first,) = workers(tmp_path / "b")
        one = request(owner, sent)
        answer = ask(config, sent, one.encode())
        assert answer["reply"] == owner.ask(sent, one)["reply"]
        assert workers(tmp_path / "b") == [first]
        # A killed worker is replaced, and the stored reply is given again.
        os.kill(first, signal.SIGKILL)
        assert ask(config, sent, one.encode()) == answer
        (second,) = workers(tmp_path / "b")
        assert second != first
        # The policy is read for every message.
        strict = (place / "policy.yaml").read_text().replace("1000.0", "0.001")
        (place / "policy.yaml").write_text(strict)
        refused = ask(config, sent, Request.decode(one.encode()).encode())["refused"]
        assert str(refused).startswith("policy.max_epsilon: ")
        assert workers(tmp_path / "b") == [second]
        deadline = time.monotonic() + 20
        while workers(tmp_path / "b") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert workers(tmp_path / "b") == []
        assert list(runtime_folder().glob("*.sock")) == []
    finally:
        end_workers(tmp_path / "b")

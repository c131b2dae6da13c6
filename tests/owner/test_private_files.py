"""What an owner's machine writes is for the owner's account alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorica.engines.flower import warm
from lorica.files import private_folder
from lorica.messages import Delivery, Request
from lorica.owner.settings import NodeSettings
from lorica.privacy import database
from lorica.privacy.ledger import Ledger
from lorica.testing.records import TinyRecords
from tests.owner.test_client import owner


@pytest.fixture(autouse=True)
def open_to_all() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_ledger_and_its_journal(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.touch(0o644)
    ledger = Ledger(path)
    assert mode(path) == 0o600
    with database.transaction(ledger.path) as connection:
        connection.execute("UPDATE releases SET steps = 0")
        columns = connection.execute("PRAGMA table_info(releases)").fetchall()
        connection.execute(f"INSERT INTO releases VALUES ({', '.join('1' * len(columns))})")
        assert {mode(found) for found in tmp_path.glob("l.sqlite*")} == {0o600}
        assert len(list(tmp_path.glob("l.sqlite*"))) == 2
    for journal in ("wal", "delete"):
        with database.reading(path) as connection:
            connection.rollback()
            connection.execute(f"PRAGMA journal_mode = {journal}")
            connection.execute("UPDATE releases SET steps = 1")
            assert {mode(found) for found in tmp_path.glob("l.sqlite*")} == {0o600}


def test_results_of_private_tests(tmp_path: Path) -> None:
    client, model, _ = owner(tmp_path)
    client.private_test = TinyRecords.texts(4, seed=1)
    client.reply_to(model, Request("run", 0, 1, 0, {}, Delivery(model.read(), {}, final=False)))
    (found,) = tmp_path.glob("*.private-metrics.jsonl")
    assert mode(found) == 0o600


def test_a_nodes_folder_and_its_workers_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = NodeSettings(client=0, data=str(tmp_path / "data.csv"))
    settings.place.mkdir(mode=0o777)
    (settings.place / "worker.log").touch(0o644)
    started: list[Any] = []
    monkeypatch.setattr("subprocess.Popen", lambda command, **_: started.append(command))
    warm._start(settings, tmp_path / "socket", os.getpid())
    assert started
    assert mode(settings.place) == 0o700
    assert mode(settings.place / "worker.log") == 0o600
    assert mode(private_folder(tmp_path / "new" / "inner")) == 0o700

"""Real processes: the example federation on loopback, with TLS and node keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch

from lorica.config import load
from lorica.engines.flower.launch import launch, with_absolute_paths, write_app
from lorica.engines.flower.processes import environment, run_app
from lorica.engines.flower.status import hub_status, node_status
from lorica.errors import UserError
from lorica.experiment import Experiment
from lorica.privacy.ledger import Ledger
from lorica.privacy.ledger_file import ledger_beside
from tests.engines.real_processes import kill_processes, until
from tests.scripts import load_script

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "federation" / "loopback.py"
pytestmark = pytest.mark.integration


def processes(folder: Path) -> list[str]:
    """Command lines of running processes that name a folder: SuperLink, nodes and their workers do."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(line)
    return found


def wait_until_none_runs(folder: Path) -> None:
    deadline = time.monotonic() + 15
    while processes(folder) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert processes(folder) == []


def test_the_example_runs_and_resumes_after_ctrl_c_and_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLE, tmp_path / "fed", "federation.rounds=3", "federation.local_steps=2"]
    metrics = tmp_path / "fed" / "runs" / "loopback" / "metrics.jsonl"
    with (tmp_path / "log").open("w+") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)
        deadline = time.monotonic() + 240
        while first.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and len(metrics.read_text().splitlines()) == 2:
                break
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        assert first.wait(60) != 0, (tmp_path / "log").read_text()
    wait_until_none_runs(tmp_path / "fed")
    finished = len(metrics.read_text().splitlines()) - 1
    assert 1 <= finished < 3
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until_none_runs(tmp_path / "fed")
    assert [json.loads(line)["round"] for line in metrics.read_text().splitlines()] == [0, 1, 2, 3]
    assert f"round   {finished + 1}" in done.stdout
    assert f"round   {finished} " not in done.stdout.split("finished:")[0]
    assert "is spent" in done.stdout
    assert len(list((tmp_path / "fed").glob("owner-*/digits.parquet.lorica/run-*/adapter"))) == 3
    stated = json.loads((metrics.parent / "privacy.json").read_text())["clients"]
    for client in stated:
        releases = Ledger(ledger_beside(tmp_path / "fed" / f"owner-{client['client']}" / "digits.parquet")).releases()
        # A round that was cut off may have been charged, and is then not charged again.
        assert sorted(release.round for release in releases) == [1, 2, 3]
        assert client["steps"] == sum(release.steps for release in releases) == 6


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The example's `Loopback`, with nodes that allow research noise."""
    loopback = load_script(EXAMPLE)
    folder = tmp_path_factory.mktemp("loopback")
    loopback.divide_digits(folder, loopback.OWNERS)
    policy = loopback.POLICY | {"noise": ["secure", "reproducible"]}
    with loopback.Loopback(folder) as running:
        for owner in range(loopback.OWNERS):
            running.register(owner, policy)
            running.start_node(owner)
        yield running
    wait_until_none_runs(folder)


def assert_well(federation: Any, folder: Path) -> None:
    """`lorica flower status` of a finished run at the hub, and at a node that waits for the next one."""
    hub = hub_status(folder, federation.home)
    assert (hub["finished"], hub["round"], hub["problems"]) == (True, 2, [])
    assert [node["status"] for node in hub["nodes"]] == ["online"] * 3
    assert hub["run"]["status"] == "finished:completed"
    node = node_status(federation.folder / "owner-0" / "digits.parquet")
    assert (node["running"], node["connected"]) == (True, True)
    assert node["runs"][0]["name"] == hub["name"]
    assert node["runs"][0]["last_round"] == 2


@pytest.mark.parametrize("method", ["as-lora", "fedask", "flora"])
def test_the_adapter_is_that_of_the_local_engine_bit_for_bit(federation: Any, tmp_path: Path, method: str) -> None:
    folder = federation.folder
    same = [f"name={method}", f"method.name={method}", "privacy.noise=reproducible", "federation.rounds=2"]
    same += ["federation.clients=3", "federation.weights=uniform", "federation.local_steps=2"]
    remote = load(None, [*same, "engine=flower", "flower.superlink=loopback", "task.train=owner", f"output={folder}"])
    launch(with_absolute_paths(remote), federation.home)
    local = load(None, [*same, f"output={tmp_path}", f"privacy.ledger={tmp_path / 'ledger.sqlite'}"])
    task = local.task.model_copy(
        update={"train": [str(file) for file in sorted(folder.glob("owner-*/digits.parquet"))]}
    )
    parts = local.federation.model_copy(update={"partition": "files"})
    result = Experiment(local.model_copy(update={"task": task, "federation": parts})).run()
    expected = safetensors.torch.load_file(result.adapter / "adapter_model.safetensors")
    assert_well(federation, folder / method)
    found = safetensors.torch.load_file(folder / method / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(value.abs().max() > 0 for name, value in expected.items() if "lora_B" in name)


def test_the_owners_refusal_and_the_servers_error_reach_the_one_who_started_the_run(
    federation: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = federation.folder
    asked = ["name=greedy", "engine=flower", "flower.superlink=loopback", "task.train=owner", f"output={folder}"]
    asked += ["federation.clients=3", "federation.weights=uniform", "flower.wait=40", "privacy.epsilon=100"]
    with pytest.raises(UserError, match=r"0 clients have joined after 40 seconds"):
        launch(with_absolute_paths(load(None, asked)), federation.home)
    assert capfd.readouterr().out.count("refused: policy.") == 3


def test_a_node_runs_no_code_that_the_server_sends(federation: Any, tmp_path: Path) -> None:
    folder = federation.folder
    config = load(None, ["name=code", "engine=flower", "flower.superlink=loopback", "task.train=owner"])
    asked = [
        "federation.clients=3",
        "federation.weights=uniform",
        "federation.rounds=1",
        "privacy.noise=reproducible",
        f"output={folder}",
    ]
    write_app(load(json.loads(config.model_dump_json()), asked), tmp_path / "app")
    app = (tmp_path / "app" / "pyproject.toml").read_text()
    (tmp_path / "app" / "pyproject.toml").write_text(app.replace("lorica.engines.flower.client:app", "sent:app"))
    leak = f"import os\nopen({str(tmp_path)!r} + f'/leak-{{os.getpid()}}', 'w').write('x')\n"
    (tmp_path / "app" / "sent.py").write_text(leak + "from lorica.engines.flower import client\n\napp = client.app\n")
    run_app(tmp_path / "app", "loopback", environment(federation.home))
    assert (folder / "code" / "adapter").is_dir()
    assert not list(tmp_path.glob("leak-*"))
    assert not list(folder.glob("owner-*/flwr/apps/*"))


def stays(node: subprocess.Popen[bytes]) -> bool:
    try:
        return node.wait(6) is None
    except subprocess.TimeoutExpired:
        return True


def test_rounds_go_on_without_a_killed_node_and_with_it_once_it_is_started_again(federation: Any) -> None:
    """It is the same node to the SuperLink, by its key; the statement has what it was charged for without an answer."""
    folder = federation.folder
    asked = ["name=killed", "engine=flower", "flower.superlink=loopback", "task.train=owner", f"output={folder}"]
    asked += [
        "federation.clients=3",
        "federation.weights=uniform",
        "federation.min_clients=2",
        "federation.rounds=9",
        "federation.local_steps=2",
    ]
    config = with_absolute_paths(load(None, [*asked, "flower.timeout=90"]))
    metrics = config.folder / "metrics.jsonl"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(launch, config, federation.home)
        until(lambda: running.done() or (metrics.is_file() and len(metrics.read_text().splitlines()) == 2))
        kill_processes(folder / "owner-0" / "flwr")
        # The SuperLink lets it in once it has missed the old process's heartbeats.
        until(lambda: running.done() or stays(federation.start_node(0)))
        running.result()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()][1:]
    participants = {row["round"]: row["participants"] for row in rows}
    assert [1, 2] in participants.values()
    assert participants[1] == participants[9] == [0, 1, 2]
    for client in json.loads((config.folder / "privacy.json").read_text())["clients"]:
        ledger = Ledger(ledger_beside(folder / f"owner-{client['client']}" / "digits.parquet"))
        run = ledger.releases()[-1].run
        releases = [release for release in ledger.releases() if release.run == run]
        answered = [number for number, present in participants.items() if client["client"] in present]
        unanswered = {release.round for release in releases} - set(answered)
        assert len(releases) == len(answered) + len(unanswered)
        assert len(unanswered) <= (client["client"] == 0)
        assert client["steps"] == sum(release.steps for release in releases)

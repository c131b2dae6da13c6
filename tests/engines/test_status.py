"""`lorica flower status`: what a monitor asks a node and the hub."""

from __future__ import annotations

import json
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lorica.cli import app
from lorica.engines.flower import status
from lorica.engines.flower.status import NODE, hub_status, node_status, note_start
from lorica.errors import UserError
from lorica.owner.node import agreed
from lorica.reporting.checksums import write_checksums
from tests.engines.test_hostile_server import Owner, by_pld, request, strict_owner


@pytest.fixture
def hub() -> Iterator[socket.socket]:
    """Something that listens, and this process's connection to it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    """A node that has answered one request."""
    agreed.cache_clear()
    owner = strict_owner(tmp_path_factory.mktemp("released") / "world")
    sent = owner.invitation()
    assert "reply" in owner.ask(sent, request(owner, sent))
    return owner


def address(hub: socket.socket) -> str:
    return f"127.0.0.1:{hub.getsockname()[1]}"


def run(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["flower", "status", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_a_node_that_runs_is_well_and_tells_its_rounds_and_what_is_left(released: Owner, hub: socket.socket) -> None:
    data = Path(str(released.settings.data))
    note_start(released.settings, address(hub))
    assert stat.S_IMODE((released.settings.place / NODE).stat().st_mode) == 0o600
    with socket.create_connection(hub.getsockname()):
        code, found = run(data)
        assert node_status(released.settings.place) == node_status(data)
        shown = CliRunner().invoke(app, ["flower", "status", str(data)], terminal_width=200)
    assert (code, found["problems"]) == (0, [])
    assert (found["running"], found["connected"], found["client"]) == (True, True, 0)
    (row,) = found["runs"]
    assert (row["name"], row["last_round"], row["steps"]) == ("hostile", 1, 2)
    assert row["reserved"] > 0, "the run is not over"
    spent = by_pld(released.releases())
    assert found["epsilon"]["spent"] == pytest.approx(spent, rel=1e-6)
    assert found["epsilon"]["left"] == pytest.approx(30.0 - spent, rel=1e-6)
    assert "hostile" in shown.output
    assert shown.exit_code == 0


def test_a_node_without_a_connection_is_not_well(released: Owner, hub: socket.socket) -> None:
    note_start(released.settings, address(hub))
    code, found = run(released.settings.data)
    assert (code, found["running"], found["connected"]) == (1, True, False)
    assert found["problems"] == [f"the node has no connection to {address(hub)}"]


@pytest.mark.parametrize(("key", "value"), [("process", 2**22 + 1), ("created", 1.0)])
def test_a_node_that_has_ended_is_not_taken_for_another_process(released: Owner, key: str, value: float) -> None:
    note_start(released.settings, "127.0.0.1:1")
    path = released.settings.place / NODE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    code, found = run(released.settings.data)
    assert (code, found["running"], found["connected"]) == (1, False, False)
    assert found["problems"] == ["the node is not running"]


def test_an_old_version_a_lost_ledger_and_a_spent_budget_are_problems(
    tmp_path: Path, released: Owner, hub: socket.socket
) -> None:
    folder = Path(str(released.settings.data)).parent
    copy = shutil.copytree(folder, tmp_path / "copy")
    ledger = copy / "data.jsonl.ledger.sqlite"
    policy = copy / "policy.yaml"
    policy.write_text(yaml.safe_dump(yaml.safe_load(policy.read_text()) | {"max_epsilon": 0.01}))
    paths = {"data": str(copy / "data.jsonl"), "policy": str(policy), "ledger": str(ledger)}
    settings = released.settings.model_copy(update=paths)
    note_start(settings, address(hub))
    path = settings.place / NODE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lorica": "0.0.1"}))
    with socket.create_connection(hub.getsockname()):
        found = node_status(Path(paths["data"]))
    assert found["epsilon"]["left"] == 0
    assert [problem.split(":")[0] for problem in found["problems"]] == [
        "the node runs Lorica 0.0.1, but 0.1.0 is installed",
        "nothing is left of the policy's ε",
    ]
    content = ledger.read_bytes()
    ledger.write_bytes(content.replace(b"secure", b"Secure"))
    assert any(
        "the ledger is not the one last used here" in line for line in node_status(copy / "data.jsonl")["problems"]
    )


def test_before_the_first_release_all_of_the_epsilon_is_left(owner_without_release: Owner) -> None:
    note_start(owner_without_release.settings, "127.0.0.1:1")
    found = node_status(Path(str(owner_without_release.settings.data)))
    assert (found["runs"], found["epsilon"]["left"]) == ([], 30.0)


@pytest.fixture
def owner_without_release(tmp_path: Path) -> Owner:
    return strict_owner(tmp_path / "world")


def test_data_without_a_node_is_an_error_of_its_own(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["flower", "status", str(tmp_path / "data.csv")])
    assert result.exit_code == 2
    assert "no node was started with it" in " ".join(result.output.split())


class SuperLink:
    """Answers of `flwr … --format json`, as Flower 1.41 gives them."""

    def __init__(self) -> None:
        self.nodes = ["online", "online", "online"]
        self.runs = {"finished:failed": "2026-11-01 10:00:00Z", "running": "2026-11-02 10:00:00Z"}
        self.name = "lorica-together"

    def __call__(self, environment: dict[str, str], *arguments: str) -> dict[str, Any]:
        if arguments[0] == "supernode":
            times = {"online-at": "2026-11-02 09:00:00Z", "offline-at": "2026-11-02 11:00:00Z"}
            nodes = [{"node-id": str(n), "owner-name": "none", "status": s} for n, s in enumerate(self.nodes)]
            return {"nodes": [node | times for node in nodes]}
        runs = [
            {"run-id": str(n), "fab-name": self.name, "status": s, "pending-at": self.runs[s]}
            for n, s in enumerate(self.runs)
        ]
        return {"runs": [*runs, {"run-id": "9", "fab-name": "another", "status": "x", "pending-at": "2027"}]}


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    answering = SuperLink()
    monkeypatch.setattr(status, "ask_flwr", answering)
    return answering


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run after its second round."""
    from lorica.config import load

    asked = ["name=together", "engine=flower", "flower.superlink=hub", "task.train=owner", "federation.clients=3"]
    config = load(None, [*asked, f"output={tmp_path}"])
    config.folder.mkdir()
    (config.folder / "config.yaml").write_text(config.to_yaml())
    rows = [{"round": 0}] + [{"round": n, "participants": [0, 2], "missing": [1], "epsilon": n / 2} for n in (1, 2)]
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config.folder


def test_a_run_whose_nodes_are_online_is_well(folder: Path, superlink: SuperLink) -> None:
    code, found = run(folder)
    assert (code, found["problems"]) == (0, [])
    assert (found["round"], found["rounds"], found["participants"], found["missing"]) == (2, 20, [0, 2], [1])
    assert found["run"] == {"id": "1", "status": "running"}
    assert [node["status"] for node in found["nodes"]] == ["online"] * 3
    assert "2 of 20" in CliRunner().invoke(app, ["flower", "status", str(folder)]).output


def test_a_run_that_stopped_or_lacks_nodes_is_not_well(folder: Path, superlink: SuperLink) -> None:
    superlink.nodes = ["online", "offline", "registered"]
    superlink.runs = {"finished:failed": "2026-11-02 10:00:00Z"}
    code, found = run(folder)
    assert code == 1
    assert found["problems"] == [
        "1 of the 3 nodes that a round needs are online",
        "the run has not finished, and it is finished:failed: start it again",
    ]
    superlink.name = "lorica-other"
    assert "it is not on this SuperLink" in hub_status(folder)["problems"][1]


def test_a_superlink_that_is_away_matters_until_the_run_has_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> dict[str, Any]:
        raise UserError("engine", "flower", "`flwr supernode` failed:\n no connection", "fix it")

    monkeypatch.setattr(status, "ask_flwr", away)
    code, found = run(folder)
    assert (code, found["nodes"]) == (1, None)
    assert found["problems"] == ["the SuperLink does not answer (`flwr supernode` failed: no connection)"]
    write_checksums(folder)
    code, found = run(folder)
    assert (code, found["finished"], found["problems"]) == (0, True, [])


def test_a_run_on_one_machine_has_no_hub(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("superlink: hub", "superlink: null"))
    with pytest.raises(UserError, match="not one across machines"):
        hub_status(folder)

"""The health of a node, from its own files and process; and of a run at the hub, from its folder and the SuperLink."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from lorica.config import ExperimentConfig, load
from lorica.engines.flower.launch import app_name
from lorica.engines.flower.processes import ask_flwr, environment
from lorica.errors import UserError
from lorica.files import private_folder, read_json, write_atomically
from lorica.owner.settings import NodeSettings, folder_beside
from lorica.privacy.policy import load_policy
from lorica.reporting.budget import read_budget
from lorica.reporting.checksums import files_are_whole
from lorica.reporting.run_folder import read_rounds

NODE = "node.json"


def note_start(settings: NodeSettings, superlink: str) -> None:
    """Write to the node's folder which process is the node, before it becomes `flower-supernode`."""
    content = {
        "process": os.getpid(),
        # Another process may get the same number later.
        "created": psutil.Process().create_time(),
        "superlink": superlink,
        "lorica": version("lorica"),
        "flwr": version("flwr"),
        "settings": settings.model_dump(),
    }
    private_folder(settings.place)
    write_atomically(settings.place / NODE, json.dumps(content, indent=2).encode(), mode=0o600)


def is_of_run(path: Path) -> bool:
    """Whether a path is a run folder at the hub, rather than a node's data."""
    return (path / "config.yaml").is_file()


def node_status(path: Path) -> dict[str, Any]:
    """JSON-able health of a node. It reads files and looks at processes of this machine; nothing is changed or sent.

    `running` and `connected` are null if this account may not see them. `runs` has a row for each run in the ledger,
    newest first, `epsilon` what the policy allows and what is left of it, `problems` what its owner should look at.

    Args:
        path: the node's data, or its folder (`folder` in its configuration).

    Raises:
        UserError: no node was started with this data, or its policy or ledger cannot be read.
    """
    path = path.expanduser()
    place = path if (path / NODE).is_file() else folder_beside(path)
    if not (place / NODE).is_file():
        remedy = "give the data that a node was started with, or the folder in its configuration"
        raise UserError("DATA", str(path), f"no node was started with it ({place / NODE} is missing)", remedy)
    node = read_json(place / NODE)
    settings = NodeSettings.model_validate(node["settings"])
    assert settings.data is not None
    assert settings.policy is not None
    policy = load_policy(Path(settings.policy).expanduser())
    ledger = settings.ledger_path
    budget = read_budget(ledger, policy.delta, policy) if ledger.is_file() else None
    process = _process(node)
    spent = {"spent": 0.0, "left": policy.max_epsilon} if budget is None else budget["policy"]
    found: dict[str, Any] = {
        "client": settings.client,
        "running": process is not None,
        "since": None if process is None else _time(process.create_time()),
        "superlink": node["superlink"],
        "connected": False if process is None else _is_connected(process, node["superlink"]),
        "lorica": node["lorica"],
        "flwr": node["flwr"],
        "ledger": str(ledger),
        "runs": [] if budget is None else _runs(budget),
        "epsilon": {"max": policy.max_epsilon, "delta": policy.delta, "spent": spent["spent"], "left": spent["left"]},
    }
    problems = []
    if not found["running"]:
        problems.append("the node is not running")
    elif found["connected"] is False:
        problems.append(f"the node has no connection to {node['superlink']}")
    if node["lorica"] != version("lorica"):
        problems.append(f"the node runs Lorica {node['lorica']}, but {version('lorica')} is installed: restart it")
    if budget is not None and budget["problem"] is not None:
        problems.append(f"the ledger is not the one last used here: {budget['problem']}")
    if not spent["left"]:
        problems.append("nothing is left of the policy's ε")
    return found | {"problems": problems}


def hub_status(folder: Path, home: Path | None = None) -> dict[str, Any]:
    """JSON-able health of a run across machines, and of the SuperLink that it runs on.

    Args:
        folder: the run folder.
        home: replaces `FLWR_HOME`.

    Raises:
        UserError: not a run folder, or the run was on one machine.
    """
    config = load(folder / "config.yaml")
    superlink = config.flower.superlink
    if config.engine != "flower" or superlink is None:
        problem = "the run is not one across machines (flower.superlink)"
        raise UserError("RUN", str(folder), problem, "give the folder of a run with flower.superlink")
    rows = read_rounds(folder / "metrics.jsonl")
    finished = files_are_whole(folder)
    found: dict[str, Any] = {"name": config.name, "superlink": superlink, "finished": finished}
    found |= {"round": rows[-1]["round"] if rows else None, "rounds": config.federation.rounds}
    found |= {key: rows[-1].get(key) if rows else None for key in ("participants", "missing", "epsilon")}
    found["time"] = _time((folder / "metrics.jsonl").stat().st_mtime) if rows else None
    try:
        around = environment(home)
        nodes = ask_flwr(around, "supernode", "list", superlink)["nodes"]
        runs = ask_flwr(around, "list", superlink)["runs"]
    except UserError as error:
        problem = f"the SuperLink does not answer ({' '.join(error.problem.split())})"
        return found | {"nodes": None, "run": None, "problems": [] if finished else [problem]}
    found["nodes"] = [
        {
            "node": node["node-id"],
            "status": node["status"],
            "since": node["online-at"] if node["status"] == "online" else node["offline-at"],
        }
        for node in nodes
    ]
    own = [run for run in runs if run["fab-name"] == app_name(config)]
    newest = max(own, key=lambda run: str(run["pending-at"]), default=None)
    found["run"] = None if newest is None else {"id": newest["run-id"], "status": newest["status"]}
    return found | {"problems": [] if finished else _problems_at_hub(config, found)}


def _problems_at_hub(config: ExperimentConfig, found: dict[str, Any]) -> list[str]:
    problems = []
    online = sum(node["status"] == "online" for node in found["nodes"])
    needed = config.federation.min_clients or config.federation.participants
    if online < needed:
        problems.append(f"{online} of the {needed} nodes that a round needs are online")
    run = found["run"]
    if run is None or str(run["status"]).startswith("finished"):
        status = "it is not on this SuperLink" if run is None else f"it is {run['status']}"
        problems.append(f"the run has not finished, and {status}: start it again")
    return problems


def _runs(budget: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each run in the ledger, newest first."""
    reserved = {row["run"]: row["epsilon"] for row in budget["reserved"]}
    keys = ("run", "name", "last", "last_round", "steps", "epsilon")
    rows = [{key: row[key] for key in keys} | {"reserved": reserved.get(row["run"])} for row in budget["runs"]]
    return sorted(rows, key=lambda row: str(row["last"]), reverse=True)


def _process(node: dict[str, Any]) -> psutil.Process | None:
    """The process of the node; None if it has ended."""
    try:
        process = psutil.Process(node["process"])
        alive = process.create_time() == node["created"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def _is_connected(process: psutil.Process, superlink: str) -> bool | None:
    """Whether a process has an open connection to the port of an address; None if this account may not see it."""
    port = int(superlink.rpartition(":")[2])
    try:
        connections = process.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    return any(one.status == psutil.CONN_ESTABLISHED and one.raddr and one.raddr.port == port for one in connections)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

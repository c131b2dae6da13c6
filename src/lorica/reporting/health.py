"""The health of a node or of a run at the hub, for the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorica.reporting.style import rounded_up


def node_table(status: dict[str, Any]) -> Group:
    """`lorica.engines.flower.status.node_status` for people."""
    facts = Table(show_header=False)
    running = f"since {status['since']}" if status["running"] else "no"
    facts.add_row("running", Text(running, style="" if status["running"] else "bold red"))
    connected = {True: "yes", False: "no", None: "unknown: this account may not see it"}[status["connected"]]
    facts.add_row("connected", Text(f"{connected}, to {status['superlink']}"))
    facts.add_row("client", str(status["client"]))
    facts.add_row("versions", f"Lorica {status['lorica']}, Flower {status['flwr']}")
    cost = status["epsilon"]
    left = math.floor(cost["left"] * 100) / 100
    facts.add_row("ε left", f"{left:.2f} of {cost['max']:g} at δ = {cost['delta']:g}")
    facts.add_row("ledger", Text(status["ledger"], overflow="fold"))
    runs = Table("run", "last round", "released (UTC)", "steps", "ε", "ε reserved", title="Runs", title_justify="left")
    for row in status["runs"]:
        reserved = "" if row["reserved"] is None else rounded_up(row["reserved"])
        spent = rounded_up(math.inf if row["epsilon"] is None else row["epsilon"])
        name = Text(row["name"] or row["run"][:8])
        runs.add_row(
            name, str(row["last_round"]), row["last"][:16].replace("T", " "), str(row["steps"]), spent, reserved
        )
    return Group(facts, *([runs] if status["runs"] else [Text("No release yet.")]), *_problems(status))


def hub_table(status: dict[str, Any]) -> Group:
    """`lorica.engines.flower.status.hub_status` for people."""
    facts = Table(show_header=False)
    facts.add_row("run", Text(status["name"]))
    when = "" if status["time"] is None else f", at {status['time'][:16].replace('T', ' ')} UTC"
    facts.add_row("last round", f"{status['round'] or 0} of {status['rounds']}{when}")
    for key in ("participants", "missing"):
        if status[key] is not None:
            facts.add_row(key, ", ".join(map(str, status[key])) or "none")
    facts.add_row("SuperLink", Text(status["superlink"]))
    run = status["run"]
    facts.add_row("state", "finished" if status["finished"] else "unknown" if run is None else Text(run["status"]))
    nodes = Table("node", "status", "since", title="Nodes", title_justify="left")
    for node in status["nodes"] or []:
        nodes.add_row(*(Text(str(node[key])) for key in ("node", "status", "since")))
    return Group(facts, *([nodes] if status["nodes"] else []), *_problems(status))


def _problems(status: dict[str, Any]) -> list[RenderableType]:
    return [Text(f"{line[:1].upper()}{line[1:]}.", style="bold red") for line in status["problems"]]

"""The table of a dry run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorica.reporting.style import duration, rounded_up
from lorica.reporting.tables import human_bytes

MOST_ROWS = 30


def rehearsal_table(found: dict[str, Any]) -> Group:
    """What `lorica.rehearsal.rehearse` found, for the terminal."""
    parts: list[RenderableType] = [_clients(found)]
    if len(found["clients"]) > MOST_ROWS:
        parts.append(Text(f"… and {len(found['clients']) - MOST_ROWS} more clients (--json lists all)."))
    notes = [] if found["delta"] is None else [f"δ = {found['delta']:g}."]
    if any("epsilon_own_noise" in client for client in found["clients"]):
        notes.append("ε: against a server that sees sums; ε alone: against one that sees single replies.")
    if found["noise"] == "secure":
        notes.append(f"ε before and after: of all that is charged for the data (ledger {found['ledger']}).")
    else:
        notes.append(f"Not a private release (privacy.noise: {found['noise']}); the ledger charges no ε.")
    parts += [Text(" ".join(notes)), _costs(found)]
    if found["refused"] is not None:
        parts.append(Text(f"The run would be refused: {found['refused']}", style="bold red"))
    parts.append(Text("Nothing was charged, and nothing was written into the run folder."))
    return Group(*parts)


def _clients(found: dict[str, Any]) -> Table:
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "client": ("Client", str),
        "records": ("Records", "{:,}".format),
        "sampling_rate": ("q", "{:.4g}".format),
        "noise_multiplier": ("σ", "{:.4g}".format),
        "own_noise_multiplier": ("σ alone", "{:.4g}".format),
        "steps": ("Steps", "{:,}".format),
        "epsilon": ("ε", rounded_up),
        "epsilon_own_noise": ("ε alone", rounded_up),
        "lifetime_epsilon_before": ("ε before", _life),
        "lifetime_epsilon_after": ("ε after", _life),
        "left": ("ε left", lambda left: f"{math.floor(left * 100) / 100:.2f}"),
    }
    # Infinite costs are null, so a column that no client has is one that the run does not have.
    shown = [key for key in columns if any(key in client for client in found["clients"])]
    table = Table(box=box.SIMPLE_HEAD, title=f"{found['name']}: clients", title_style="bold", title_justify="left")
    for key in shown:
        table.add_column(columns[key][0], justify="right")
    for client in found["clients"][:MOST_ROWS]:
        table.add_row(*("–" if client.get(key) is None else columns[key][1](client[key]) for key in shown))
    return table


def _life(value: float) -> str:
    return "none" if value == 0 else rounded_up(value)


def _costs(found: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1, 0, 0))
    seconds, sent = found["seconds"], found["bytes"]
    table.add_row("Rounds", f"{found['rounds']:,} of {found['local_steps']} steps ({found['method']})")
    for way, name in (("up", "Sent by the clients"), ("down", "Sent to the clients")):
        a_round, total = (human_bytes(sent[way][part]) for part in ("later_round", "all"))
        table.add_row(name, f"{a_round} in a round, {total} in all")
    table.add_row("Memory", f"{human_bytes(found['memory'])} at the peak ({found['device']})")
    parts = [f"{duration(seconds['step'])} for a client's step", f"{duration(seconds['evaluation'])} for an evaluation"]
    table.add_row("Time", f"{', '.join(parts)}: about {duration(seconds['all'])} in all")
    return table

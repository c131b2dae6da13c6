"""The table of clients for terminal, report and model card, each with a selection of columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorica.reporting.style import rounded_up

# Key of a client in privacy.json -> heading and format. Costs have no format because they are rounded up.
_COLUMNS: dict[str, tuple[str, str | None]] = {
    "client": ("Client", "{}"),
    "records": ("Records", "{:,}"),
    "clients": ("Clients", "{:,}"),
    "sampling_rate": ("Sampling rate q", "{:.4g}"),
    "noise_multiplier": ("Noise multiplier σ", "{:.4g}"),
    "own_noise_multiplier": ("Own noise multiplier", "{:.4g}"),
    "clip_norm": ("Clipping norm C", "{:g}"),
    "steps": ("Steps", "{:,}"),
    "releases": ("Releases", "{:,}"),
    "epsilon": ("ε", None),
    "epsilon_own_noise": ("ε of own noise alone", None),
    "epsilon_rdp": ("ε by RDP", None),
    "delta": ("δ", None),
    "lifetime_epsilon": ("ε, lifetime of the data", None),
}
ALL = tuple(_COLUMNS)
SHARED = ("own_noise_multiplier", "epsilon_own_noise")
"""Columns that are shown only if the clients share the noise."""
GUARANTEE = (
    *("client", "records", "clients", "sampling_rate", "noise_multiplier", "own_noise_multiplier", "clip_norm"),
    *("steps", "epsilon", "epsilon_own_noise", "delta"),
)
SHORT = ("client", "records", "clients", "noise_multiplier", "steps", "epsilon", "epsilon_own_noise", "delta")


MOST_CLIENTS = 200
"""Maximum number of clients that figures and tables show one by one."""


def client_rows(clients: list[dict[str, Any]], columns: Sequence[str] = ALL) -> tuple[list[str], list[list[str]]]:
    """Headings, and one row per client in the order of their numbers. Missing values are dashes.

    Of more than `MOST_CLIENTS` clients, those with the largest ε are shown, or with the most records if they are equal.
    With client-level DP there is one row for all clients.
    """
    if len(clients) > MOST_CLIENTS:
        clients = sorted(clients, key=lambda one: (one.get("epsilon") or 0, one.get("records") or 0), reverse=True)
        clients = clients[:MOST_CLIENTS]
    together = any("clients" in client for client in clients)
    hidden = ("client", "records") if together else ("clients",)
    columns = [key for key in columns if key not in hidden]
    columns = [key for key in columns if key not in SHARED or any(key in client for client in clients)]
    headings = [_COLUMNS[key][0] for key in columns]
    return headings, [[_cell(client, key) for key in columns] for client in sorted(clients, key=_number)]


def left_out_text(count: int) -> str:
    """ "The table shows the 200 clients with the largest ε; all 1,000 are in privacy.json."; empty if all are shown."""
    if count <= MOST_CLIENTS:
        return ""
    return f"The table shows the {MOST_CLIENTS} clients with the largest ε; all {count:,} are in privacy.json."


def _number(client: dict[str, Any]) -> int:
    return int(client["client"])


def _cell(client: dict[str, Any], key: str) -> str:
    value, form = client.get(key), _COLUMNS[key][1]
    if value is None:
        return "–"
    return rounded_up(value) if form is None else form.format(value)

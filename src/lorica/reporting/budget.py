"""The account of a ledger: what was released from an owner's data, when, at what ε, and the budget that is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorica.privacy.accounting import epsilon
from lorica.privacy.exposures import Exposure
from lorica.privacy.ledger import Release
from lorica.privacy.ledger_file import Book, find_ledger, read_ledger
from lorica.privacy.lifetime import history
from lorica.privacy.policy import Policy
from lorica.privacy.unit import RECORD, PrivacyUnit
from lorica.reporting.style import rounded_up

SHOWN_OF_A_DIGEST = 8


def read_budget(path: Path, delta: float, policy: Policy | None = None) -> dict[str, Any]:
    """JSON-able account of a ledger. Each ε is computed by PLD at the same δ; null means infinity.

    `runs` has a row for each run, client and kind of noise, with the ε of that run alone; `name` is null if unknown.
    `owners` has a row for each set of records, with the ε of the most exposed record, from this ledger and the index
    in Lorica's home folder.
    `reserved` has the unused reservations of runs. `policy` composes everything in the ledger, as
    `Policy.review_release` does. `problem` says what is wrong with the ledger; null if nothing is.

    Args:
        path: a ledger, or the data next to it.
        delta: δ if there is no policy; a policy has its own.

    Raises:
        UserError: no ledger found.
    """
    ledger = find_ledger(path)
    book = read_ledger(ledger)
    entries = book.entries
    releases = [release for _, release in entries]
    runs: dict[tuple[str, int, str, str, str, PrivacyUnit], list[tuple[float, Release]]] = {}
    for entry in entries:
        runs.setdefault(_of_run(entry[1]), []).append(entry)
    delta = delta if policy is None else policy.delta
    return {
        "ledger": str(ledger),
        "delta": delta,
        "runs": [_run_row(rows, delta, book.names) for rows in runs.values()],
        "owners": [_records_row(book, *key, delta) for key in dict.fromkeys(map(_of_records, releases))],
        "reserved": [_reserved_row(one, delta, book.names) for one in book.own if one.outstanding],
        "policy": None if policy is None else _policy_row(releases, policy),
        "problem": book.problem,
    }


def budget_table(budget: dict[str, Any]) -> Group:
    """The account for the terminal. Unprotected releases are red, and ids are shortened to 8 characters.

    Each run has a table of its own, under its name, so that no word is broken at 80 columns.
    """
    delta = f"{budget['delta']:g}"
    parts: list[RenderableType] = [
        # Not wrapped: it can be copied.
        Text(f"Ledger {budget['ledger']}", overflow="ignore", no_wrap=True),
        Text(f"\nReleases (ε of each run alone, at δ = {delta}; times in UTC)", style="bold"),
    ]
    headings = ["Client", "Records of", "Rounds", "Steps", "q", "σ", "C", "ε"]
    runs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in budget["runs"]:
        runs.setdefault((row["run"], row["noise"], row["unit"]), []).append(row)
    cells = [_run_cells(row) for row in budget["runs"]]
    widths = [max(len(row[place]) for row in [headings, *cells]) for place in range(len(headings))]
    for rows in runs.values():
        bare = rows[0]["noise"] != "secure"
        parts += [_run_heading(rows), _table(headings, [(_run_cells(row), bare) for row in rows], widths)]
    parts += [
        Text(f"Lifetime of the data (ε of all runs, at δ = {delta})", style="bold"),
        _table(
            ["Data set", "Records of", "Unit", "Runs", "Releases", "Unprotected", "ε"],
            [(_records_cells(row), row["unprotected"] > 0) for row in budget["owners"]],
        ),
    ]
    if budget["reserved"]:
        parts.append(Text("Unused reservations (release one with --release RUN)", style="bold"))
        held = [(_reserved_cells(row), False) for row in budget["reserved"]]
        parts.append(_table(["Run", "Client", "Steps", "ε"], held))
    if budget["problem"] is not None:
        text = f"This is not the ledger last used here: {budget['problem']}. Restore the newest copy of the file."
        parts.append(Text(text, style="bold red"))
    policy = budget["policy"]
    if policy is not None:
        text = f"Policy: ε = {rounded_up(_number(policy['spent']))} of {policy['max_epsilon']:g} is spent"
        left = f"{math.floor(policy['left'] * 100) / 100:.2f} is left" if policy["left"] else "nothing is left"
        parts.append(Text(f"{text}, {left}.", style="bold" if policy["left"] else "bold red"))
    return Group(*parts)


def _of_run(release: Release) -> tuple[str, int, str, str, str, PrivacyUnit]:
    return release.run, release.client, release.dataset, release.records, release.noise, release.unit


def _of_records(release: Release) -> tuple[str, str, PrivacyUnit]:
    return release.dataset, release.records, release.unit


def _run_row(entries: list[tuple[float, Release]], delta: float, names: Mapping[str, str]) -> dict[str, Any]:
    times = [time for time, _ in entries]
    releases = [release for _, release in entries]
    run, client, dataset, records, noise, unit = _of_run(releases[0])
    terms = sorted({(release.sampling_rate, release.noise_multiplier, release.clip_norm) for release in releases})
    cost = epsilon([release.cost for release in releases], delta) if noise == "secure" else math.inf
    return {
        "run": run,
        "name": names.get(run),
        "client": client,
        "dataset": dataset,
        "owner": records,
        "unit": str(unit),
        "noise": noise,
        "first": datetime.fromtimestamp(min(times), UTC).isoformat(timespec="seconds"),
        "last": datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds"),
        "rounds": len({release.round for release in releases}),
        "last_round": max(release.round for release in releases),
        "releases": len(releases),
        "steps": sum(release.steps for release in releases),
        "sampling_rates": sorted({rate for rate, _, _ in terms}),
        "noise_multipliers": sorted({sigma for _, sigma, _ in terms}),
        "clip_norms": sorted({clip for _, _, clip in terms if math.isfinite(clip)}),
        "epsilon": _finite(cost),
    }


def _records_row(book: Book, dataset: str, records: str, unit: PrivacyUnit, delta: float) -> dict[str, Any]:
    releases = [release for _, release in book.entries]
    own = [release for release in releases if _of_records(release) == (dataset, records, unit)]
    found = history(book, dataset, records)
    life = math.inf if found.unprotected else found.epsilon(delta, unit=unit)
    return {
        "dataset": dataset,
        "owner": records,
        "unit": str(unit),
        "runs": len({release.run for release in own}),
        "releases": len(own),
        "unprotected": found.unprotected,
        "lifetime_epsilon": _finite(life),
    }


def _reserved_row(exposure: Exposure, delta: float, names: Mapping[str, str]) -> dict[str, Any]:
    cost = replace(exposure.cost(reserved=True), count=exposure.outstanding)
    return {
        "run": exposure.run,
        "name": names.get(exposure.run),
        "client": exposure.client,
        "owner": exposure.records,
        "steps": exposure.outstanding,
        "epsilon": _finite(epsilon([cost], delta)),
    }


def _policy_row(releases: list[Release], policy: Policy) -> dict[str, Any]:
    spent = policy.spent(releases)
    return {
        "max_epsilon": policy.max_epsilon,
        "delta": policy.delta,
        "spent": _finite(spent),
        "left": max(0.0, policy.max_epsilon - spent),
    }


def _run_heading(rows: list[dict[str, Any]]) -> Text:
    """Which run its rows belong to: name, id, when, and what protects what."""
    first = rows[0]
    period = _period(min(row["first"] for row in rows), max(row["last"] for row in rows))
    noise = {"secure": "", "none": ", no noise"}.get(first["noise"], f", {first['noise']} noise")
    unit = "" if first["unit"] == str(RECORD) else f", unit: {first['unit']}"
    return Text(f"\n{_run_name(first)}: {period}{noise}{unit}", style="red" if noise else "")


def _run_name(row: dict[str, Any]) -> str:
    """`NAME (ID)`, or the id of a run without a known name; the id is shortened."""
    short = row["run"][:SHOWN_OF_A_DIGEST]
    return short if row["name"] is None else f"{row['name']} ({short})"


def _run_cells(row: dict[str, Any]) -> list[str]:
    return [
        str(row["client"]),
        row["owner"][:SHOWN_OF_A_DIGEST],
        str(row["rounds"]),
        str(row["steps"]),
        _numbers(row["sampling_rates"]),
        _numbers(row["noise_multipliers"]),
        _numbers(row["clip_norms"]),
        rounded_up(_number(row["epsilon"])),
    ]


def _records_cells(row: dict[str, Any]) -> list[str]:
    digests = [row["dataset"][:SHOWN_OF_A_DIGEST], row["owner"][:SHOWN_OF_A_DIGEST]]
    counts = [str(row[name]) for name in ("runs", "releases", "unprotected")]
    return [*digests, row["unit"], *counts, rounded_up(_number(row["lifetime_epsilon"]))]


def _reserved_cells(row: dict[str, Any]) -> list[str]:
    return [_run_name(row), str(row["client"]), str(row["steps"]), rounded_up(_number(row["epsilon"]))]


def _period(first: str, last: str) -> str:
    """A period of time, to the minute; the date is repeated only if it changes."""
    start, end = first[:16].replace("T", " "), last[:16].replace("T", " ")
    if start == end:
        return start
    return f"{start} to {end[11:] if start[:10] == end[:10] else end}"


def _table(headings: list[str], rows: list[tuple[list[str], bool]], widths: Sequence[int] | None = None) -> Table:
    """A table whose rows are red if flagged.

    Args:
        widths: the least width of each column, so that several tables look like one.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading, width in zip(headings, widths or [0] * len(headings), strict=True):
        table.add_column(heading, overflow="fold", min_width=width)
    for cells, bare in rows:
        table.add_row(*map(Text, cells), style="red" if bare else None)
    return table


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.inf if value is None else value

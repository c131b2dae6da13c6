"""What an audit found, for the terminal, the report and the model card: "not refuted" at best, never "private"."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorica.reporting.style import percent, rounded_up

HEADINGS = ["Claimed ε", "ε ≥ (one run)", "ε ≥ (f-DP)", "AUC", "TPR at 1 % FPR", "ε ≥ with σ → 0", "Verdict"]
ATTACKS = {
    "white_box": "all that the server received (white box)",
    "black_box": "the final adapter (black box)",
}
NO_POWER = (
    "no power. Even with σ → 0 it finds no bound above the claim, so it could not have refuted the claim. Audit with "
    "more canaries."
)


def mechanism_table(audit: dict[str, Any]) -> Group:
    """The audit of the mechanism for the terminal: a row for each method and kind of noise, then what was refuted."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(["Method", "Noise", *HEADINGS]):
        table.add_column(heading, justify="left" if place in (0, 1, 8) else "right", overflow="fold")
    for row in audit["rows"]:
        names = (row["method"], row["noise"])
        if "not_audited" in row:
            table.add_row(*names, *["–"] * 6, f"not audited: {row['not_audited']}")
            continue
        verdict = _verdict(bool(row["refuted"]), row["control"])
        style = "bold red" if row["refuted"] else None
        table.add_row(*names, *_bounds(row["claimed_epsilon"], row), verdict, style=style)
    parts: list[RenderableType] = [table]
    for row in audit["rows"]:
        for test in row.get("tests", []):
            if test["promise"] in row["refuted"]:
                found = f"{test['promise']} ({test['found']}; p = {test['p_value']:.1e})"
                parts.append(Text(f"{row['method']}, {row['noise']} noise: {found}", style="bold red"))
    rows, tests = len(audit["rows"]), audit["number_of_tests"]
    summary = "Refuted" if audit["refuted"] else "Not refuted"
    parts.append(
        Text(
            f"{summary}: {tests} tests of {rows} kinds of exchange. Bounds hold with {100 * audit['confidence']:g} % "
            f"confidence at δ = {audit['delta']:g}. The tests together refute a correct mechanism with probability "
            f"{audit['false_alarm']:g} at most.",
            style="bold red" if audit["refuted"] else "bold",
        )
    )
    return Group(*parts)


def audit_rows(audit: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each attack, of the audit of a run."""
    rows = [
        [ATTACKS[name], *_bounds(audit["claimed_epsilon"], found), _verdict(found["refuted"], found["control"])]
        for name, found in audit["attacks"].items()
    ]
    return ["Attack on", *HEADINGS], rows


def audit_notes(audit: dict[str, Any]) -> list[str]:
    """How the audit was done, and what it cannot say, in sentences."""
    notes = [
        f"{audit['canaries']} canaries of {audit['owners']} owners, each included by a fair coin: public test records, "
        f"mislabelled where the task has labels. σ = {audit['noise_multiplier']:.3g}, "
        f"q = {audit['sampling_rate']:.3g}, {audit['steps']} steps.",
        f"Each lower bound on ε holds with {100 * audit['confidence']:g} % confidence at δ = {audit['delta']:g}. "
        f"A correct run is refuted with probability {audit['false_alarm']:.2g} at most.",
    ]
    powerless = [ATTACKS[name] for name, found in audit["attacks"].items() if not found["control"]["has_power"]]
    return notes + [f"The attack on {name}: {NO_POWER}" for name in powerless]


def audit_table(audit: dict[str, Any]) -> Group:
    """The audit of a run for the terminal."""
    headings, rows = audit_rows(audit)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place in (0, len(headings) - 1) else "right", overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold red" if row[-1] == "refuted" else None)
    return Group(table, *(Text(note) for note in audit_notes(audit)))


def audit_line(audit: dict[str, Any]) -> str:
    """One sentence for a model card."""
    white = audit["attacks"]["white_box"]
    bound = max(white["epsilon_one_run"], white["epsilon_fdp"])
    verdict = "refuted" if audit["refuted"] else _verdict(False, white["control"])
    return (
        f"Audit with {audit['canaries']} canaries: {verdict}. From all that the server received, ε is at least "
        f"{bound:.2f} with {100 * audit['confidence']:g} % confidence (claimed "
        f"{rounded_up(audit['claimed_epsilon'])}); with σ → 0, at least {white['control']['epsilon_one_run']:.2f}."
    )


def _bounds(claimed: float, found: dict[str, Any]) -> list[str]:
    return [
        rounded_up(claimed),
        f"{found['epsilon_one_run']:.2f}",
        f"{found['epsilon_fdp']:.2f}",
        f"{found['auc']:.3f}",
        percent(found["tpr_at_1_percent_fpr"]),
        f"{found['control']['epsilon_one_run']:.2f}",
    ]


def _verdict(refuted: bool, control: dict[str, Any]) -> str:
    if refuted:
        return "refuted"
    return "not refuted" if control["has_power"] else "no power"

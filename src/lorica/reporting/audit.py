"""What an audit found, for the terminal, the report and the model card: "not refuted" at best, never "private"."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorica.reporting.style import percent, rounded_up

HEADINGS = ["ε, one run", "ε, f-DP", "AUC", "TPR at 1 % FPR", "ε, σ → 0", "Verdict"]
ATTACKS = {"white_box": "white box", "black_box": "black box"}
READS = {"white_box": "all that the server received", "black_box": "the final adapter"}


AUDIT_LINE = "Audit with "
"""How the line of a model card begins."""


def mechanism_table(audit: dict[str, Any]) -> Group:
    """The audit of the mechanism for the terminal: a row for each method and kind of noise, then what was refuted."""
    rows = []
    for row in audit["rows"]:
        names = [row["method"], row["noise"]]
        if "not_audited" in row:
            rows.append([*names, *["–"] * 5, "not audited"])
        else:
            rows.append([*names, *_figures(row), _verdict(bool(row["refuted"]), row["control"])])
    parts: list[RenderableType] = [_table(audit["epsilon"], audit["delta"], ["Method", "Noise", *HEADINGS], rows)]
    for row in audit["rows"]:
        if "not_audited" in row:
            parts.append(Text(f"{row['method']}, {row['noise']} noise: not audited, because {row['not_audited']}"))
        for test in row.get("tests", []):
            if test["promise"] in row["refuted"]:
                found = f"{test['promise']} ({test['found']}; p = {test['p_value']:.1e})"
                parts.append(Text(f"{row['method']}, {row['noise']} noise: {found}", style="bold red"))
    parts.append(
        Text(
            f"{'Refuted' if audit['refuted'] else 'Not refuted'}, by {audit['number_of_tests']} tests. Together they "
            f"refute a correct mechanism with probability {audit['false_alarm']:g} at most. Each bound holds with "
            f"{100 * audit['confidence']:g} % confidence.",
            style="bold red" if audit["refuted"] else "bold",
        )
    )
    return Group(*parts)


def audit_table(audit: dict[str, Any]) -> Group:
    """The audit of a run for the terminal."""
    table = _table(audit["claimed_epsilon"], audit["delta"], *audit_rows(audit))
    return Group(table, *(Text(note) for note in audit_notes(audit)))


def audit_rows(audit: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each attack, of the audit of a run."""
    rows = [
        [ATTACKS[name], *_figures(found), _verdict(found["refuted"], found["control"])]
        for name, found in audit["attacks"].items()
    ]
    return ["Attack", *HEADINGS], rows


def audit_notes(audit: dict[str, Any]) -> list[str]:
    """What was claimed and attacked, and what the attacks cannot say, in sentences."""
    reads = ", the ".join(f"{ATTACKS[name]} attack reads {what}" for name, what in READS.items())
    notes = [
        f"Claimed: ε = {rounded_up(audit['claimed_epsilon'])} at δ = {audit['delta']:g}, with "
        f"σ = {audit['noise_multiplier']:.3g}, q = {audit['sampling_rate']:.3g} and {audit['steps']} steps.",
        f"Attacked with {audit['canaries']} canaries of {audit['owners']} owners, each included by a fair coin: public "
        f"test records, with wrong labels where the task has labels. The {reads}.",
        f"Each bound is a lower bound on ε with {100 * audit['confidence']:g} % confidence. A correct run is refuted "
        f"with probability {audit['false_alarm']:.2g} at most.",
    ]
    return notes + [
        f"No power, {ATTACKS[name]}: even with σ → 0 the attack finds no bound above the claim, so it could not have "
        "refuted it. Audit with more canaries."
        for name, found in audit["attacks"].items()
        if not found["control"]["has_power"]
    ]


def audit_line(audit: dict[str, Any]) -> str:
    """One line for a model card."""
    white = audit["attacks"]["white_box"]
    bound = max(white["epsilon_one_run"], white["epsilon_fdp"])
    return (
        f"{AUDIT_LINE}{audit['canaries']} canaries: {_verdict(audit['refuted'], white['control'])}. All that the "
        f"server received shows that ε is at least {bound:.2f}, with {100 * audit['confidence']:g} % confidence "
        f"(claimed {rounded_up(audit['claimed_epsilon'])}; with σ → 0, at least "
        f"{white['control']['epsilon_one_run']:.2f})"
    )


def _table(claimed: float, delta: float, headings: list[str], rows: list[list[str]]) -> Table:
    title = f"Lower bounds on ε, of a claim of ε = {rounded_up(claimed)} at δ = {delta:g}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for heading in headings:
        words = heading in ("Method", "Noise", "Attack", "Verdict")
        # Wrapped by hand, so that the table fits 80 columns.
        broken = heading.replace(", ", ",\n").replace(" at ", " at\n")
        table.add_column(broken, justify="left" if words else "right", no_wrap=words)
    for row in rows:
        table.add_row(*map(Text, row), style="bold red" if row[-1] == "refuted" else None)
    return table


def _figures(found: dict[str, Any]) -> list[str]:
    return [
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

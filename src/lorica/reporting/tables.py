"""Tables of a run and of a comparison, for the terminal and for Markdown."""

from __future__ import annotations

import re
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorica.reporting.clients import SHORT, client_rows
from lorica.reporting.comparison import ComparedRun, Summary, summarise
from lorica.reporting.factors import FactorRow, factor_rows
from lorica.reporting.run_folder import (
    Run,
    bytes_sent,
    client_level,
    clipping,
    guarantee,
    metric_name,
    missing_text,
    not_private,
    outcome,
    own_noise_epsilon,
    score_of,
    seconds_per_round,
)
from lorica.reporting.style import capital, duration, percent, points, rounded_up

MOST_CLIENT_ROWS = 10
MOST_ROUND_LETTERS = 40
PRIVACY_TERMS = (
    ("unit", "Unit of privacy"),
    ("adversary", "Protects against"),
    ("relation", "Neighbouring data sets"),
    ("sampler", "Sampler"),
    ("clipping", "Clipping"),
    ("accountant", "Accountant"),
)
FACTOR_LETTERS = {"A": "A", "B": "B", "AB": "+", "R": "R", "": "·"}


def human_bytes(count: float) -> str:
    """A size in decimal units with three digits: 950 is "950 B", 1_234_000 is "1.23 MB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def run_table(run: Run) -> Group:
    """Summary of a run for the terminal: result, privacy cost per client, traffic, and factors trained per layer.

    Clients have their own rows if there are at most 10. Layers with the same history share a row.
    """
    parts: list[RenderableType] = [_summary_table(run)]
    if 0 < len(run.clients) <= MOST_CLIENT_ROWS and guarantee(run) is not None:
        parts.append(_client_table(run))
    rows = factor_rows(run)
    if rows:
        parts.append(_factor_table(rows))
    return Group(*parts)


def comparison_table(results: list[ComparedRun]) -> Table:
    """One row per method, highest mean first: main metric in the last evaluated round over its seeds, and its cost.

    Raises:
        UserError: as `lorica.reporting.comparison.by_method`.
    """
    headings, rows = comparison_rows(results)
    title = f"{capital(metric_name(results[0].metrics))} after the last round, mean ± std over seeds"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def comparison_markdown(results: list[ComparedRun]) -> str:
    """The table of `comparison_table` in Markdown.

    Raises:
        UserError: as `lorica.reporting.comparison.by_method`.
    """
    return markdown_table(*comparison_rows(results))


def comparison_rows(results: list[ComparedRun]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of `comparison_table`, for the page.

    Raises:
        UserError: as `lorica.reporting.comparison.by_method`.
    """
    summaries = summarise(results)
    same_seeds = all(summary.seeds == summaries[0].seeds for summary in summaries)
    seeds = f"Seed {', '.join(map(str, summaries[0].seeds))}" if same_seeds else "Each seed"
    headings = [
        "Method",
        f"{capital(metric_name(results[0].metrics))} (%)",
        f"{seeds} (%)",
        "Start (%)",
        "Last round",
        "ε",
        "Up",
        "Down",
        "Time/round",
        "Server",
    ]
    return headings, [_comparison_row(summary, same_seeds) for summary in summaries]


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column aligned left, the others right. Bars and line breaks in cells are escaped."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(re.sub(r"[\r\n]+", " ", cell.replace("|", "\\|")) for cell in cells) + " |"

    ruler = "| --- |" + " ---: |" * (len(headings) - 1)
    return "\n".join([line(headings), ruler, *(line(row) for row in rows)]) + "\n"


def score_text(run: Run) -> str:
    """ "73.0 % → 89.4 % (+16.4 points, round 20)"; or a note that no later round was evaluated.

    With personal models: their mean, and the worst and the best of them.
    """
    reached = outcome(run.metrics)
    if reached.final is None:
        return f"{percent(reached.start)} at the start; no later round was evaluated"
    gain = "" if reached.gain is None else f"{points(reached.gain)}, "
    own = next((row["client_scores"] for row in reversed(run.metrics) if row.get("client_scores")), None)
    spread = (
        "" if own is None else f"; clients' own models: {percent(min(own.values()))} to {percent(max(own.values()))}"
    )
    return f"{percent(reached.start)} → {percent(reached.final)} ({gain}round {reached.final_round}){spread}"


def further_metrics(run: Run) -> str:
    """Other metrics of the last evaluated round, such as "loss 0.412, mismatched accuracy 71.3 %". May be empty."""
    rows = [row for row in run.metrics if score_of(row) is not None]
    if not rows:
        return ""
    known = {
        "round",
        "score",
        "metric",
        rows[-1].get("metric"),
        "epsilon",
        "epsilon_own_noise",
        "seconds",
        "server_seconds",
    }
    found = {key: value for key, value in rows[-1].items() if key not in known and isinstance(value, int | float)}
    shares = {key: value for key, value in found.items() if not key.endswith(("loss", "perplexity"))}
    texts = {key: percent(value) if key in shares else f"{value:.3f}" for key, value in found.items()}
    return ", ".join(f"{metric_name([{'metric': key}])} {text}" for key, text in texts.items())


def rounds_text(run: Run) -> str:
    """ "20", or "12 of 20 planned" for a run that stopped early."""
    return str(run.rounds) if run.rounds >= run.planned_rounds else f"{run.rounds} of {run.planned_rounds} planned"


def _summary_table(run: Run) -> Table:
    up, down = bytes_sent(run.metrics)
    spent = guarantee(run)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    reason = not_private(run)
    if reason is not None:
        table.add_row(Text("Warning"), Text(f"Not a private release: {reason}", style="bold red"))
    table.add_row("Run", Text(f"{run.name} ({run.method})", style="bold"))
    table.add_row(capital(metric_name(run.metrics)), score_text(run))
    table.add_row("Also", further_metrics(run) or "–")
    start = run.environment.get("start")
    if start:
        table.add_row("Started from", Text(f"adapter {start['name']} (SHA-256 {start['sha256'][:16]}…)"))
    if spent is None:
        table.add_row("Privacy", "unknown" if run.privacy is None else f"no DP, gradients {clipping(run)}")
    else:
        lifetime = max((client.get("lifetime_epsilon") or 0 for client in run.clients), default=0)
        more = f"; ε = {rounded_up(lifetime)} over the lifetime of the data" if lifetime > spent[0] else ""
        where = "each client" if client_level(run) else f"largest of {len(run.clients)} clients"
        table.add_row("Privacy", f"ε = {rounded_up(spent[0])}, δ = {rounded_up(spent[1])} ({where}){more}")
        own = own_noise_epsilon(run)
        if own is not None:
            alone = f"ε = {rounded_up(own)} against a server that sees single replies"
            table.add_row("", f"against a server that sees only sums; {alone}")
    table.add_row("Rounds", f"{rounds_text(run)}, {duration(seconds_per_round(run.metrics))} each")
    if not client_level(run):
        table.add_row("Traffic", f"{human_bytes(up)} up, {human_bytes(down)} down, over all clients and rounds")
    left_out = missing_text(run.metrics)
    if left_out:
        table.add_row("Left out", left_out)
    for heading, name in (("Adapter", "adapter"), ("Report", "report.html")):
        path = run.folder / name
        table.add_row(heading, Text(str(path) if path.exists() else "not written"))
    return table


def _client_table(run: Run) -> Table:
    headings, rows = client_rows(run.clients, SHORT)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _factor_table(rows: list[FactorRow]) -> Table:
    used = {choice for row in rows for choice in row.choices}
    signs = [
        f"{FACTOR_LETTERS[choice]} {words}" for choice, words in (("AB", "both"), ("", "neither")) if choice in used
    ]
    heading = ", ".join(["Factor trained, round by round", *signs])
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Layer", overflow="fold")
    table.add_column(heading, no_wrap=True)
    table.add_column("A", justify="right")
    table.add_column("B", justify="right")
    for choices, group in groupby(rows, key=lambda row: row.choices):
        same = list(group)
        label = same[0].label if len(same) == 1 else f"{same[0].label} to {same[-1].label}"
        letters = "".join(FACTOR_LETTERS[choice] for choice in choices)
        if len(letters) > MOST_ROUND_LETTERS:
            letters = letters[: MOST_ROUND_LETTERS - 9] + "…" + letters[-8:]
        table.add_row(Text(label), letters, *(f"{100 * same[0].share(factor):.0f} %" for factor in "AB"))
    return table


def _comparison_row(summary: Summary, same_seeds: bool) -> list[str]:
    """Cells of a method. Values are prefixed with their seed if methods have different seeds."""
    deviation = "" if summary.std is None else f" ± {100 * summary.std:.2f}"
    values = [f"{100 * final:.2f}" for final in summary.finals]
    if not same_seeds:
        values = [f"{seed}:\u00a0{value}" for seed, value in zip(summary.seeds, values, strict=True)]
    first, last = min(summary.final_rounds), max(summary.final_rounds)
    return [
        summary.method,
        f"{100 * summary.mean:.2f}{deviation}",
        ", ".join(values),
        "–" if summary.start is None else f"{100 * summary.start:.2f}",
        str(last) if first == last else f"{first} to {last}",
        "no DP" if summary.epsilon is None else rounded_up(summary.epsilon),
        human_bytes(summary.bytes_up),
        human_bytes(summary.bytes_down),
        duration(summary.seconds_per_round),
        duration(summary.server_seconds_per_round),
    ]

"""The tables of a benchmark, for its page and for Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lorica.markdown import inline
from lorica.reporting.benchmark import Benchmark, Entry, difference
from lorica.reporting.run_folder import metric_name
from lorica.reporting.style import capital, duration, percent, rounded_up
from lorica.reporting.tables import human_bytes, markdown_table

OVERVIEW = "Difference to {} in points, with its 95 % interval; above zero, the method is ahead."


def benchmark_headings(benchmark: Benchmark) -> list[str]:
    """Headings of `benchmark_rows`."""
    metrics = [{"metric": run.metric} for entry in benchmark.entries for run in entry.runs]
    return [
        "Method",
        f"{capital(metric_name(metrics))} (%)",
        "Seeds",
        f"Difference to {benchmark.reference} (points)",
        "Rate",
        "Plateau",
        "ε",
        "Signal/noise",
        "Up",
        "Down",
        "Time",
    ]


def benchmark_rows(entries: Sequence[Entry], reference: str) -> list[list[str]]:
    """One row per method of a setting that has a finished run, ranked."""
    base = _entry_of(reference, entries)
    return [_row(entry, base) for entry in ranked(entries)]


def overview(benchmark: Benchmark) -> tuple[list[str], list[list[str]]] | None:
    """Headings and rows of one table over all settings with a result of the reference: each method's difference to it.

    None if there are fewer than two such settings, or no other method has a result.
    """
    columns: dict[str, dict[str, str]] = {}
    for name, entries in benchmark.by_setting().items():
        base = _entry_of(benchmark.reference, entries)
        if base is not None and base.scores:
            found = {entry.method: _difference(entry, base) for entry in entries if entry.scores and entry is not base}
            columns[capital(name)] = found
    methods = list(dict.fromkeys(method for found in columns.values() for method in found))
    if len(columns) < 2 or not methods:
        return None
    rows = [[method, *(found.get(method, "–") for found in columns.values())] for method in methods]
    return ["Method", *columns], rows


def ranked(entries: Sequence[Entry]) -> list[Entry]:
    """Those with a finished run, highest mean first; entries without a mean last."""
    return sorted(
        (entry for entry in entries if entry.runs), key=lambda entry: (entry.mean is None, -(entry.mean or 0))
    )


def setting_notes(entries: Sequence[Entry]) -> list[str]:
    """Sentences about a setting: where it started, what is missing, what was left out and why."""
    notes = []
    starts = [run.start for entry in entries for run in entry.runs if run.start is not None]
    if starts:
        low, high = percent(min(starts)), percent(max(starts))
        notes.append(f"The initial model has {low if low == high else f'{low} to {high}'}.")
    planned = sum(entry.planned for entry in entries if entry.refusal is None)
    missing = planned - sum(len(entry.runs) for entry in entries)
    if missing:
        notes.append(f"{missing} of {planned} runs are missing.")
    waiting = [entry.method for entry in entries if entry.refusal is None and not entry.runs]
    if waiting:
        notes.append(f"Not started: {'; '.join(waiting)}.")
    for entry in entries:
        if entry.refusal is not None:
            notes.append(f"Left out: {entry.method}. {entry.refusal}")
        diverged = sum(run.score is None for run in entry.runs)
        if diverged:
            notes.append(f"{diverged} of {len(entry.runs)} runs of {entry.method} diverged.")
    return notes


def benchmark_markdown(benchmark: Benchmark) -> str:
    """All tables in Markdown, with the command and the versions."""
    headings = benchmark_headings(benchmark)
    lines = [f"# Benchmark {benchmark.name}", "", f"{benchmark.finished} of {benchmark.planned} runs are finished.", ""]
    lines += ["```", benchmark.command, "```", ""]
    for lorica, git, torch, count in benchmark.versions():
        lines.append(f"* {count} runs with Lorica {lorica} ({git}) and PyTorch {torch}")
    not_started = benchmark.not_started
    for name, entries in benchmark.by_setting().items():
        if name in not_started:
            continue
        rows = [[inline(method), *cells] for method, *cells in benchmark_rows(entries, benchmark.reference)]
        lines += ["", f"## {inline(capital(name))}", "", markdown_table(headings, rows)]
        lines += [f"* {inline(note)}" for note in setting_notes(entries)]
    table = overview(benchmark)
    if table is not None:
        names, differences = table
        lines += ["", "## All settings", "", OVERVIEW.format(inline(benchmark.reference)), ""]
        rows = [[inline(method), *cells] for method, *cells in differences]
        lines += [markdown_table([inline(name) for name in names], rows)]
    if not_started:
        lines += ["", "## Not started", "", *(f"* {inline(capital(name))}" for name in not_started)]
    return "\n".join(lines) + "\n"


def _entry_of(method: str, entries: Sequence[Entry]) -> Entry | None:
    return next((entry for entry in entries if entry.method == method), None)


def _row(entry: Entry, reference: Entry | None) -> list[str]:
    runs = entry.results or entry.runs
    ratios = [run.signal_to_noise for run in runs if run.signal_to_noise is not None]
    means = [(run.bytes_up, run.bytes_down, run.seconds) for run in runs if run.score is not None]
    up, down, seconds = (statistics.fmean(column) for column in zip(*means, strict=True)) if means else [None] * 3
    return [
        entry.method,
        _score(entry),
        f"{len(entry.results)} of {entry.planned_results}",
        _difference(entry, reference),
        _rate(entry),
        f"{entry.plateau} of {len(entry.tuning)}" if entry.rate is not None else "–",
        _epsilon(entry),
        f"{statistics.fmean(ratios):.2f}" if ratios else "–",
        "–" if up is None else human_bytes(up),
        "–" if down is None else human_bytes(down),
        duration(seconds),
    ]


def _score(entry: Entry) -> str:
    if entry.mean is not None:
        return f"{100 * entry.mean:.2f}" + ("" if entry.std is None else f" ± {100 * entry.std:.2f}")
    return "diverged" if entry.results else "–"


def _difference(entry: Entry, reference: Entry | None) -> str:
    found = None if reference is None or entry.method == reference.method else difference(entry, reference)
    if found is None:
        return "–"
    text = f"{100 * found.mean:+.2f}"
    if found.interval is not None:
        low, high = found.interval
        text += f" ({100 * low:+.2f} to {100 * high:+.2f})"
    return text.replace("-", "−")


def _rate(entry: Entry) -> str:
    """The best rate, marked if it is the smallest or the largest: a wider grid might have a better one."""
    if entry.rate is None:
        return "tuning"
    edge = len(entry.tuning) > 1 and entry.rate in (min(entry.tuning), max(entry.tuning))
    return f"{entry.rate:g}{' (edge)' if edge else ''}"


def _epsilon(entry: Entry) -> str:
    """The largest ε of a run and, where the noise is shared, that against a server that sees single replies."""
    spent = max((run.epsilon for run in entry.runs if run.epsilon is not None), default=None)
    if spent is None:
        return "no DP" if entry.target is None else "–"
    own = max((run.epsilon_own_noise for run in entry.runs if run.epsilon_own_noise is not None), default=None)
    return rounded_up(spent) + ("" if own is None else f" / {rounded_up(own)}")

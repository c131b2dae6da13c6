"""The HTML pages of a run, of a comparison and of a benchmark, each a single self-contained file."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lorica.files import to_json, write_atomically
from lorica.reporting.audit import audit_notes, audit_rows
from lorica.reporting.benchmark import Benchmark
from lorica.reporting.benchmark_figures import epsilon_figure, setting_figure
from lorica.reporting.benchmark_tables import (
    OVERVIEW,
    benchmark_headings,
    benchmark_markdown,
    benchmark_rows,
    overview,
    setting_notes,
)
from lorica.reporting.choices import median_signal_to_noise, mostly_noise
from lorica.reporting.clients import MOST_CLIENTS, client_rows, left_out_text
from lorica.reporting.comparison import ComparedRun, comparison_content, summarise
from lorica.reporting.drawing import Figure, rc_context
from lorica.reporting.factors import factor_rows
from lorica.reporting.partition import partition_figure
from lorica.reporting.plots import (
    accuracy_figure,
    choices_figure,
    clients_figure,
    comparison_figure,
    factors_figure,
    final_figure,
)
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
    read_run,
    score_of,
    seconds_per_round,
)
from lorica.reporting.style import RC, capital, duration, percent, points, rounded_up
from lorica.reporting.tables import (
    PRIVACY_TERMS,
    comparison_markdown,
    comparison_rows,
    further_metrics,
    human_bytes,
)

PNG_DPI = 160
MOST_OPEN_ROWS = 25
REFRESH_SECONDS = 5
UNFINISHED = Markup('<meta name="run" content="unfinished">')
"""In the page of a run without privacy.json, which is not the report of the finished run."""


def write_report(folder: str | Path, live: bool = False) -> Path:
    """Write report.html and the figures accuracy, factors, choices and partition (.png) to a run folder.

    Args:
        live: the run goes on. The page loads itself again every `REFRESH_SECONDS` seconds and shows the ε spent so far.
            It is the only file, which takes half the time.

    Returns:
        The path of the page.

    All figures are drawn before the first file is replaced, files are replaced atomically, and the page is written
    last, so a failure keeps the old page. Sections without data (evaluated rounds, decisions, label counts, clients)
    are left out.

    Raises:
        UserError: as `read_run`, or the folder is not writable.
    """
    run = read_run(folder)
    if live:
        run = replace(run, privacy=_privacy_so_far(run))
    figures: dict[str, Figure] = {name: draw(run) for name, draw in _plots(run).items()}
    files = {} if live else {f"{name}.png": _png(figure) for name, figure in figures.items()}
    if run.clients and not client_level(run):
        figures["clients"] = clients_figure(run)
    shown = _run_view(run) | (_spent_so_far(run) if live else {})
    state = UNFINISHED if live or run.privacy is None else ""
    shown |= {"live": live, "refresh": REFRESH_SECONDS, "state": state, "figures": _drawings(figures)}
    page = _render("report.html.j2", shown)
    for name, content in (files | {"report.html": page.encode()}).items():
        write_atomically(run.folder / name, content)
    return run.folder / "report.html"


def report_is_missing(folder: Path) -> bool:
    """Whether report.html or one of the plots that belong to it is missing in the folder of a finished run.

    A report that was written before the run had finished counts as missing.
    """
    names = ["report.html", *(f"{name}.png" for name in _plots(read_run(folder)))]
    if not all((folder / name).is_file() and (folder / name).stat().st_size for name in names):
        return True
    return UNFINISHED.encode() in (folder / "report.html").read_bytes()


def _privacy_so_far(run: Run) -> dict[str, Any]:
    """What stands in for privacy.json while the run goes on."""
    privacy = run.config["privacy"]
    noise = privacy["noise"]
    return {
        "noise": noise,
        "private_release": noise == "secure",
        "unit": privacy["unit"],
        "target_epsilon": None if noise == "none" else privacy["epsilon"],
    }


def _spent_so_far(run: Run) -> dict[str, str]:
    """What replaces the cost of a finished run on the page, by the last line of metrics.jsonl."""
    last, names = run.metrics[-1], {"epsilon": "epsilon", "epsilon_own_noise": "own_noise"}
    spent = {names[key]: rounded_up(last[key]) for key in names if key in last}
    return spent | {"delta": rounded_up(run.config["privacy"]["delta"])}


def _plots(run: Run) -> dict[str, Callable[[Run], Figure]]:
    """Name of each plot that is also a file -> the function that draws it."""
    plots: dict[str, Callable[[Run], Figure]] = {}
    if any(score_of(row) is not None for row in run.metrics):
        plots["accuracy"] = accuracy_figure
    if factor_rows(run):
        plots["factors"] = factors_figure
    if median_signal_to_noise(run):
        plots["choices"] = choices_figure
    if run.partition is not None:
        plots["partition"] = partition_figure
    return plots


def write_comparison(folder: str | Path, results: list[ComparedRun]) -> Path:
    """Write comparison.html, .png, .md and .json and final.png to a folder and return the path of the page.

    The folder is created if needed. The page is written last, so a failure keeps the old page.

    Raises:
        UserError: as `lorica.reporting.comparison.by_method`, or the folder is not writable.
    """
    folder = Path(folder)
    figures = {"comparison": comparison_figure(results), "final": final_figure(results)}
    headings, rows = comparison_rows(results)
    summaries = summarise(results)
    public = [result for result in results if result.private_release is False]
    page = _render(
        "comparison.html.j2",
        {
            "title": "Comparison of one method" if len(summaries) == 1 else f"Comparison of {len(summaries)} methods",
            "methods": [summary.method for summary in summaries],
            "headings": headings,
            "rows": rows,
            "figures": _drawings(figures),
            "runs": len(results),
            "not_private": len(public),
            "unknown": sum(result.private_release is None for result in results),
            "uneven": len({last for summary in summaries for last in summary.final_rounds}) > 1,
            "single_seeds": [summary.method for summary in summaries if summary.std is None],
        },
    )
    files = {f"{name}.png": _png(figure) for name, figure in figures.items()}
    files["comparison.md"] = comparison_markdown(results).encode()
    files["comparison.json"] = (to_json(comparison_content(results), indent=2, ensure_ascii=False) + "\n").encode()
    for name, text in (files | {"comparison.html": page.encode()}).items():
        write_atomically(folder / name, text)
    return folder / "comparison.html"


def write_benchmark(folder: str | Path, benchmark: Benchmark) -> Path:
    """Write benchmark.html, results.md and the plots of a benchmark to a folder and return the path of the page.

    A setting without a finished run is only named. Plots of settings that the suite no longer has are deleted. The page
    is written last, so a failure keeps the old page.

    Raises:
        UserError: the folder is not writable.
    """
    folder = Path(folder)
    reference, not_started = benchmark.reference, benchmark.not_started
    settings, figures = [], {}
    for number, (name, entries) in enumerate(benchmark.by_setting().items(), start=1):
        if name in not_started:
            continue
        figures[f"setting-{number}"] = figure = setting_figure(entries, reference)
        settings.append(
            {
                "name": capital(name),
                "figure": figure_svg(figure, f"s{number}", f"Results with {name}"),
                "rows": benchmark_rows(entries, reference),
                "notes": setting_notes(entries),
            }
        )
    groups = []
    for number, (name, entries) in enumerate(benchmark.by_group().items(), start=1):
        against = epsilon_figure(entries)
        if against is not None:
            figures[f"epsilon-{number}"] = against
            text = f"Accuracy against ε with {name}"
            groups.append({"name": capital(name), "figure": figure_svg(against, f"e{number}", text)})
    page = _render(
        "benchmark.html.j2",
        {
            "title": f"Benchmark {benchmark.name}",
            "finished": benchmark.finished,
            "planned": benchmark.planned,
            "reference": reference,
            "headings": benchmark_headings(benchmark),
            "settings": settings,
            "overview": overview(benchmark),
            "overview_text": OVERVIEW.format(reference),
            "not_started": [capital(name) for name in not_started],
            "groups": groups,
            "command": benchmark.command,
            "versions": benchmark.versions(),
            "suite": benchmark.suite,
        },
    )
    files = {f"{name}.png": _png(figure) for name, figure in figures.items()}
    files |= {"results.md": benchmark_markdown(benchmark).encode(), "benchmark.html": page.encode()}
    for name, content in files.items():
        write_atomically(folder / name, content)
    # Plots of a suite that had other settings.
    for path in [*folder.glob("setting-*.png"), *folder.glob("epsilon-*.png")]:
        if path.name not in files:
            path.unlink()
    return folder / "benchmark.html"


def figure_svg(figure: Figure, name: str, description: str) -> Markup:
    """A figure as an inline SVG element that scales with the page.

    Args:
        name: prefix for all ids in the SVG, because ids must be unique on a page.
        description: text for screen readers.
    """
    buffer = io.StringIO()
    with rc_context(RC):
        unchanging = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        # On whatever colour the page has.
        figure.savefig(buffer, format="svg", transparent=True, metadata=unchanging)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    opening = re.match(r"<svg[^>]*>", svg)
    view = re.search(r'viewBox="([^"]*)"', svg)
    if opening is None or view is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox")
    label = escape(description)
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view[1]}" role="img" aria-label="{label}">'
    )
    return Markup(start + svg[opening.end() :])


def _drawings(figures: dict[str, Figure]) -> dict[str, Markup]:
    return {name: figure_svg(figure, name, DESCRIPTIONS[name]) for name, figure in figures.items()}


DESCRIPTIONS = {
    "accuracy": "Main metric on the test set per round, and the privacy spent",
    "factors": "Factors trained by each layer in each round",
    "choices": "Signal-to-noise ratio of the choices of factors in each round",
    "partition": "Number of records per client and label",
    "clients": "Records and noise multiplier of each client",
    "comparison": "Main metric on the test set per round of each method",
    "final": "Main metric on the test set of each method and seed after the last round",
}


def _run_view(run: Run) -> dict[str, Any]:
    """The content of the page as text; the template only arranges it."""
    reached = outcome(run.metrics)
    spent, own_noise = guarantee(run), own_noise_epsilon(run)
    up, down = bytes_sent(run.metrics)
    privacy = run.privacy or {}
    lifetime = max((client.get("lifetime_epsilon") or 0 for client in run.clients), default=0)
    server = seconds_per_round(run.metrics, "server_seconds")
    headings, rows = client_rows(run.clients)
    return {
        "title": run.name,
        "metric": metric_name(run.metrics),
        "metric_heading": capital(metric_name(run.metrics)),
        "further": further_metrics(run),
        "subtitle": _subtitle(run),
        "reason": not_private(run),
        "start": percent(reached.start),
        "final": percent(reached.final),
        "final_round": reached.final_round,
        "gain": None if reached.gain is None else points(reached.gain),
        "epsilon": None if spent is None else rounded_up(spent[0]),
        "own_noise": None if own_noise is None else rounded_up(own_noise),
        "delta": None if spent is None else rounded_up(spent[1]),
        "lifetime": rounded_up(lifetime) if spent is not None and lifetime > spent[0] else None,
        "up": human_bytes(up),
        "down": human_bytes(down),
        "finished": run.rounds,
        "planned": run.planned_rounds,
        "unfinished": run.rounds < run.planned_rounds,
        "round_time": duration(seconds_per_round(run.metrics)),
        "server_time": None if server is None else duration(server),
        "known": run.privacy is not None,
        "private": privacy.get("noise", "none") != "none",
        "clipping": clipping(run),
        "terms": [(name, privacy[key]) for key, name in PRIVACY_TERMS if privacy.get(key)],
        "target": None if privacy.get("target_epsilon") is None else f"{privacy['target_epsilon']:g}",
        "together": client_level(run),
        "client_headings": headings,
        "client_rows": rows,
        "clients_left_out": left_out_text(len(run.clients)),
        "traffic_left_out": len(run.clients) > MOST_CLIENTS,
        "open_clients": len(rows) <= MOST_OPEN_ROWS,
        "assumptions": privacy.get("assumptions") or [],
        "not_covered": privacy.get("not_covered") or [],
        "audit": None if run.audit is None else (*audit_rows(run.audit), audit_notes(run.audit)),
        "mostly_noise": mostly_noise(run),
        "traffic": _traffic(run),
        "left_out": missing_text(run.metrics),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "environment": {key: value for key, value in run.environment.items() if key != "start"},
    }


def _subtitle(run: Run) -> str:
    task = str(run.config.get("task", {}).get("type", "")).replace("-", " ")
    base = run.config.get("model", {}).get("base", "an unknown base model")
    clients = run.config.get("federation", {}).get("clients", len(run.clients))
    start = run.environment.get("start")
    parts = [
        f"{run.method} on {base}",
        f"started from the adapter {start['name']} (SHA-256 {start['sha256']})" if start else "",
        task,
        f"{clients} {'client' if clients == 1 else 'clients'}",
        f"seed {run.config.get('seed', 'unknown')}",
    ]
    return ", ".join(part for part in parts if part)


def _traffic(run: Run) -> list[list[str]]:
    """Per client: number of rounds, bytes up, bytes down. Of many clients, those that sent most."""
    totals: dict[str, list[int]] = {}
    for row in run.metrics:
        for client, count in row.get("bytes_down", {}).items():
            totals.setdefault(client, [0, 0, 0])[2] += count
        for client, count in row.get("bytes_up", {}).items():
            own = totals.setdefault(client, [0, 0, 0])
            own[0] += 1
            own[1] += count
    shown = sorted(totals, key=lambda client: -totals[client][1])[:MOST_CLIENTS]
    return [
        [client, f"{totals[client][0]:,}", *map(human_bytes, totals[client][1:])]
        for client in sorted(shown, key=lambda client: (len(client), client))
    ]


def _render(template: str, view: dict[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(view)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI)
    return buffer.getvalue()

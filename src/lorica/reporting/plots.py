"""The figures of a run and of a comparison. Each function returns a new Figure and uses no global state."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

from lorica.errors import UserError
from lorica.reporting.choices import median_signal_to_noise
from lorica.reporting.clients import MOST_CLIENTS
from lorica.reporting.comparison import ComparedRun, by_method, summarise
from lorica.reporting.drawing import Axes, Figure, MaxNLocator, Outline, PathPatch, Rectangle, rc_context
from lorica.reporting.factors import factor_rounds, factor_rows
from lorica.reporting.run_folder import Run, metric_name, outcome, score_of
from lorica.reporting.style import (
    FACTOR_COLOURS,
    FACTOR_NAMES,
    INK,
    MUTED,
    PAPER,
    RC,
    RULE,
    looks,
    rounded_up,
    shortened,
    spread,
)

WIDTH = 9.0
TICK_ROOM = 0.42
MOST_MARKED_ROUNDS = 40
LABEL_HEIGHT = 0.155
MOST_BINS = 40

Arguments = ParamSpec("Arguments")


def _styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    @wraps(draw)
    def styled(*arguments: Arguments.args, **named: Arguments.kwargs) -> Figure:
        with rc_context(RC):
            return draw(*arguments, **named)

    return styled


@_styled
def accuracy_figure(run: Run) -> Figure:
    """The main metric per round, compared with the initial model; with DP, a second panel with the ε spent so far.

    Raises:
        UserError: no round was evaluated.
    """
    rounds, accuracy = _scores(run.metrics)
    if not rounds:
        raise UserError("run", str(run.folder), "no round was evaluated", "set federation.evaluate_every to 1")
    spent_rounds, spent = _series(run.metrics, "epsilon")
    heights = [2.9, 1.2] if spent else [2.9]
    figure, panels = _panels(heights, right=1.3)
    look = looks([run.method])[run.method]
    reached = outcome(run.metrics)

    top = panels[0]
    marker = "o" if len(rounds) <= MOST_MARKED_ROUNDS else None
    top.plot(rounds, accuracy, color=look.colour, linewidth=2, marker=marker, markersize=4, label=run.method)
    top.plot(rounds[-1], accuracy[-1], marker="o", markersize=6, color=look.colour, clip_on=False, label="_end")
    labels = [(accuracy[-1], f"{accuracy[-1]:.1f} %", look.text, "bold")]
    if reached.start is not None:
        start = 100 * reached.start
        top.axhline(start, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="start")
        if reached.final is not None:
            labels.append((start, f"start {start:.1f} %", MUTED, "normal"))
    _percent_axis(top, accuracy)
    _name_axis(top, f"Test {metric_name(run.metrics)} (%)", inset=TICK_ROOM)
    last = run.rounds
    _label_ends(top, labels, [rounds[-1], last], last)

    if spent:
        bottom = panels[1]
        bottom.plot(spent_rounds, spent, color=INK, linewidth=1.6, label="epsilon")
        bottom.plot(spent_rounds[-1], spent[-1], marker="o", markersize=5, color=INK, clip_on=False, label="_end")
        ends = [(spent[-1], f"ε {rounded_up(spent[-1])}", INK, "bold")]
        target = (run.privacy or {}).get("target_epsilon")
        if target is not None:
            bottom.axhline(target, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="target")
            ends.append((target, f"target {target:g}", MUTED, "normal"))
        bottom.set_ylim(0, 1.15 * (max(spent[-1], target or 0) or 1))
        bottom.yaxis.set_major_locator(MaxNLocator(3))
        _name_axis(bottom, "Privacy spent: ε, largest over the clients", inset=TICK_ROOM)
        _label_ends(bottom, ends, [spent_rounds[-1], last], last)
    _round_axis(panels, last)
    return figure


@_styled
def factors_figure(run: Run) -> Figure:
    """A map of the factors trained by each layer (rows) in each round (columns).

    Raises:
        UserError: the run recorded no decisions.
    """
    rows, rounds = factor_rows(run), factor_rounds(run)
    if not rows:
        raise UserError(
            "run", str(run.folder), "decisions.jsonl is missing or empty", "finish at least one round of this run"
        )
    row_height = min(0.34, max(5.5 / len(rows), min(0.16, 9.6 / len(rows))))
    figure, (panel,) = _panels([max(0.5, row_height * len(rows))], left=_label_room(rows), right=1.16, top=0.62)
    gap = 0.03 * len(rounds) / _width(panel) if len(rounds) <= MOST_MARKED_ROUNDS else 0.0
    for choice, colour in FACTOR_COLOURS.items():
        cells = [
            (number - 0.5, place)
            for place, row in enumerate(rows)
            for number, made in zip(rounds, row.choices, strict=True)
            if made == choice
        ]
        if cells:
            panel.add_patch(PathPatch(_cells(cells, gap), facecolor=colour, linewidth=0, label=FACTOR_NAMES[choice]))
    panel.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    _row_labels(panel, [row.label for row in rows])
    panel.spines["bottom"].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    panel.set_xlabel("Round")
    if row_height >= LABEL_HEIGHT:
        for factor, offset in (("A", 0.47), ("B", 1.04)):
            _at_right(panel, offset, -0.5, factor, MUTED, 4, va="bottom")
            for place, row in enumerate(rows):
                _at_right(panel, offset, place, f"{100 * row.share(factor):.0f} %", INK, 0)
        _at_right(panel, 1.04, -0.5, "Share of rounds", MUTED, 17, va="bottom")
    _legend(figure, panel, [choice for choice in FACTOR_COLOURS if any(choice in row.choices for row in rows)])
    return figure


@_styled
def choices_figure(run: Run) -> Figure:
    """The median signal-to-noise ratio of the choices per round, with a line at 1.

    Raises:
        UserError: the run recorded no ratios.
    """
    found = median_signal_to_noise(run)
    if not found:
        problem = "decisions.jsonl has no signal-to-noise ratios"
        raise UserError("run", str(run.folder), problem, "use a method with a score, such as as-lora, under DP")
    rounds, ratios = [number for number, _ in found], [ratio for _, ratio in found]
    figure, (panel,) = _panels([1.6], right=1.3)
    look = looks([run.method])[run.method]
    marker = "o" if len(rounds) <= MOST_MARKED_ROUNDS else None
    panel.plot(rounds, ratios, color=look.colour, linewidth=1.6, marker=marker, markersize=3.5, label="ratio")
    panel.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="one")
    panel.set_ylim(0, 1.15 * max(1, *ratios))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    _name_axis(panel, "|gain of A − gain of B| / its standard deviation, median over choices", inset=TICK_ROOM)
    ends = [(ratios[-1], f"{ratios[-1]:.2f}", look.text, "bold"), (1.0, "noise = signal", MUTED, "normal")]
    _label_ends(panel, ends, [rounds[-1], run.rounds], run.rounds)
    _round_axis([panel], run.rounds)
    return figure


@_styled
def clients_figure(run: Run) -> Figure:
    """Bars with the records and, with DP, the noise multiplier of each client; of many clients, histograms of both.

    Raises:
        UserError: privacy.json lists no clients.
    """
    clients = sorted(run.clients, key=lambda client: client["client"])
    if not clients:
        raise UserError(
            "run", str(run.folder), "privacy.json lists no clients", "finish this run, then draw the figure"
        )
    shown = [("records", "Records", "{:,.0f}")]
    if any(client.get("noise_multiplier") for client in clients):
        shown.append(("noise_multiplier", "Noise multiplier σ (noise std / clipping norm)", "{:.2f}"))
    if len(clients) > MOST_CLIENTS:
        return histograms([(title, [float(client.get(key) or 0) for client in clients]) for key, title, _ in shown])
    row_height = min(0.3, max(0.02, 4.8 / len(clients)))
    height = max(0.5, row_height * len(clients))
    labelled = row_height >= LABEL_HEIGHT
    left, top, bottom, between = 0.85, 0.42, 0.12 if labelled else 0.35, 0.65
    figure = Figure(figsize=(WIDTH, height + top + bottom))
    width = (WIDTH - left - 0.55 - between) / 2
    for place, (key, title, form) in enumerate(shown):
        panel = _axes(figure, left + place * (width + between), bottom, width, height)
        values = [float(client.get(key) or 0) for client in clients]
        panel.barh(range(len(clients)), values, height=0.68, color="#8fa3b3", label=key)
        panel.set_ylim(len(clients) - 0.5, -0.5)
        panel.set_xlim(0, 1.12 * max([*values, 1e-9]))
        panel.spines["bottom"].set_visible(False)
        _name_axis(panel, title)
        if labelled:
            panel.set_xticks([])
            for row, value in enumerate(values):
                panel.annotate(
                    form.format(value), (value, row), (4, 0), textcoords="offset points", va="center", fontsize=9
                )
        else:
            panel.grid(axis="x")
            panel.xaxis.set_major_locator(MaxNLocator(4))
        if place == 0:
            _row_labels(panel, [f"client {client['client']}" for client in clients])
        else:
            panel.set_yticks([])
    return figure


@_styled
def histograms(shown: Sequence[tuple[str, Sequence[float]]]) -> Figure:
    """Number of clients by the size of each quantity: its title, and its value at each client."""
    height, left, top, bottom, between = 1.9, 0.85, 0.42, 0.35, 0.85
    figure = Figure(figsize=(WIDTH, height + top + bottom))
    width = (WIDTH - left - 0.55 - between) / 2
    for place, (title, values) in enumerate(shown):
        panel = _axes(figure, left + place * (width + between), bottom, width, height)
        panel.hist(values, bins=MOST_BINS, color="#8fa3b3")
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.grid(axis="y")
        _name_axis(panel, f"Clients by {title[0].lower()}{title[1:]}")
    return figure


@_styled
def comparison_figure(results: list[ComparedRun]) -> Figure:
    """The main metric per round of each method: mean over its seeds, and a band from the lowest to the highest seed.

    A method's line covers only the rounds that all its seeds evaluated, so that the mean is always over all seeds.

    Raises:
        UserError: as `by_method`.
    """
    groups = by_method(results)
    style = looks(groups)
    figure, (panel,) = _panels([4.2], right=0.55 + 0.078 * max(len(shortened(method)) + 8 for method in groups))
    ends: list[tuple[float, str, str, str]] = []
    end_rounds: list[int] = []
    everything: list[float] = []
    for method, group in groups.items():
        rounds, seeds = _shared_rounds(group)
        if not rounds:
            raise UserError(
                "results",
                method,
                "its seeds have no evaluated round in common",
                "set federation.evaluate_every to the same value for all seeds",
            )
        mean = [statistics.fmean(values) for values in seeds]
        low, high = [min(values) for values in seeds], [max(values) for values in seeds]
        look = style[method]
        if len(group) > 1:
            panel.fill_between(rounds, low, high, color=look.colour, alpha=0.14, linewidth=0, label=f"_{method} band")
        panel.plot(rounds, mean, color=look.colour, linestyle=look.dashes, linewidth=2, label=method)
        panel.plot(rounds[-1], mean[-1], marker="o", markersize=5, color=look.colour, clip_on=False, label="_end")
        ends.append((mean[-1], f"{shortened(method)}  {mean[-1]:.1f} %", look.text, "bold"))
        end_rounds.append(rounds[-1])
        everything += low + high
    _percent_axis(panel, everything)
    _name_axis(panel, f"Test {metric_name(results[0].metrics)} (%), mean over seeds", inset=TICK_ROOM)
    last = max(end_rounds)
    _label_ends(panel, ends, end_rounds, last)
    _round_axis([panel], last)
    return figure


@_styled
def final_figure(results: list[ComparedRun]) -> Figure:
    """The main metric after the last evaluated round: one dot per seed, mean and standard deviation per method.

    The dashed line is the initial model (the mean, if runs differ).

    Raises:
        UserError: as `by_method`.
    """
    summaries = summarise(results)
    style = looks(summary.method for summary in summaries)
    left = 0.3 + 0.082 * max(len(shortened(summary.method)) for summary in summaries)
    figure, (panel,) = _panels([0.5 * len(summaries) + 0.2], left=left, right=1.35, top=0.45)
    for row, summary in enumerate(summaries):
        look = style[summary.method]
        finals = [100 * value for value in summary.finals]
        mean = 100 * summary.mean
        if summary.std is not None:
            deviation = 100 * summary.std
            panel.plot(
                [mean - deviation, mean + deviation],
                [row, row],
                color=look.colour,
                linewidth=7,
                alpha=0.25,
                solid_capstyle="butt",
                label=f"_{summary.method} std",
            )
        panel.plot([mean, mean], [row - 0.28, row + 0.28], color=look.colour, linewidth=2.5, label=summary.method)
        # Each seed has its own height, so that seeds with equal values stay visible.
        offsets = (
            [0.0] if len(finals) == 1 else [0.24 * (place / (len(finals) - 1) - 0.5) for place in range(len(finals))]
        )
        panel.plot(
            finals,
            [row + offset for offset in offsets],
            linestyle="none",
            marker="o",
            markersize=5.5,
            markerfacecolor=PAPER,
            markeredgecolor=look.colour,
            markeredgewidth=1.4,
            label=f"_{summary.method} seeds",
        )
        deviation_text = "" if summary.std is None else f" ± {100 * summary.std:.2f}"
        _at_right(panel, 1.2, row, f"{mean:.2f}{deviation_text}", look.text, 0, weight="bold")
    starts = [summary.start for summary in summaries if summary.start is not None]
    values = [100 * value for summary in summaries for value in summary.finals]
    panel.set_ylim(len(summaries) - 0.4, -0.6)
    _row_labels(panel, [summary.method for summary in summaries])
    low, high = _limits(values + [100 * start for start in starts])
    panel.set_xlim(low, high)
    if starts:
        start = 100 * statistics.fmean(starts)
        panel.axvline(start, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="start")
        panel.annotate(
            f"start {start:.1f} %",
            (start, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            color=MUTED,
            fontsize=9,
        )
    panel.grid(axis="x")
    panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    panel.set_xlabel(f"Test {metric_name(results[0].metrics)} after the last round (%)")
    _at_right(panel, 1.2, -0.6, "mean ± std", MUTED, 4, va="bottom")
    return figure


def _series(metrics: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Rounds and values of a metric, where it is present and finite."""
    rows = [row for row in metrics if row.get(key) is not None and math.isfinite(row[key])]
    return [int(row["round"]) for row in rows], [row[key] for row in rows]


def _scores(metrics: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Rounds and the main metric in percent, where it is present and finite."""
    return _series([{"round": row["round"], "percent": _percent(score_of(row))} for row in metrics], "percent")


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _shared_rounds(group: Sequence[ComparedRun]) -> tuple[list[int], list[list[float]]]:
    """The rounds that every seed evaluated and, per round, the main metric of each seed in percent."""
    per_seed = [dict(zip(*_scores(result.metrics), strict=True)) for result in group]
    rounds = sorted(set.intersection(*(set(series) for series in per_seed)))
    return rounds, [[series[number] for series in per_seed] for number in rounds]


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a position in inches. Labels are placed by hand, so the layout must be known before drawing."""
    whole_width, whole_height = figure.get_size_inches()
    return figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))


def _panels(
    heights: Sequence[float], left: float = TICK_ROOM, right: float = 0.5, top: float = 0.36
) -> tuple[Figure, list[Axes]]:
    """Panels of these heights (inches), one below the other."""
    bottom, between = 0.52, 0.55
    figure = Figure(figsize=(WIDTH, top + sum(heights) + between * (len(heights) - 1) + bottom))
    panels = []
    upper = figure.get_size_inches()[1] - top
    for height in heights:
        panels.append(_axes(figure, left, upper - height, WIDTH - left - right, height))
        upper -= height + between
    return figure, panels


def _name_axis(panel: Axes, text: str, inset: float = 0) -> None:
    """The name of the y axis, written horizontally above the axis, `inset` inches to its left."""
    panel.set_ylabel(text, rotation=0, ha="left", va="bottom")
    panel.yaxis.set_label_coords(-inset / _width(panel), 1 + 6 / 72 / _height(panel))


def _round_axis(panels: Sequence[Axes], last: int) -> None:
    for panel in panels:
        panel.set_xlim(-0.01 * last, last)
        panel.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        panel.tick_params(labelbottom=panel is panels[-1])
        panel.grid(axis="y")
    panels[-1].set_xlabel("Round")


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of an axis in percent: a margin, and a range of at least 5 points, so that noise does not look large.

    The axis includes negative values only if there are any: correlations can be negative, other metrics cannot.
    """
    low, high = min(values), max(values)
    margin = max(0.06 * (high - low), (5 - (high - low)) / 2, 0.5)
    return max(min(0.0, low), low - margin), min(100.0, high + margin)


def _percent_axis(panel: Axes, values: Sequence[float]) -> None:
    panel.set_ylim(*_limits(values))
    panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _width(panel: Axes) -> float:
    return float(panel.bbox.width / panel.figure.dpi)


def _height(panel: Axes) -> float:
    return float(panel.bbox.height / panel.figure.dpi)


def _label_ends(
    panel: Axes, labels: Sequence[tuple[float, str, str, str]], end_rounds: Sequence[int], last: int
) -> None:
    """Labels (value, text, colour, weight) to the right of the panel, moved apart if they would overlap."""
    low, high = panel.get_ylim()
    unit = (high - low) / _height(panel)
    values = [value for value, *_ in labels]
    places = spread(values, gap=0.19 * unit, low=low, high=high)
    moved = [abs(place - value) > 0.03 * unit for place, value in zip(places, values, strict=True)]
    reach = 0.3 if any(moved) else 0.15
    inch = last / _width(panel)
    for index, (value, text, colour, weight) in enumerate(labels):
        if moved[index] or end_rounds[index] < last:
            panel.plot(
                [end_rounds[index], last + 0.06 * inch, last + (reach - 0.04) * inch],
                [value, value, places[index]],
                color=colour,
                linewidth=0.7,
                clip_on=False,
                label="_leader",
            )
        panel.annotate(
            text,
            (1, places[index]),
            (72 * reach, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=colour,
            weight=weight,
            annotation_clip=False,
        )


def _row_labels(panel: Axes, labels: Sequence[str]) -> None:
    """Labels of the rows; if the rows are too narrow, only of every second, third, ... row."""
    step = math.ceil(LABEL_HEIGHT * len(labels) / _height(panel))
    panel.set_yticks(range(0, len(labels), step), [shortened(label) for label in labels[::step]])
    panel.tick_params(axis="y", labelcolor=INK)


def _label_room(rows: Sequence[Any]) -> float:
    return 0.25 + 0.072 * max(len(shortened(row.label)) for row in rows)


def _at_right(
    panel: Axes,
    inches: float,
    place: float,
    text: str,
    colour: str,
    up: float,
    va: str = "center_baseline",
    weight: str = "normal",
) -> None:
    """Right-aligned text to the right of the panel, at a height in data coordinates."""
    panel.annotate(
        text,
        (1, place),
        (72 * inches, up),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va=va,
        color=colour,
        fontsize=9,
        weight=weight,
        annotation_clip=False,
    )


def _cells(cells: Sequence[tuple[float, float]], gap: float) -> Outline:
    """One outline of many unit cells (left edge, middle height): a single SVG path instead of thousands."""
    corners: list[tuple[float, float]] = []
    for left, middle in cells:
        x0, x1, y0, y1 = left + gap / 2, left + 1 - gap / 2, middle - 0.43, middle + 0.43
        corners += [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY] * len(cells)
    return Outline(corners, codes)


def _legend(figure: Figure, panel: Axes, choices: Sequence[str]) -> None:
    """A legend above the map: squares with their names."""
    width, height = figure.get_size_inches()
    x = panel.get_position().x0 * width
    y = height - 0.3
    for choice in choices:
        name = f"trains {FACTOR_NAMES[choice]}"
        square = Rectangle(
            (x / width, y / height),
            0.13 / width,
            0.13 / height,
            transform=figure.transFigure,
            facecolor=FACTOR_COLOURS[choice],
            edgecolor=RULE if choice == "" else "none",
            linewidth=0.6,
        )
        figure.add_artist(square)
        figure.text((x + 0.2) / width, (y + 0.06) / height, name, va="center", color=INK)
        x += 0.45 + 0.085 * len(name)

"""The figures of a benchmark. Each function returns a new Figure and uses no global state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lorica.reporting.benchmark import Entry, interval
from lorica.reporting.benchmark_tables import ranked
from lorica.reporting.drawing import Axes, Figure, MaxNLocator, Rectangle, rc_context
from lorica.reporting.partition import SHADES
from lorica.reporting.plots import WIDTH
from lorica.reporting.run_folder import metric_name
from lorica.reporting.style import INK, MUTED, PAPER, RC, Look, looks, shortened, spread

ROW, LETTER = 0.3, 0.082
COLUMN = 0.52
"""Width (inches) of a rate in the map of the tuning runs."""


def setting_figure(entries: Sequence[Entry], reference: str) -> Figure:
    """The methods of a setting that have a finished run as rows, highest mean first.

    Left: each seed, the mean and its 95 % interval; dashed, the mean of the reference and the initial model. Right: the
    score on the tuning seeds at each rate; the best rate is framed.

    Raises:
        ValueError: no run is finished.
    """
    rows = ranked(entries)
    if not rows:
        raise ValueError("nothing to draw")
    with rc_context(RC):
        rates = list(rows[0].tuning)
        left = 0.25 + LETTER * max(len(shortened(row.method)) for row in rows)
        top, bottom, middle = 0.36, 0.5, 1.2
        height, strip = ROW * len(rows), COLUMN * len(rates)
        figure = Figure(figsize=(WIDTH, top + height + bottom))
        whole = top + height + bottom
        width = WIDTH - left - middle - strip - 0.1
        panel = figure.add_axes((left / WIDTH, bottom / whole, width / WIDTH, height / whole))
        tuned = figure.add_axes(((left + width + middle) / WIDTH, bottom / whole, strip / WIDTH, height / whole))
        _draw_results(panel, rows, reference)
        _draw_tuning(tuned, rows, rates)
    return figure


def epsilon_figure(entries: Sequence[Entry]) -> Figure | None:
    """Mean score and its 95 % interval against the target ε, a line for each method.

    Methods with results in a single setting are left out. None before a method has two points.

    Args:
        entries: of settings that differ in ε only. Runs without privacy stand at the right.
    """
    scored = [entry for entry in entries if entry.mean is not None]
    counts = Counter(entry.method for entry in scored)
    found = [entry for entry in scored if counts[entry.method] > 1]
    targets: list[float | None] = [*sorted({entry.target for entry in found if entry.target is not None})]
    if len(targets) < 2:
        return None
    if any(entry.target is None for entry in found):
        targets.append(None)
    methods = list(dict.fromkeys(entry.method for entry in found))
    with rc_context(RC):
        right = 0.75 + LETTER * (max(len(shortened(method)) for method in methods) + 7)
        left, top, bottom, height = 0.45, 0.4, 0.5, max(3.0, 0.21 * len(methods))
        whole, width = top + height + bottom, WIDTH - left - right
        figure = Figure(figsize=(WIDTH, whole))
        panel = figure.add_axes((left / WIDTH, bottom / whole, width / WIDTH, height / whole))
        ends = []
        for place, method in enumerate(methods):
            # Beside each other, so that intervals do not hide each other.
            shift = 0.3 * (place / max(1, len(methods) - 1) - 0.5)
            points = {targets.index(entry.target) + shift: entry for entry in found if entry.method == method}
            ends.append((_draw_line(panel, points, looks(methods)[method]), method))
        panel.set_xlim(-0.4, len(targets) - 0.6)
        panel.set_xticks(range(len(targets)), ["no privacy" if t is None else f"ε = {t:g}" for t in targets])
        panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        panel.grid(axis="y")
        metric = metric_name([{"metric": run.metric} for entry in found for run in entry.results])
        panel.set_title(f"Test {metric} (%), mean over seeds", loc="left", fontsize=9.5, x=(0.05 - left) / width)
        _name_lines(panel, ends, height)
    return figure


def _draw_line(panel: Axes, points: Mapping[float, Entry], look: Look) -> float:
    """A line through the means at each x, and their intervals. Returns the last mean in percent."""
    means = [100 * (entry.mean or 0) for entry in points.values()]
    label = next(iter(points.values())).method
    panel.plot([*points], means, color=look.colour, linestyle=look.dashes, linewidth=1.4, label=label)
    panel.plot([*points], means, color=look.colour, marker="o", markersize=4, linestyle="none", label="_means")
    for x, entry in points.items():
        bounds = interval([100 * score for score in entry.scores])
        if bounds is not None:
            panel.plot([x, x], bounds, color=look.colour, linewidth=1.2, alpha=0.6, label="_interval")
    return means[-1]


def _name_lines(panel: Axes, ends: Sequence[tuple[float, str]], height: float) -> None:
    """Names to the right of the panel, each with a piece of its line: two methods may have the same colour."""
    style = looks(method for _, method in ends)
    low, high = panel.get_ylim()
    places = spread([value for value, _ in ends], gap=0.19 * (high - low) / height, low=low, high=high)
    for (value, method), place in zip(ends, places, strict=True):
        look = style[method]
        panel.plot(
            [1.01, 1.05],
            [place, place],
            transform=panel.get_yaxis_transform(),
            color=look.colour,
            linestyle=look.dashes,
            clip_on=False,
            label="_key",
        )
        panel.annotate(
            f"{shortened(method)}  {value:.1f}",
            (1.05, place),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=look.text,
            annotation_clip=False,
        )
    panel.set_ylim(low, high)


def _draw_results(panel: Axes, rows: Sequence[Entry], reference: str) -> None:
    style = looks(row.method for row in rows)
    values: list[float] = []
    for place, row in enumerate(rows):
        look = style[row.method]
        scores = [100 * score for score in row.scores]
        bounds = interval(scores)
        if bounds is not None:
            panel.plot(bounds, [place, place], color=look.colour, linewidth=6, alpha=0.25, solid_capstyle="butt")
        if scores:
            offsets = np.linspace(-0.18, 0.18, len(scores)) if len(scores) > 1 else [0.0]
            panel.plot(
                scores,
                [place + offset for offset in offsets],
                linestyle="none",
                marker="o",
                markersize=4,
                markerfacecolor=PAPER,
                markeredgecolor=look.colour,
                label=f"_{row.method} seeds",
            )
            mean = 100 * (row.mean or 0)
            panel.plot([mean, mean], [place - 0.3, place + 0.3], color=look.colour, linewidth=2.5, label=row.method)
        deviation = "" if row.std is None else f" ± {100 * row.std:.1f}"
        text = f"{100 * row.mean:.1f}{deviation}" if row.mean is not None else "diverged" if row.results else "–"
        panel.annotate(
            text,
            (1, place),
            (8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center_baseline",
            fontsize=9,
            color=look.text,
            annotation_clip=False,
        )
        values += scores
    marks = [(100 * row.mean, reference) for row in rows if row.method == reference and row.mean is not None]
    starts = [100 * run.start for row in rows for run in row.runs if run.start is not None]
    if starts:
        marks.append((sum(starts) / len(starts), "start"))
    values += [value for value, _ in marks]
    for value, name in marks:
        panel.axvline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=f"_{name} line")
        panel.annotate(
            shortened(name),
            (value, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            color=MUTED,
            fontsize=9,
        )
    low, high = min(values, default=0.0), max(values, default=100.0)
    margin = max(0.06 * (high - low), 1.0)
    panel.set_xlim(max(min(0.0, low), low - margin), min(100.0, high + margin))
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_yticks(range(len(rows)), [shortened(row.method) for row in rows])
    panel.tick_params(axis="y", labelcolor=INK)
    panel.grid(axis="x")
    panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    metric = metric_name([{"metric": run.metric} for row in rows for run in row.runs])
    panel.set_xlabel(f"Test {metric} after the last round (%)")


def _draw_tuning(panel: Axes, rows: Sequence[Entry], rates: Sequence[float]) -> None:
    """A map of rows by rates, darker for a higher mean over the tuning seeds."""
    means = np.full((len(rows), len(rates)), np.nan)
    for place, row in enumerate(rows):
        for column, rate in enumerate(rates):
            scores = [run.score for run in row.tuning[rate] if run.score is not None]
            if scores:
                means[place, column] = 100 * np.mean(scores)
    known = means[np.isfinite(means)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    for place, row in enumerate(rows):
        for column, rate in enumerate(rates):
            value = means[place, column]
            diverged = any(run.score is None for run in row.tuning[rate])
            share = 0.0 if not np.isfinite(value) or high == low else (value - low) / (high - low)
            # Most methods are near the best: equal steps of the shades would show them all alike.
            shade = round(share**3 * (len(SHADES) - 1))
            best = rate == row.rate
            if np.isfinite(value):
                square = Rectangle((column - 0.47, place - 0.44), 0.94, 0.88, facecolor=SHADES[shade], linewidth=0)
                panel.add_patch(square)
            if best:
                panel.add_patch(
                    Rectangle((column - 0.47, place - 0.44), 0.94, 0.88, fill=False, edgecolor=INK, linewidth=1.3)
                )
            text = "div." if diverged else f"{value:.1f}" if np.isfinite(value) else "–"
            dark = np.isfinite(value) and shade >= 3
            panel.text(
                column,
                place,
                text,
                ha="center",
                va="center_baseline",
                fontsize=8.5,
                color=PAPER if dark else INK,
                weight="bold" if best else "normal",
            )
    panel.set_xlim(-0.5, len(rates) - 0.5)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    panel.set_yticks([])
    panel.tick_params(axis="x", length=0, labelcolor=INK)
    panel.spines["bottom"].set_visible(False)
    # The label is wider than a panel of few rates, and would be cut at the right.
    panel.set_xlabel("Learning rate (tuning seeds)", loc="right" if len(rates) < 4 else "center")

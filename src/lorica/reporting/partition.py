"""The figure of a simulated partition: number of records per client and label."""

from __future__ import annotations

import math

import numpy as np

from lorica.errors import UserError
from lorica.reporting.clients import MOST_CLIENTS
from lorica.reporting.drawing import Axes, Figure, MaxNLocator, Outline, PathPatch, Rectangle, rc_context
from lorica.reporting.plots import LABEL_HEIGHT, WIDTH, histograms
from lorica.reporting.run_folder import Run
from lorica.reporting.style import INK, MUTED, PAPER, RC, RULE, shortened

MOST_COLUMNS = 200
MOST_NAMED_LABELS = 40
SHADES = ("#e3edf5", "#b9d2e5", "#86b1d0", "#4f8bb5", "#2a6595", "#153f66", "#061f38")
DARK = SHADES[3:]
LETTER = 0.074


def partition_figure(run: Run) -> Figure:
    """A heat map of clients (rows) by labels (columns), darker for more records, with each client's total.

    Counts are written in the cells if they fit. With more than 200 labels, neighbouring labels are grouped so that
    columns stay visible; the axis label gives the size of the groups. Of more than 200 clients, the figure has
    histograms of their records and of their numbers of labels.

    Raises:
        UserError: partition.json is missing or has no counts.
    """
    clients = (run.partition or {}).get("clients")
    if not clients or not clients[0]["counts"]:
        problem = "partition.json is missing or has no counts"
        raise UserError("run", str(run.folder), problem, "choose a run with simulated clients")
    counts = np.array([client["counts"] for client in clients], dtype=np.int64)
    if len(clients) > MOST_CLIENTS:
        return histograms([("Records", counts.sum(axis=1).tolist()), ("Labels", (counts > 0).sum(axis=1).tolist())])
    labels = [str(label) for label in (run.partition or {})["labels"]]
    names = [_client_name(client) for client in clients]
    group = math.ceil(counts.shape[1] / MOST_COLUMNS)
    starts = np.arange(0, counts.shape[1], group)
    cells = np.add.reduceat(counts, starts, axis=1)
    with rc_context(RC):
        return _draw(cells, counts.sum(axis=1), names, labels, group)


def shade_bounds(most: int) -> list[int]:
    """The lowest count of each shade: 1, 3, 10, 30, … up to `most`, or every second or third of these if too many."""
    bounds = [step * 10**power for power in range(19) for step in (1, 3) if step * 10**power <= max(1, most)]
    return bounds[:: math.ceil(len(bounds) / len(SHADES))]


def _draw(cells: np.ndarray, totals: np.ndarray, names: list[str], labels: list[str], group: int) -> Figure:
    rows, columns = cells.shape
    written = [f"{total:,}" for total in totals]
    left = 0.2 + LETTER * max(len(shortened(name)) for name in names)
    right = 0.35 + LETTER * max(len("records"), *map(len, written))
    row_height = min(0.3, max(0.05, 6.0 / rows))
    named = group == 1 and columns <= MOST_NAMED_LABELS
    texts = [shortened(label, 18) for label in labels] if named else []
    room = WIDTH - left - right
    width = min(room, columns * max(0.75, LETTER * max(map(len, texts)) + 0.15)) if named else room
    upright = named and max(map(len, texts)) * LETTER > width / columns
    bottom = (0.2 + LETTER * max(map(len, texts)) if upright else 0.28) + 0.27 if named else 0.52
    top, height = 0.7, max(0.3, row_height * rows)

    figure = Figure(figsize=(WIDTH, top + height + bottom))
    whole = top + height + bottom
    panel = figure.add_axes((left / WIDTH, bottom / whole, width / WIDTH, height / whole))
    bounds = shade_bounds(int(cells.max()))
    shades = [SHADES[round(place)] for place in np.linspace(0, len(SHADES) - 1, max(2, len(bounds)))]
    levels = np.searchsorted(bounds, cells, side="right") - 1
    gap = (0.02 * columns / width, 0.02 * rows / height) if columns <= 60 and row_height > 0.1 else (0.0, 0.0)
    for level, shade in enumerate(shades[: len(bounds)]):
        if (levels == level).any():
            panel.add_patch(PathPatch(_runs(levels == level, gap), facecolor=shade, linewidth=0, label=str(level)))
    panel.set_xlim(-0.5, columns - 0.5)
    panel.set_ylim(rows - 0.5, -0.5)
    panel.spines[:].set_visible(True)

    step = math.ceil(LABEL_HEIGHT / row_height)
    panel.set_yticks(range(0, rows, step), [shortened(name) for name in names[::step]])
    panel.tick_params(axis="y", labelcolor=INK)
    for row in range(0, rows, step):
        panel.annotate(
            written[row],
            (1, row),
            (72 * (right - 0.15), 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center_baseline",
            fontsize=9,
            annotation_clip=False,
        )
    panel.annotate(
        "records", (1, 1), (72 * (right - 0.15), 4), xycoords="axes fraction", textcoords="offset points",
        ha="right", va="bottom", fontsize=9, color=MUTED,
    )  # fmt: skip
    if named:
        panel.set_xticks(range(columns), texts, rotation=90 if upright else 0)
        panel.tick_params(axis="x", length=0, labelcolor=INK)
        panel.set_xlabel("Label")
    else:
        panel.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True))
        panel.xaxis.set_major_formatter(lambda place, _: f"{place * group:.0f}")
        grouped = f"; each column is a group of {group} labels" if group > 1 else ""
        panel.set_xlabel(f"Label (index among {len(labels):,}{grouped})")
    _write_counts(panel, cells, levels, shades, width / columns, row_height)
    _legend(figure, left, bounds, int(cells.max()), shades)
    return figure


def _client_name(client: dict[str, object]) -> str:
    number = f"client {client['client']}"
    return f"{number}: {client['name']}" if client.get("name") else number


def _runs(inside: np.ndarray, gap: tuple[float, float]) -> Outline:
    """One outline of many cells. Without a gap, adjacent cells of a row are merged into one rectangle."""
    corners: list[tuple[float, float]] = []
    for row, line in enumerate(inside):
        if gap[0]:
            ranges = [(column, column + 1) for column in np.flatnonzero(line)]
        else:
            edges = np.flatnonzero(np.diff(np.concatenate(([0], line.astype(np.int8), [0]))))
            ranges = list(zip(edges[::2], edges[1::2], strict=True))
        y0, y1 = row - 0.5 + gap[1] / 2, row + 0.5 - gap[1] / 2
        for start, end in ranges:
            x0, x1 = start - 0.5 + gap[0] / 2, end - 0.5 - gap[0] / 2
            corners += [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    return Outline(corners, codes * (len(corners) // 5))


def _write_counts(
    panel: Axes, cells: np.ndarray, levels: np.ndarray, shades: list[str], cell_width: float, cell_height: float
) -> None:
    longest = len(f"{cells.max():,}")
    if LETTER * longest + 0.06 > cell_width or cell_height < LABEL_HEIGHT:
        return
    for (row, column), count in np.ndenumerate(cells):
        if count:
            colour = PAPER if shades[levels[row, column]] in DARK else INK
            panel.text(column, row, f"{count:,}", ha="center", va="center_baseline", fontsize=9, color=colour)


def _legend(figure: Figure, left: float, bounds: list[int], most: int, shades: list[str]) -> None:
    """A legend above the map: squares with the counts that they represent."""
    width, height = figure.get_size_inches()
    ends = [bound - 1 for bound in bounds[1:]] + [max(most, bounds[-1])]
    texts = ["none"] + [
        f"{low:,}" if low == high else f"{low:,}–{high:,}" for low, high in zip(bounds, ends, strict=True)
    ]
    x, y = left, height - 0.3
    for text, colour in zip(texts, [PAPER, *shades], strict=False):
        square = Rectangle(
            (x / width, y / height),
            0.13 / width,
            0.13 / height,
            transform=figure.transFigure,
            facecolor=colour,
            edgecolor=RULE if colour == PAPER else "none",
            linewidth=0.6,
        )
        figure.add_artist(square)
        figure.text((x + 0.2) / width, (y + 0.06) / height, text, va="center", color=INK)
        x += 0.42 + LETTER * len(text)

"""Draw accuracy per round of runs with and without privacy: one panel for each experiment's name.

python scripts/learning_curves.py docs/images/learning-curves.png RUN_FOLDER…
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorica.reporting.run_folder import Run, read_run, score_of
from lorica.reporting.style import COLOURS, INK, MUTED, RC, RULE, spread

PRIVATE, OPEN = COLOURS[0], COLOURS[1]


def private(run: Run) -> bool:
    return run.privacy is not None and run.privacy["noise"] != "none"


def label(run: Run) -> str:
    return f"ε = {run.config['privacy']['epsilon']:g}" if private(run) else "no privacy"


def draw(panel: Axes, name: str, runs: list[Run]) -> None:
    """The runs of one experiment, each with its name and last score beside its end."""
    ends = []
    for run in sorted(runs, key=label):
        scores = [(row["round"], 100 * score) for row in run.metrics if (score := score_of(row)) is not None]
        colour = PRIVATE if private(run) else OPEN
        panel.plot(*zip(*scores, strict=True), color=colour, linewidth=2, marker="o", markersize=3.5, label=label(run))
        ends.append((scores[-1], f"{label(run)}  {scores[-1][1]:.1f} %", colour))
    low, high = panel.get_ylim()
    heights = spread([end[1] for end, _, _ in ends], 0.08 * (high - low), low, high)
    for ((last, _), text, colour), height in zip(ends, heights, strict=True):
        panel.annotate(text, (last, height), (8, 0), textcoords="offset points", va="center", color=colour, size=9)
    panel.set_title(name, loc="left", color=INK, fontsize=10.5, fontweight="bold")
    panel.grid(axis="y", color=RULE)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.set_xlim(0, None)
    panel.set_xlabel("Round")
    panel.set_ylabel("Test accuracy (%)", color=MUTED)


def figure(runs: list[Run]) -> Figure:
    """One panel for each experiment's name, in the order of the runs."""
    names = list(dict.fromkeys(run.config["name"] for run in runs))
    with matplotlib.rc_context(RC):
        made = Figure(figsize=(4.5 * len(names), 3.1), layout="constrained")
        made.get_layout_engine().set(w_pad=0.15)
        for panel, name in zip(made.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            draw(panel, name, [run for run in runs if run.config["name"] == name])
    return made


if __name__ == "__main__":
    figure([read_run(Path(folder)) for folder in sys.argv[2:]]).savefig(sys.argv[1], dpi=160)

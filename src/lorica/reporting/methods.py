"""The table of methods, for the terminal and for the docs."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from lorica.methods.base import registry

HEADINGS = ["method", "trains", "sends", "aggregation", "client ranks", "under DP", "paper"]


def method_rows() -> list[list[str]]:
    """Cells of all installed methods, in the order of `HEADINGS`. Client ranks are `any`, or `one` for all clients."""
    return [
        [
            name,
            method.about.trains,
            method.about.sends,
            "exact" if method.about.exact else "inexact",
            "one" if "client_ranks" in method.refuses else "any",
            method.about.privacy,
            method.about.arxiv,
        ]
        for name, method in registry().items()
    ]


def methods_table() -> Table:
    """The table for a terminal. From 80 columns on, no cell is cut, and no method name or arXiv number is wrapped."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        # Wrapped by hand: the cells below are narrow, and at 80 columns the other columns need the space.
        broken = heading.replace("aggregation", "aggre-\ngation").replace(" ", "\n")
        table.add_column(broken, overflow="fold", no_wrap=heading in ("method", "paper"))
    for row in method_rows():
        *cells, papers = row
        table.add_row(*(Text(cell) for cell in cells), Text(papers.replace(", ", "\n")))
    return table

"""The table of methods, for the terminal and for the docs."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from lorica.methods.base import registry

HEADINGS = ["method", "trains", "sends", "aggregation", "client ranks", "under DP", "paper"]


def method_rows() -> list[list[str]]:
    """Cells of every installed method, in the order of `HEADINGS`; client ranks are `any` or `one` for all clients."""
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
    """The rows for a terminal; from 80 columns on, no cell is cut and no name of a method and no number is broken."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        # Broken by hand: its cells are short, and at 80 columns the other ones need the room.
        broken = heading.replace("aggregation", "aggre-\ngation").replace(" ", "\n")
        table.add_column(broken, overflow="fold", no_wrap=heading in ("method", "paper"))
    for row in method_rows():
        *cells, papers = row
        table.add_row(*(Text(cell) for cell in cells), Text(papers.replace(", ", "\n")))
    return table

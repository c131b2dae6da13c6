"""Fewer rows than a product: every two values of different columns still meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

Row = tuple[Any, ...]


def pairwise(*columns: Sequence[Any]) -> list[Row]:
    """Rows of the columns' product, each in turn the one with most pairs that no row before it has."""
    rows = list(product(*columns))
    left = set().union(*map(pairs, rows))
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(left & pairs(row)))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def pairs(row: Row) -> set[Any]:
    return set(combinations(enumerate(row), 2))

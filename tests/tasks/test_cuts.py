"""Micro-batches are cut where the passes cost least."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorica.tasks.records import cheapest_cuts


def cost(lengths: list[int], rows: list[int], ends: tuple[int, ...], tokens: int) -> float:
    total, start = 0.0, 0
    for end in ends:
        padded = sum(rows[start:end]) * lengths[end - 1]
        if padded > tokens and end - start > 1:
            return float("inf")
        total += padded + tokens / 16
        start = end
    return total


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), max_size=8), st.integers(1, 100), st.booleans())
def test_no_other_way_to_cut_is_cheaper(sizes: list[tuple[int, int]], tokens: int, several: bool) -> None:
    lengths = sorted(length for length, _ in sizes)
    rows = [count if several else 1 for _, count in sizes]
    counts = np.array(rows, dtype=np.int64) if several else None
    ends = cheapest_cuts(np.array(lengths, dtype=np.int64), tokens, counts)
    n = len(lengths)
    ways = [(*chosen, n) for count in range(max(n, 1)) for chosen in itertools.combinations(range(1, n), count)]
    best = min((cost(lengths, rows, way, tokens) for way in ways), default=0.0) if n else 0.0
    assert cost(lengths, rows, tuple(ends), tokens) == best
    assert ends == sorted(set(ends))
    assert (ends[-1] if ends else 0) == n


def test_thousands_of_records_are_cut_quickly_and_with_little_padding() -> None:
    lengths = np.sort(np.random.default_rng(0).geometric(1 / 13, 5000))
    ends = cheapest_cuts(lengths, 1024)
    padded = sum((end - start) * lengths[end - 1] for start, end in itertools.pairwise([0, *ends]))
    assert padded < 1.05 * lengths.sum()

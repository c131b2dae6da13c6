"""Micro-batches are cut where the passes cost least."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.tasks.records import cheapest_cuts
from lorica.testing.records import TinyRecords


def cost(lengths: list[int], rows: list[int], ends: tuple[int, ...], tokens: int, most_rows: int | None) -> float:
    total, start = 0.0, 0
    for end in ends:
        padded = sum(rows[start:end]) * lengths[end - 1]
        too_many = most_rows is not None and sum(rows[start:end]) > most_rows
        if (padded > tokens or too_many) and end - start > 1:
            return float("inf")
        total += padded + tokens / 16
        start = end
    return total


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), max_size=8),
    st.integers(1, 100),
    st.booleans(),
    st.none() | st.integers(1, 12),
)
def test_no_other_way_to_cut_is_cheaper(
    sizes: list[tuple[int, int]], tokens: int, several: bool, most_rows: int | None
) -> None:
    lengths = sorted(length for length, _ in sizes)
    rows = [count if several else 1 for _, count in sizes]
    counts = np.array(rows, dtype=np.int64) if several else None
    ends = cheapest_cuts(np.array(lengths, dtype=np.int64), tokens, counts, most_rows)
    n = len(lengths)
    ways = [(*chosen, n) for count in range(max(n, 1)) for chosen in itertools.combinations(range(1, n), count)]
    best = min((cost(lengths, rows, way, tokens, most_rows) for way in ways), default=0.0) if n else 0.0
    assert cost(lengths, rows, tuple(ends), tokens, most_rows) == best
    assert ends == sorted(set(ends))
    assert (ends[-1] if ends else 0) == n


def test_thousands_of_records_are_cut_quickly_and_with_little_padding() -> None:
    lengths = np.sort(np.random.default_rng(0).geometric(1 / 13, 5000))
    ends = cheapest_cuts(lengths, 1024)
    padded = sum((end - start) * lengths[end - 1] for start, end in itertools.pairwise([0, *ends]))
    assert padded < 1.05 * lengths.sum()


def test_all_records_are_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, cuts = TinyRecords.texts(20), []
    monkeypatch.setattr("lorica.tasks.records.cheapest_cuts", lambda *args: cuts.append(args) or cheapest_cuts(*args))
    first = texts.passes(40)
    assert texts.passes(40) is first
    assert len(cuts) == 1
    expected = list(texts.micro_batch_indices(np.arange(20), 40))
    assert all(np.array_equal(one, other) for one, other in zip(first, expected, strict=True))
    # Another size is cut otherwise, and so are other records.
    assert len(texts.passes(80)) < len(first)
    assert sum(map(len, texts.subset(np.arange(5)).passes(40))) == 5

"""Robust aggregates: equal to Flower's, and out of the reach of a minority."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.aggregation.robust import check_aggregate, krum, make_aggregate, median, trimmed_mean
from lorica.config import ServerConfig
from lorica.errors import UserError


def updates(clients: int, seed: int) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    return [{"a": torch.randn(3, 4, generator=draws), "b": torch.randn(5, generator=draws)} for _ in range(clients)]


@pytest.mark.parametrize("clients", [5, 6, 9])
@pytest.mark.parametrize("seed", range(3))
def test_aggregates_are_flowers(clients: int, seed: int) -> None:
    flower = pytest.importorskip("flwr.server.strategy.aggregate")
    some = updates(clients, seed)
    results = [([value.numpy() for value in update.values()], 1) for update in some]
    for found, expected in (
        (median(some), flower.aggregate_median(results)),
        (trimmed_mean(some, 0.2), flower.aggregate_trimmed_avg(results, 0.2)),
        (krum(some, 1), flower.aggregate_krum(results, 1, 0)),
    ):
        for value, reference in zip(found.values(), expected, strict=True):
            assert value.dtype == torch.float32
            np.testing.assert_allclose(value.numpy(), reference, rtol=1e-6, atol=1e-7)


@given(
    honest=st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=9),
    bad=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=0, max_size=4),
    seed=st.integers(0, 100),
)
def test_a_minority_cannot_move_the_median_or_a_trimmed_mean_out_of_the_honest_range(
    honest: list[float], bad: list[float], seed: int
) -> None:
    bad = bad[: (len(honest) - 1) // 2]
    order = np.random.default_rng(seed).permutation(len(honest) + len(bad))
    values = [{"x": torch.tensor([(honest + bad)[i]])} for i in order]
    found = [median(values)]
    share = (len(bad) + 0.5) / len(values)
    if share < 0.5 and len(values) > 2 * int(share * len(values)):
        found.append(trimmed_mean(values, share))
    for each in found:
        assert min(honest) - 1e-4 <= float(each["x"]) <= max(honest) + 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_krum_picks_an_honest_update(seed: int) -> None:
    """Two of seven collude far from the rest, which are close to each other."""
    draws = torch.Generator().manual_seed(seed)
    honest = [{"x": 1 + 0.01 * torch.randn(20, generator=draws)} for _ in range(5)]
    bad = [{"x": torch.full((20,), 5.0)}] * 2
    found = krum([bad[0], *honest[:3], bad[1], *honest[3:]], 2)
    assert any(torch.equal(found["x"], update["x"]) for update in honest)


def test_what_means_nothing_for_so_few_replies_is_refused() -> None:
    check_aggregate(ServerConfig(aggregate="krum", byzantine=1), 5)
    with pytest.raises(UserError, match=r"server\.byzantine = 1.*5 replies"):
        check_aggregate(ServerConfig(aggregate="krum", byzantine=1), 4)
    check_aggregate(ServerConfig(aggregate="trimmed-mean", trim=0.2), 5)
    with pytest.raises(UserError, match=r"server\.trim = 0\.2"):
        check_aggregate(ServerConfig(aggregate="trimmed-mean", trim=0.2), 4)
    check_aggregate(ServerConfig(), 1)


@pytest.mark.parametrize("aggregate", ["median", "trimmed-mean", "krum"])
def test_the_configured_aggregate_withstands_one_that_the_mean_does_not(aggregate: str) -> None:
    chosen = make_aggregate(ServerConfig(aggregate=aggregate, trim=0.2, byzantine=1))
    assert chosen is not None
    assert make_aggregate(ServerConfig()) is None
    some = updates(5, 0)
    some[3] = {name: value + 1e6 for name, value in some[3].items()}
    assert max(float(value.abs().max()) for value in chosen(some).values()) < 10

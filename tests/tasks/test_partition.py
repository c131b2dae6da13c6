"""Partitions of records among clients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.config import FederationConfig
from lorica.errors import UserError
from lorica.tasks.partition import partition


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=40, max_size=120),
    clients=st.integers(1, 5),
    kind=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.floats(0.5, 100),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_record_goes_to_exactly_one_client_and_every_client_gets_one(labels, clients, kind, alpha, seed):
    parts = partition(np.array(labels), FederationConfig(clients=clients, partition=kind, alpha=alpha), seed)
    assert len(parts) == clients
    assert all(len(part) for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_partition_is_a_function_of_the_seed(kind):
    labels = np.arange(200) % 3
    config = FederationConfig(clients=4, partition=kind)
    first, again, other = (partition(labels, config, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_parts_differ_by_at_most_one_record():
    sizes = [len(part) for part in partition(np.zeros(23), FederationConfig(clients=5, partition="iid"), 0)]
    assert max(sizes) - min(sizes) <= 1


def test_small_alpha_gives_more_skew_than_large_alpha():
    labels = np.arange(3000) % 3

    def skew(alpha):
        parts = partition(labels, FederationConfig(clients=3, alpha=alpha), 7)
        shares = [np.bincount(labels[part], minlength=3) / len(part) for part in parts]
        return np.abs(np.array(shares) - 1 / 3).max()

    assert skew(0.2) > 0.2 > 0.05 > skew(1000)


def test_dirichlet_shares_have_the_dirichlet_distributions_moments():
    labels = np.zeros(10_000)
    clients, alpha = 4, 2.0
    first = [len(partition(labels, FederationConfig(clients=clients, alpha=alpha), s)[0]) / 1e4 for s in range(400)]
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.mean(first) == pytest.approx(1 / clients, abs=4 * np.sqrt(variance / 400))
    assert np.var(first) == pytest.approx(variance, rel=0.3)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_more_clients_than_records_is_an_error(kind):
    with pytest.raises(UserError, match="only 3 training records") as error:
        partition(np.arange(3), FederationConfig(clients=4, partition=kind), 0)
    assert error.value.key == "federation.clients"


def test_draws_that_always_starve_a_client_are_an_error():
    with pytest.raises(UserError, match=r"100 draws .* 6 clients .*federation\.clients") as error:
        partition(np.zeros(50), FederationConfig(clients=6, alpha=1e-9), 0)
    assert error.value.key == "federation.alpha"

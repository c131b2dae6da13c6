"""Partitions of records among clients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.config import FederationConfig, load
from lorica.errors import UserError
from lorica.tasks.partition import partition

RANDOM = ["iid", "dirichlet", "shards", "quantity", "as-lora-text", "as-lora-images"]


@given(
    labels=st.lists(st.integers(0, 4), min_size=40, max_size=120),
    clients=st.integers(1, 5),
    kind=st.sampled_from(RANDOM),
    alpha=st.floats(0.5, 100),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_record_goes_to_exactly_one_client_and_every_client_gets_one(labels, clients, kind, alpha, seed):
    parts = partition(np.array(labels), FederationConfig(clients=clients, partition=kind, alpha=alpha), seed)
    assert len(parts) == clients
    assert all(len(part) for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@pytest.mark.parametrize("kind", RANDOM)
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


@pytest.mark.parametrize("kind", RANDOM)
def test_more_clients_than_records_is_an_error(kind):
    with pytest.raises(UserError, match="only 3 training records") as error:
        partition(np.arange(3), FederationConfig(clients=4, partition=kind), 0)
    assert error.value.key == "federation.clients"


def test_draws_that_always_starve_a_client_are_an_error():
    with pytest.raises(UserError, match=r"100 draws .* 6 clients .*federation\.clients") as error:
        partition(np.zeros(50), FederationConfig(clients=6, alpha=1e-3), 0)
    assert error.value.key == "federation.alpha"


# Records of each label in the training set, in the labels' natural order, and each client's records in the table of
# AS-LoRA's experiments (Dirichlet(0.5), seed 42).
PUBLISHED = {
    "SST-2": ("as-lora-text", [29780, 37569], [10358, 14346, 5749, 11449, 19710, 5737]),
    "QNLI": ("as-lora-text", [52366, 52377], [17347, 24625, 8047, 18692, 27540, 8492]),
    "QQP": ("as-lora-text", [229468, 134378], [69985, 103730, 20929, 71894, 71176, 26132]),
    "MNLI": ("as-lora-text", [130899, 130900, 130903], [46148, 143425, 32543, 72537, 70804, 27245]),
    "SNLI": ("as-lora-text", [183416, 182764, 183187], [64617, 200792, 45479, 101524, 98867, 38088]),
    "CIFAR-100": ("as-lora-images", [500] * 100, [15939, 15863, 18198]),
    "Tiny-ImageNet": ("as-lora-images", [500] * 200, [31132, 32643, 36225]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_loras_client_sizes_are_reproduced_whatever_the_order_of_the_records(name):
    kind, counts, sizes = PUBLISHED[name]
    labels = np.repeat(np.arange(len(counts)), counts)
    config = FederationConfig(clients=len(sizes), partition=kind, partition_seed=42)
    parts = partition(labels, config, 0)
    assert [len(part) for part in parts] == sizes
    shuffled = np.random.default_rng(1).permutation(labels)
    assert [len(part) for part in partition(shuffled, config, 1)] == sizes
    if name == "SST-2":
        assert [np.bincount(labels[parts[client]]).tolist() for client in (4, 2)] == [[162, 19548], [87, 5662]]


@pytest.mark.parametrize("kind", RANDOM)
def test_a_partition_seed_takes_the_place_of_the_runs_seed(kind):
    labels = np.arange(200) % 3
    config = FederationConfig(clients=4, partition=kind, partition_seed=5)
    own = partition(labels, FederationConfig(clients=4, partition=kind), 5)
    assert all(np.array_equal(a, b) for a, b in zip(own, partition(labels, config, 6), strict=True))


def test_shards_hold_few_labels_and_equal_sizes():
    labels = np.random.default_rng(0).permutation(np.arange(10).repeat(60))
    config = FederationConfig(clients=10, partition="shards", shards_per_client=2)
    parts = partition(labels, config, 0)
    assert [len(part) for part in parts] == [60] * 10
    assert all(len(np.unique(labels[part])) <= 2 for part in parts)


def test_quantity_skews_sizes_but_not_labels():
    labels = np.arange(30_000) % 3
    parts = partition(labels, FederationConfig(clients=4, partition="quantity", alpha=0.5, min_records=1000), 3)
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1000
    assert max(sizes) > 2 * min(sizes)
    assert all(np.abs(np.bincount(labels[part]) / len(part) - 1 / 3).max() < 0.06 for part in parts)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity", "as-lora-text", "as-lora-images"])
def test_random_sizes_are_drawn_again_until_every_client_has_enough(kind):
    labels = np.arange(600) % 3
    few, enough = (FederationConfig(clients=5, partition=kind, min_records=least) for least in (1, 60))
    seed = next(seed for seed in range(50) if min(map(len, partition(labels, few, seed))) < 60)
    assert min(map(len, partition(labels, enough, seed))) >= 60


@pytest.mark.parametrize("kind", ["column", "files"])
def test_owners_of_the_data_become_clients(kind):
    owners = np.array([2, 0, 0, 1, 2, 2])
    config = FederationConfig(clients=3, partition=kind, by="hospital" if kind == "column" else None)
    assert [part.tolist() for part in partition(np.zeros(6), config, 0, owners)] == [[1, 2], [3], [0, 4, 5]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"partition": "column", "by": "hospital"}, r"clients = 6: the column 'hospital' holds 3 values.* to 3\."),
        ({"partition": "files"}, r"federation\.clients = 6: task\.train is 3 files.* Set federation\.clients to 3"),
        ({"partition": "files", "clients": 3, "min_records": 2}, r"min_records = 2: client 1 has only 1 records"),
        ({"partition": "iid", "min_records": 2}, r"clients = 6: .* 6 training records, but each client needs 2"),
        ({"partition": "shards"}, r"federation\.shards_per_client = 2: 6 training records .* 12 shards"),
        (
            {"partition": "quantity", "clients": 2, "min_records": 3, "alpha": 1e-3},
            r"federation\.alpha = 0\.001: each of 100 draws left one of 2 clients with fewer than 3 records",
        ),
    ],
)
def test_what_cannot_be_divided_is_an_error(keys, message):
    with pytest.raises(UserError, match=message):
        partition(np.zeros(6), FederationConfig(**keys), 0, np.array([2, 0, 0, 1, 2, 2]))


@pytest.mark.parametrize("override", ["partition=column", "by=hospital", "min_records=0", "shards_per_client=0"])
def test_keys_that_do_not_fit_together_are_refused(override):
    with pytest.raises(UserError, match="federation"):
        load(None, [f"federation.{override}"])

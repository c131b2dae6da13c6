"""What the releases about an owner's data cost over its life."""

from dataclasses import replace

import pytest

from lorica.privacy.accounting import Steps, epsilon, epsilon_from_rdp, total_rdp
from lorica.privacy.ledger import Release
from lorica.privacy.lifetime import lifetime_above, lifetime_epsilon, unprotected

RELEASE = Release(
    dataset="data",
    records="alice",
    run="one",
    client=0,
    round=1,
    sampling_rate=0.1,
    noise_multiplier=1.2,
    clip_norm=1.0,
    steps=5,
    noise="secure",
    request="first",
)


def test_runs_on_the_same_records_compose() -> None:
    runs = [replace(RELEASE, run=str(index), round=round_number) for index in range(3) for round_number in (1, 2)]
    assert lifetime_epsilon(runs, "alice", 1e-5) == epsilon([Steps(0.1, 1.2, 30)], 1e-5)
    planned = Steps(0.1, 1.2, 10)
    assert lifetime_epsilon(runs, "alice", 1e-5, planned) == epsilon([Steps(0.1, 1.2, 40)], 1e-5)


def test_other_clients_of_the_same_run_hold_other_records() -> None:
    both = [RELEASE, replace(RELEASE, records="bob", client=1, noise_multiplier=0.5)]
    assert lifetime_epsilon(both, "alice", 1e-5) == epsilon([RELEASE.cost], 1e-5)


def test_a_run_with_another_partition_counts_its_worst_client() -> None:
    others = [
        replace(RELEASE, run="two", records="carol", client=0, noise_multiplier=2.0),
        replace(RELEASE, run="two", records="dave", client=1, noise_multiplier=0.9),
    ]
    worst = epsilon_from_rdp(total_rdp([RELEASE.cost]) + total_rdp([others[1].cost]), 1e-5)
    assert lifetime_epsilon([RELEASE, *others], "alice", 1e-5) == pytest.approx(worst)
    # It can only over-count: the record was with one of the two.
    for other in others:
        assert lifetime_epsilon([RELEASE, *others], "alice", 1e-5) >= epsilon([RELEASE.cost, other.cost], 1e-5)


def test_releases_without_secret_noise_are_counted_apart() -> None:
    rows = [RELEASE, replace(RELEASE, run="two", noise="reproducible"), replace(RELEASE, run="three", noise="none")]
    assert lifetime_epsilon(rows, "alice", 1e-5) == epsilon([RELEASE.cost], 1e-5)
    assert unprotected(rows) == 2


def test_where_a_server_names_clients_every_release_counts() -> None:
    rows = [
        RELEASE,
        replace(RELEASE, client=1, records="the same records in another order"),
        replace(RELEASE, run="two", dataset="other columns of the same records"),
    ]
    assert lifetime_epsilon(rows, None, 1e-5) == epsilon([Steps(0.1, 1.2, 15)], 1e-5)
    assert lifetime_epsilon(rows, None, 1e-5, Steps(0.1, 1.2, 5)) == epsilon([Steps(0.1, 1.2, 20)], 1e-5)


@pytest.mark.parametrize("records", ["alice", None])
@pytest.mark.parametrize("factor", [0.5, 0.999, 1.001, 2.0, 100.0])
def test_a_limit_is_passed_exactly_where_the_epsilon_is_above_it(records: str | None, factor: float) -> None:
    """Below the Rényi bound too, which alone would refuse more."""
    rows = [RELEASE, replace(RELEASE, run="two", records="carol", noise_multiplier=2.0)]
    for planned in (None, Steps(0.2, 0.9, 30)):
        life = lifetime_epsilon(rows, records, 1e-5, planned)
        above = lifetime_above(life * factor, rows, records, 1e-5, planned)
        assert above == (life if factor < 1 else None)

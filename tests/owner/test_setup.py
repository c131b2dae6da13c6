"""What an owner brings to a run: each record's side of the hold-out depends on that record alone."""

from __future__ import annotations

import numpy as np
import pytest

from lorica.config import ExperimentConfig, load
from lorica.errors import UserError
from lorica.owner.setup import hold_out
from lorica.tasks.records import Records
from lorica.testing.records import TinyRecords

RECORDS = TinyRecords.texts(1000)


def held_out(share: float, seed: int = 42) -> ExperimentConfig:
    return load(None, [f"federation.private_test={share}", f"seed={seed}"])


def sides(records: Records, share: float = 0.2, seed: int = 42) -> tuple[set[bytes], set[bytes]]:
    """Digests of the records trained on, and of those tested on."""
    train, test = hold_out(held_out(share, seed), records)
    return set(map(bytes, train.digests)), set() if test is None else set(map(bytes, test.digests))


def test_removing_or_replacing_a_record_moves_no_other() -> None:
    train, test = sides(RECORDS)
    assert len(train) + len(test) == 1000
    other = TinyRecords.texts(1, seed=7)
    for index in (0, 17, 500, 999):
        gone = bytes(RECORDS.digests[index])
        without = RECORDS.subset(np.delete(np.arange(1000), index))
        assert sides(without) == (train - {gone}, test - {gone})
        digests = RECORDS.digests.copy()
        digests[index] = other.digests[0]
        replaced = TinyRecords(RECORDS.labels, digests, RECORDS.inputs)
        new = bytes(other.digests[0])
        now_train, now_test = sides(replaced)
        assert (now_train - {new}, now_test - {new}) == (train - {gone}, test - {gone})


def test_the_order_of_records_and_equal_records_change_no_side() -> None:
    order = np.random.default_rng(0).permutation(1000)
    assert sides(RECORDS.subset(order)) == sides(RECORDS)
    twice = RECORDS.subset(np.repeat(np.arange(1000), 2))
    train, test = hold_out(held_out(0.2), twice)
    assert test is not None
    assert sides(twice) == sides(RECORDS)
    assert len(train) + len(test) == 2000


def test_the_share_is_met_and_the_seed_draws_anew() -> None:
    # A binomial draw: 6 standard deviations of its share are 0.076.
    assert abs(len(sides(RECORDS)[1]) / 1000 - 0.2) < 0.076
    assert sides(RECORDS, seed=43) != sides(RECORDS)
    # A larger share holds out the same records, and more.
    assert sides(RECORDS, 0.2)[1] < sides(RECORDS, 0.5)[1]


def test_few_records_may_leave_none_to_test_on_but_never_none_to_train_on() -> None:
    lonely = RECORDS.subset(np.arange(1))
    whole, none = hold_out(held_out(1e-9), lonely)
    assert none is None
    assert len(whole) == 1
    with pytest.raises(UserError, match=r"federation\.private_test.* all 1 records"):
        hold_out(held_out(1 - 1e-9), lonely)

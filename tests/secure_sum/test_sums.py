"""The server gets the sum of those that answered, to the quantisation step, whoever drops out within the threshold."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.secure_sum import server
from lorica.secure_sum.setup import SummationError
from tests.secure_sum.parties import (
    agreement_for,
    dyadic,
    masked,
    plain_sum,
    random_inputs,
    revealed,
    shared,
    summed,
)

# Ids as Flower gives them: 63 bits, no order that means anything.
CLIENTS = [3, 2**63 - 1, 0, 17, 10**12]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].double(), other[name].double()) for name in one)


@given(
    count=st.integers(2, 6),
    bits=st.sampled_from([32, 64]),
    bound=st.floats(1e-6, 1e6),
    shape=st.lists(st.integers(0, 4), max_size=3),
    data=st.data(),
)
def test_sums_equal_plain_sums_to_the_step(
    count: int, bits: int, bound: float, shape: list[int], data: st.DataObject
) -> None:
    """The reference is exact: fractions of the clipped values. Half the draws lie beyond the bound."""
    size = int(torch.Size(shape).numel())
    values = st.floats(-2 * bound, 2 * bound) | st.sampled_from([0.0, bound, -bound, 1e9, -1e9])
    rows = data.draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=count, max_size=count))
    inputs = {own: {"x": torch.tensor(row, dtype=torch.float64).reshape(shape)} for own, row in enumerate(rows)}
    agreement, weights = (
        agreement_for(range(count), bits=bits, bound=bound, shapes={"x": tuple(shape)}),
        dyadic(range(count)),
    )

    total = summed(agreement, inputs)["x"]

    assert total.shape == torch.Size(shape)
    assert total.dtype == torch.float32
    for index, value in enumerate(total.flatten().tolist()):
        exact = sum(Fraction(min(max(weights[own] * row[index], -bound), bound)) for own, row in enumerate(rows))
        to_fp32 = abs(exact) * Fraction(2) ** -23
        assert abs(Fraction(value) - exact) <= count * Fraction(agreement.setup.step) / 2 + to_fp32


def test_values_on_the_grid_are_summed_exactly() -> None:
    inputs = random_inputs(CLIENTS)
    assert equal(summed(agreement_for(CLIENTS), inputs), plain_sum(inputs, CLIENTS))


@pytest.mark.parametrize("dropped", [d for n in range(3) for d in itertools.combinations(CLIENTS, n)])
def test_every_pattern_of_dropouts_after_sharing_recovers_the_sum_of_the_others(dropped: tuple[int, ...]) -> None:
    inputs = random_inputs(CLIENTS)
    rest = [own for own in CLIENTS if own not in dropped]
    assert equal(summed(agreement_for(CLIENTS, 3), inputs, before_mask=dropped), plain_sum(inputs, rest))


@pytest.mark.parametrize("silent", [d for n in range(1, 3) for d in itertools.combinations(CLIENTS, n)])
def test_clients_that_answer_and_then_reveal_nothing_are_in_the_sum(silent: tuple[int, ...]) -> None:
    inputs = random_inputs(CLIENTS)
    assert equal(summed(agreement_for(CLIENTS, 3), inputs, before_reveal=silent), plain_sum(inputs, CLIENTS))


@pytest.mark.parametrize("silent", [d for n in range(1, 3) for d in itertools.combinations(CLIENTS, n)])
def test_clients_that_stop_before_sharing_take_no_part(silent: tuple[int, ...]) -> None:
    inputs = random_inputs(CLIENTS)
    rest = [own for own in CLIENTS if own not in silent]
    assert equal(summed(agreement_for(CLIENTS, 3), inputs, before_share=silent), plain_sum(inputs, rest))


def test_dropouts_at_every_stage_at_once() -> None:
    clients = range(9)
    inputs = random_inputs(clients)
    total = summed(agreement_for(clients, 5), inputs, before_share=[0], before_mask=[4, 8], before_reveal=[6])
    assert equal(total, plain_sum(inputs, [1, 2, 3, 5, 6, 7]))


@pytest.mark.parametrize("stage", ["before_share", "before_mask", "before_reveal"])
@pytest.mark.parametrize("dropped", list(itertools.combinations(CLIENTS, 3)))
def test_more_dropouts_than_the_threshold_allows_end_in_an_error(stage: str, dropped: tuple[int, ...]) -> None:
    with pytest.raises(SummationError, match="the threshold is 3"):
        summed(agreement_for(CLIENTS, 3), random_inputs(CLIENTS), **{stage: dropped})


def test_a_server_below_the_threshold_cannot_go_on_alone() -> None:
    """With shares of one client fewer than the threshold, unmasking is refused, and would give a wrong secret."""
    inputs = random_inputs(CLIENTS)
    parties = shared(agreement_for(CLIENTS, 3))
    replies = masked(parties, inputs)
    answers = dict(list(revealed(parties, replies).items())[:2])
    with pytest.raises(SummationError, match="2 clients revealed"):
        server.unmask(parties.agreement, parties.keys, replies, answers)
    lower = agreement_for(CLIENTS[:3], 2)
    with pytest.raises(SummationError):
        server.unmask(lower, parties.keys, replies, answers)

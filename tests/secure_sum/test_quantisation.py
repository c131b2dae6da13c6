"""A coordinate is off by at most half a step, and a sum never wraps."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.errors import UserError
from lorica.secure_sum.quantisation import dequantise, quantise
from lorica.secure_sum.setup import Setup, SummationError
from tests.secure_sum.parties import agreement_for, dyadic, random_inputs, setup_for, summed


def signed(word: int, bits: int) -> int:
    """Two's complement by its definition."""
    return word - 2**bits if word >= 2 ** (bits - 1) else word


@given(
    values=st.lists(st.floats(-3.0, 3.0) | st.sampled_from([1e30, -1e30]), max_size=20),
    clients=st.integers(2, 50),
    bits=st.sampled_from([32, 64]),
    bound=st.floats(1e-6, 2.0),
)
def test_a_coordinate_is_off_by_at_most_half_a_step(values: list[float], clients: int, bits: int, bound: float) -> None:
    setup = setup_for(clients, bits=bits, bound=bound)
    words = quantise(setup, {"x": torch.tensor(values, dtype=torch.float64)})
    for value, word in zip(values, words.tolist(), strict=True):
        clipped = Fraction(min(max(value, -bound), bound))
        assert abs(signed(word, bits) * Fraction(setup.step) - clipped) <= Fraction(setup.step) / 2


@pytest.mark.parametrize("bits", [32, 64])
def test_words_come_back_as_two_s_complement_times_the_step(bits: int) -> None:
    setup = setup_for(3, bits=bits)
    words = np.array([0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 7], dtype=setup.word)
    tensors = dequantise(setup, words, {"b": (2, 2), "a": (), "c": (1,)})
    expected = [float(np.float32(signed(int(word), bits) * Fraction(setup.step))) for word in words]
    assert tensors["a"].item() == expected[0]
    assert tensors["b"].flatten().tolist() == expected[1:5]
    assert tensors["c"].tolist() == expected[5:]


@pytest.mark.parametrize("clients", [2, 3, 1000, 65536])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("bound", [1.0, 0.1, 1 - 2.0**-53, 1 + 2.0**-52, 1 / 3, 2**31 / 3, 1e-30, 1e30])
def test_the_step_keeps_the_range_and_wastes_at_most_one_bit(clients: int, bits: int, bound: float) -> None:
    largest = clients * round(Fraction(bound) / Fraction(setup_for(clients, bits=bits, bound=bound).step))
    assert (1 - 2.0**-50) * 2 ** (bits - 2) - 2 * clients <= largest < 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("bound", [1.0, 0.75, 1 - 2.0**-53, 1e-30, 3e29])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_sum_at_the_bound_does_not_wrap(bits: int, bound: float, count: int) -> None:
    shares = dyadic(range(count))
    inputs = {own: {"x": torch.tensor([1e38, -1e38, bound / share])} for own, share in shares.items()}
    agreement = agreement_for(range(count), bits=bits, bound=bound, shapes={"x": (3,)})
    total = summed(agreement, inputs)["x"].double()
    assert torch.allclose(total, count * bound * torch.tensor([1.0, -1.0, 1.0]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_tensors_that_are_not_finite_are_refused_by_name_and_without_their_values(value: float) -> None:
    inputs = random_inputs(range(3))
    inputs[1]["b"][1, 1] = value
    with pytest.raises(SummationError, match=r"^secure summation: tensor b is not finite$"):
        summed(agreement_for(range(3)), inputs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("summation", ""),
        ("clients", 1),
        ("clients", 65537),
        ("threshold", 2),
        ("threshold", 6),
        ("bits", 16),
        ("bound", 0.0),
        ("bound", float("inf")),
        ("bound", float("nan")),
    ],
)
def test_terms_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    terms = {"summation": "s", "clients": 5, "threshold": 3, "bits": 32, "bound": 1.0} | {key: value}
    with pytest.raises(UserError) as refused:
        Setup(**terms)
    assert refused.value.key == key

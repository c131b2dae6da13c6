"""A masked input is uniform modulo 2^k, whatever the input: what the server sees of one client.

The randomness is the operating system's, so a test of significance fails by chance with its p-value, 1e-9.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lorica.secure_sum.messages import DIGEST_BYTES, pair_seed
from lorica.secure_sum.primitives import keystream, private_key, public_key
from lorica.secure_sum.quantisation import quantise
from lorica.secure_sum.setup import Setup
from tests.secure_sum.parties import agreement_for, masked, setup_for, shared

P_VALUE = 1e-9
COUNT = 100_000
INPUTS: dict[str, Tensor] = {
    "zeros": torch.zeros(COUNT),
    "at the bound": torch.full((COUNT,), 1.0),
    "beyond the bound": torch.full((COUNT,), -1e6),
    "noise": torch.randn(COUNT, generator=torch.Generator().manual_seed(0)) * 0.1,
}


def reply_words(setup: Setup, reply: bytes) -> np.ndarray:
    return np.frombuffer(reply, setup.word, offset=2 * DIGEST_BYTES)


def deviation(words: np.ndarray, place: int) -> float:
    """χ² of the byte at one place of each word against the uniform distribution, 255 degrees of freedom."""
    observed = np.bincount(words.view(np.uint8).reshape(len(words), -1)[:, place], minlength=256)
    return float(stats.chisquare(observed).statistic)


LIMIT = stats.chi2.isf(P_VALUE, 255)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", INPUTS)
def test_a_masked_input_is_uniform_whatever_the_input(name: str, bits: int) -> None:
    setup = setup_for(3, bits=bits)
    tensors = {"x": INPUTS[name]}
    # The same statistic finds every input at once when it is not masked.
    assert max(deviation(quantise(setup, tensors), place) for place in range(bits // 8)) > 10 * LIMIT
    parties = shared(agreement_for(range(3), bits=bits, shapes={"x": (COUNT,)}))
    for reply in masked(parties, dict.fromkeys(range(3), tensors)).values():
        words = reply_words(setup, reply)
        assert len(words) == COUNT
        assert all(deviation(words, place) < LIMIT for place in range(bits // 8))


@pytest.mark.parametrize("bits", [32, 64])
def test_masked_zeros_and_masked_large_values_have_one_distribution(bits: int) -> None:
    setup = setup_for(2, bits=bits)
    inputs = {0: {"x": INPUTS["zeros"]}, 1: {"x": INPUTS["at the bound"]}}
    plain = [quantise(setup, tensors).astype(np.float64) for tensors in inputs.values()]
    assert stats.ks_2samp(*plain).pvalue < P_VALUE
    replies = masked(shared(agreement_for(range(2), bits=bits, shapes={"x": (COUNT,)})), inputs)
    words = [reply_words(setup, reply).astype(np.float64) for reply in replies.values()]
    assert stats.ks_2samp(*words).pvalue > P_VALUE
    assert stats.pearsonr(*words).pvalue > P_VALUE


@pytest.mark.parametrize("known", ["self mask", "pairwise masks"])
def test_either_kind_of_mask_hides_the_input_alone(known: str) -> None:
    """For each client the server learns the seed of its self mask, or what gives its pairwise masks; never both."""
    agreement = agreement_for(range(2), shapes={"x": (COUNT,)})
    setup, parties = agreement.setup, shared(agreement)
    replies = masked(parties, {own: {"x": INPUTS["zeros"]} for own in range(2)})
    words = reply_words(setup, replies[0])
    self_mask = keystream(parties.states[0].seed, COUNT, setup.word)
    rest = words - self_mask if known == "self mask" else self_mask
    assert all(deviation(rest, place) < LIMIT for place in range(4))
    # The inputs are zeros: what is left of client 0 under its pairwise mask is minus what is left of client 1.
    other = reply_words(setup, replies[1]) - keystream(parties.states[1].seed, COUNT, setup.word)
    assert np.array_equal(words - self_mask, np.negative(other))


def test_each_pair_has_a_mask_of_its_own_whatever_keys_it_uses() -> None:
    """X25519 knows several spellings of one public key, so a check for equal bytes does not find a copied one."""
    agreement, private, public = agreement_for(range(3)), private_key(), public_key(private_key())
    other = public[:31] + bytes([public[31] ^ 0x80])
    assert pair_seed(agreement, 0, private, 1, public) != pair_seed(agreement, 0, private, 2, other)
    assert pair_seed(agreement, 0, private, 1, public) == pair_seed(agreement, 0, private, 1, other)


def test_two_summations_never_share_a_mask() -> None:
    agreement = agreement_for(range(2), shapes={"x": (COUNT,)})
    inputs = {own: {"x": INPUTS["zeros"]} for own in range(2)}
    one, two = (reply_words(agreement.setup, masked(shared(agreement), inputs)[0]) for _ in range(2))
    assert all(deviation(one - two, place) < LIMIT for place in range(4))

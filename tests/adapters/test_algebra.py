"""Factor-space algebra against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.algebra import (
    orthonormal,
    padded,
    product_svd,
    rotation_towards,
    stacked,
    truncated,
    truncated_dense,
    weighted_sum,
)
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, fold, leading, stack_pairs
from tests.models import adapted, batch


def pair(d_out: int, rank: int, d_in: int, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(d_out, rank, generator=draws), torch.randn(rank, d_in, generator=draws)


@given(
    d_out=st.integers(2, 24),
    d_in=st.integers(2, 24),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    kept=st.integers(1, 8),
    balanced=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_truncation_of_a_stack_is_the_truncated_svd_of_the_dense_sum(
    d_out: int, d_in: int, ranks: list[int], kept: int, balanced: bool, seed: int
) -> None:
    """Also where the ranks add up to more than the matrix has."""
    draws = torch.Generator().manual_seed(seed)
    pairs = [pair(d_out, rank, d_in, draws) for rank in ranks]
    weights = torch.rand(len(ranks), generator=draws)
    weights = (weights / weights.sum()).tolist()
    dense = sum(weight * b.double() @ a.double() for weight, (b, a) in zip(weights, pairs, strict=True))
    b, a = stacked(pairs, weights)
    torch.testing.assert_close((b @ a).double(), dense, rtol=1e-5, atol=1e-5)
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    q = min(len(s), product_svd((b, a))[1].numel())
    torch.testing.assert_close(product_svd((b, a))[1][:q], s[:q], rtol=1e-4, atol=1e-5)
    new_b, new_a = truncated((b, a), kept, balanced)
    assert new_b.shape == (d_out, kept)
    assert new_a.shape == (kept, d_in)
    best = (u[:, :kept] * s[:kept]) @ vt[:kept]
    # Nearly equal singular values leave the subspace open, never the error.
    assert float((dense - new_b.double() @ new_a.double()).norm()) <= float((dense - best).norm()) + 1e-4
    other_b, other_a = truncated_dense((b, a), kept)
    assert float((dense - other_b.double() @ other_a.double()).norm()) <= float((dense - best).norm()) + 1e-3


def test_where_the_singular_values_go() -> None:
    draws = torch.Generator().manual_seed(0)
    product = pair(9, 4, 7, draws)
    b, a = truncated(product, 3)
    torch.testing.assert_close(a @ a.T, torch.eye(3), rtol=1e-5, atol=1e-5)
    b, a = truncated(product, 3, balanced=True)
    s = product_svd(product)[1][:3].float()
    torch.testing.assert_close(b.T @ b, s.diag(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a @ a.T, s.diag(), rtol=1e-4, atol=1e-4)


def test_the_weight_of_a_stack_is_on_one_factor_only() -> None:
    ones = (torch.ones(2, 1), torch.ones(1, 2))
    b, a = stacked([ones, ones], [0.25, 0.75])
    torch.testing.assert_close(b @ a, torch.ones(2, 2))


def test_random_orthonormal_columns_are_uniform() -> None:
    """Orthonormal, and every entry has mean 0 and variance 1/rows, as under the Haar measure."""
    draws = np.random.default_rng(0)
    found = torch.stack([orthonormal(6, 3, draws) for _ in range(4000)])
    torch.testing.assert_close(found.transpose(1, 2) @ found, torch.eye(3).expand(4000, 3, 3), rtol=1e-4, atol=1e-5)
    assert found.mean(0).abs().max() < 5 / np.sqrt(6 * 4000)
    assert (found.square().mean(0) - 1 / 6).abs().max() < 0.02


@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation_is_scipys_and_never_a_reflection(mirrored: bool) -> None:
    draws = torch.Generator().manual_seed(1)
    value, reference = torch.randn(3, 30, generator=draws), torch.randn(3, 30, generator=draws)
    procrustes, _ = scipy.linalg.orthogonal_procrustes(value.double().T.numpy(), reference.double().T.numpy())
    if (np.linalg.det(procrustes) < 0) != mirrored:
        value = torch.diag(torch.tensor([1.0, 1.0, -1.0])) @ value
    found = rotation_towards(value, reference)
    expected = Rotation.align_vectors(reference.T.numpy(), value.T.numpy())[0].as_matrix().T
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert torch.linalg.det(found) > 0
    assert (found.T @ value.double() - reference).norm() < (value - reference).norm()


def test_no_rotation_where_it_is_not_unique() -> None:
    draws = torch.Generator().manual_seed(1)
    value, reference = torch.randn(4, 30, generator=draws), torch.randn(4, 30, generator=draws)
    reference[3] = reference[2]
    assert torch.equal(rotation_towards(value, reference), torch.eye(4).double())


def test_smaller_tensors_count_as_zeros_where_they_end() -> None:
    total = weighted_sum([(0.5, torch.ones(1, 3)), (0.25, torch.ones(2, 3))])
    torch.testing.assert_close(total, torch.tensor([[0.75] * 3, [0.25] * 3]))
    torch.testing.assert_close(padded(torch.ones(2), (4,)), torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_leading_ranks_are_rows_of_a_and_columns_of_b() -> None:
    value = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(leading("x.A", value, 2), value[:2])
    assert torch.equal(leading("x.B", value, 2), value[:, :2])
    assert torch.equal(leading("head.weight", value, 2), value)
    assert leading("x.A", value, None) is value


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_merged_increments_stay_the_sum_of_products_however_many(shape: tuple[int, int]) -> None:
    """Stacking is exact; past twice the ranks of a full matrix, folding keeps the product and bounds its rank."""
    site = Site("m", "m", shape[1], shape[0], 2, 1.0)
    state = AdapterState([site], {site.a: torch.zeros(2, shape[1]), site.b: torch.zeros(shape[0], 2)})
    draws = torch.Generator().manual_seed(0)
    total = torch.zeros(*shape, dtype=torch.float64)
    epochs = set()
    for _ in range(30):
        increment = pair(shape[0], 2, shape[1], draws)
        total += increment[0].double() @ increment[1].double()
        state.merge({"m": increment})
        b, a = state.merged["m"]
        torch.testing.assert_close((b @ a).double(), total, rtol=1e-4, atol=1e-4)
        assert b.shape[1] == a.shape[0] <= 10
        epochs.add(state.epoch)
    assert len(epochs) > 1


def test_folding_needs_no_more_than_the_smaller_side() -> None:
    draws = torch.Generator().manual_seed(2)
    for d_out, d_in in ((4, 9), (9, 4)):
        wide = stack_pairs(pair(d_out, 7, d_in, draws), pair(d_out, 6, d_in, draws))
        b, a = fold(wide)
        assert b.shape == (d_out, 4)
        torch.testing.assert_close(b @ a, wide[0] @ wide[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_merging_equals_a_dense_addition_to_the_weight(family: str) -> None:
    """GPT-2 keeps its weights transposed; released code of FedEx-LoRA got that wrong the other way round."""
    model, reference = adapted(family), adapted(family)
    draws = torch.Generator().manual_seed(3)
    merged = {site.name: pair(site.d_out, 3, site.d_in, draws) for site in model.sites}
    with torch.no_grad():
        for site in reference.sites:
            weight = _frozen(reference, site.name)
            product = site.scale * merged[site.name][0] @ merged[site.name][1]
            weight += product.T if family == "gpt2" else product
    examples = batch(family, 4).inputs
    model.merge(merged)
    with torch.inference_mode():
        expected = reference.peft_model(**examples).logits
        torch.testing.assert_close(model.peft_model(**examples).logits, expected)
        model.merge({})
        for site in model.sites:
            assert torch.equal(_frozen(model, site.name), _frozen(adapted(family), site.name))


def test_what_is_merged_depends_on_nothing_that_was_merged_before() -> None:
    """Bit for bit: W0 is added to once, from the original."""
    draws = torch.Generator().manual_seed(4)
    one, other = adapted("bert"), adapted("bert")
    increments = [{site.name: pair(site.d_out, 2, site.d_in, draws) for site in one.sites} for _ in range(3)]
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for increment in increments:
        sums = {name: stack_pairs(sums.get(name), value) for name, value in increment.items()}
        one.merge(sums)
    other.merge(sums)
    for site in one.sites:
        assert torch.equal(_frozen(one, site.name), _frozen(other, site.name))


def _frozen(model: AdaptedModel, name: str) -> torch.Tensor:
    return model.peft_model.base_model.model.get_submodule(name).get_base_layer().weight

from __future__ import annotations

import numpy as np
import pytest

from lorica.audit.attack import fit

DRAWS = np.random.default_rng(0)


def test_a_fit_is_that_of_least_squares() -> None:
    shares = 50 * DRAWS.standard_normal((20, 60))
    values = DRAWS.standard_normal(60) + shares[:7].sum(axis=0)
    found = fit(values, shares)
    expected, residual, rank, _ = np.linalg.lstsq(shares.T, values)
    assert found.visible.all()
    np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.square(found.deviations), np.diag(np.linalg.pinv(shares @ shares.T)), rtol=1e-9)
    assert found.energy == pytest.approx(residual[0])
    assert found.left == 60 - rank


@pytest.mark.parametrize("nearly", [0.0, 1e-7])
def test_shares_that_others_add_up_to_are_not_read(nearly: float) -> None:
    shares = 50 * DRAWS.standard_normal((20, 60))
    shares[3] = shares[8] - shares[11] + nearly * shares[3]
    shares[5] = 0.0
    values = DRAWS.standard_normal(60) + shares[[0, 3, 4]].sum(axis=0)
    found = fit(values, shares)
    assert set(np.flatnonzero(~found.visible)) == {3, 5, 8, 11}
    expected = np.linalg.lstsq(shares.T, values, rcond=1e-5)[0]
    np.testing.assert_allclose(found.values, expected[found.visible], rtol=1e-6, atol=1e-9)
    assert found.left == 60 - 18


def test_nothing_is_read_where_nothing_is_added() -> None:
    found = fit(np.ones(4), np.zeros((3, 4)))
    assert not found.visible.any()
    assert (found.energy, found.left) == (4.0, 4)

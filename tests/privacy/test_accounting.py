"""ε against a second accountant, closed forms and published numbers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    pld,
    rdp,
)
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from lorica.errors import UserError
from lorica.privacy import accounting, calibration
from lorica.privacy.accounting import (
    RDP_ORDERS,
    Steps,
    epsilon,
    epsilon_from_rdp,
    epsilon_rdp,
    epsilons_from_rdp,
    rdp_curve,
)
from lorica.privacy.calibration import calibrate
from tests.tiers import integration, slow

GRID = [
    (0.016, 0.8, 500, 1e-5),
    (0.012357, 0.94, 1000, 1e-5),
    (0.2666, 2.72, 60, 1e-4),
    (0.05, 1.5, 2000, 1e-6),
    (0.001, 0.6, 1000, 1e-5),
]
SOMETIMES = [GRID[2], *integration(GRID[4]), *slow(*GRID[:2], GRID[3])]


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), SOMETIMES)
@pytest.mark.filterwarnings("ignore")
def test_pld_equals_opacus_prv_and_stays_below_rdp(rate: float, sigma: float, steps: int, delta: float) -> None:
    ours = epsilon([Steps(rate, sigma, steps)], delta)
    prv = PRVAccountant()
    prv.history = [(sigma, rate, steps)]
    reference = prv.get_epsilon(delta, eps_error=0.005)
    assert ours == pytest.approx(reference, rel=0.01)
    assert ours <= epsilon_rdp([Steps(rate, sigma, steps)], delta)


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), SOMETIMES)
def test_zero_out_costs_no_less_than_add_or_remove(rate: float, sigma: float, steps: int, delta: float) -> None:
    """The stated relation is what is computed: by both of the library's accountants, for either relation."""
    event = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps)
    ours = epsilon([Steps(rate, sigma, steps)], delta)
    for relation in (NeighboringRelation.REPLACE_SPECIAL, NeighboringRelation.ADD_OR_REMOVE_ONE):
        tight = pld.PLDAccountant(relation).compose(event).get_epsilon(delta)
        loose = rdp.RdpAccountant(RDP_ORDERS, relation).compose(event).get_epsilon(delta)
        assert tight <= ours * (1 + 1e-9) <= loose
    assert accounting.NEIGHBOURS is NeighboringRelation.REPLACE_SPECIAL


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (3.0, 10), (20.0, 100)])
def test_without_subsampling_equals_the_closed_form(sigma: float, steps: int) -> None:
    """The Gaussian mechanism's exact privacy profile (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    mu = math.sqrt(steps) / sigma

    def delta_at(value: float) -> float:
        return norm.cdf(mu / 2 - value / mu) - math.exp(value) * norm.cdf(-mu / 2 - value / mu)

    exact = brentq(lambda value: delta_at(value) - 1e-5, 0, 200)
    assert epsilon([Steps(1.0, sigma, steps)], 1e-5) == pytest.approx(exact, rel=2e-3)
    assert epsilon([Steps(1.0, sigma, steps)], 1e-5) >= exact * (1 - 1e-6)


@pytest.mark.parametrize(("rate", "steps", "target", "delta"), [(0.016, 500, 3.0, 1e-5), (0.3, 60, 1.0, 1e-4)])
def test_calibrated_noise_meets_the_target_and_no_more(rate: float, steps: int, target: float, delta: float) -> None:
    sigma = calibrate(rate, steps, target, delta)
    assert epsilon([Steps(rate, sigma, steps)], delta) <= target
    assert epsilon([Steps(rate, sigma * 0.998, steps)], delta) > target
    assert calibrate(rate, steps, target, delta) == sigma


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The noise multipliers of which a loss distribution is computed from now on."""
    asked: list[float] = []
    compute = accounting.from_gaussian_mechanism

    def count(sigma: float, **options: Any) -> Any:
        asked.append(sigma)
        return compute(sigma, **options)

    monkeypatch.setattr(accounting, "from_gaussian_mechanism", count)
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path)
    accounting._epsilon.cache_clear()
    accounting._loss_distribution.cache_clear()
    return asked


@pytest.mark.parametrize(
    ("rate", "steps", "target", "delta"),
    [
        (0.1, 1000, 40.0, 1e-5),
        pytest.param(0.5, 100_000, 100.0, 1e-5, marks=pytest.mark.slow),
        (0.016, 500, 3.0, 1e-5),
        (0.3, 60, 0.01, 1e-12),
    ],
)
def test_a_calibration_computes_few_distributions_and_none_of_little_noise(
    noises: list[float], rate: float, steps: int, target: float, delta: float
) -> None:
    """Of a noise multiplier of 0.02 one alone takes a minute and gigabytes."""
    sigma = calibrate(rate, steps, target, delta)
    assert epsilon([Steps(rate, sigma, steps)], delta) <= target
    assert len(noises) <= 25
    assert min(noises) >= sigma / 4


@pytest.mark.integration
@pytest.mark.parametrize(("rate", "steps", "target", "delta"), [(0.01, 1, 100.0, 1e-5), (0.1, 1, 1.0, 0.49)])
def test_a_target_that_takes_no_noise_is_one_clear_error(
    noises: list[float], rate: float, steps: int, target: float, delta: float
) -> None:
    with pytest.raises(UserError, match=r"privacy\.epsilon = .* it allows a noise multiplier below 0\.2"):
        calibrate(rate, steps, target, delta)
    assert len(noises) <= 6
    assert min(noises) >= 0.2


def test_a_target_that_no_noise_meets_is_one_clear_error(noises: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_NOISE", 40.0)
    with pytest.raises(UserError, match=r"privacy\.epsilon = 0\.1: it requires a noise multiplier above"):
        calibrate(0.5, 1000, 0.1, 1e-5)
    assert len(noises) <= 3


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"), [(0.5, 0.5, 100_000), (1.0, 0.2, 10**6), (0.01, 1.0, 10**9), (0.1, 1e-3, 100)]
)
def test_what_costs_beyond_all_reason_is_bounded_without_a_distribution(
    noises: list[float], rate: float, sigma: float, steps: int
) -> None:
    assert epsilon([Steps(rate, sigma, steps)], 1e-5) == epsilon_rdp([Steps(rate, sigma, steps)], 1e-5) > 1000
    assert noises == []


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), [*GRID, (1.0, 0.3, 50, 0.1), (0.5, 0.5, 1000, 0.4)])
def test_the_least_epsilon_is_below_epsilon(rate: float, sigma: float, steps: int, delta: float) -> None:
    assert accounting._least_epsilon((Steps(rate, sigma, steps),)) <= epsilon([Steps(rate, sigma, steps)], delta)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 40.0])
def test_moments_of_the_gaussian_mechanisms_loss(sigma: float) -> None:
    """Normal with mean 1/(2σ²) and variance 1/σ² (Balle and Wang, arXiv 1805.06530, lemma 3)."""
    assert accounting._loss_moments(1.0, sigma) == pytest.approx((0.5 / sigma**2, 1 / sigma**2), rel=1e-6)


def test_the_known_value() -> None:
    """design/ecosystem.md, section 4: q = 64/4000, T = 500, δ = 1e-5 needs σ = 0.872 for ε = 3."""
    assert calibrate(64 / 4000, 500, 3.0, 1e-5) == pytest.approx(0.872, abs=0.002)


def test_composition_adds_up() -> None:
    halves = [Steps(0.02, 1.0, 250), Steps(0.02, 1.0, 250)]
    assert epsilon(halves, 1e-5) == epsilon([Steps(0.02, 1.0, 500)], 1e-5)
    mixed = [Steps(0.02, 1.0, 250), Steps(0.05, 2.0, 100)]
    parts = [epsilon([part], 1e-5) for part in mixed]
    assert max(parts) < epsilon(mixed, 1e-5) < sum(parts)
    assert epsilon(mixed, 1e-5) == epsilon(mixed[::-1], 1e-5)
    assert epsilon(mixed, 1e-5) <= epsilon_rdp(mixed, 1e-5)


def test_no_steps_are_free_and_no_noise_is_infinite() -> None:
    assert epsilon([], 1e-5) == 0.0
    assert epsilon_rdp([], 1e-5) == 0.0
    assert epsilon([Steps(0.1, 1.0, 0)], 1e-5) == 0.0
    assert epsilon([Steps(0.1, 0.0, 1)], 1e-5) == math.inf
    assert epsilon_rdp([Steps(0.1, 0.0, 1)], 1e-5) == math.inf


@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.3])
def test_many_curves_at_once_give_what_dp_accounting_gives_for_each(delta: float) -> None:
    steps = [Steps(q, sigma, count) for q in (0.01, 0.3, 1.0) for sigma in (0.4, 1.0, 20.0) for count in (1, 500)]
    curves = np.stack(
        [rdp_curve(step) for step in steps] + [np.zeros(len(RDP_ORDERS)), np.full(len(RDP_ORDERS), np.inf)]
    )
    single = [epsilon_from_rdp(curve, delta) for curve in curves]
    assert epsilons_from_rdp(curves, delta).tolist() == pytest.approx(single, rel=1e-9)

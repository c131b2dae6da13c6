"""Noise for many sampling rates at the cost of a few."""

from __future__ import annotations

import math

import pytest

from lorica.errors import UserError
from lorica.privacy import calibration
from lorica.privacy.accounting import Steps, epsilon
from lorica.privacy.calibration import CALIBRATION_TOLERANCE, calibrate, calibrate_many
from lorica.privacy.plan import MOST_CALIBRATED
from tests.tiers import integration


def margin(rate: float, steps: int, target: float, delta: float) -> float:
    """How far the interpolated noise multiplier is above the exact one, relatively."""
    sigma = calibrate_many(rate, steps, target, delta)
    assert epsilon([Steps(rate, sigma, steps)], delta) <= target
    exact = calibrate(rate, steps, target, delta)
    # The exact search itself may end so far above the least noise.
    return (sigma + CALIBRATION_TOLERANCE - exact) / exact


@pytest.mark.parametrize("rate", [0.6, *integration(0.11, 0.021)])
def test_interpolated_noise_meets_the_target_and_is_hardly_more(rate: float) -> None:
    assert 0 <= margin(rate, 40, 8.0, 1e-5) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "target", "delta"), [(40, 8.0, 1e-5), (800, 3.0, 1e-5), (8, 8.0, 1e-3), (40, 1.0, 1e-5)]
)
def test_no_interpolated_noise_is_below_the_exact_one(steps: int, target: float, delta: float) -> None:
    """Halfway between two nodes, for a high, a middle and a low sampling rate."""
    for place in (2, 12, 24):
        assert 0 <= margin(2.0 ** -((place + 0.5) / 4), steps, target, delta) < 2e-3


def test_many_rates_cost_few_calibrations(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[float] = []

    def counted(rate: float, *terms: float) -> float:
        nodes.append(rate)
        return 1.0 + rate

    calibration._calibrated_at.cache_clear()
    monkeypatch.setattr(calibration, "calibrate", counted)
    for records in range(100, 400):
        calibrate_many(10 / records, 77, 8.0, 1e-5)
    assert len(set(nodes)) <= 8
    calibration._calibrated_at.cache_clear()


def test_where_a_node_has_no_noise_the_exact_search_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def only(rate: float, *terms: float) -> float:
        if rate < 0.1:
            raise UserError("privacy.epsilon", 50.0, "too little noise", "lower it")
        return 0.25

    calibration._calibrated_at.cache_clear()
    monkeypatch.setattr(calibration, "calibrate", only)
    assert calibrate_many(0.15, 78, 8.0, 1e-5) == 0.25
    with pytest.raises(UserError, match="too little noise"):
        calibrate_many(0.05, 78, 8.0, 1e-5)
    calibration._calibrated_at.cache_clear()


@pytest.mark.integration
def test_few_clients_are_calibrated_one_by_one() -> None:
    assert MOST_CALIBRATED >= 10
    assert math.isclose(calibrate(0.11, 40, 8.0, 1e-5), calibrate_many(0.11, 40, 8.0, 1e-5), rel_tol=2e-3)

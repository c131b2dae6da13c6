"""What an owner agrees to, and what it refuses."""

import math
from dataclasses import replace

import pytest

from lorica.config import PrivacyConfig
from lorica.errors import UserError
from lorica.privacy.accounting import Steps, epsilon
from lorica.privacy.plan import Refused, plan_client

PRIVACY = PrivacyConfig(epsilon=2.0, delta=1e-5)


def test_rate_is_exact_and_noise_covers_every_step() -> None:
    plan = plan_client(0, 1000, 96, 40, PRIVACY)
    assert plan.terms.sampling_rate == 96 / 1000
    assert plan.terms.noise_std == plan.terms.noise_multiplier * 2.0 / 96
    assert 1.99 < plan.epsilon() <= 2.0
    assert plan.epsilon() == epsilon([Steps(0.096, plan.terms.noise_multiplier, 40)], 1e-5)
    assert plan.epsilon(20) < plan.epsilon()
    assert plan.epsilon_rdp() >= plan.epsilon()


def test_a_fixed_multiplier_gives_its_epsilon() -> None:
    privacy = PrivacyConfig(epsilon=None, noise_multiplier=0.8, delta=1e-5)
    assert plan_client(0, 4000, 64, 500, privacy).epsilon() == pytest.approx(3.749, abs=0.01)


def test_without_privacy_epsilon_is_infinite() -> None:
    for clip_norm, norm in ((2.0, 2.0), (None, math.inf)):
        plan = plan_client(0, 100, 10, 5, PrivacyConfig(noise="none", clip_norm=clip_norm))
        assert plan.epsilon() == plan.epsilon_rdp() == math.inf
        assert plan.noise == "none"
        assert plan.terms.noise_std == 0.0
        assert plan.terms.clip_norm == norm
        assert not plan.terms.private


def test_a_delta_that_means_nothing_is_refused_unless_the_noise_protects_nothing_anyway() -> None:
    with pytest.raises(
        UserError, match=r"privacy\.delta = 0\.01: not below 1/100, .* records of client 3: .* Choose at most 1e-03"
    ):
        plan_client(3, 100, 10, 5, PrivacyConfig(epsilon=2.0, delta=0.01))
    chosen = {"epsilon": None, "noise_multiplier": 1.0}
    assert not plan_client(3, 101, 10, 5, PrivacyConfig(**chosen, delta=0.0099)).void_delta
    assert plan_client(3, 100, 10, 5, PrivacyConfig(**chosen, delta=0.01, noise="reproducible")).void_delta
    assert not plan_client(3, 100, 10, 5, PrivacyConfig(noise="none")).void_delta


def test_batches_above_the_records_are_refused() -> None:
    with pytest.raises(UserError, match=r"federation\.batch_size = 128: client 3 has only 100 records"):
        plan_client(3, 100, 128, 5, PRIVACY)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.0},
        {"clip_norm": 1e6},
        {"sampling_rate": 1.0},
        {"batch_size": 1},
        {"noise_multiplier": 0.1},
    ],
)
def test_other_terms_than_agreed_are_refused(change: dict[str, float]) -> None:
    plan = plan_client(0, 1000, 100, 40, PRIVACY)
    plan.check(plan.terms, 40)
    with pytest.raises(Refused, match="agreed"):
        plan.check(replace(plan.terms, **change), 1)


def test_more_steps_than_agreed_are_refused() -> None:
    plan = plan_client(0, 1000, 100, 40, PRIVACY)
    with pytest.raises(Refused, match="41 steps"):
        plan.check(plan.terms, 41)

"""Lower bounds on ε: against closed forms, another implementation, and mechanisms whose ε is known."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from lorica.audit.estimators import (
    Guesses,
    Scores,
    best_plans,
    fdp_bound,
    fdp_refutes,
    fdp_refutes_any,
    one_run_bound,
    one_run_p_value,
    one_run_p_value_of,
    plans_of,
    trade_off_inverse,
)
from lorica.privacy.accounting import Steps, epsilon
from tests.scripts import load_script

DELTA = 1e-5


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """jax_privacy's auditing module, without its package, which imports JAX."""
    package = importlib.util.find_spec("jax_privacy")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps jax-privacy==2.0.0")
    return load_script(Path(package.origin).with_name("auditing.py"))


def normal_scores(shift: float, each: int) -> Scores:
    """The quantiles of N(shift, 1) for included canaries, and of N(0, 1) for as many others."""
    quantiles = stats.norm.ppf((np.arange(each) + 0.5) / each)
    return Scores(np.concatenate([quantiles + shift, quantiles]), np.arange(2 * each) < each)


def test_without_delta_the_p_value_is_binomial() -> None:
    """e^ε/(1 + e^ε) = 3/4 at ε = log 3: all of 10 guesses are right with probability (3/4)^10."""
    assert one_run_p_value(100, Guesses(10, 10), math.log(3), 0.0) == pytest.approx(0.75**10)
    assert one_run_p_value(100, Guesses(10, 9), math.log(3), 0.0) == pytest.approx(0.75**10 + 10 * 0.75**9 * 0.25)


@pytest.mark.parametrize("canaries", [10, 1000])
@pytest.mark.parametrize("made", [1, 10])
@pytest.mark.parametrize("wrong", [0, 1, 7])
@pytest.mark.parametrize("claimed", [0.0, 1.0])
@pytest.mark.parametrize("delta", [1e-6, 1e-2, 0.5])
def test_the_p_value_is_that_of_the_theorem(canaries: int, made: int, wrong: int, claimed: float, delta: float) -> None:
    """Steinke et al., Theorem 5.2, summed term by term."""
    if wrong > made:
        return
    correct, law = made - wrong, stats.binom(made, 1 / (1 + math.exp(-claimed)))
    beta = sum(law.pmf(k) for k in range(correct, made + 1))
    alphas = [sum(law.pmf(correct - j) for j in range(1, i + 1)) / i for i in range(1, correct + 1)]
    expected = min(1.0, beta + 2 * canaries * delta * max(alphas, default=0.0))
    assert one_run_p_value(canaries, Guesses(made, correct), claimed, delta) == pytest.approx(expected, abs=1e-12)


def test_p_values_and_refutations_are_those_of_jax_privacy(reference: ModuleType) -> None:
    for made, correct in [(20, 20), (50, 41), (200, 150), (400, 231)]:
        guesses = Guesses(made, correct)
        for claimed in (0.2, 1.0, 3.0):
            expected = reference._one_run_p_value(1000, made, correct, claimed, DELTA)
            assert one_run_p_value(1000, guesses, claimed, DELTA) == pytest.approx(expected, abs=1e-12)
        bound = reference._epsilon_one_run_fdp(0.0, 1000, made, correct, 0.05, DELTA)
        for factor, refuted in ((0.98, True), (1.02, False)):
            sigma = reference.dp_accounting.get_sigma_gaussian(factor * bound, DELTA)
            assert fdp_refutes(1000, guesses, trade_off_inverse(Steps(1.0, sigma, 1)), 0.05) == refuted


@pytest.mark.parametrize(
    ("shift", "one_run", "fdp"), [(0.0, 0.0, 0.0), (1.0, 1.13346, 2.164749), (2.0, 2.311945, 4.7218075)]
)
def test_bounds_reach_the_published_examples(shift: float, one_run: float, fdp: float) -> None:
    """jax_privacy's tests (auditing_test.py, test_epsilon_one_run_close), which guesses "included" only.

    Guesses of both kinds give more, and never more than the true ε of the Gaussian mechanism.
    """
    scores, delta = normal_scores(shift, 10_000), 1e-6
    true = epsilon([Steps(1.0, 1 / shift, 1)], delta) if shift else 1e-9
    found, from_trade_off = one_run_bound(scores, delta), fdp_bound(scores, Steps(1.0, 1.0, 1), delta)
    assert one_run <= found + 1e-3
    assert fdp <= from_trade_off * 1.02
    assert max(found, from_trade_off) <= true


@pytest.mark.parametrize(
    ("claimed", "canaries", "one_run", "fdp"),
    [(1.0, 4000, 0.32, 0.0), (3.0, 4000, 1.24, 0.0), (8.0, 4000, 2.91, 0.0), (1.0, 15_000, 0.0, 0.57)],
)
def test_bounds_reach_those_of_another_implementation(
    claimed: float, canaries: int, one_run: float, fdp: float
) -> None:
    """One step of the Gaussian mechanism on all canaries at δ = 1e-5, without the chance of a run."""
    sigma = brentq(lambda s: epsilon([Steps(1.0, s, 1)], DELTA) - claimed, 0.3, 20)
    steps, scores = Steps(1.0, sigma, 1), normal_scores(1 / sigma, canaries // 2)
    for_one_run, for_fdp = best_plans(canaries, steps, DELTA)
    found, from_trade_off = one_run_bound(scores, DELTA, for_one_run), fdp_bound(scores, steps, DELTA, for_fdp)
    assert one_run <= found <= claimed
    assert fdp <= from_trade_off <= claimed


def test_the_best_plan_is_found_on_the_claimed_mechanism() -> None:
    """Of a sampled mechanism, canaries are guessed to be included only."""
    whole, _ = best_plans(1000, Steps(1.0, 1.4, 1), DELTA)
    sampled, _ = best_plans(1000, Steps(0.5, 1.4, 1), DELTA)
    assert whole.low in (whole.high, whole.high - 1)
    assert sampled.low == 0
    assert whole.made < 500


def test_a_correct_claim_is_refuted_no_more_often_than_promised() -> None:
    """Coins and scores of 600 Gaussian mechanisms, at a significance of 20 %."""
    draws, steps, runs = np.random.default_rng(0), Steps(1.0, 0.7, 1), 600
    true = epsilon([steps], DELTA)
    for_one_run, for_fdp = best_plans(100, steps, DELTA)
    one_run = fdp = 0
    for _ in range(runs):
        included = draws.random(100) < 0.5
        scores = Scores(included / steps.noise_multiplier + draws.standard_normal(100), included)
        one_run += one_run_p_value_of(scores, true, DELTA, for_one_run) < 0.2
        fdp += fdp_refutes_any(scores, trade_off_inverse(steps), 0.2, for_fdp)
    limit = stats.binom(runs, 0.2).isf(1e-4)
    assert one_run < limit
    assert fdp < limit


def test_a_claim_far_too_small_is_refuted() -> None:
    scores = normal_scores(3.0, 500)
    assert one_run_p_value_of(scores, 0.5, DELTA) < 1e-3
    assert one_run_p_value_of(scores, 0.5, 0.0) < 1e-9
    assert fdp_refutes_any(scores, trade_off_inverse(Steps(1.0, 3.0, 1)), 1e-9)


def test_the_trade_off_of_sampled_steps_is_that_of_the_best_test() -> None:
    """One step with q = 1/2: the type II errors of thresholds, by the densities N(0, σ²) and its mixture with N(1, σ²).

    Symmetric under exchange of the two, and above the Gaussian trade-off of a record that is in every batch.
    """
    sigma, rate = 0.8, 0.5
    inverse, whole = trade_off_inverse(Steps(rate, sigma, 1)), trade_off_inverse(Steps(1.0, sigma, 1))
    for threshold in np.linspace(-1, 3, 9):
        alpha = stats.norm.sf(threshold, 0, sigma)
        beta = (1 - rate) * stats.norm.cdf(threshold, 0, sigma) + rate * stats.norm.cdf(threshold, 1, sigma)
        found = inverse(1 - alpha)
        assert found <= beta + 1e-6
        assert found >= whole(1 - alpha) - 1e-3
    # The lower envelope of both directions is reached where the densities' ratio is steepest.
    alpha = stats.norm.sf(1.5, 0, sigma)
    beta = (1 - rate) * stats.norm.cdf(1.5, 0, sigma) + rate * stats.norm.cdf(1.5, 1, sigma)
    assert inverse(1 - alpha) == pytest.approx(beta, abs=5e-3)


def test_auc_and_tpr_are_those_of_normal_scores(reference: ModuleType) -> None:
    """AUC = Φ(μ/√2), TPR at FPR a = Φ(μ + Φ⁻¹(a))."""
    scores = normal_scores(1.5, 5000)
    assert scores.auc() == pytest.approx(stats.norm.cdf(1.5 / math.sqrt(2)), abs=1e-3)
    assert scores.tpr_at_fpr(0.01) == pytest.approx(stats.norm.cdf(1.5 + stats.norm.ppf(0.01)), abs=5e-3)
    other = reference.CanaryScoreAuditor(scores.values[scores.included], scores.values[~scores.included])
    assert scores.auc() == pytest.approx(other.attack_auroc(), abs=1e-3)
    assert scores.tpr_at_fpr(0.01) == pytest.approx(other.tpr_at_given_fpr(0.01), abs=2e-3)


def test_scores_of_one_kind_say_nothing() -> None:
    scores = Scores(np.arange(50.0), np.ones(50, dtype=bool))
    assert (scores.auc(), scores.tpr_at_fpr()) == (0.5, 0.0)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("canaries", [128, 288, 1024])
def test_an_attack_that_is_always_right_has_power_however_the_coins_fall(canaries: int, sampled: bool) -> None:
    """By three standard deviations more or fewer than half."""
    for included in (-3, 3):
        count = round(canaries / 2 + included * math.sqrt(canaries) / 2)
        scores = Scores(np.arange(canaries), np.arange(canaries) >= canaries - count)
        plan = plans_of(canaries, sampled)[0]
        assert scores.guess(plan).correct == plan.made
        assert one_run_bound(scores, 1e-5, plan) > (2.5 if sampled else 3)

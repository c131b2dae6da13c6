"""Lower bounds on ε from the scores of canaries, each of which was included or not by a fair coin.

An attack gives every canary a score; the canaries with the highest scores are guessed to be included, those with the
lowest to be left out, and the rest is not guessed. The bounds hold for any attack: a better one gives a larger bound.

jax_privacy's auditing module has these estimators too, for guesses "included" only. It cannot be installed without
JAX, so it is not a dependency; the tests compare with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import bdtrc, expit, ndtr, ndtri
from sklearn.metrics import roc_auc_score, roc_curve

from lorica.privacy.accounting import LEAST_NOISE, Steps, delta_curve, epsilon

CONFIDENCE = 0.95
LARGEST_EPSILON = 50.0
# Fewer guesses cannot say anything: five correct ones happen by chance with probability 1/32.
FEWEST_GUESSES = 8
Inverse = Callable[[float], float]
"""`x -> f(1 - x)` of a symmetric trade-off function `f`."""


@dataclass(frozen=True)
class Guesses:
    """The number of guesses, and how many of them were correct."""

    made: int
    correct: int


@dataclass(frozen=True)
class Plan:
    """Which canaries are guessed; fixed before their scores are known.

    Attributes:
        high: number of canaries with the highest scores, which are guessed to be included.
        low: number of those with the lowest scores, which are guessed to be left out.
    """

    high: int
    low: int

    @property
    def made(self) -> int:
        return self.high + self.low


@dataclass(frozen=True)
class Scores:
    """Scores of canaries, and the coins that an attack must guess.

    Attributes:
        values: (m,), higher for canaries that seem to be included.
        included: (m,) bool, the result of each canary's fair coin.
    """

    values: np.ndarray
    included: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def guess(self, plan: Plan) -> Guesses:
        """The result of guessing according to a plan."""
        coins = self.included[np.argsort(self.values, kind="stable")]
        return Guesses(plan.made, int(coins[len(coins) - plan.high :].sum() + (~coins[: plan.low]).sum()))

    def weighted(self, best: Plan | None) -> list[tuple[Guesses, float]]:
        """The results of several plans, each with its part of the significance (Bonferroni).

        Nine tenths are for the plan that is best if the claim is tight, the rest for plans of all sizes.
        """
        plans = [*plans_of(len(self), sampled=False), *plans_of(len(self), sampled=True)]
        rest = 1.0 if best is None else 0.1
        parts = [(self.guess(plan), rest / len(plans)) for plan in plans]
        return parts if best is None else [(self.guess(best), 1 - rest), *parts]

    def auc(self) -> float:
        """Area under the ROC curve of "included"; 1/2 if all coins fell alike."""
        return float(roc_auc_score(self.included, self.values)) if len(set(self.included.tolist())) == 2 else 0.5

    def tpr_at_fpr(self, fpr: float = 0.01) -> float:
        """The largest true positive rate of a threshold with at most this false positive rate."""
        if len(set(self.included.tolist())) < 2:
            return 0.0
        false, true, _ = roc_curve(self.included, self.values, drop_intermediate=False)
        return float(true[false <= fpr].max())


def plans_of(canaries: int, sampled: bool) -> list[Plan]:
    """Plans for nine tenths of the canaries or fewer, half of that, a quarter and so on, down to `FEWEST_GUESSES`.

    Args:
        sampled: guess "included" only, for at most half of the canaries. A canary that was in no batch looks like one
            that was left out; one that was in a batch does not.
    """
    # Not all of them: coins hardly ever include exactly one half, but seldom miss it by four standard deviations.
    imbalance = round(4 * math.sqrt(canaries))
    most = min(9 * canaries // 10, max(canaries // 2, canaries - imbalance))
    made, plans = most, []
    while made >= FEWEST_GUESSES:
        if not sampled:
            plans.append(Plan(made - made // 2, made // 2))
        elif 2 * made <= most:
            plans.append(Plan(made, 0))
        made //= 2
    return plans


@lru_cache(maxsize=256)
def best_plans(canaries: int, steps: Steps, delta: float) -> tuple[Plan, Plan]:
    """The plans for the one-run and for the f-DP bound that are best if the claim is tight.

    A threshold with false positive rate `a` and true positive rate `1 - f(a)` guesses `a + 1 - f(a)` of the canaries on
    one side. For the one-run bound, the plan with the largest bound on what is expected of it; for f-DP, the one that
    refutes 1.4 times the claimed noise most clearly.
    """
    inverse = trade_off_inverse(steps)
    weaker = trade_off_inverse(Steps(steps.sampling_rate, 1.4 * steps.noise_multiplier, steps.count))
    expected = []
    for plan in plans_of(canaries, sampled=steps.sampling_rate < 1):
        share = 2 * plan.high / canaries
        false = float(brentq(lambda a, share=share: a + 1 - inverse(1 - a) - share, 0.0, 1.0))
        expected.append((plan, Guesses(plan.made, round(plan.made * (1 - false / share)))))

    def one_run_bound_of(guesses: Guesses) -> float:
        return _largest_refuted(lambda claimed: one_run_p_value(canaries, guesses, claimed, delta), 1 - CONFIDENCE)

    one_run = max(expected, key=lambda one: one_run_bound_of(one[1]))
    fdp = min(expected, key=lambda one: _fdp_significance(canaries, one[1], weaker))
    return one_run[0], fdp[0]


def _fdp_significance(canaries: int, guesses: Guesses, inverse: Inverse) -> float:
    """The logarithm of the smallest significance at which a mechanism is still refuted; 0 if it never is."""
    low, high = -100.0, 0.0
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (low, middle) if fdp_refutes(canaries, guesses, inverse, math.exp(middle)) else (middle, high)
    return high


def one_run_p_value(canaries: int, guesses: Guesses, claimed: float, delta: float) -> float:
    """The probability that an (ε, δ)-DP mechanism lets an attack guess so well, at most.

    `β + 2mδ max_i (P[W ≥ v - i] - β)/i` with `W ~ Binomial(r, e^ε/(1 + e^ε))` and `β = P[W ≥ v]`, for `v` correct ones
    of `r` guesses about `m` canaries. Steinke, Nasr and Jagielski, arXiv 2305.08846, Theorem 5.2.

    Args:
        canaries: `m`, guessed or not.
        claimed: `ε`.
    """
    # P[W > k] for k = -1, …, v - 1; fifty times as fast as `scipy.stats.binom`.
    tail = np.append(1.0, bdtrc(np.arange(guesses.correct), guesses.made, expit(claimed)))
    beta = float(tail[-1])
    if delta == 0 or guesses.correct == 0:
        return beta
    alpha = float(np.max((tail[-2::-1] - beta) / np.arange(1, guesses.correct + 1), initial=0.0))
    return min(beta + 2 * canaries * delta * alpha, 1.0)


def one_run_p_value_of(scores: Scores, claimed: float, delta: float, best: Plan | None = None) -> float:
    """The smallest p-value of several plans, corrected for their number."""
    p_values = [one_run_p_value(len(scores), one, claimed, delta) / part for one, part in scores.weighted(best)]
    return min([1.0, *p_values])


def one_run_bound(scores: Scores, delta: float, best: Plan | None = None, confidence: float = CONFIDENCE) -> float:
    """The largest ε that is refuted at this confidence; 0 if none is.

    >>> scores = Scores(np.arange(1000.0), np.arange(1000) >= 500)
    >>> round(one_run_bound(scores, delta=1e-5), 1)
    4.9
    """
    return _largest_refuted(lambda claimed: one_run_p_value_of(scores, claimed, delta, best), 1 - confidence)


def _largest_refuted(p_value: Callable[[float], float], significance: float) -> float:
    """The largest ε whose p-value is below the significance; 0 if that of 0 is not."""
    if p_value(0.0) >= significance:
        return 0.0
    if p_value(LARGEST_EPSILON) < significance:
        return LARGEST_EPSILON
    return float(brentq(lambda claimed: p_value(claimed) - significance, 0.0, LARGEST_EPSILON, xtol=1e-4))


def fdp_refutes(canaries: int, guesses: Guesses, inverse: Inverse, significance: float) -> bool:
    """Whether a mechanism with this trade-off function guesses so well with a probability below `significance`.

    The recursion over the tail of the number of correct guesses of Mahloujifar, Melis and Chaudhuri, arXiv 2410.22235,
    Algorithm 3 (`rh_with_cap`), for canaries with two states.

    Args:
        inverse: `x -> f(1 - x)`, for the symmetric trade-off function `f` of one canary.
    """
    made, correct = guesses.made, guesses.correct
    r, h = significance * correct / canaries, significance * (made - correct) / canaries
    for left in range(correct - 1, -1, -1):
        higher = max(h, inverse(r))
        if higher == h:
            # Then neither changes any more.
            break
        r, h = min(r + left / (made - left) * (higher - h), 1.0), higher
    return r + h > made / canaries


def fdp_refutes_any(scores: Scores, inverse: Inverse, significance: float, best: Plan | None = None) -> bool:
    """`fdp_refutes` by any of several plans, corrected for their number."""
    weighted = scores.weighted(best)
    return any(fdp_refutes(len(scores), one, inverse, significance * part) for one, part in weighted)


def fdp_bound(
    scores: Scores, claimed: Steps, delta: float, best: Plan | None = None, confidence: float = CONFIDENCE
) -> float:
    """The ε of the largest noise multiplier that is refuted, with sampling rate and steps as claimed; 0 if none is.

    The trade-off function of the claimed mechanism says more than its (ε, δ), so this bound is larger than that of
    `one_run_bound`. It relies on the kind of mechanism, Gaussian noise on Poisson batches. Noise multipliers of a
    claim's multiple between 1/16 and 16 are tried, but none below that of `LEAST_NOISE`.
    """

    def refuted(logarithm: float) -> bool:
        steps = Steps(claimed.sampling_rate, claimed.noise_multiplier * math.exp(logarithm), claimed.count)
        return fdp_refutes_any(scores, trade_off_inverse(steps), 1 - confidence, best)

    low, high = max(-math.log(16), math.log(LEAST_NOISE / claimed.noise_multiplier)), math.log(16)
    if not refuted(high):
        return 0.0
    if refuted(low):
        high = low
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return epsilon([Steps(claimed.sampling_rate, claimed.noise_multiplier * math.exp(high), claimed.count)], delta)


@lru_cache(maxsize=256)
def trade_off_inverse(steps: Steps) -> Inverse:
    """`x -> f(1 - x)` of the steps' trade-off function `f`, the least type II error of a test with a type I error.

    If every record is in every batch, `f(a) = Φ(Φ⁻¹(1 - a) - √T/σ)`: Dong, Roth and Su, arXiv 1905.02383. Otherwise
    `f(a) = max_ε max(1 - δ(ε) - e^ε a, e^-ε (1 - δ(ε) - a), 0)` over a grid of ε, with `δ(ε)` by privacy loss
    distributions; their Proposition 2.13. A grid gives a smaller `f`, and so a smaller bound.
    """
    if steps.sampling_rate == 1:
        mean = math.sqrt(steps.count) / steps.noise_multiplier
        return lambda x: float(ndtr(ndtri(x) - mean))
    grid = np.concatenate([np.linspace(0, 2, 81), np.linspace(2.1, 12, 100)])
    rest, factor = 1 - delta_curve([steps], grid), np.exp(grid)

    def inverse(x: float) -> float:
        alpha = 1 - x
        return float(max(np.max(rest - factor * alpha), np.max((rest - alpha) / factor), 0.0))

    return inverse

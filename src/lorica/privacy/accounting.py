"""Privacy accounting: the ε of releases. PLD by dp-accounting, with RDP as a cross-check.

Neighbouring data sets (`NEIGHBOURS`): one record of one client contributes zero to every sum instead of its clipped
gradient. Both have the same number n of records, so n and what follows from it (q = b/n, σ) are public. Kairouz et al.,
arXiv 2103.00039, definition 1.1. Adding or removing a record would also change n, q and σ.

Clients hold disjoint records, so the ε of a federation is the maximum over its clients, not their sum. Choosing the
trained tensors from earlier releases is adaptive composition at fixed (q, σ) and costs nothing extra.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, reduce
from importlib.metadata import version

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation, rdp
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism

# Pessimistic rounding on this grid overstates ε by less than 0.1 % and is ten times faster than the default grid.
DISCRETIZATION = 1e-3
# Integer orders only: fractional orders converge slowly at high sampling rates, and dp-accounting then drops them.
RDP_ORDERS = [*range(2, 65), 80, 96, 128, 192, 256, 512, 1024]
# With less noise, or beyond these limits, computing a loss distribution takes gigabytes or minutes.
LEAST_NOISE = 0.2
MOST_STEPS, MOST_EPSILON = 10**6, 1000.0
ACCOUNTANT = f"dp-accounting {version('dp-accounting')} PLD"
NEIGHBOURS = NeighboringRelation.REPLACE_SPECIAL


@dataclass(frozen=True)
class Steps:
    """`count` steps of the Poisson-subsampled Gaussian mechanism with rate `q` and noise multiplier `σ`."""

    sampling_rate: float
    noise_multiplier: float
    count: int


def epsilon(steps: Iterable[Steps], delta: float) -> float:
    """The ε of a composition at `delta` < 1/2, by privacy loss distributions (an upper bound, tight to about 0.1 %).

    Zero for no steps; infinite for a noise multiplier of 0. If ε is certainly above 1000, a noise multiplier is below
    0.2, or there are more than a million steps, the looser `epsilon_rdp` is returned, which takes milliseconds. Koskela
    et al., arXiv 1906.03049; Doroshenko et al., arXiv 2207.04380 (connect-the-dots).

    >>> round(epsilon([Steps(sampling_rate=0.01, noise_multiplier=1.0, count=1000)], delta=1e-5), 2)
    1.83
    """
    return _epsilon(merged_steps(steps), delta)


def epsilon_rdp(steps: Iterable[Steps], delta: float) -> float:
    """The ε of a composition at `delta` by Rényi differential privacy: a looser bound, as an independent check.

    Mironov et al., arXiv 1908.10530, for the sampled Gaussian; Canonne et al., arXiv 2004.00010, for the conversion.

    >>> round(epsilon_rdp([Steps(sampling_rate=0.01, noise_multiplier=1.0, count=1000)], delta=1e-5), 2)
    2.11
    """
    return epsilon_from_rdp(total_rdp(steps), delta)


def delta_curve(steps: Iterable[Steps], epsilons: np.ndarray) -> np.ndarray:
    """The δ of a composition at each ε, by privacy loss distributions: an upper bound, as `epsilon`.

    >>> delta_curve([Steps(sampling_rate=1.0, noise_multiplier=1.0, count=1)], np.array([1.0])).round(3)
    array([0.127])
    """
    return np.asarray(_composed(merged_steps(steps)).get_delta_for_epsilon(epsilons))


def epsilon_above(limit: float, steps: Iterable[Steps], delta: float) -> float | None:
    """`epsilon` if it is above `limit`, else None.

    RDP bounds ε in about 20 ms for each kind of step. PLD is several times slower and is computed only if that bound
    exceeds the limit.
    """
    steps = list(steps)
    if epsilon_rdp(steps, delta) <= limit:
        return None
    exact = epsilon(steps, delta)
    return exact if exact > limit else None


def rdp_curve(steps: Steps) -> np.ndarray:
    """Rényi divergence bound at each of `RDP_ORDERS`, `(orders,)`."""
    if steps.noise_multiplier == 0:
        return np.full(len(RDP_ORDERS), np.inf)
    return steps.count * _rdp_of_one_step(steps.sampling_rate, steps.noise_multiplier)


def total_rdp(steps: Iterable[Steps]) -> np.ndarray:
    """The RDP curve of a composition: the sum of the curves of its steps."""
    return sum((rdp_curve(step) for step in merged_steps(steps)), np.zeros(len(RDP_ORDERS)))


def epsilon_from_rdp(curve: np.ndarray, delta: float) -> float:
    """ε at `delta` of an RDP curve over `RDP_ORDERS`."""
    if not np.any(curve):
        return 0.0
    if np.all(np.isinf(curve)):
        return float("inf")
    return float(rdp.rdp_privacy_accountant.compute_epsilon(RDP_ORDERS, curve, delta)[0])


def epsilons_from_rdp(curves: np.ndarray, delta: float) -> np.ndarray:
    """`epsilon_from_rdp` of many curves at once: (n, orders) to (n,).

    `min_α r(α) + log(1 - 1/α) - log(δα)/(α - 1)`, and 0 where `δ² > 1 - exp(-r)`: Canonne et al., arXiv 2004.00010,
    Proposition 12.
    """
    orders = np.array(RDP_ORDERS, dtype=np.float64)
    values = curves + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    values = np.where(delta**2 + np.expm1(-curves) > 0, 0.0, values)
    found: np.ndarray = np.maximum(values.min(axis=1), 0.0)
    return found


def merged_steps(steps: Iterable[Steps]) -> tuple[Steps, ...]:
    """Equal mechanisms merged and sorted, so that equal compositions have the same cache key."""
    counts: dict[tuple[float, float], int] = {}
    for step in steps:
        key = (step.sampling_rate, step.noise_multiplier)
        counts[key] = counts.get(key, 0) + step.count
    return tuple(Steps(q, sigma, count) for (q, sigma), count in sorted(counts.items()) if count > 0)


# Numbers, of which a run needs one for each kind of step: not bounded, since a bound below that would recompute all.
@cache
def _epsilon(steps: tuple[Steps, ...], delta: float) -> float:
    if not steps:
        return 0.0
    if any(step.noise_multiplier == 0 for step in steps):
        return float("inf")
    if _extreme(steps):
        return epsilon_rdp(steps, delta)
    return float(_composed(steps).get_epsilon_for_delta(delta))


def _composed(steps: tuple[Steps, ...]) -> PrivacyLossDistribution:
    parts = [_loss_distribution(step.sampling_rate, step.noise_multiplier).self_compose(step.count) for step in steps]
    return reduce(PrivacyLossDistribution.compose, parts)


def _extreme(steps: tuple[Steps, ...]) -> bool:
    """Whether a loss distribution would take gigabytes or minutes."""
    far = any(step.noise_multiplier < LEAST_NOISE or step.count > MOST_STEPS for step in steps)
    return far or _least_epsilon(steps) > MOST_EPSILON


class Composition:
    """The composition of one kind of step while its number grows, such as that of a client from round to round.

    Adding as many steps as the time before costs one convolution, a few milliseconds. `epsilon` of a number of steps
    costs many times that, since it looks for the range of the composed losses anew. Both are upper bounds, and differ
    by less than 1e-6, since each cuts off other tails of 1e-15, pessimistically.

    Attributes:
        count: number of steps so far.

    Args:
        step: its `count` does not matter.
    """

    def __init__(self, step: Steps, delta: float) -> None:
        self._step, self._delta = step, delta
        self.count = 0
        self._losses: PrivacyLossDistribution | None = None
        self._added: tuple[int, PrivacyLossDistribution] | None = None
        self._epsilon = 0.0

    def epsilon(self, count: int) -> float:
        """ε of `count` steps, at least as many as in the call before."""
        steps = replace(self._step, count=count)
        if count == 0 or self._step.noise_multiplier == 0 or _extreme((steps,)):
            return epsilon([steps], self._delta)
        if count > self.count:
            added = self._several(count - self.count)
            self._losses = added if self._losses is None else self._losses.compose(added)
            self.count = count
            self._epsilon = float(self._losses.get_epsilon_for_delta(self._delta))
        return self._epsilon

    def _several(self, count: int) -> PrivacyLossDistribution:
        if self._added is None or self._added[0] != count:
            one = _loss_distribution(self._step.sampling_rate, self._step.noise_multiplier)
            self._added = (count, one.self_compose(count))
        return self._added[1]


def _least_epsilon(steps: tuple[Steps, ...]) -> float:
    """A lower bound on the ε of a composition, at any δ < 1/2.

    With mean m and standard deviation s of the privacy loss L, Cantelli's inequality gives L > m - 3s with probability
    0.9 at least, and δ(ε) = E[max(0, 1 - e^(ε-L))] is then above 0.56 at ε = m - 3s - 1.
    """
    moments = [(step.count, *_loss_moments(step.sampling_rate, step.noise_multiplier)) for step in steps]
    mean = sum(count * first for count, first, _ in moments)
    variance = sum(count * second for count, _, second in moments)
    return mean - 3 * math.sqrt(variance) - 1


@cache
def _loss_moments(sampling_rate: float, noise_multiplier: float) -> tuple[float, float]:
    """Mean and variance of one step's loss `log(1 - q + q e^((2x - 1)/(2σ²)))`, `x ~ (1 - q) N(0, σ²) + q N(1, σ²)`."""
    x = np.linspace(-10 * noise_multiplier, 1 + 10 * noise_multiplier, 4001)
    densities = [np.exp(-0.5 * ((x - centre) / noise_multiplier) ** 2) for centre in (0, 1)]
    weights = (1 - sampling_rate) * densities[0] + sampling_rate * densities[1]
    weights /= weights.sum()
    with np.errstate(divide="ignore"):
        loss = np.logaddexp(np.log1p(-sampling_rate), np.log(sampling_rate) + (2 * x - 1) / (2 * noise_multiplier**2))
    mean = float(weights @ loss)
    return mean, float(weights @ (loss - mean) ** 2)


# Arrays of up to a megabyte: few are kept.
@lru_cache(maxsize=64)
def _loss_distribution(sampling_rate: float, noise_multiplier: float) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sampling_rate,
        value_discretization_interval=DISCRETIZATION,
        neighboring_relation=NEIGHBOURS,
    )


@cache
def _rdp_of_one_step(sampling_rate: float, noise_multiplier: float) -> np.ndarray:
    accountant = rdp.RdpAccountant(RDP_ORDERS, NEIGHBOURS)
    accountant.compose(
        dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    )
    return np.asarray(accountant.rdp)

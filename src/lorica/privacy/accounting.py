"""Privacy accounting: the ε of releases, and the noise for a target ε. PLD by dp-accounting, with RDP as a cross-check.

Neighbouring data sets (`NEIGHBOURS`): one record of one client contributes zero to every sum instead of its clipped
gradient. Both have the same number n of records, so n and what follows from it (q = b/n, σ) are public. Kairouz et al.,
arXiv 2103.00039, definition 1.1. Adding or removing a record would also change n, q and σ.

Clients hold disjoint records, so the ε of a federation is the maximum over its clients, not their sum. Choosing the
trained tensors from earlier releases is adaptive composition at fixed (q, σ) and costs nothing extra.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from importlib.metadata import version
from pathlib import Path

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation, rdp
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from scipy.optimize import brentq

from lorica.errors import UserError
from lorica.files import cache_folder, read_json, write_atomically

# Pessimistic rounding on this grid overstates ε by less than 0.1 % and is ten times faster than the default grid.
DISCRETIZATION = 1e-3
# Integer orders only: fractional orders converge slowly at high sampling rates, and dp-accounting then drops them.
RDP_ORDERS = [*range(2, 65), 80, 96, 128, 192, 256, 512, 1024]
CALIBRATION_TOLERANCE = 1e-4
# Range of calibrated noise. With less, one step on all records costs ε = 34 at δ = 1e-5; with more, no run can learn.
LEAST_NOISE, MOST_NOISE = 0.2, 1e6
# Beyond these limits, or with less noise, computing a loss distribution takes gigabytes or minutes.
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


def calibrate(sampling_rate: float, steps: int, target_epsilon: float, delta: float) -> float:
    """The smallest noise multiplier (to 1e-4) with which `steps` steps cost at most `target_epsilon` at `delta`.

    Brent's method between two powers of two times `LEAST_NOISE`. Results are cached on disk in Lorica's cache folder,
    since a calibration takes about a second.

    Raises:
        UserError: the result would be outside `LEAST_NOISE` … `MOST_NOISE`.

    >>> noise_multiplier = calibrate(sampling_rate=0.1, steps=10, target_epsilon=3.0, delta=1e-5)
    >>> round(epsilon([Steps(0.1, noise_multiplier, 10)], delta=1e-5), 2)
    3.0
    """
    key = [sampling_rate, steps, target_epsilon, delta, DISCRETIZATION, CALIBRATION_TOLERANCE, LEAST_NOISE, ACCOUNTANT]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = cache_folder() / "noise-multipliers" / f"{name}.json"
    known = _stored(path)
    if known is not None:
        return known

    def excess(sigma: float) -> float:
        return epsilon([Steps(sampling_rate, sigma, steps)], delta) - target_epsilon

    # The noise of a Gaussian mechanism whose sensitivity is the mean number of times that a record is sampled.
    guess = sampling_rate * math.sqrt(2 * steps * math.log(1 / delta)) / target_epsilon
    low, high = _bracket(excess, target_epsilon, guess)
    noise_multiplier = float(brentq(excess, low, high, xtol=CALIBRATION_TOLERANCE))
    while excess(noise_multiplier) > 0:
        noise_multiplier += CALIBRATION_TOLERANCE
    record = asdict(Steps(sampling_rate, noise_multiplier, steps)) | {"epsilon": target_epsilon, "delta": delta}
    record["crc32"] = _checksum(path, noise_multiplier)
    write_atomically(path, json.dumps(record).encode())
    return noise_multiplier


def _checksum(path: Path, noise_multiplier: float) -> int:
    """The name of the file stands for the terms."""
    return zlib.crc32(f"{path.stem} {noise_multiplier!r}".encode())


def _stored(path: Path) -> float | None:
    """A noise multiplier from the cache; None if there is none, or if its file is damaged."""
    try:
        record = read_json(path)
        known = float(record["noise_multiplier"])
        if record["crc32"] == _checksum(path, known):
            return known
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _bracket(excess: Callable[[float], float], target_epsilon: float, guess: float) -> tuple[float, float]:
    """`σ` and `2σ` around the root of a decreasing function.

    The search starts near the guess, or at a noise whose loss distribution is small, and moves towards the root: far
    below the root, loss distributions are large.
    """
    high = LEAST_NOISE * 2.0 ** max(4, math.ceil(math.log2(guess / LEAST_NOISE)))
    while high <= MOST_NOISE and excess(high) > 0:
        high *= 2
    if high > MOST_NOISE:
        problem = f"it requires a noise multiplier above {MOST_NOISE:g}"
        raise UserError("privacy.epsilon", target_epsilon, problem, "raise privacy.epsilon")
    while high > LEAST_NOISE and excess(high / 2) <= 0:
        high /= 2
    if high <= LEAST_NOISE:
        problem = f"it allows a noise multiplier below {LEAST_NOISE:g}, which protects nothing"
        raise UserError("privacy.epsilon", target_epsilon, problem, "lower privacy.epsilon or privacy.delta")
    return high / 2, high


def merged_steps(steps: Iterable[Steps]) -> tuple[Steps, ...]:
    """Equal mechanisms merged and sorted, so that equal compositions have the same cache key."""
    counts: dict[tuple[float, float], int] = {}
    for step in steps:
        key = (step.sampling_rate, step.noise_multiplier)
        counts[key] = counts.get(key, 0) + step.count
    return tuple(Steps(q, sigma, count) for (q, sigma), count in sorted(counts.items()) if count > 0)


@lru_cache(maxsize=4096)
def _epsilon(steps: tuple[Steps, ...], delta: float) -> float:
    if not steps:
        return 0.0
    if any(step.noise_multiplier == 0 for step in steps):
        return float("inf")
    extreme = any(step.noise_multiplier < LEAST_NOISE or step.count > MOST_STEPS for step in steps)
    if extreme or _least_epsilon(steps) > MOST_EPSILON:
        return epsilon_rdp(steps, delta)
    return float(_composed(steps).get_epsilon_for_delta(delta))


def _composed(steps: tuple[Steps, ...]) -> PrivacyLossDistribution:
    parts = [_loss_distribution(step.sampling_rate, step.noise_multiplier).self_compose(step.count) for step in steps]
    return reduce(PrivacyLossDistribution.compose, parts)


def _least_epsilon(steps: tuple[Steps, ...]) -> float:
    """A lower bound on the ε of a composition, at any δ < 1/2.

    With mean m and standard deviation s of the privacy loss L, Cantelli's inequality gives L > m - 3s with probability
    0.9 at least, and δ(ε) = E[max(0, 1 - e^(ε-L))] is then above 0.56 at ε = m - 3s - 1.
    """
    moments = [(step.count, *_loss_moments(step.sampling_rate, step.noise_multiplier)) for step in steps]
    mean = sum(count * first for count, first, _ in moments)
    variance = sum(count * second for count, _, second in moments)
    return mean - 3 * math.sqrt(variance) - 1


@lru_cache(maxsize=1024)
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


@lru_cache(maxsize=1024)
def _loss_distribution(sampling_rate: float, noise_multiplier: float) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sampling_rate,
        value_discretization_interval=DISCRETIZATION,
        neighboring_relation=NEIGHBOURS,
    )


@lru_cache(maxsize=1024)
def _rdp_of_one_step(sampling_rate: float, noise_multiplier: float) -> np.ndarray:
    accountant = rdp.RdpAccountant(RDP_ORDERS, NEIGHBOURS)
    accountant.compose(
        dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    )
    return np.asarray(accountant.rdp)

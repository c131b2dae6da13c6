"""Exact tests of what a mechanism promises: no bound on ε sees an error of 10 % in the noise, its variance does.

Each function gives an `Outcome` with a p-value that is corrected for what the function looks at. Whoever makes several
tests corrects for their number (`refuted`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from lorica.privacy.accounting import Steps

FALSE_ALARM = 1e-5
"""Probability that an audit of a correct mechanism refutes it, over all of its tests together."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a test of one promise.

    Attributes:
        promise: what is tested, such as "noise variance".
        p_value: probability of such a result, or one farther off, if the promise holds.
        found: what was measured.
    """

    promise: str
    p_value: float
    found: str


def refuted(tests: Sequence[Outcome], among: int | None = None) -> list[Outcome]:
    """The tests that fail at `FALSE_ALARM`, corrected for their number (Bonferroni).

    Args:
        among: the number of all tests of the audit; by default that of `tests`.
    """
    return [test for test in tests if test.p_value < FALSE_ALARM / (among or len(tests))]


def _smallest(p_values: Iterable[float]) -> float:
    """The smallest of several p-values, corrected for their number; 1 for none."""
    found = list(p_values)
    return min([1.0, *(len(found) * value for value in found)])


def _two_sided(distribution: stats.rv_continuous, value: float) -> float:
    return float(min(1.0, 2 * min(distribution.cdf(value), distribution.sf(value))))


def noise_variance(noise: Mapping[str, np.ndarray]) -> Outcome:
    """The variance of the noise, of each tensor and of all together: `Σ z² ~ χ²_d` (two-sided).

    Args:
        noise: tensor -> all its noise over the promised standard deviation.
    """
    energies = {name: (float(np.square(values).sum()), values.size) for name, values in noise.items()}
    total = tuple(map(sum, zip(*energies.values(), strict=True)))
    p_values = [_two_sided(stats.chi2(size), energy) for energy, size in [*energies.values(), total]]
    ratios = {name: energy / size for name, (energy, size) in energies.items()}
    name = max(ratios, key=lambda one: abs(ratios[one] - 1))
    found = f"{total[0] / total[1]:.3f} of the promised variance; {name} {ratios[name]:.3f}"
    return Outcome("noise variance", _smallest(p_values), found)


def noise_of_each_coordinate(noise: Mapping[str, np.ndarray]) -> Outcome:
    """No coordinate has much less or much more noise than the others: over n releases, each has `Σ z² ~ χ²_n`.

    Args:
        noise: tensor -> (n, d), its noise in each release over the promised standard deviation.
    """
    p_values, least = [], 1.0
    for values in noise.values():
        energies, limits = np.square(values).sum(axis=0), stats.chi2(len(values))
        p_values += [
            values.shape[1] * float(limits.cdf(energies.min())),
            values.shape[1] * float(limits.sf(energies.max())),
        ]
        least = min(least, float(energies.min()) / len(values))
    return Outcome(
        "noise of each coordinate", _smallest(p_values), f"the least is {least:.3f} of the promised variance"
    )


def normality(noise: np.ndarray) -> Outcome:
    """The noise over the promised standard deviation is N(0, 1): the test of Kolmogorov and Smirnov."""
    found = stats.kstest(noise, "norm")
    return Outcome(
        "normal noise", float(found.pvalue), f"largest difference of distribution functions {found.statistic:.4f}"
    )


def independent_noise(promise: str, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Outcome:
    """The noises of each pair are uncorrelated: `√d · (x·y)/(‖x‖ ‖y‖) ~ N(0, 1)` (two-sided)."""
    correlations, p_values = [0.0], []
    for first, second in pairs:
        size = min(len(first), len(second))
        x, y = first[:size], second[:size]
        length = float(np.linalg.norm(x) * np.linalg.norm(y))
        # Noise of exactly zero is the variance test's.
        correlation = float(x @ y) / length if length else 0.0
        correlations.append(correlation)
        p_values.append(2 * float(stats.norm.sf(abs(correlation) * np.sqrt(size))))
    largest = max(correlations, key=abs)
    return Outcome(promise, _smallest(p_values), f"largest correlation {largest:+.3f} of {len(p_values)} pairs")


def noise_of_releases(noise: Mapping[str, np.ndarray]) -> Outcome:
    """The noise of a tensor in different releases.

    Args:
        noise: tensor -> (n, d), its noise in each release.
    """
    pairs = [pair for values in noise.values() for pair in combinations(values, 2)]
    return independent_noise("noise independent between releases", pairs)


def noise_of_tensors(releases: Iterable[Sequence[np.ndarray]]) -> Outcome:
    """The noises of the tensors of each release, from their first coordinates on.

    Args:
        releases: of each release the noises of its tensors, each flat.
    """
    pairs = [pair for tensors in releases for pair in combinations(tensors, 2)]
    return independent_noise("noise independent between tensors", pairs)


def contributions(values: np.ndarray, deviations: np.ndarray) -> tuple[Outcome, Outcome]:
    """What each record adds is its gradient clipped to C over the expected batch size, or nothing.

    Args:
        values: (n,), how much of that each canary added: 0 or 1, plus noise of these standard deviations.
        deviations: (n,).

    Returns:
        The test that no record adds more than C, and that of the division: those that are included add exactly that.
    """
    inside = values > 0.5
    over = (values[inside] - 1) / deviations[inside]
    largest = float(values.max(initial=0.0))
    clip = Outcome(
        "clip",
        _smallest(stats.norm.sf(over).tolist()),
        f"the largest contribution is {largest:.4f} C over the batch size",
    )
    off = (values - inside) / deviations
    mean = float(values[inside].mean()) if inside.any() else 0.0
    division = Outcome(
        "division by the expected batch size",
        _smallest((2 * stats.norm.sf(np.abs(off))).tolist()),
        f"records in a batch add {mean:.4f} of their share on average",
    )
    return clip, division


def nothing_else(energy: float, coordinates: int) -> Outcome:
    """Beside clipped gradients and noise nothing is released: what is left over has the energy of noise (one-sided).

    Args:
        energy: `Σ z²` of what is left over, over the standard deviation of the noise.
        coordinates: their number, less that of the contributions that were fitted.
    """
    return Outcome(
        "nothing but clipped gradients and noise",
        float(stats.chi2(coordinates).sf(energy)),
        f"what is left over has {energy / coordinates:.3f} of the energy of noise",
    )


@dataclass(frozen=True)
class Memberships:
    """Which records some batches of the same n records have, as far as it can be read.

    Attributes:
        visible: (batches, n) bool, which records would leave a trace.
        drawn: (batches, n) bool, which of these are in the batch.
    """

    visible: np.ndarray
    drawn: np.ndarray


def sampling_rate(owners: Iterable[Memberships], rate: float) -> Outcome:
    """A record is in a batch with the promised probability: the number of all memberships is binomial (two-sided)."""
    drawn, looked_at = (sum(int(getattr(one, key).sum()) for one in owners) for key in ("drawn", "visible"))
    p_value = float(stats.binomtest(drawn, looked_at, rate).pvalue) if looked_at else 1.0
    return Outcome("sampling rate", p_value, f"{drawn / max(1, looked_at):.4f}, promised {rate:.4f}")


def batch_sizes(owners: Iterable[Memberships], rate: float) -> Outcome:
    """Batch sizes vary as those of independent coins: the largest deviation from the mean, both ways.

    A batch of fixed size has the right sampling rate, but no deviation.
    """
    batches = [
        (int(visible.sum()), int(drawn.sum()))
        for one in owners
        for visible, drawn in zip(one.visible, one.drawn, strict=True)
        if visible.any()
    ]
    scales = [np.sqrt(records * rate * (1 - rate)) for records, _ in batches]
    largest = max((abs(size - n * rate) / scale for (n, size), scale in zip(batches, scales, strict=True)), default=0.0)
    within = below = 1.0
    for (records, _), scale in zip(batches, scales, strict=True):
        sizes = np.arange(records + 1)
        law, deviations = stats.binom(records, rate).pmf(sizes), np.abs(sizes - records * rate) / scale
        within *= float(law[deviations <= largest + 1e-9].sum())
        below *= float(law[deviations < largest - 1e-9].sum())
    p_value = 2 * min(within, 1 - below) if batches else 1.0
    found = f"{len(batches)} batches, at most {largest:.2f} standard deviations from the mean"
    return Outcome("batch sizes", min(1.0, p_value), found)


def independent_batches(owners: Iterable[Memberships]) -> Outcome:
    """Two batches of the same records have as many in common as independent ones: hypergeometric, given their sizes."""
    p_values, common = [], [1.0]
    for one in owners:
        for first, second in combinations(range(len(one.visible)), 2):
            both = one.visible[first] & one.visible[second]
            shared = int((one.drawn[first] & one.drawn[second])[both].sum())
            records, sizes = int(both.sum()), [int(one.drawn[batch][both].sum()) for batch in (first, second)]
            law = stats.hypergeom(records, *sizes)
            p_values.append(min(1.0, 2 * min(float(law.cdf(shared)), float(law.sf(shared - 1)))))
            common.append(shared / max(1.0, sizes[0] * sizes[1] / max(1, records)))
    farthest = max(common, key=lambda ratio: abs(ratio - 1))
    found = f"{len(p_values)} pairs, at the most {farthest:.2f} times the expected number in common"
    return Outcome("independent batches", _smallest(p_values), found)


def accounting(claimed: float, steps: Steps, delta: float) -> Outcome:
    """The claimed ε is at least that of the noise, in closed form for records that are in every batch.

    `δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ)` with `μ = √T/σ`. Balle and Wang, arXiv 1805.06530, Theorem 8.
    """
    mean = float(np.sqrt(steps.count)) / steps.noise_multiplier

    def excess(epsilon: float) -> float:
        tail = np.exp(epsilon + log_ndtr(-mean / 2 - epsilon / mean))
        return float(ndtr(mean / 2 - epsilon / mean) - tail) - delta

    exact = 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 1000.0))
    return Outcome("accounting", 1.0 if claimed >= exact * (1 - 1e-6) else 0.0, f"the noise has ε = {exact:.4f}")


def derived(promise: str, differences: Iterable[float], tolerance: float = 1e-3) -> Outcome:
    """What costs nothing is a function of what was released: relative differences from it, up to rounding."""
    largest = max(differences, default=0.0)
    return Outcome(promise, 0.0 if largest > tolerance else 1.0, f"largest relative difference {largest:.1e}")

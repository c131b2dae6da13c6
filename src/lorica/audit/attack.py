"""Attacks on releases: which canaries were included."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

# A canary whose share is this much smaller than the largest one leaves no trace that could be read.
LEAST_SHARE = 0.02
LEAST_EIGENVALUE = 1e-9
LARGEST_CONDITION = 1e7
# With more noise than this, in units of its share, it cannot be told whether a canary is in a batch.
LARGEST_DEVIATION = 0.1


class Ridge:
    """Ridge regression of releases on the canaries' shares, over all releases with the same coins.

    In units of the noise's standard deviation, a release is `z = Σ_i β_i s_i + N(0, I)`, where `s_i` is what canary `i`
    adds. With the prior `β_i ~ N(m, v)`, the posterior mean of `β - m` is `(Σ S Sᵀ + I/v)⁻¹ Σ S (z - m Sᵀ1)`, with the
    sums over the releases. Inner products `s_i·z` alone have no power where the shares overlap.

    Args:
        canaries: number of canaries.
        mean: `m`, the mean of what a canary's coin makes of its share.
        variance: `v`.
    """

    def __init__(self, canaries: int, mean: float = 0.5, variance: float = 0.25) -> None:
        self._mean, self._variance = mean, variance
        self._gram = np.zeros((canaries, canaries))
        self._products = np.zeros(canaries)

    def add(self, values: np.ndarray, shares: np.ndarray) -> None:
        """Add a release.

        Args:
            values: `z`, (d,).
            shares: `S`, (canaries, d).
        """
        gram = shares @ shares.T
        self._gram += gram
        self._products += shares @ values - self._mean * gram.sum(axis=1)

    def scores(self) -> np.ndarray:
        """(canaries,), the posterior mean of `β - m`."""
        system = self._gram + np.eye(len(self._gram)) / self._variance
        return np.asarray(cho_solve(cho_factor(system), self._products))


@dataclass(frozen=True)
class Fit:
    """The least-squares fit of a release by the canaries' shares.

    Attributes:
        visible: (canaries,) bool, which canaries leave a trace that can be read and told from those of all others.
        values: of the visible ones, what they added in units of their shares.
        deviations: of `values`, from the noise.
        energy: `Σ z²` of what is left over, in units of the noise's variance.
        left: number of coordinates less the dimension of what was fitted.
    """

    visible: np.ndarray
    values: np.ndarray
    deviations: np.ndarray
    energy: float
    left: int


def fit(values: np.ndarray, shares: np.ndarray) -> Fit:
    """Fit a release by least squares.

    Args:
        values: (d,), in units of the noise's standard deviation.
        shares: (canaries, d), likewise.
    """
    norms = np.linalg.norm(shares, axis=1)
    traced = norms > LEAST_SHARE * norms.max(initial=0.0)
    own = shares[traced]
    inverse, told_apart, dimension = _inverse(own @ own.T)
    found, deviations = inverse @ (own @ values), np.sqrt(np.diag(inverse))
    rest = values - found @ own
    readable = told_apart & (deviations < LARGEST_DEVIATION)
    visible = np.zeros(len(shares), dtype=bool)
    visible[traced] = readable
    energy, left = float(rest @ rest), len(values) - dimension
    return Fit(visible, found[readable], deviations[readable], energy, left)


def _inverse(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The (pseudo-)inverse of a Gram matrix of shares, which of them no others add up to, and its rank."""
    with suppress(np.linalg.LinAlgError):
        inverse = np.linalg.inv(gram)
        # Eigenvectors take ten times as long, and are needed only where shares overlap almost completely.
        if np.linalg.norm(gram, 1) * np.linalg.norm(inverse, 1) < LARGEST_CONDITION:
            return inverse, np.ones(len(gram), dtype=bool), len(gram)
    eigenvalues, vectors = np.linalg.eigh(gram)
    kept = eigenvalues > LEAST_EIGENVALUE * eigenvalues.max(initial=0.0)
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    told_apart = np.square(vectors).sum(axis=1) > 1 - 1e-6
    return (vectors / eigenvalues) @ vectors.T, told_apart, len(eigenvalues)

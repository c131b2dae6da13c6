"""The variance of the DP noise in aggregated updates, computed from public numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.privacy.mechanism import Terms


def step_weights(steps: int, momentum: float) -> Tensor:
    """`c_e = (1 - μ^{E-e+1}) / (1 - μ)`, `e = 1…E`: the total effect of the gradient of step `e` on the parameters.

    Shape `(E,)`, float64. All ones without momentum.
    """
    left = torch.arange(steps, 0, -1, dtype=torch.float64)
    return left.sign() if momentum == 0 else (1 - momentum**left) / (1 - momentum)


def mean_noise_variance(terms: Mapping[int, Terms], weights: Mapping[int, float], coefficients: Tensor) -> float:
    """`v = Σ_k w_k² τ_k² · Σ_e c_e² / (Σ_e c_e)²`: noise variance of each coordinate of the mean gradient `Ḡ`."""
    spread = float(coefficients.square().sum() / coefficients.sum().square())
    return sum(weight**2 * terms[client].noise_std ** 2 for client, weight in weights.items()) * spread


def update_noise_variance(
    terms: Mapping[int, Terms], weights: Mapping[int, float], rate: float, steps: int, momentum: float
) -> float:
    """`a² v` with the path length `a = η Σ_e c_e`: noise variance of each coordinate of the mean update `Σ_k w_k U_k`.

    Valid for SGD without weight decay on the unchanged noisy gradient; other local steps shape the noise.
    """
    coefficients = step_weights(steps, momentum)
    length = rate * float(coefficients.sum())
    return length**2 * mean_noise_variance(terms, weights, coefficients)

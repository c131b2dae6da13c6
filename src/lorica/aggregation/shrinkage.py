"""Optimal shrinkage of the singular values of a noisy update."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.aggregation.memory import Memory


class Shrinkage(Memory):
    """Shrinks the singular values of each tensor's mean update (`shrink_singular_values`). Stateless."""

    def step(self, mean: Mapping[str, Tensor], noise: Mapping[str, float], round_number: int) -> dict[str, Tensor]:
        """The estimate of each update. `noise` is name -> noise variance."""
        return {name: shrink_singular_values(value, noise[name]) for name, value in mean.items()}


def shrink_singular_values(update: Tensor, noise_variance: float) -> Tensor:
    """Estimate a low-rank matrix under white noise of known variance by optimal shrinkage of its singular values.

    For `Y = X + √v Z` of shape `(m, n)`, `m ≤ n`, `β = m/n`, every singular value `y` of `Y/√(n v)` becomes
    `√((y² - β - 1)² - 4β) / y` if `y > 1 + √β`, else 0: asymptotically optimal for the Frobenius loss. Gavish and
    Donoho, IEEE Trans. Inf. Theory 2017, arXiv 1405.7511, equation 7.

    Post-processing of a release with public parameters. With zero variance the update is returned unchanged. A vector
    is treated as a matrix with one row.

    Args:
        update: `(m, n)` or `(n,)`.
        noise_variance: `v`, per coordinate.

    >>> shrink_singular_values(torch.diag(torch.tensor([10.0, 1.0])), noise_variance=1.0)
    tensor([[9.5917, 0.0000],
            [0.0000, 0.0000]])
    """
    if noise_variance == 0:
        return update
    matrix = update.double().reshape(-1, update.shape[-1]) if update.dim() > 1 else update.double()[None]
    tall = matrix.shape[0] > matrix.shape[1]
    u, s, vt = torch.linalg.svd(matrix.T if tall else matrix, full_matrices=False)
    beta = u.shape[0] / vt.shape[1]
    unit = math.sqrt(vt.shape[1] * noise_variance)
    y = s / unit
    inside = ((y.square() - beta - 1).square() - 4 * beta).clamp(min=0)
    shrunk = torch.where(y > 1 + math.sqrt(beta), inside.sqrt() / y.clamp(min=1e-30), 0.0) * unit
    estimate: Tensor = (u * shrunk) @ vt
    return (estimate.T if tall else estimate).reshape(update.shape).to(update)

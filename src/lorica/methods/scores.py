"""Scores of a block of tensors, computed from the clients' uploads: pure post-processing.

A block is one factor of one layer, with `d` coordinates in total. Client `k` uploads `U_k = θ_{k,E} - θ_t`. With the
path length `a = η Σ_e c_e` the client's round-average noisy gradient is `G_k = -U_k / a`, and the server moves by
`-a Ḡ` with `Ḡ = Σ_k w_k G_k`. The DP noise in `Ḡ` has the public variance `v` per coordinate.

For a local quadratic loss with gradient `g` and Hessian `H`, training the block once lowers the loss by `a D`, with
`D = ‖g‖² - (a/2)(gᵀHg + v tr H)` up to the local drift. The statistics here estimate it without bias.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def cross_client_energy(mean: Tensor, energies: Sequence[float], weights: Sequence[float]) -> float:
    """`Q = (‖Σ_k w_k G_k‖² - Σ_k w_k² ‖G_k‖²) / (1 - Σ_k w_k²)`.

    Estimates `‖g‖² - 2b gᵀHg` for the small drift coefficient `b = η (E-1)/2`, with no noise to subtract, since
    the noise of different clients is independent. Under heterogeneity it estimates the mean inner product of two
    clients' gradients.

    Args:
        mean: `Σ_k w_k G_k`, `(d,)`.
        energies: `‖G_k‖²` of each of the `K ≥ 2` clients.
        weights: their weights, which sum to 1.

    >>> cross_client_energy(torch.tensor([2.0, 0.0]), energies=[4.0, 4.0], weights=[0.5, 0.5])
    4.0
    """
    own = sum(weight**2 * energy for weight, energy in zip(weights, energies, strict=True))
    return (float(mean.square().sum()) - own) / (1 - sum(weight**2 for weight in weights))


def debiased_energy(mean: Tensor, noise_variance: float) -> float:
    """`N' = ‖Ḡ‖² - d v`: the energy of the mean gradient `(d,)` minus the known noise energy.

    >>> debiased_energy(torch.tensor([2.0, 1.0]), noise_variance=0.5)
    4.0
    """
    return float(mean.square().sum()) - mean.numel() * noise_variance


def alignment(earlier: Tensor, later: Tensor) -> float:
    """`X = ⟨Ḡ_t, Ḡ_{t+}⟩` with `t+` the next round in which the block is active.

    Estimates `‖g‖² - (2b + a) gᵀHg - a v tr H`: how much of the gradient remains after the noisy step along it. The
    noise of different rounds is independent, so nothing is subtracted.

    >>> alignment(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
    3.0
    """
    return float(earlier @ later)


def curvature_score_variance(dimension: int, noise_variance: float, clients: int, score: float) -> float:
    """Variance of `S = (Q + X)/2`: `(d v²/4)(2K/(K-1) + 1) + 2.5 v ‖g‖²`, with `max(S, 0)` for `‖g‖²`.

    For `K = 1`, where the debiased energy replaces `Q`, `2K/(K-1)` becomes 2.
    """
    own = 2 * clients / (clients - 1) if clients > 1 else 2.0
    return dimension * noise_variance**2 / 4 * (own + 1) + 2.5 * noise_variance * max(score, 0.0)


def energy_variance(dimension: int, noise_variance: float, energy: float) -> float:
    """Variance of a debiased energy: `2 d v² + 4 v ‖g‖²`, with `max(energy, 0)` for `‖g‖²`."""
    return 2 * dimension * noise_variance**2 + 4 * noise_variance * max(energy, 0.0)

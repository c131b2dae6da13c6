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

from lorica.adapters.algebra import inner
from lorica.adapters.names import Pair


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


def weight_alignment(earlier: Sequence[Pair], later: Sequence[Pair], scale: float) -> float:
    """`X` in weight space, for factors whose basis changes between the two rounds.

    A step `-a Ḡ` on B moves the weight by `-a γ Ḡ A`, and one on A by `-a γ B Ḡ`. In the gauge (`lorica.methods.gauge`)
    the resting factor is orthonormal times `s`. Then `X = Σ_sites ⟨Ḡ₁ A₁, Ḡ₂ A₂⟩ / s²` for B, which is
    `tr(Ḡ₁ᵀ Ḡ₂ A₂ A₁ᵀ) / s²`, and `⟨B₁ Ḡ₁, B₂ Ḡ₂⟩ / s²` for A. If the resting factor has not changed, this is
    `alignment`. Otherwise it is the known part of the slope along the earlier step: the part in the subspace in which
    the later gradient was taken.

    Args:
        earlier, later: the steps in weight space for each site, `(Ḡ, A)` or `(B, Ḡ)`.
        scale: `s`.

    >>> step = torch.tensor([[2.0], [1.0]]), torch.tensor([[0.5, 0.0]])
    >>> turned = torch.tensor([[-1.0], [-1.0]]), torch.tensor([[-0.5, 0.0]])
    >>> weight_alignment([step], [turned], scale=0.5)
    3.0
    """
    return sum(inner(first, second) for first, second in zip(earlier, later, strict=True)) / scale**2


def cross_client_spread(noises: Sequence[float], weights: Sequence[float]) -> float:
    """`c` in `Var Q = c d v²` for pure noise: `2 (1 - Σ_k m_k² / v²) / (1 - Σ_k w_k²)²` with `m_k = w_k² τ_k²`.

    `2K/(K-1)` for equal clients. Without noise it is 2, as for `debiased_energy`.

    Args:
        noises: `τ_k²` of each client, up to a common factor.
        weights: their weights, which sum to 1.

    >>> cross_client_spread([1.0, 1.0], [0.5, 0.5])
    4.0
    """
    parts = [weight**2 * noise for weight, noise in zip(weights, noises, strict=True)]
    total = sum(parts)
    if total == 0:
        return 2.0
    together = 1 - sum((part / total) ** 2 for part in parts)
    return 2 * together / (1 - sum(weight**2 for weight in weights)) ** 2


def curvature_score_variance(
    energy_noise: float, shared: float, noise_variances: tuple[float, float], score: float
) -> float:
    """Variance of `S = (Q + X)/2`: `(Var Q + d_X v v')/4 + (9 v + v')/4 ‖g‖²`, with `max(S, 0)` for `‖g‖²`.

    Args:
        energy_noise: `Var Q` for pure noise, `c d v²`.
        shared: `d_X`, the dimension that the noises of the two rounds share: `d`, or in weight space
            `shared_dimension`, where the term in `‖g‖²` is an upper bound.
        noise_variances: `v` of the earlier and `v'` of the later activation.
    """
    earlier, later = noise_variances
    return (energy_noise + shared * earlier * later) / 4 + (9 * earlier + later) / 4 * max(score, 0.0)


def shared_dimension(resting: Sequence[tuple[Tensor, Tensor, int]], scale: float) -> float:
    """`d_X` with `Var X = d_X v v'` for pure noise in weight space: `Σ_sites d_out ‖A₁ A₂ᵀ‖² / s⁴` for steps on B.

    For steps on A it is `Σ_sites d_in ‖B₁ᵀ B₂‖² / s⁴`. It is `d` if the subspaces are the same, and zero if they are
    orthogonal.

    Args:
        resting: for each site, the rows `(r, n)` of the earlier and of the later resting factor, and the number of the
            trained factor's coordinates per row.
        scale: `s`.
    """
    return (
        sum(other * float((first.double() @ second.double().T).square().sum()) for first, second, other in resting)
        / scale**4
    )


def energy_variance(dimension: int, noise_variance: float, energy: float, spread: float = 2.0) -> float:
    """Variance of a debiased energy: `2 d v² + 4 v ‖g‖²`, with `max(energy, 0)` for `‖g‖²`.

    Args:
        spread: 2 for `debiased_energy`; `cross_client_spread` for `cross_client_energy`, where the second term is exact
            for equal weights.
    """
    return spread * dimension * noise_variance**2 + 4 * noise_variance * max(energy, 0.0)

"""Bounds on how far noisy steps can move a tensor. The server sees no gradients, but it can check replies against them.

The server knows the terms of every step. With `m ~ Binomial(n, q)` records in a batch, a noisy gradient is
`ĝ = s/b + ξ` with `‖s‖ ≤ C m` over all tensors trained in the step and `ξ ~ N(0, τ² I)`, `τ = σC/b`. Each of these
events fails with probability at most `p = 1e-12`:

    m_1 + … + m_k ≤ M_k, the (1 - p)-quantile of Binomial(k n, q), over any k given steps
    ‖Σ_e h_e ξ_e‖ ≤ τ (√(Σ_i v_i) + √(2 max_i v_i ln(1/p))),  v_i = Σ_e h_e² of coordinate i

The second is the concentration of a Lipschitz function of Gaussians around a mean of at most `τ √(Σ_i v_i)` (Boucheron,
Lugosi and Massart, Concentration Inequalities, theorem 5.6).

All operations after the noise are known, so a bound on the update follows. Let `h_e` bound how far a gradient of norm 1
in step `e` moves the tensor by the end: for plain SGD `η`, with momentum `η (1 - μ^{E-e+1})/(1 - μ)`, in general the
response of

    w ← μ w + κ ρ x + (λ + κ μ_prox) u,   u ← u + η w

to `x = 1` in one step. `ρ` is 1, or `√0.273` if the smoothing is a rescaling (the filter has norm 1). `κ` is the
norm of scaled gradient descent's `(F Fᵀ + δI)⁻¹`: exact if the factor `F` is public and fixed, else `1/δ`. Then

    ‖U‖ ≤ (C/b) Σ_k (h_(k) - h_(k+1)) M_k + (noise, as above) + (Σ_e h_e/ρ) (‖c - c_k‖ + λ‖θ_0‖/κ)

with `h_(1) ≥ h_(2) ≥ …` (summation by parts; for plain SGD the first term is `η C M_E/b`), and the same for all updates
together, each divided by its rate. If a step's map depends on earlier noise (scaled GD on both factors of a site,
HetLoRA's tail penalty), the noise is bounded step by step, with `Σ_e h_e` for `√(Σ_e h_e²)`; the penalty's gradient is
bounded by `λ_t (‖other_0‖ + ‖U_other‖)`.

The bound for AdamW is deterministic. By Cauchy-Schwarz, no coordinate of `m̂/√v̂` exceeds

    R_t = (1-β₁)/(1-β₁^t) √((1-β₂^t)/(1-β₂)) √(Σ_{i<t} (β₁²/β₂)^i)

An honest client's `E` steps on `T` tensors break any of the bounds with probability at most `(E + 1)(2T + 1) p`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from lorica.adapters.names import is_a, is_factor, other_factor
from lorica.local.optimizers import AdamW
from lorica.local.smoothing import NOISE_ENERGY
from lorica.messages import Training
from lorica.privacy.mechanism import Terms

FAILURE = 1e-12
"""`p`, the failure probability of one event."""
ROUNDING = 1e-3
"""Relative tolerance for rounding in fp32."""


@dataclass(frozen=True)
class Bounds:
    """Bounds on the updates of one exchange.

    Attributes:
        norms: name -> largest L2 norm.
        joint: `√(Σ_n ‖U_n‖²/η_n²) ≤ joint` over all updates in the reply.
        coordinates: name -> largest absolute value of each coordinate; AdamW only.
    """

    norms: Mapping[str, float]
    joint: float = math.inf
    coordinates: Mapping[str, Tensor] = field(default_factory=dict)


def update_bounds(work: Training, records: int, model: Mapping[str, Tensor]) -> Bounds:
    """Bounds on `U = θ_E - θ_0` of every trained tensor, including those that stay with the client.

    Args:
        work: with a finite clip norm; without a clip there are no bounds. The noise may be zero.
        records: `n`.
        model: all global tensors.
    """
    tensors = {name: work.part(name, value) for name, value in model.items()}
    active = active_steps(work)
    if work.optimizer.name == "adamw":
        coordinates = _adamw(work, tensors, active)
        return Bounds({name: norm(value) for name, value in coordinates.items()}, coordinates=coordinates)
    return _sgd(work, records, tensors, active)


def gradient_bound(terms: Terms, records: int, size: int) -> float:
    """`C M_1/b + τ (√d + √(2 ln(1/p)))`: bound on the norm of one noisy gradient with `size` coordinates `d`."""
    return (1 + ROUNDING) * (clipped_norm(terms, records, [1.0]) + gaussian_norm([(terms.noise_std, size)]))


def active_steps(work: Training) -> dict[str, list[int]]:
    """Name -> steps, counted from 0, in which the tensor is trained. Tensors that are never trained are left out."""
    found: dict[str, list[int]] = {}
    for step in range(work.steps):
        for name in work.local.active(work.trained, step):
            found.setdefault(name, []).append(step)
    return found


def clipped_norm(terms: Terms, records: int, gains: Sequence[float]) -> float:
    """Bound on `Σ_e h_e C m_e/b`: `(C/b) Σ_k (h_(k) - h_(k+1)) M_k`, with the gains `h_e` in descending order."""
    ordered = np.sort(gains)[::-1]
    falls = ordered - np.append(ordered[1:], 0.0)
    counts = np.flatnonzero(falls) + 1
    most = np.array([_most_records(int(count) * records, terms.sampling_rate, FAILURE) for count in counts])
    return terms.clip_norm / terms.batch_size * float(falls[counts - 1] @ most)


@lru_cache(maxsize=4096)
def _most_records(draws: int, sampling_rate: float, failure: float) -> float:
    """The `(1 - p)`-quantile of Binomial(draws, q). Every tensor of every request asks for the same few."""
    return float(stats.binom.isf(failure, draws, sampling_rate))


def gaussian_norm(parts: Sequence[tuple[float, int]]) -> float:
    """Bound on the norm of independent Gaussian coordinates, exceeded with probability at most `p`.

    Args:
        parts: standard deviations, each with its number of coordinates.
    """
    spread = math.sqrt(sum(deviation**2 * size for deviation, size in parts))
    return spread + max(deviation for deviation, _ in parts) * math.sqrt(-2 * math.log(FAILURE))


def norm(value: Tensor) -> float:
    """L2 norm, in fp64."""
    return float(torch.linalg.vector_norm(value.double()))


def _sgd(work: Training, records: int, tensors: Mapping[str, Tensor], active: Mapping[str, list[int]]) -> Bounds:
    local, decay = work.local, work.optimizer.weight_decay
    drifts, tails, gains = {}, {}, {}
    for name, steps in active.items():
        amplified = _amplification(name, work, tensors)
        # Responses to a unit input after the rescaling and preconditioning of the gradient.
        responses = _responses(
            len(steps), work.rates[name], work.optimizer.momentum, decay + amplified * local.proximal
        )
        rescaled = NOISE_ENERGY**0.5 if local.smoothing == "rescale" and is_factor(name) else 1.0
        gains[name] = [rescaled * amplified * response for response in responses]
        drifts[name] = amplified * norm(work.corrections[name]) * sum(responses) if name in work.corrections else 0.0
        if decay:
            # The server does not know the starting value of a personal tensor.
            drifts[name] += math.inf if name in work.personal else decay * norm(tensors[name]) * sum(responses)
        tails[name] = amplified * local.tail_penalty * sum(responses) if is_factor(name) else 0.0
    independent = not any(_depends_on_noise(name, work, active) for name in active)

    def noise(scales: Mapping[str, float]) -> float:
        """Bound on the noise of these tensors together, each multiplied by its scale."""
        deviations = {name: work.terms.noise_std * scale for name, scale in scales.items()}
        if independent:
            return gaussian_norm(
                [(deviation * math.hypot(*gains[n]), tensors[n].numel()) for n, deviation in deviations.items()]
            )
        return sum(
            sum(gains[n]) * gaussian_norm([(deviation, tensors[n].numel())]) for n, deviation in deviations.items()
        )

    alone = {
        name: clipped_norm(work.terms, records, gains[name]) + noise({name: 1.0}) + drifts[name] for name in active
    }
    norms = {name: (1 + ROUNDING) * _with_tail(name, alone, tails, tensors, work) for name in active}
    scales = {name: 1 / work.rates[name] for name in active if name not in work.personal}
    if any(tails.values()) or not scales:
        return Bounds(norms)
    scaled = {name: dict(zip(active[name], gains[name], strict=True)) for name in scales}
    # All tensors of a step share one clip norm, so the largest gain among them bounds the step.
    shared = [max(scales[name] * scaled[name].get(step, 0.0) for name in scales) for step in range(work.steps)]
    drift = math.sqrt(sum((scale * drifts[name]) ** 2 for name, scale in scales.items()))
    return Bounds(norms, (1 + ROUNDING) * (clipped_norm(work.terms, records, shared) + noise(scales) + drift))


def _adamw(work: Training, tensors: Mapping[str, Tensor], active: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """`Σ_t h_t (R_t + λ |θ_0|)` for each coordinate."""
    decay, (first, second) = work.optimizer.weight_decay, AdamW.BETAS
    reached = {}
    for name, steps in active.items():
        responses = _responses(len(steps), work.rates[name], 0.0, decay)
        moved = powers = 0.0
        for count, response in enumerate(responses, start=1):
            powers += (first**2 / second) ** (count - 1)
            largest = (1 - first) / (1 - first**count) * math.sqrt((1 - second**count) / (1 - second) * powers)
            moved += response * largest
        coordinates = torch.full_like(tensors[name], moved)
        if decay:
            start = math.inf if name in work.personal else tensors[name].abs()
            coordinates += sum(responses) * decay * start
        reached[name] = (1 + ROUNDING) * coordinates
    return reached


def _responses(steps: int, rate: float, momentum: float, pull: float) -> list[float]:
    """`h_e`, `e = 1…E`: how far a unit input in step `e` can move the tensor by the end.

    `w ← μ w + x + pull u`, `u ← u + η w`, where the pull is taken in the worst direction, outwards. All steps are
    alike, so the response to a later step is the response to the first one, shifted.
    """
    velocity = position = 0.0
    after = []
    for step in range(steps):
        velocity = momentum * velocity + (1.0 if step == 0 else 0.0) + pull * position
        position += rate * velocity
        after.append(position)
    return after[::-1]


def _amplification(name: str, work: Training, tensors: Mapping[str, Tensor]) -> float:
    """`κ`: the operator norm of the preconditioner of the noisy gradient; 1 without one."""
    if work.local.damping is None or not is_factor(name):
        return 1.0
    other = other_factor(name)
    if other in work.trained:
        return 1 / work.local.damping
    factor = tensors[other].double()
    gram = factor @ factor.T if is_a(other) else factor.T @ factor
    return 1 / (float(torch.linalg.eigvalsh(gram)[0].clamp(min=0)) + work.local.damping)


def _depends_on_noise(name: str, work: Training, active: Mapping[str, list[int]]) -> bool:
    """Whether the map from gradient to increment depends on the noise of earlier steps."""
    preconditioned = work.local.damping is not None and other_factor(name) in active
    return is_factor(name) and (bool(work.local.tail_penalty) or preconditioned)


def _with_tail(
    name: str,
    alone: Mapping[str, float],
    tails: Mapping[str, float],
    tensors: Mapping[str, Tensor],
    work: Training,
) -> float:
    """Solve `u = a + k (‖other_0‖ + u')`, `u' = a' + k' (‖own_0‖ + u)` for `u`; infinite if there is no solution."""
    if not tails[name]:
        return alone[name]
    other = other_factor(name)
    if {name, other} & set(work.personal):
        return math.inf
    own, k = alone[name] + tails[name] * norm(tensors[other]), tails[name]
    if other not in alone:
        return own
    k_other = tails[other]
    fed = k * (alone[other] + k_other * norm(tensors[name]))
    return (own + fed) / (1 - k * k_other) if k * k_other < 1 else math.inf

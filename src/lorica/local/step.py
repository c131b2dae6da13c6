"""The transformations of a noisy gradient in a local step, in the order in which they are applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorica.adapters.names import factor_a, factor_b, is_a, is_b, is_factor, site_of
from lorica.config import LocalConfig
from lorica.local.preconditioning import precondition
from lorica.local.smoothing import NOISE_ENERGY, smooth
from lorica.privacy.released import Released, post_process


@dataclass(frozen=True)
class LocalStep:
    """The transformations of the noisy gradient `ĝ` of each trained tensor `θ` before the optimiser. All public.

    1. `smoothing`: LA-LoRA's filter (`lorica.local.smoothing`), or `√0.273 ĝ` for comparison. Factors only.
    2. SCAFFOLD: `ĝ + c - c_k`, if the request contains corrections.
    3. `proximal`: FedProx, `ĝ + μ (θ - θ_t)`. As part of the loss, it would be clipped or lost.
    4. `tail_penalty`: HetLoRA's, `ĝ + λ ∂(‖A_t‖ ‖B_t‖)/∂θ` over the ranks after the first `⌊kept r_k⌋`.
    5. `damping`: scaled gradient descent (`lorica.local.preconditioning`).

    Attributes:
        alternate: train B and A alternately, starting with B, and the head in every step.
        perturbation: `ρ` of Flat-LoRA's noise on the frozen weights (`lorica.local.perturbation`).
    """

    alternate: bool = False
    smoothing: Literal["none", "gaussian", "rescale"] = "none"
    proximal: float = 0.0
    tail_penalty: float = 0.0
    kept: float = 1.0
    damping: float | None = None
    perturbation: float = 0.0

    @classmethod
    def of(cls, local: LocalConfig) -> LocalStep:
        """The configured transformations, without those that a method asks for."""
        return cls(
            proximal=local.fedprox, damping=local.damping if local.scaled_gd else None, perturbation=local.flat_lora
        )

    def active(self, trained: tuple[str, ...], step: int) -> list[str]:
        """Names of the tensors trained in a local step, counted from 0."""
        if not self.alternate:
            return list(trained)
        rests = is_a if step % 2 == 0 else is_b
        return [name for name in trained if not rests(name)]


def transform_gradients(
    gradients: Mapping[str, Released],
    values: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    corrections: Mapping[str, Tensor],
    local: LocalStep,
) -> dict[str, Released]:
    """Apply the transformations of `LocalStep` to the noisy gradients.

    Args:
        values: the current tensors of the adapter, functions of public values and earlier releases.
        start: `θ_t`, the trained tensors at the start of the round.
        corrections: name -> `c - c_k`.
    """
    shaped = {}
    for name, gradient in gradients.items():
        if is_factor(name):
            if local.smoothing == "gaussian":
                axis = 1 if is_a(name) else 0
                gradient = post_process(lambda g, axis=axis: smooth(g, axis), gradient)
            elif local.smoothing == "rescale":
                gradient = post_process(lambda g: NOISE_ENERGY**0.5 * g, gradient)
        if name in corrections:
            gradient = post_process(lambda g, name=name: g + corrections[name], gradient)
        if local.proximal:
            gradient = post_process(lambda g, name=name: g + local.proximal * (values[name] - start[name]), gradient)
        if local.tail_penalty and is_factor(name):
            gradient = post_process(lambda g, name=name: g + local.tail_penalty * _tail(name, values, local), gradient)
        damping = local.damping
        if damping is not None and is_factor(name):
            gradient = post_process(lambda g, name=name, d=damping: precondition(name, g, values, d), gradient)
        shaped[name] = gradient
    return shaped


def _tail(name: str, values: Mapping[str, Tensor], local: LocalStep) -> Tensor:
    """Gradient of `‖A_t‖_F ‖B_t‖_F` with respect to one factor: `‖other_t‖ own_t / ‖own_t‖`, zero at zero."""
    site = site_of(name)
    a, b = values[factor_a(site)], values[factor_b(site)]
    kept = math.floor(local.kept * a.shape[0])
    own, other = (a[kept:], b[:, kept:]) if is_a(name) else (b[:, kept:], a[kept:])
    gradient = torch.zeros_like(values[name])
    if bool(own.any()):
        (gradient[kept:] if is_a(name) else gradient[:, kept:]).copy_(other.norm() * own / own.norm())
    return gradient

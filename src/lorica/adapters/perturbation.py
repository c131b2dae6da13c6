"""Flat-LoRA's noise on the frozen weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weight_noise(adapted: Tensor, ratio: float, generator: torch.Generator, transposed: bool) -> Tensor:
    """Noise `ε_ij ~ N(0, ρ² ‖W_i‖² / d_in)` for a frozen weight.

    Flat-LoRA (Li et al., ICML 2025, arXiv 2409.14396): the gradient is taken at `W + ε`, with new noise in every
    step, which favours flat minima of the whole weight. The noise is a function of public and released values, and all
    examples of a step share it, so it has no privacy cost. The generator is seeded by a counter, never by the clock.

    Args:
        adapted: `W = W0 + γ B A`, `(d_out, d_in)`, whose rows determine the scale.
        ratio: `f ρ`.
        transposed: return `(d_in, d_out)`, for a weight that is stored transposed.
    """
    deviation = ratio * adapted.norm(dim=1, keepdim=True) / math.sqrt(adapted.shape[1])
    noise: Tensor = deviation * torch.randn(adapted.shape, generator=generator).to(adapted)
    return noise.T if transposed else noise

"""LA-LoRA's Gaussian low-pass filter on noisy gradients."""

from __future__ import annotations

import torch
from torch import Tensor

KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
NOISE_ENERGY = sum(weight**2 for weight in KERNEL)
"""`70/256 ≈ 0.273`: the fraction of the variance of white noise that remains after filtering."""


def smooth(gradient: Tensor, axis: int) -> Tensor:
    """`Σ_j k_j g_{i+j}` with the kernel `[1, 4, 6, 4, 1]/16` along one axis, with symmetric padding.

    LA-LoRA (arXiv 2602.19926) filters A along `d_in` (axis 1) and B along `d_out` (axis 0). The released code instead
    uses a two-dimensional periodic filter, which mixes ranks, and also applies the unsmoothed step.

    Args:
        gradient: `(m, n)`, with length at least 2 along `axis`.
    """
    moved = gradient.movedim(axis, -1)
    length = moved.shape[-1]
    padded = torch.cat([moved[..., :2].flip(-1), moved, moved[..., -2:].flip(-1)], dim=-1)
    smoothed = sum(weight * padded[..., shift : shift + length] for shift, weight in enumerate(KERNEL))
    assert isinstance(smoothed, Tensor)
    return smoothed.movedim(-1, axis)

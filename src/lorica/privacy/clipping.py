"""Flat clipping of per-example gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Norms are computed in fp32, whose rounding could otherwise leave a clipped gradient slightly above the bound.
ROUNDING_MARGIN = 1e-5


def clipped_sum(gradients: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """`Σ_i g_i · min(1, C/‖g_i‖₂)`, with the norm over all trained tensors together.

    Formal guarantee: adding or removing one example changes the result by at most `C` in L2 norm. Abadi et al.,
    arXiv 1607.00133, Algorithm 1.

    | example's gradient | contribution |
    |---|---|
    | zero | zero |
    | norm at most C (less the rounding margin of 1e-5) | itself |
    | larger norm | scaled to norm C (1 - 1e-5) |
    | NaN or inf anywhere, or a norm that overflows fp32 | zero |

    Args:
        gradients: name -> `(n, *shape)`, fp32.
        clip_norm: `C`; `inf` sums without clipping (non-finite examples still contribute zero).

    Returns:
        name -> `(*shape)`, fp32.
    """
    flat = {name: gradient.flatten(1) for name, gradient in gradients.items()}
    norms = torch.stack([torch.linalg.vector_norm(gradient, dim=1) for gradient in flat.values()])
    norms = torch.linalg.vector_norm(norms, dim=0)
    finite = torch.isfinite(norms)
    scale = torch.where(finite, (clip_norm * (1 - ROUNDING_MARGIN) / norms).clamp(max=1.0), 0.0)
    if not bool(finite.all()):
        # 0 · NaN is NaN, so a zero weight is not enough.
        flat = {name: torch.where(finite[:, None], gradient, 0.0) for name, gradient in flat.items()}
    return {name: (scale @ gradient).reshape(gradients[name].shape[1:]) for name, gradient in flat.items()}

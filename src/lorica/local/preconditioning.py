"""Scaled gradient descent on the factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.adapters.names import is_a, other_factor


def precondition(name: str, gradient: Tensor, values: Mapping[str, Tensor], damping: float) -> Tensor:
    """`(BᵀB + δI)⁻¹ G` for a factor A, `G (AAᵀ + δI)⁻¹` for a factor B.

    Without damping, the step in `W` is the projection of the gradient on the span of the other factor, whatever that
    factor's size. The noise is projected likewise, which is DEeR's noise regulator (arXiv 2410.12926). It is applied to
    isotropic noise that has already been added; adding noise of this shape instead would give no guarantee where the
    factor is large. The amplification by a small factor is at most `1/δ`, which matters because B starts at zero. Tong,
    Ma and Chi, arXiv 2005.08898; Zhang and Pilanci, arXiv 2402.02347.

    Args:
        name: `SITE.A` or `SITE.B`.
        gradient: `(r, d_in)` or `(d_out, r)`, like the factor.
        values: the adapter's current tensors.
    """
    other = values[other_factor(name)].to(gradient)
    gram = other.T @ other if is_a(name) else other @ other.T
    damped = gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    scaled: Tensor = torch.linalg.solve(damped, gradient, left=is_a(name))
    return scaled

"""Scaled gradient descent on the factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.adapters.names import is_a, other_factor


def precondition(name: str, gradient: Tensor, values: Mapping[str, Tensor], damping: float) -> Tensor:
    """`(BᵀB + δI)⁻¹ G` for a factor A, `G (AAᵀ + δI)⁻¹` for a factor B.

    Without damping the step in `W` is the gradient's projection on the space that the other factor spans, whatever that
    factor's size; and so is the noise, which is DEeR's noise regulator (arXiv 2410.12926). It acts on isotropic noise
    after the fact: noise that is drawn in this shape to begin with gives no guarantee where the factor is large.
    `δ` bounds what a small factor does: B starts at zero, and noise would be multiplied by `1/δ`. Tong, Ma and Chi,
    arXiv 2005.08898; Zhang and Pilanci, arXiv 2402.02347.

    Args:
        name: `SITE.A` or `SITE.B`.
        gradient: of the factor's shape.
        values: the adapter's current tensors.
    """
    other = values[other_factor(name)].to(gradient)
    gram = other.T @ other if is_a(name) else other @ other.T
    damped = gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    scaled: Tensor = torch.linalg.solve(damped, gradient, left=is_a(name))
    return scaled

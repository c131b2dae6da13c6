"""Flat clipping of per-example gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# Rounding errors relative to the bound C, with u = 2⁻⁵³ and any order of summation (Higham, Accuracy and Stability of
# Numerical Algorithms, section 4.2): the norm of d coordinates is off by a factor of at most 1 + d·u, and the sum of n
# clipped gradients by at most n·u·nC in norm, once with an example and once without it. The margin covers d up to 10¹⁰
# together with n up to 200,000.
ROUNDING_MARGIN = 1e-5
# Number of values converted to fp64 at a time: 8 MiB.
CHUNK = 2**20


def clipped_sum(gradients: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """`Σ_i g_i · min(1, C/‖g_i‖₂)`, with the norm over all trained tensors together.

    Formal guarantee: replacing one example's gradients by zeros changes the result by at most `C` in L2 norm, rounding
    included. Abadi et al., arXiv 1607.00133, Algorithm 1.

    | example's gradient | contribution |
    |---|---|
    | zero | zero |
    | norm at most C (less the rounding margin of 1e-5) | itself |
    | larger norm | scaled to norm C (1 - 1e-5) |
    | NaN or inf anywhere | zero |

    Args:
        gradients: name -> `(n, *shape)`, fp32.
        clip_norm: `C`; `inf` sums without clipping (non-finite examples still contribute zero).

    Returns:
        name -> `(*shape)`, fp64. A caller that adds up several sums stays in fp64 until the noise is added: rounded to
        fp32, sums of many examples could differ by more than C.
    """
    flat = {name: gradient.flatten(1) for name, gradient in gradients.items()}
    squares: Tensor | float = 0.0
    for gradient in flat.values():
        for chunk in _chunks(gradient):
            squares = squares + torch.linalg.vector_norm(chunk, dim=1, dtype=torch.float64).square()
    norms = torch.as_tensor(squares, dtype=torch.float64).sqrt()
    finite = torch.isfinite(norms)
    scale = torch.where(finite, (clip_norm * (1 - ROUNDING_MARGIN) / norms).clamp(max=1.0), 0.0)
    return {
        name: torch.cat([_weighted(chunk, scale, ~finite[:, None]) for chunk in _chunks(gradient)]).reshape(
            gradients[name].shape[1:]
        )
        for name, gradient in flat.items()
    }


def _weighted(chunk: Tensor, scale: Tensor, spoiled: Tensor) -> Tensor:
    # 0 · NaN is NaN, so a zero weight is not enough. Not asked whether there is any: a GPU would have to be waited for.
    return scale @ chunk.to(torch.float64, copy=True).masked_fill_(spoiled, 0.0)


def _chunks(gradient: Tensor) -> Iterator[Tensor]:
    """Split `(n, d)` into pieces `(n, k)` of at most `CHUNK` values, or of one column."""
    return iter(torch.split(gradient, max(1, CHUNK // max(1, len(gradient))), dim=1))

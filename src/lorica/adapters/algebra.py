"""Algebra of low-rank products `B A` in factor space, without forming a `d_out × d_in` matrix.

Decompositions are computed in fp64; new factors are returned in the precision of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lorica.adapters.names import Pair

SINGULAR = 1e-6
"""A singular value so small beside the largest one is rounding of fp32 factors."""


def weighted_sum(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """`Σ_k w_k X_k`, summed in the given order. Smaller tensors are padded with zeros at the end of each axis.

    >>> weighted_sum([(0.25, torch.tensor([4.0, 8.0])), (0.75, torch.tensor([4.0]))])
    tensor([4., 2.])
    """
    largest = [max(sizes) for sizes in zip(*(value.shape for _, value in terms), strict=True)]
    total = terms[0][1].new_zeros(largest)
    for weight, value in terms:
        total[tuple(slice(size) for size in value.shape)].add_(value, alpha=weight)
    return total


def padded(value: Tensor, shape: Iterable[int]) -> Tensor:
    """`value` padded with zeros at the end of each axis, up to `shape`."""
    filled = value.new_zeros(tuple(shape))
    filled[tuple(slice(size) for size in value.shape)] = value
    return filled


def stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """`(B, A)` of rank `Σ r_k` with `B A = Σ_k w_k B_k A_k`: `B = [B_1 … B_K]`, `A = [w_1 A_1; …; w_K A_K]`.

    Only one of the factors is multiplied by the weight; on both it would count twice.

    >>> ones = torch.ones(2, 1), torch.ones(1, 2)
    >>> b, a = stacked([ones, ones], weights=[0.25, 0.75])
    >>> b.shape, b @ a
    (torch.Size([2, 2]), tensor([[1., 1.],
            [1., 1.]]))
    """
    b = torch.cat([b for b, _ in pairs], dim=1)
    a = torch.cat([weight * a for weight, (_, a) in zip(weights, pairs, strict=True)], dim=0)
    return b, a


def product_svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD `U, s, Vᵀ` of `B A` without forming it: QR of both factors, then the SVD of the small `R_B R_Aᵀ`.

    With `R` columns of B, the cost is `O((d_out + d_in) R² + R³)` instead of `O(d_out d_in min(d_out, d_in))`. FLoRIST
    (MLSys 2026) uses the same identity.

    Returns:
        `U (d_out, q)`, `s (q,)` descending, `Vᵀ (q, d_in)`, fp64, with `q = min(R, d_out, d_in)`.

    >>> _, s, _ = product_svd((torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2)))
    >>> s
    tensor([3., 1.], dtype=torch.float64)
    """
    b, a = pair[0].double(), pair[1].double()
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def truncated(pair: Pair, rank: int, balanced: bool = False) -> Pair:
    """`(B, A)` of the best rank-`rank` approximation of a product (Eckart and Young), padded with zeros if needed.

    `B = U_r S_r`, `A = V_rᵀ` with orthonormal rows; `balanced` splits `S` evenly, `U_r S_r^½` and `S_r^½ V_rᵀ`.

    >>> b, a = truncated((torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2)), rank=1)
    >>> b @ a
    tensor([[0., 0.],
            [0., 3.]])
    """
    return _split(*product_svd(pair), rank, balanced, pair[0])


def principal(weight: Tensor, rank: int) -> Pair:
    """`(B, A)` of the best rank-`rank` approximation of a matrix, `U_r S_r^½` and `S_r^½ V_rᵀ`, by a dense SVD in fp64.

    >>> b, a = principal(torch.diag(torch.tensor([1.0, 4.0])), rank=1)
    >>> (b @ a).abs(), b.abs()
    (tensor([[0., 0.],
            [0., 4.]]), tensor([[0.],
            [2.]]))
    """
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return _split(u, s, vt, rank, True, weight)


def truncated_dense(pair: Pair, rank: int) -> Pair:
    """As `truncated`, through a dense SVD in the inputs' precision: slower, to compare the cost."""
    u, s, vt = torch.linalg.svd(pair[0] @ pair[1], full_matrices=False)
    return _split(u, s, vt, rank, False, pair[0])


def orthonormal(rows: int, columns: int, draws: np.random.Generator) -> Tensor:
    """A random matrix with orthonormal columns (`rows ≥ columns`), Haar distributed, fp32.

    QR of a Gaussian matrix, with the signs of R's diagonal moved into Q. Mezzadri, arXiv math-ph/0609050.
    """
    q, r = torch.linalg.qr(torch.from_numpy(draws.standard_normal((rows, columns))))
    unique: Tensor = q * r.diagonal().sign()
    return unique.float()


def with_orthonormal_rows(pair: Pair, scale: float) -> Pair:
    """The same product `B A` with `scale` times orthonormal rows of A: `Aᵀ = Q R`, `A ← s Qᵀ`, `B ← B Rᵀ / s`.

    R has a non-negative diagonal, so the factors do not depend on the signs that a library chooses. If A has dependent
    rows, Q has arbitrary orthonormal columns in their place, and the columns of B for these are zero.

    Raises:
        ValueError: A has more rows than columns.

    >>> with_orthonormal_rows((torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]])), scale=1.0)
    (tensor([[10.]]), tensor([[0.6000, 0.8000]]))
    """
    a, b = with_orthonormal_columns((pair[1].T, pair[0].T), scale)
    return b.T.contiguous(), a.T.contiguous()


def with_orthonormal_columns(pair: Pair, scale: float) -> Pair:
    """The same product `B A` with `scale` times orthonormal columns of B: `B = Q R`, `B ← s Q`, `A ← R A / s`.

    As `with_orthonormal_rows`, with the factors' roles exchanged.

    Raises:
        ValueError: B has more columns than rows.
    """
    b, a = pair[0].double(), pair[1].double()
    if b.shape[0] < b.shape[1]:
        raise ValueError(f"{b.shape[1]} vectors of {b.shape[0]} numbers cannot be orthonormal")
    q, r = torch.linalg.qr(b)
    # Not `sign`: it is zero where the diagonal is zero, and Q has to stay orthonormal.
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    # LAPACK's Q is stored by columns.
    return (scale * q * signs).contiguous().to(pair[0]), (signs[:, None] * r @ a / scale).to(pair[1])


def inner(first: Pair, second: Pair) -> float:
    """`⟨B₁ A₁, B₂ A₂⟩ = Σ (B₁ᵀ B₂) ∘ (A₁ A₂ᵀ)`, the inner product of two products, fp64.

    >>> inner((torch.eye(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]])), (torch.eye(2), torch.eye(2)))
    2.0
    """
    b = first[0].double().T @ second[0].double()
    a = first[1].double() @ second[1].double().T
    return float((b * a).sum())


def rotation_towards(value: Tensor, reference: Tensor) -> Tensor:
    """The rotation `R (r, r)` that minimises `‖Rᵀ X - X_ref‖_F`, with `det R = 1` (Kabsch's algorithm), fp64.

    `U Vᵀ` of `X X_refᵀ`; if that is a reflection, the direction of the smallest singular value is turned round. Where
    `X X_refᵀ` is singular the minimiser is not unique, and R is the identity.

    Args:
        value, reference: `(r, n)`, as a factor A; pass the transpose of a factor B.

    >>> value, quarter_turn = torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> rotation_towards(value, quarter_turn) @ quarter_turn.double()
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    >>> rotation_towards(value, torch.zeros(2, 2))
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    u, s, vt = torch.linalg.svd(value.double() @ reference.double().T)
    if s[-1] <= SINGULAR * s[0]:
        return torch.eye(len(s), dtype=s.dtype)
    signs = torch.ones_like(s)
    signs[-1] = torch.linalg.det(u @ vt).sign()
    rotation: Tensor = (u * signs) @ vt
    return rotation


def _split(u: Tensor, s: Tensor, vt: Tensor, rank: int, balanced: bool, like: Tensor) -> Pair:
    kept = min(rank, s.numel())
    left, right = (s[:kept].sqrt(), s[:kept].sqrt()) if balanced else (s[:kept], torch.ones_like(s[:kept]))
    b, a = u[:, :kept] * left, right[:, None] * vt[:kept]
    return padded(b, (b.shape[0], rank)).to(like), padded(a, (rank, a.shape[1])).to(like)

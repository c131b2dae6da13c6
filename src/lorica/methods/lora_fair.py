"""LoRA-FAIR: average both factors, and correct B for the error of that."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.algebra import stacked
from lorica.adapters.names import Pair
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.components import OWN_AGGREGATION, SAME_RANKS, SINGLE_REPLIES
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server, client_factors


class LoRAFair(Method):
    """LoRA-FAIR (ICCV 2025, arXiv 2411.14961).

    Idea: average both factors, then correct B so that `(B̄ + ΔB) Ā` is close to the mean product `M = Σ w_k B_k A_k`.
    The correction is penalised, to stay near the mean from which clients start.
    Travels: A and B, both ways. Aggregation is approximate: the part of M outside the row space of Ā is lost.
    DP: sound; the correction is post-processing, but M contains the product of the two noises.

    `solver: closed-form` is regularised least squares, `ΔB = (M - B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹`. `iterative` minimises the
    paper's objective, `1 - cos(M, (B̄ + ΔB) Ā) + λ ‖ΔB‖²`, by gradient descent. Both work in factor space: inner
    products of products are traces of small matrices.
    """

    name = "lora-fair"
    about = About(
        paper="LoRA-FAIR",
        arxiv="2411.14961",
        trains="A and B",
        sends="A and B",
        exact=False,
        privacy="sound; noise quadratic",
    )
    refuses = SAME_RANKS | OWN_AGGREGATION | SINGLE_REPLIES

    class Options(Strict):
        solver: Literal["closed-form", "iterative"] = "closed-form"
        """Least squares, or gradient descent on the cosine objective of the paper."""
        regularisation: float = Field(0.01, gt=0)
        """`λ`: strength of the penalty on the correction."""
        iterations: int = Field(100, ge=1)
        """Number of steps of the iterative solver."""
        lr: float = Field(0.01, gt=0)
        """Learning rate of the iterative solver."""

    options: Options

    def round(self, server: Server) -> Round:
        replies = yield Train("AB")
        products = {}
        for site in self.sites:
            factors = client_factors(server, replies, site, {})
            products[site.name] = stacked(list(factors.values()), [replies.weights[client] for client in factors])
        server.model.add(replies.mean)
        for site in self.sites:
            b, a = server.model.tensors[site.b], server.model.tensors[site.a]
            server.model.add({site.b: self._correction(products[site.name], b.double(), a.double()).to(b)})

    def _correction(self, product: Pair, b: Tensor, a: Tensor) -> Tensor:
        target_b, target_a = product[0].double(), product[1].double()
        if self.options.solver == "closed-form":
            residual = target_b @ (target_a @ a.T) - b @ (a @ a.T)
            gram = a @ a.T + self.options.regularisation * torch.eye(a.shape[0], dtype=a.dtype)
            correction: Tensor = torch.linalg.solve(gram, residual, left=False)
            return correction
        return descend(target_b, target_a, b, a, self.options.regularisation, self.options.iterations, self.options.lr)


def descend(
    target_b: Tensor, target_a: Tensor, b: Tensor, a: Tensor, regularisation: float, iterations: int, rate: float
) -> Tensor:
    """Gradient descent on `1 - cos(B_s A_s, (B + ΔB) A) + λ ‖ΔB‖²` from `ΔB = 0`.

    `⟨B_s A_s, B A⟩ = tr(B_sᵀ B · A A_sᵀ)`; where either product is zero the cosine has no direction and the correction
    is 0.
    """
    correction = torch.zeros_like(b)
    cross, gram = target_a @ a.T, a @ a.T
    scale = ((target_b.T @ target_b) * (target_a @ target_a.T)).sum().sqrt()
    if scale == 0 or not bool((b @ gram).any()):
        return correction
    for _ in range(iterations):
        moved = (b + correction).requires_grad_()
        with torch.enable_grad():
            inner = ((target_b.T @ moved) * cross).sum()
            length = ((moved.T @ moved) * gram).sum().sqrt()
            loss = 1 - inner / (scale * length) + regularisation * (moved - b).square().sum()
            (gradient,) = torch.autograd.grad(loss, moved)
        correction = correction - rate * gradient
    return correction

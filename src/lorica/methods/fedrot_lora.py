"""FedRot-LoRA: rotate the clients' factors into one basis before they are averaged."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.algebra import rotation_towards, weighted_sum
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.components import OWN_AGGREGATION, SAME_RANKS, SINGLE_REPLIES
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server, client_factors


class FedRotLoRA(Method):
    """FedRot-LoRA (arXiv 2602.23638).

    Idea: `B_k A_k = (B_k R)(Rᵀ A_k)` for every orthogonal R, so clients can differ in basis alone, and averaging the
    factors then destroys what they agree on. So each client's factors are first rotated towards the last global A, with
    `R_k = argmin ‖Rᵀ A_k - A_t‖_F` (Procrustes), and then averaged.
    Travels: A and B, both ways. Aggregation is inexact, but less so than in FedAvg.
    DP: sound; rotations are functions of uploads. Noise on A and B multiplies.

    A soft alignment `λ` rotates only part of the way, by the orthogonal matrix nearest to `(1 - λ) I + λ R_k`. The
    paper uses 0.4 to 0.6.
    """

    name = "fedrot-lora"
    about = About(
        paper="FedRot-LoRA",
        arxiv="2602.23638",
        trains="A and B",
        sends="A and B",
        exact=False,
        privacy="sound; noise quadratic",
    )
    refuses = SAME_RANKS | OWN_AGGREGATION | SINGLE_REPLIES

    class Options(Strict):
        alignment: float = Field(0.5, ge=0, le=1)
        """`λ`: 0 is FedAvg, 1 the full rotation."""

    options: Options

    def round(self, server: Server) -> Round:
        replies = yield Train("AB")
        for site in self.sites:
            reference = server.model.tensors[site.a]
            rotated = []
            for client, (b, a) in client_factors(server, replies, site, {}).items():
                r = self._rotation(a, reference).to(a)
                rotated.append((replies.weights[client], b @ r, r.T @ a))
            server.model.assign(
                {
                    site.b: weighted_sum([(weight, b) for weight, b, _ in rotated]),
                    site.a: weighted_sum([(weight, a) for weight, _, a in rotated]),
                }
            )
        server.step_head(replies)

    def _rotation(self, a: Tensor, reference: Tensor) -> Tensor:
        full = rotation_towards(a, reference)
        soft = (1 - self.options.alignment) * torch.eye(full.shape[0], dtype=full.dtype) + self.options.alignment * full
        u, _, vt = torch.linalg.svd(soft)
        rotation: Tensor = u @ vt
        return rotation

"""FedRot-LoRA: rotate the clients' factors into one basis before they are averaged."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lorica.adapters.algebra import SINGULAR, rotation_towards, weighted_sum
from lorica.adapters.names import Pair
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.components import OWN_AGGREGATION, SAME_RANKS, SINGLE_REPLIES
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server, client_factors


class FedRotLoRA(Method):
    """FedRot-LoRA (ICML 2026, arXiv 2602.23638).

    Idea: `B_k A_k = (B_k R)(Rᵀ A_k)` for every rotation R, so clients can differ in basis alone, and averaging the
    factors then destroys what they agree on. So each client's factors are first rotated towards a factor of the last
    global model (Procrustes), and then averaged. The reference alternates: `R_k = argmin ‖Rᵀ A_k - A_t‖_F` in even
    rounds, `R_k = argmin ‖B_k R - B_t‖_F` in odd rounds.
    Travels: A and B, both ways. Aggregation is inexact, but less so than in FedAvg.
    DP: sound; rotations are functions of uploads. Noise on A and B multiplies.

    R has determinant 1: reflections are excluded. Nothing is rotated while the global B is zero, as in the first round,
    nor at a site where the minimum is not unique. A soft alignment `λ` rotates only part of the way, by the orthogonal
    matrix nearest to `(1 - λ) I + λ R_k`. The paper uses 0.4 to 0.6.

    Where the released code differs: clients rotate before they send. Its default `λ` is above 1, which takes a branch
    that allows reflections. Which factor is the reference first is an option there; here it is A, since B is small at
    the start.
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
            before = server.model.tensors[site.b], server.model.tensors[site.a]
            rotated = []
            for client, (b, a) in client_factors(server, replies, site, {}).items():
                r = self._rotation((b, a), before, by_a=server.round % 2 == 0).to(a)
                rotated.append((replies.weights[client], b @ r, r.T @ a))
            server.model.assign(
                {
                    site.b: weighted_sum([(weight, b) for weight, b, _ in rotated]),
                    site.a: weighted_sum([(weight, a) for weight, _, a in rotated]),
                }
            )
        server.step_head(replies)

    def _rotation(self, pair: Pair, reference: Pair, by_a: bool) -> Tensor:
        identity = torch.eye(len(pair[1]), dtype=torch.float64)
        if not bool(reference[0].any()):
            return identity
        full = rotation_towards(pair[1], reference[1]) if by_a else rotation_towards(pair[0].T, reference[0].T)
        u, s, vt = torch.linalg.svd((1 - self.options.alignment) * identity + self.options.alignment * full)
        # Half of a half-turn: both ways round are equally near.
        return identity if s[-1] <= SINGULAR else u @ vt

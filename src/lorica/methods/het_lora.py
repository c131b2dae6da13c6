"""HetLoRA: ranks that differ, zero-padding, self-pruning."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field
from torch import Tensor

from lorica.adapters.algebra import padded, weighted_sum
from lorica.adapters.names import Pair
from lorica.adapters.sites import Site
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.components import OWN_AGGREGATION, SINGLE_REPLIES
from lorica.methods.exchange import Replies, Round, Train
from lorica.methods.server import Server, client_factors


class HetLoRA(Method):
    """HetLoRA (EMNLP 2024, arXiv 2401.06432).

    Idea: a client of rank `r_k` trains the first `r_k` ranks of the global factors. The server pads the uploads with
    zeros and averages each factor with weights `w_k ∝ ‖B_k A_k‖_F`. Two rules let a client find its rank: a penalty on
    the last ranks, `λ ‖B_t‖ ‖A_t‖` with the tail after `γ r_k`, and pruning to `⌊γ r_k⌋` ranks where the tail's product
    shrank.
    Travels: A and B of the client's rank, both ways. Aggregation is inexact.
    DP: sound. The penalty's gradient is added to the noisy gradient; norms and pruning are functions of uploads,
    computed by the server. Norms of noisy factors are dominated by the noise; `norm_weights: false` uses
    `federation.weights` instead.

    All ranks share the scale γ of the largest. A rank never grows again.
    """

    name = "het-lora"
    about = About(
        paper="HetLoRA",
        arxiv="2401.06432",
        trains="A and B, any rank, self-pruning",
        sends="A and B",
        exact=False,
        privacy="sound; noise quadratic",
    )
    refuses = OWN_AGGREGATION | SINGLE_REPLIES

    class Options(Strict):
        norm_weights: bool = True
        """Weight clients by `‖B_k A_k‖_F` over all sites; if false, by `federation.weights`."""
        pruning: float = Field(0.99, gt=0, le=1)
        """`γ`: the fraction of its ranks that a client keeps when it prunes; 1 never prunes."""
        penalty: float = Field(0.0, ge=0)
        """`λ` of the penalty on the last ranks."""
        smallest_rank: int = Field(1, ge=1)
        """Minimum rank: no client prunes below it."""

    options: Options

    def __init__(self, options: BaseModel, sites: list[Site]) -> None:
        super().__init__(options, sites)
        self.ranks: dict[int, int] = {}

    def round(self, server: Server) -> Round:
        full = self.sites[0].rank
        ranks = {client: self.ranks.get(client, server.ranks.get(client, full)) for client in server.terms}
        local = replace(server.local, tail_penalty=self.options.penalty, kept=self.options.pruning)
        replies = yield Train("AB", ranks=ranks, local=local)
        factors = {site: client_factors(server, replies, site, ranks) for site in self.sites}
        before = {site: (server.model.tensors[site.b], server.model.tensors[site.a]) for site in self.sites}
        weights = self._weights(factors, replies)
        for site, pairs in factors.items():
            b = weighted_sum([(weights[client], pair[0]) for client, pair in pairs.items()])
            a = weighted_sum([(weights[client], pair[1]) for client, pair in pairs.items()])
            start_b, start_a = before[site]
            # If every client has pruned, the last ranks have no update.
            server.model.assign({site.b: padded(b, start_b.shape), site.a: padded(a, start_a.shape)})
        for client in replies.updates:
            self.ranks[client] = self._next_rank(client, ranks[client], factors, before)
        server.step_head(replies)

    def _weights(self, factors: dict[Site, dict[int, Pair]], replies: Replies) -> dict[int, float]:
        if not self.options.norm_weights:
            return dict(replies.weights)
        clients = sorted(replies.updates)
        norms = {c: math.sqrt(sum(_energy(*factors[site][c]) for site in factors)) for c in clients}
        total = sum(norms.values())
        return {client: norm / total for client, norm in norms.items()} if total > 0 else dict(replies.weights)

    def _pruned(self, rank: int) -> int:
        return max(min(self.options.smallest_rank, rank), math.floor(self.options.pruning * rank))

    def _next_rank(self, client: int, rank: int, factors: dict[Site, dict[int, Pair]], before: dict[Site, Pair]) -> int:
        kept = self._pruned(rank)
        after = sum(_energy(b[:, kept:], a[kept:]) for b, a in (factors[site][client] for site in factors))
        start = sum(_energy(b[:, kept:rank], a[kept:rank]) for b, a in before.values())
        return kept if after < start else rank

    def decisions(self) -> dict[str, object]:
        return {"ranks": {str(client): rank for client, rank in sorted(self.ranks.items())}}

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": {str(client): rank for client, rank in self.ranks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ranks = {int(client): rank for client, rank in state["ranks"].items()}


def _energy(b: Tensor, a: Tensor) -> float:
    """`‖B A‖_F²` in factor space: `tr(BᵀB · A Aᵀ)`."""
    return float(((b.T @ b) * (a @ a.T)).sum())

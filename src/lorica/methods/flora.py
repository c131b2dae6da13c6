"""FLoRA: stack the clients' factors into the frozen weight and start again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorica.adapters.algebra import stacked
from lorica.methods.base import About, Method
from lorica.methods.components import MERGES, NEW_BASIS, OWN_AGGREGATION, SINGLE_REPLIES
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server, client_factors


class FLoRA(Method):
    """FLoRA (NeurIPS 2024, arXiv 2409.05976).

    Idea: each round starts from a fresh random A and `B = 0` of the client's rank. The server stacks what clients send,
    `W0 ← W0 + γ [B_1 … B_K] [w_1 A_1; …; w_K A_K]`, which is exactly the weighted mean of the products, for any ranks.
    Travels: A and B up; the stack of all clients' factors and the fresh A down.
    DP: sound under the canonical step, but the noise on A and B multiplies. In each round's first step A has no
    gradient, since B is zero, so this step of A is pure noise.

    The fresh A has PEFT's initialisation, `U(-1/√d_in, 1/√d_in)`, from the public seed. It is sent, so that all clients
    have the same bits. Only A is multiplied by the weights.

    Where the released code differs: it has no DP. Its FedIT baseline is broken (because of a misspelt accumulator, only
    client 0 counts).
    """

    name = "flora"
    about = About(
        paper="FLoRA",
        arxiv="2409.05976",
        trains="A and B, fresh in each round, any rank",
        sends="A and B up; the stack of all down",
        exact=True,
        privacy="sound; noise quadratic",
    )
    refuses = OWN_AGGREGATION | NEW_BASIS | MERGES | SINGLE_REPLIES
    merges = True

    def round(self, server: Server) -> Round:
        replies = yield Train("AB", ranks=server.ranks)
        increments = {}
        for site in self.sites:
            factors = client_factors(server, replies, site, server.ranks)
            increments[site.name] = stacked(list(factors.values()), [replies.weights[client] for client in factors])
        server.model.merge(increments)
        server.model.assign(self._fresh(server))
        server.step_head(replies)

    def _fresh(self, server: Server) -> dict[str, Tensor]:
        draws = server.generator("flora")
        fresh = {}
        for site in self.sites:
            bound = 1 / math.sqrt(site.d_in)
            fresh[site.a] = torch.from_numpy(draws.uniform(-bound, bound, (site.rank, site.d_in))).float()
            fresh[site.b] = torch.zeros(site.d_out, site.rank)
        return fresh

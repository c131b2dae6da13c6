"""FRLoRA: start every round from the weight's principal factors, and add the change to the weight."""

from __future__ import annotations

import torch

from lorica.adapters.algebra import principal, stacked
from lorica.adapters.state import AdapterState
from lorica.methods.base import About, Method
from lorica.methods.components import MERGES, SAME_RANKS
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class FRLoRA(Method):
    """FRLoRA (Yan et al., ICLR 2025, OpenReview e0rQRMUhs7; no arXiv version).

    Idea: each round starts from the principal factors of the pre-trained weight, `γ B₀ A₀ = U_r S_r V_rᵀ`, beside the
    rest of it, `W0 - γ B₀ A₀`. The server averages both factors and adds the change of their product to the weight of
    all clients, `W ← W + γ (B̄ Ā - B₀ A₀)`; then A and B are set back. So the update's rank grows with the rounds, and
    clients drift less, since all of them start along the same directions.
    Travels: A and B up; the change, of rank 2 r, down. Aggregation is inexact, as in FedAvg.
    DP: sound; B₀ and A₀ are functions of public weights. The noise on A and the noise on B multiply, and since neither
    starts at zero, both also reach the weight from the first step. Noise accumulates in the weight over rounds.

    The singular values are split evenly, `B₀ = U_r (S_r/γ)^½`. The server computes them by a dense SVD of each weight
    when a run starts or resumes, and sends them. A run from another adapter (`lora.start`) keeps its product in the
    weight.

    Where the released code differs: it has no DP, and weights all clients equally.
    """

    name = "frlora"
    about = About(
        paper="FRLoRA",
        arxiv="ICLR 2025",
        trains="A and B, from the weight's principal factors in each round",
        sends="A and B up; their change of the weight, of rank 2 r, down",
        exact=False,
        privacy="sound; noise quadratic",
    )
    refuses = SAME_RANKS | MERGES
    merges = True

    def start(self, model: AdapterState, seed: int) -> None:
        for site in self.sites:
            before = model.tensors[site.b], model.tensors[site.a]
            b, a = principal(model.frozen_weight(site) / site.scale, site.rank)
            model.assign({site.b: b, site.a: a})
            pairs = [before, (b, a)] if bool(before[0].any()) else [(b, a)]
            model.merge({site.name: stacked(pairs, [1.0, -1.0][-len(pairs) :])})

    def round(self, server: Server) -> Round:
        replies = yield Train("AB")
        update = server.refined(replies)
        for site in self.sites:
            b, a = server.model.tensors[site.b], server.model.tensors[site.a]
            # (B₀ + U_B)(A₀ + U_A) - B₀ A₀, without the difference of two large products.
            change = torch.cat([update[site.b], b], dim=1), torch.cat([a + update[site.a], update[site.a]])
            server.model.merge({site.name: change})
        server.model.add({name: update[name] for name in server.model.head})

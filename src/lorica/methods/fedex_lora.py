"""FedEx-LoRA: average both factors, and add the residual to the frozen weight."""

from __future__ import annotations

from lorica.adapters.algebra import stacked
from lorica.methods.base import About, Method
from lorica.methods.components import MERGES, OWN_AGGREGATION, SAME_RANKS, SINGLE_REPLIES
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class FedExLoRA(Method):
    """FedEx-LoRA (ACL 2025, arXiv 2410.09432).

    Idea: average both factors as in FedAvg, and add the residual to the frozen weight,
    `W0 ← W0 + γ (Σ w_k B_k A_k - B̄ Ā)`, so that the model is exactly the mean of the clients' models.
    Travels: A and B up; A, B and the residual in factored form down, `K r (d_in + d_out)` per site.
    DP: sound; the residual is post-processing, but it contains the product of the two noises.

    The residual is `Σ w_k (B_k - B̄)(A_k - Ā)`. It is computed from the updates' deviations, which avoids the
    cancellation of two nearly equal products.

    Where the released code differs: it transposes the residual for every model, which is right for GPT-2's Conv1D and
    silently wrong for square linear maps.
    """

    name = "fedex-lora"
    about = About(
        paper="FedEx-LoRA",
        arxiv="2410.09432",
        trains="A and B",
        sends="A and B up; A, B and a residual of rank K r down",
        exact=True,
        privacy="sound; noise quadratic",
    )
    refuses = SAME_RANKS | OWN_AGGREGATION | MERGES | SINGLE_REPLIES
    merges = True

    def round(self, server: Server) -> Round:
        replies = yield Train("AB")
        mean = replies.mean
        clients = sorted(replies.updates)
        increments = {}
        for site in self.sites:
            updates = [replies.updates[client] for client in clients]
            deviations = [(update[site.b] - mean[site.b], update[site.a] - mean[site.a]) for update in updates]
            increments[site.name] = stacked(deviations, [replies.weights[client] for client in clients])
        server.model.merge(increments)
        server.model.add(mean)

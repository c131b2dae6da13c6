"""FlexLoRA: average the full updates, truncate by SVD."""

from __future__ import annotations

from lorica.adapters.algebra import stacked, truncated
from lorica.methods.base import About, Method
from lorica.methods.components import NEW_BASIS, OWN_AGGREGATION, SINGLE_REPLIES
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server, client_factors


class FlexLoRA(Method):
    """FlexLoRA (NeurIPS 2024, arXiv 2402.11505).

    Idea: `M = Σ w_k B_k A_k` is the mean of the full updates, whatever the clients' ranks. With `U S Vᵀ = M`, a client
    of rank `r_k` gets `A = V_{r_k}ᵀ`, `B = U_{r_k} S_{r_k}`. The sum is exact, the truncation is not.
    Travels: A and B of the client's rank, both ways.
    DP: sound under the canonical step, but noise on A and B multiplies, and where the ranks of many clients add up, the
    leading singular directions of M are those of the noise.

    M is never formed: the method uses a QR of the stacked factors and an SVD of size `R × R`, `R = Σ r_k` (FLoRIST's
    identity). All ranks share the scale γ of the largest, as the sum over clients requires.

    Where the released code differs: it forms M and computes its dense SVD.
    """

    name = "flex-lora"
    about = About(
        paper="FlexLoRA",
        arxiv="2402.11505",
        trains="A and B, any rank",
        sends="A and B",
        exact=False,
        privacy="sound; noise quadratic",
    )
    refuses = OWN_AGGREGATION | NEW_BASIS | SINGLE_REPLIES

    def round(self, server: Server) -> Round:
        replies = yield Train("AB", ranks=server.ranks)
        for site in self.sites:
            factors = client_factors(server, replies, site, server.ranks)
            pairs, weights = list(factors.values()), [replies.weights[client] for client in factors]
            b, a = truncated(stacked(pairs, weights), site.rank)
            server.model.assign({site.b: b, site.a: a})
        server.step_head(replies)

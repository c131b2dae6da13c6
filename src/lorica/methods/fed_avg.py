"""FedAvg of LoRA factors."""

from __future__ import annotations

from lorica.methods.base import About, Method
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class FedAvg(Method):
    """FedIT (Zhang et al., arXiv 2305.05644) and, under DP, DP-LoRA (Liu et al., arXiv 2312.17493).

    Idea: train both factors on every client and average each of them: `A ← Σ w_k A_k`, `B ← Σ w_k B_k`.
    Travels: A and B, both ways. Aggregation is inexact: `Σ w_k B_k A_k - B̄ Ā = Σ w_k (B_k - B̄)(A_k - Ā)`.
    DP: sound under the canonical step; the noise on A and the noise on B multiply.

    Where the released code differs: the original has no DP. Re-implementations often clip the batch gradient or the
    whole update; here each example is clipped.
    """

    name = "fed-avg"
    about = About(
        paper="FedIT; DP-LoRA",
        arxiv="2305.05644, 2312.17493",
        trains="A and B",
        sends="A and B",
        exact=False,
        privacy="sound; noise quadratic",
    )

    client_level = 1

    def round(self, server: Server) -> Round:
        replies = yield Train("AB")
        server.step(replies)

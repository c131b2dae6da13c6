"""FedSA-LoRA: share A, keep B."""

from __future__ import annotations

from lorica.methods.base import About, Method
from lorica.methods.components import SAME_RANKS
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class FedSALoRA(Method):
    """FedSA-LoRA (ICLR 2025, arXiv 2410.01463).

    Idea: A learns what the clients have in common and is averaged; B and the head learn what is specific to a client
    and stay there. Every client has its own model, so evaluation is per client and there is no global product.
    Travels: A, both ways.
    DP: sound here, since B and the head are trained under DP too. B never leaves the client, but the gradient of A is
    `γ Bᵀ G`. Later uploads of A depend through B on every earlier batch, so a B trained on raw gradients would leak
    through A.

    The reported accuracy is the mean over the clients' models, each on the public test set. A client that never took
    part has the global A, and its initial B and head. One adapter per client is exported.

    Where the released code differs: it has no DP.
    """

    name = "fedsa-lora"
    about = About(
        paper="FedSA-LoRA",
        arxiv="2410.01463",
        trains="A and B; B and head stay with the client",
        sends="A",
        exact=False,
        privacy="sound; noise quadratic",
    )
    refuses = SAME_RANKS | {
        "shared_noise": "B stays with the client, where only its own part of the noise protects it",
        "average": "each client has its own model, and the server sees only A",
        "scaffold": "B stays with the client, so the server cannot track its control variates",
    }
    personal = True

    def round(self, server: Server) -> Round:
        own = frozenset([*(site.b for site in self.sites), *server.model.head])
        replies = yield Train("AB", personal=own)
        server.step(replies)

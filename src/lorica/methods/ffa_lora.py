"""FFA-LoRA: frozen A."""

from __future__ import annotations

import torch

from lorica.adapters.state import AdapterState
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class FFALoRA(Method):
    """FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313).

    Idea: all clients share the random A and train only B, so `Σ w_k B_k A = B̄ A` exactly and DP noise enters linearly.
    Travels: B. The row space of every adapted map stays that of A₀.
    DP: sound under the canonical step.

    With `orthonormal_a`, the rows of A are made orthonormal first. This is FedSVD without the work on the server, since
    FedSVD's re-factorisation never leaves row(A₀). It is therefore the fair baseline for FedSVD.
    """

    name = "ffa-lora"
    about = About(
        paper="FFA-LoRA",
        arxiv="2403.12313",
        trains="B",
        sends="B",
        exact=True,
        privacy="sound; noise linear",
    )

    client_level = 1

    class Options(Strict):
        orthonormal_a: bool = False
        """Make the rows of A orthonormal before the first round."""

    options: Options

    def start(self, model: AdapterState, seed: int) -> None:
        if self.options.orthonormal_a:
            for site in self.sites:
                # A = Rᵀ Qᵀ, so B A = (B Rᵀ) Qᵀ.
                q, r = torch.linalg.qr(model.tensors[site.a].T)
                model.assign({site.a: q.T.contiguous(), site.b: model.tensors[site.b] @ r.T})

    def round(self, server: Server) -> Round:
        replies = yield Train("B")
        server.step(replies)

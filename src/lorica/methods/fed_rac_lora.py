"""Fed-RAC-LoRA: a chain of one-factor adaptations over random subspaces."""

from __future__ import annotations

from typing import Literal

import torch

from lorica.adapters.algebra import orthonormal
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.components import MERGES, NEW_BASIS
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class FedRACLoRA(Method):
    """Fed-RAC-LoRA (arXiv 2410.08305).

    Idea: in each round one factor is drawn at random and shared by all clients, and the other one is trained from zero.
    The mean product is merged into the frozen weight exactly, `W0 ← W0 + γ B_S Ā`, and the next round starts in a new
    subspace. This is gradient descent sketched by `B_S B_Sᵀ`.
    Travels: the trained factor up; the fresh factor and the merged product in factored form down, `2 r d + r d` for the
    next round.
    DP: well suited: one noisy factor that starts at zero, no product of noises, and subspaces that are not tied to A₀.
    Noise accumulates in the frozen weight over rounds.

    The drawn factor has orthonormal columns (rows), as the theory requires. The factor itself is sent rather than its
    seed, so that all clients have the same bits.
    """

    name = "fed-rac-lora"
    about = About(
        paper="RAC-LoRA",
        arxiv="2410.08305",
        trains="A from zero, B drawn anew; any rank",
        sends="A up; B and the last round's product down",
        exact=True,
        privacy="sound; noise linear, in a new subspace each round",
    )
    refuses = NEW_BASIS | MERGES
    merges = True

    class Options(Strict):
        trains: Literal["A", "B", "coin"] = "A"
        """The factor that is trained; the other one is drawn. `coin` chooses at random in each round."""

    options: Options

    def round(self, server: Server) -> Round:
        draws = server.generator("fed-rac-lora")
        trains = self.options.trains
        if trains == "coin":
            trains = "A" if draws.random() < 0.5 else "B"
        for site in self.sites:
            if trains == "A":
                drawn, zero = orthonormal(site.d_out, site.rank, draws), torch.zeros(site.rank, site.d_in)
                server.model.assign({site.b: drawn, site.a: zero})
            else:
                drawn, zero = (
                    orthonormal(site.d_in, site.rank, draws).T.contiguous(),
                    torch.zeros(site.d_out, site.rank),
                )
                server.model.assign({site.b: zero, site.a: drawn})
        replies = yield Train(trains, ranks=server.ranks)
        update = server.refined(replies)
        tensors = server.model.tensors
        # If no client of full rank replied, the last ranks have no update.
        if trains == "A":
            pairs = {site.name: (update[site.a].shape[0], tensors[site.b], update[site.a]) for site in self.sites}
        else:
            pairs = {site.name: (update[site.b].shape[1], update[site.b], tensors[site.a]) for site in self.sites}
        server.model.merge({name: (b[:, :rank], a[:rank]) for name, (rank, b, a) in pairs.items()})
        server.model.add({name: update[name] for name in server.model.head})

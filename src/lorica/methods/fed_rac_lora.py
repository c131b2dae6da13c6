"""Fed-RAC-LoRA: a chain of one-factor adaptations over random subspaces."""

from __future__ import annotations

from typing import Literal

import torch

from lorica.adapters.algebra import orthonormal
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.exchange import Round, Train
from lorica.methods.pieces import MERGES, NEW_BASIS
from lorica.methods.server import Server


class FedRACLoRA(Method):
    """Fed-RAC-LoRA (arXiv 2410.08305).

    Idea: each round draws one factor at random, common to all clients, and trains the other one from zero; the mean
    product is merged into the frozen weight, `W0 ← W0 + γ B_S Ā`, exactly, and the next round starts in a new
    subspace. It is gradient descent sketched by `B_S B_Sᵀ`.
    Travels: the trained factor up; down the fresh factor and the merged product in factored form, which for the next
    round is `2 r d + r d`.
    DP: well suited: one noisy factor that starts at zero, no product of noises, and subspaces that do not stay those
    of A₀. Noise adds up in the frozen weight over rounds.

    The drawn factor has orthonormal columns (rows), as the theory asks for, and is sent rather than its seed, so that
    all clients have it bit for bit.
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
        """The factor that is trained, the other one being drawn; `coin` tosses for it in each round."""

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
        # Where no client of the whole rank replied, the trailing ranks are nobody's.
        if trains == "A":
            pairs = {site.name: (update[site.a].shape[0], tensors[site.b], update[site.a]) for site in self.sites}
        else:
            pairs = {site.name: (update[site.b].shape[1], update[site.b], tensors[site.a]) for site in self.sites}
        server.model.merge({name: (b[:, :rank], a[:rank]) for name, (rank, b, a) in pairs.items()})
        server.model.add({name: update[name] for name in server.model.head})

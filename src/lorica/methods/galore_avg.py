"""GaLore in a federation: projected gradients and direct averaging of the weights."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from lorica.adapters.algebra import orthonormal
from lorica.adapters.sites import Site
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.components import MERGES, NEW_BASIS, SAME_RANKS
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class GaLoreAvg(Method):
    """GaLore on the clients, direct averaging of the full weights on the server (arXiv 2410.23111).

    Idea: train the frozen weight itself, but along a projected gradient: `W ← W - η P Opt(Pᵀ G)` with `P (d_out, r)`
    orthonormal, or the same on the right. Averaging the weights is exact. Since all clients share P, it amounts to
    averaging the projected updates: `W0 ← W0 + γ P Σ w_k Ā_k`. In LoRA's terms, `B = P` is fixed and A starts at zero
    in each round.
    Travels: the projected update up, `r d_in` (`r d_out` on the right); the mean update and its projector down.
    DP: sound here. GaLore takes P from the singular vectors of the client's own gradient, which leaks. Lorica takes P
    from the last mean update, which was already released; the projected gradient `Pᵀ G` is clipped and noised.

    The update of a left projector lies in the span of P, so it says nothing new about the left side, but its row space
    was chosen by the gradient. Each refresh therefore switches to the other side and uses the singular vectors of the
    last projection's total update, as in subspace iteration. The first projector is random. Optimiser moments are reset
    in every round, since they would belong to a different subspace.

    Runs without privacy use the same public projector.
    """

    name = "galore-avg"
    about = About(
        paper="GaLore with direct averaging",
        arxiv="2410.23111",
        trains="the weight along a projected gradient",
        sends="the projected update up; the mean one and the projector down",
        exact=True,
        privacy="sound; noise linear, in the span of a released projector",
    )
    refuses = SAME_RANKS | NEW_BASIS | MERGES
    merges = True

    class Options(Strict):
        refresh: int = Field(5, ge=1)
        """Number of rounds for which a projector is used."""

    options: Options

    def __init__(self, options: BaseModel, sites: list[Site]) -> None:
        super().__init__(options, sites)
        self.left = False
        self.totals: dict[str, Tensor] = {}

    def round(self, server: Server) -> Round:
        if (server.round - 1) % self.options.refresh == 0:
            self._turn(server)
        replies = yield Train("A" if self.left else "B")
        update = server.refined(replies)
        tensors = server.model.tensors
        for site in self.sites:
            trained = site.a if self.left else site.b
            self.totals[site.name] = self.totals.get(site.name, torch.zeros(())) + update[trained]
            pair = (tensors[site.b], update[site.a]) if self.left else (update[site.b], tensors[site.a])
            server.model.merge({site.name: pair})
        server.model.add({name: update[name] for name in server.model.head})

    def _turn(self, server: Server) -> None:
        """Switch sides: a new projector on the other side, and a zero factor on this one."""
        draws = server.generator("galore-avg")
        self.left = not self.left
        for site in self.sites:
            size = site.d_out if self.left else site.d_in
            total = self.totals.get(site.name)
            if total is None:
                projector = orthonormal(size, site.rank, draws)
            else:
                projector = torch.linalg.qr((total if self.left else total.T).double()).Q.float()
            if self.left:
                server.model.assign({site.b: projector, site.a: torch.zeros(site.rank, site.d_in)})
            else:
                server.model.assign({site.b: torch.zeros(site.d_out, site.rank), site.a: projector.T.contiguous()})
        self.totals = {}

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left, "totals": dict(self.totals)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left, self.totals = state["left"], dict(state["totals"])

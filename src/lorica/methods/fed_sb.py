"""Fed-SB: only a small matrix between fixed factors."""

from __future__ import annotations

import torch
from pydantic import Field

from lorica.adapters.algebra import orthonormal, product_svd
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.components import SAME_RANKS
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server
from lorica.streams import numpy_stream


class FedSB(Method):
    """Fed-SB (arXiv 2502.15436), LoRA-SB in a federation.

    Idea: `W = W0 + γ B R A` with B and A fixed and orthonormal. Clients train `R (r, r)`, so averaging is exact, and
    only `r²` numbers per site are sent and noised, whatever the model's width.
    Travels: R, both ways.
    DP: sound; the least noise of all methods, in `r²` directions. The gradient `∂L/∂R = Bᵀ (γ G) Aᵀ` is clipped.

    LoRA-SB takes B and A from the singular vectors of a first gradient, which is private data. Here that gradient is
    noisy: in the first `warm_up` rounds B and A are trained in turn, under DP and exactly as in RoLoRA, and the SVD of
    their product fixes the factors. `warm_up: 0` fixes random factors, or those of the adapter
    that the run starts from. Choose a larger rank than for other methods.
    """

    name = "fed-sb"
    about = About(
        paper="Fed-SB",
        arxiv="2502.15436",
        trains="R (r × r) between fixed factors",
        sends="R",
        exact=True,
        privacy="sound; noise linear, in r² directions",
    )
    refuses = SAME_RANKS | dict.fromkeys(
        ("server_optimizer", "kalman", "scaffold", "average", "scaled_gd"),
        "the trained tensors change after the warm-up, when the factors are fixed",
    )

    class Options(Strict):
        warm_up: int = Field(2, ge=0)
        """Number of rounds that train B and A in turn to find the factors; 0 uses random factors, or those of
        `lora.start`."""

    options: Options

    def start(self, model: AdapterState, seed: int) -> None:
        if self.options.warm_up:
            model.extend({site.r: torch.eye(site.rank) for site in self.sites})
            return
        draws = numpy_stream(seed, "fed-sb")
        for site in self.sites:
            model.extend({site.r: torch.zeros(site.rank, site.rank)})
            if bool(model.tensors[site.b].any()):
                self._fix(model, site)
                continue
            b, a = orthonormal(site.d_out, site.rank, draws), orthonormal(site.d_in, site.rank, draws).T.contiguous()
            model.assign({site.b: b, site.a: a})

    def round(self, server: Server) -> Round:
        if server.round > self.options.warm_up:
            replies = yield Train("R")
            server.step(replies)
            return
        replies = yield Train("B" if server.round % 2 else "A")
        server.step(replies)
        if server.round == self.options.warm_up:
            for site in self.sites:
                self._fix(server.model, site)

    def _fix(self, model: AdapterState, site: Site) -> None:
        """Fix the factors by the SVD of their product."""
        u, s, vt = product_svd((model.tensors[site.b], model.tensors[site.a]))
        found = {site.b: u, site.r: s.diag(), site.a: vt}
        model.assign({name: value.float().contiguous() for name, value in found.items()})

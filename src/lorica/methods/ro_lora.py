"""RoLoRA: the factor alternates by round."""

from __future__ import annotations

from lorica.adapters.state import Factors
from lorica.methods.base import About
from lorica.methods.exchange import Round, Train
from lorica.methods.gauge import GaugedMethod, alternating, fix_gauge
from lorica.methods.server import Server


class RoLoRA(GaugedMethod):
    """RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755; workshop version 2409.02346).

    Idea: train B in odd rounds and A in even rounds, in all layers. All clients share the other factor, so averaging is
    exact and A's subspace is learned too.
    Travels: the active factor up; with a gauge, both factors down.
    DP: the paper has none; sound under the canonical step. Training starts with B, since A has no gradient while B is
    zero.

    With `first: A` the roles are exchanged: B starts at random and A at zero. With `gauge: orthonormal` the factor that
    rests is made orthonormal before each round. Neither is in the paper, whose algorithm is `gauge: none`.
    """

    name = "ro-lora"
    about = About(
        paper="RoLoRA",
        arxiv="2502.01755",
        trains="B, A, B, A… by round",
        sends="the active factor up, A and B down",
        exact=True,
        privacy="sound; noise linear",
    )

    def round(self, server: Server) -> Round:
        factor = alternating(self.options.first, server.round)
        factors: dict[str, Factors] = {site.name: factor for site in self.sites}
        fix_gauge(self.options, server.model, factors)
        replies = yield Train(factors)
        server.step(replies)

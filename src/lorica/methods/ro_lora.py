"""RoLoRA: the factor alternates by round."""

from __future__ import annotations

from lorica.methods.base import About, Method
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class RoLoRA(Method):
    """RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755; workshop version 2409.02346).

    Idea: train B in odd rounds and A in even rounds, in all layers. All clients share the other factor, so averaging is
    exact and A's subspace is learned too.
    Travels: the active factor.
    DP: the paper has none; sound under the canonical step. Training starts with B, since A has no gradient while B is
    zero.
    """

    name = "ro-lora"
    about = About(
        paper="RoLoRA",
        arxiv="2502.01755",
        trains="B, A, B, A… by round",
        sends="the active factor",
        exact=True,
        privacy="sound; noise linear",
    )

    def round(self, server: Server) -> Round:
        replies = yield Train("B" if server.round % 2 else "A")
        server.step(replies)

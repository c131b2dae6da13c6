"""The head alone, without an adapter: a baseline."""

from __future__ import annotations

from collections.abc import Mapping

from lorica.methods.base import About, Method
from lorica.methods.exchange import Round, Train
from lorica.methods.server import Server


class HeadOnly(Method):
    """Linear probing (Alain and Bengio, arXiv 1610.01644) in a federation: the adapter stays zero.

    Idea: what the head learns on the frozen features is no merit of LoRA. A method has to beat this baseline before its
    accuracy says anything about its adapter.
    Travels: the head. Its mean is that of the models.
    DP: sound under the canonical step; the clip norm is spent on the head alone.
    """

    name = "head-only"
    about = About(
        paper="linear probing",
        arxiv="1610.01644",
        trains="the head",
        sends="the head",
        exact=True,
        privacy="sound; noise linear",
    )
    refuses: Mapping[str, str] = {
        "client_ranks": "it trains no factors",
        "scaled_gd": "it trains no factors",
        "frozen_head": "it trains nothing else",
    }

    def round(self, server: Server) -> Round:
        replies = yield Train("")
        server.step(replies)

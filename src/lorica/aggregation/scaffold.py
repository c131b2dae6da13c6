"""SCAFFOLD's control variates, tracked by the server alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorica.aggregation.noise import step_weights

if TYPE_CHECKING:
    from lorica.methods.base import Replies, Server


class Scaffold:
    """SCAFFOLD, option II (Karimireddy et al., ICML 2020, arXiv 1910.06378), on noisy gradients.

    Clients step along `ĝ + c - c_k`. After a round `c_k ← c_k - c - U_k/(η E)` and `c ← c + (|S|/N) Σ_k w_k Δc_k`, for
    the tensors that were trained in it. Since `c_k` is a function of uploads the server keeps it: nothing more is
    uploaded, and `c - c_k` travels down. All of it is post-processing. The noise in `c_k` stays for `E` steps, as much
    as their own, and cancels in the mean when all clients take part with equal weights.
    """

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[str, Any] = {}

    def corrections(self, client: int, trained: Iterable[str]) -> dict[str, Tensor]:
        """`c - c_k` of the trained tensors; nothing before the first round in which any client trained them."""
        return {
            name: self.tensors[f"all:{name}"] - self.tensors.get(f"{client}:{name}", torch.zeros(()))
            for name in trained
            if f"all:{name}" in self.tensors
        }

    def learn(self, replies: Replies, server: Server) -> None:
        """Take in the updates of one exchange."""
        share = len(replies.updates) / self._clients
        changes: dict[str, Tensor] = {}
        length = float(step_weights(server.local_steps, 0.0).sum())
        for client in sorted(replies.updates):
            for name, update in replies.updates[client].items():
                common = self.tensors.get(f"all:{name}", torch.zeros(()))
                own = self.tensors.get(f"{client}:{name}", torch.zeros(()))
                change = -common - update / (server.rates[name] * length)
                self.tensors[f"{client}:{name}"] = own + change
                weighted = share * replies.weights[client] * change
                changes[name] = changes[name] + weighted if name in changes else weighted
        for name, change in changes.items():
            self.tensors[f"all:{name}"] = self.tensors.get(f"all:{name}", torch.zeros(())) + change

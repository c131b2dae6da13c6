"""SCAFFOLD's control variates, kept by the server alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorica.aggregation.memory import Memory
from lorica.aggregation.noise import step_weights


class Scaffold(Memory):
    """SCAFFOLD, option II (Karimireddy et al., ICML 2020, arXiv 1910.06378), on noisy gradients.

    Clients step along `ĝ + c - c_k`. After a round, `c_k ← c_k - c - U_k/(η E)` and `c ← c + (|S|/N) Σ_k w_k Δc_k` for
    the tensors trained in it. Since `c_k` is a function of uploads, the server computes it: nothing more is uploaded,
    and `c - c_k` is sent to the client. All of it is post-processing. The noise in `c_k` is added in each of the `E`
    steps; it cancels in the mean if all clients take part with equal weights.
    """

    def __init__(self, clients: int) -> None:
        super().__init__()
        self._clients = clients

    def corrections(self, client: int, trained: Iterable[str]) -> dict[str, Tensor]:
        """`c - c_k` of the trained tensors. Tensors that no client has trained yet are left out."""
        return {
            name: self.tensors[f"all:{name}"] - self.tensors.get(f"{client}:{name}", torch.zeros(()))
            for name in trained
            if f"all:{name}" in self.tensors
        }

    def learn(
        self,
        updates: Mapping[int, Mapping[str, Tensor]],
        weights: Mapping[int, float],
        rates: Mapping[str, float],
        steps: int,
    ) -> None:
        """Update the control variates with the updates `U_k` of one exchange.

        Args:
            updates: client -> tensor name -> `U_k`.
            weights: client -> `w_k`.
            rates: tensor name -> `η`.
            steps: `E`.
        """
        share = len(updates) / self._clients
        changes: dict[str, Tensor] = {}
        length = float(step_weights(steps, 0.0).sum())
        for client in sorted(updates):
            for name, update in updates[client].items():
                common = self.tensors.get(f"all:{name}", torch.zeros(()))
                own = self.tensors.get(f"{client}:{name}", torch.zeros(()))
                change = -common - update / (rates[name] * length)
                self.tensors[f"{client}:{name}"] = own + change
                weighted = share * weights[client] * change
                changes[name] = changes[name] + weighted if name in changes else weighted
        for name, change in changes.items():
            self.tensors[f"all:{name}"] = self.tensors.get(f"all:{name}", torch.zeros(())) + change

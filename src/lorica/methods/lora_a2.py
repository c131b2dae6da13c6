"""LoRA-A2: alternate the factor, and train only the ranks that matter most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from lorica.adapters.sites import Site
from lorica.adapters.state import Factors
from lorica.aggregation.noise import update_noise_variance
from lorica.config import Strict
from lorica.methods.base import About, Method
from lorica.methods.exchange import Replies, Round, Train
from lorica.methods.server import Server

_FEW_RANKS = "only the trained ranks of an update carry noise"
Slices = dict[str, tuple[int, ...]]
"""Site name -> ranks, ascending."""


class LoRAA2(Method):
    """LoRA-A2 (ACL 2025, arXiv 2410.22815), with ranks chosen from released values: a reconstruction in that part.

    Idea: train B in odd rounds and A in even rounds, so averaging is exact, and only the ranks that matter most, so
    little is sent. With `n` adapted maps of rank `r`, a client trains the best of all `n r` pairs of a column of B and
    a row of A: `method.budget` of them, or `n r_k` with its own rank `r_k` (`lora.client_ranks`). So it may train all
    ranks of one map and none of another. What it does not train is a zero in the mean.
    Travels: the trained ranks of the active factor up, the active factor down.
    DP: sound; only the trained ranks are clipped and noised. Noise is linear.

    In the paper each client chooses its ranks by its own gradients, and sends the choice; under DP that would leak.
    Here the server chooses from the updates of earlier rounds. Pair `i` of a map with active factor B scores
    `(‖ū_i‖² - d_out v) ‖a_i‖² / η²`, with `ū_i` the column of the mean update when the pair was last trained, `v` its
    known noise variance (zero unless `optimizer.name` is `sgd`) and `η` its learning rate: the squared size of its
    change of the weight. For A the roles are exchanged. Pairs that were never trained come first, so every pair gets a
    score, and the budget holds from the first round on. A row of A is trained only if its column of B is not zero.

    No code was released. The paper's score is taken from secondary sources.
    """

    name = "lora-a2"
    about = About(
        paper="LoRA-A2",
        arxiv="2410.22815",
        trains="B, A, B, A… by round; the ranks with the largest updates, any number per client",
        sends="the trained ranks of the active factor up, the factor down",
        exact=True,
        privacy="sound; noise linear, in the trained ranks",
    )
    refuses: Mapping[str, str] = {
        "shrinkage": _FEW_RANKS,
        "kalman": _FEW_RANKS,
        "scaffold": "the trained ranks change between rounds, and control variates need all of them",
    }

    class Options(Strict):
        budget: float = Field(0.5, gt=0, le=1)
        """Fraction of all ranks of all adapted maps that a client trains in a round; `lora.client_ranks` replaces
        it."""

    options: Options

    def __init__(self, options: BaseModel, sites: list[Site]) -> None:
        super().__init__(options, sites)
        # Of each factor, by site: `(‖ū_i‖² - d v) / η²` of each rank; infinite before it was trained.
        self.energies = {
            factor: {site.name: torch.full((site.rank,), math.inf, dtype=torch.float64) for site in sites}
            for factor in ("A", "B")
        }
        self.trained: Slices = {}

    def round(self, server: Server) -> Round:
        factor: Factors = "A" if server.round % 2 == 0 and self._ranking(server, "A") else "B"
        ranking = self._ranking(server, factor)
        slices = {client: self._slices(ranking, server.ranks.get(client)) for client in server.terms}
        self.trained = max(slices.values(), key=lambda ranks: sum(map(len, ranks.values())))
        replies = yield Train(
            {site.name: factor if site.name in self.trained else "" for site in self.sites}, slices=slices
        )
        self._learn(server, replies, factor, slices)
        server.step(replies)

    def _ranking(self, server: Server, factor: Factors) -> list[tuple[str, int]]:
        """(Site name, rank) of all pairs that can be trained, the best one first."""
        scored = []
        for place, site in enumerate(self.sites):
            partners = self._rows(site, "B" if factor == "A" else "A", server.model.tensors).double().square().sum(1)
            for rank, (energy, partner) in enumerate(
                zip(self.energies[factor][site.name].tolist(), partners.tolist(), strict=True)
            ):
                if partner > 0:
                    scored.append((-energy * partner, rank, place))
        return [(self.sites[place].name, rank) for _, rank, place in sorted(scored)]

    def _slices(self, ranking: list[tuple[str, int]], rank: int | None) -> Slices:
        if rank is None:
            count = max(1, round(self.options.budget * sum(site.rank for site in self.sites)))
        else:
            count = rank * len(self.sites)
        chosen: dict[str, list[int]] = {}
        for name, index in ranking[:count]:
            chosen.setdefault(name, []).append(index)
        return {name: tuple(sorted(ranks)) for name, ranks in chosen.items()}

    def _learn(self, server: Server, replies: Replies, factor: Factors, slices: dict[int, Slices]) -> None:
        optimizer, steps = server.optimizer, server.local_steps
        for site in self.sites:
            if site.name not in self.trained:
                continue
            rate = server.rates[site.a if factor == "A" else site.b]
            rows = self._rows(site, factor, replies.mean).double()
            for rank in self.trained[site.name]:
                weights = {
                    c: replies.weights[c] for c in sorted(replies.weights) if rank in slices[c].get(site.name, ())
                }
                noise = 0.0
                if optimizer.name == "sgd":
                    noise = update_noise_variance(server.terms, weights, rate, steps, optimizer.momentum)
                if weights:
                    energy = float(rows[rank].square().sum()) - rows.shape[1] * noise
                    self.energies[factor][site.name][rank] = energy / rate**2

    @staticmethod
    def _rows(site: Site, factor: Factors, tensors: Mapping[str, Tensor]) -> Tensor:
        """`(r, d)`: what belongs to each rank of a factor."""
        rows: Tensor = tensors[site.a] if factor == "A" else tensors[site.b].T
        return rows

    def decisions(self) -> dict[str, object]:
        return {"trained_ranks": {site: list(ranks) for site, ranks in self.trained.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {
            factor: {site: energies.clone() for site, energies in by_site.items()}
            for factor, by_site in self.energies.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.energies = {factor: {site: value.clone() for site, value in state[factor].items()} for factor in state}

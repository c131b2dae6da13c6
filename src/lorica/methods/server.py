"""The server as seen by a method: the global adapter and public numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from lorica.adapters.names import Pair
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, leading
from lorica.aggregation.averaging import RoundAverage
from lorica.aggregation.denoising import Denoiser
from lorica.aggregation.memory import Memory
from lorica.aggregation.noise import update_noise_variance
from lorica.aggregation.robust import Aggregate
from lorica.aggregation.scaffold import Scaffold
from lorica.aggregation.server_optimizers import ServerAverage, ServerOptimizer
from lorica.config import OptimizerConfig
from lorica.local.optimizers import schedule_factor
from lorica.local.step import LocalStep
from lorica.methods.exchange import Replies
from lorica.privacy.mechanism import Terms
from lorica.streams import numpy_stream


@dataclass
class Server:
    """The server as seen by a method: the global adapter and public numbers.

    Attributes:
        model: the global adapter.
        round, rounds: the current round, from 1, and the number of rounds.
        terms: client -> its DP terms.
        optimizer, local_steps: local optimiser and steps per round of the clients.
        full_rates: tensor name -> learning rate before `optimizer.schedule`.
        seed: public seed.
        local: configured transformations of the noisy gradient on the clients.
        ranks: client -> rank of its factors; empty if all clients use the full rank.
        aggregate: robust aggregate that replaces the weighted mean; None for the mean.
        optimize: the server optimiser.
        denoise: denoiser of the mean update, applied before the server optimiser; None for none.
        average: average over rounds, for evaluation and export; None for none.
        scaffold: SCAFFOLD's control variates; None for none.
    """

    model: AdapterState
    rounds: int
    terms: Mapping[int, Terms]
    optimizer: OptimizerConfig
    local_steps: int
    full_rates: Mapping[str, float]
    seed: int
    round: int = 0
    local: LocalStep = field(default_factory=LocalStep)
    ranks: Mapping[int, int] = field(default_factory=dict)
    aggregate: Aggregate | None = None
    optimize: ServerOptimizer = field(default_factory=lambda: ServerAverage(1.0))
    denoise: Denoiser | None = None
    average: RoundAverage | None = None
    scaffold: Scaffold | None = None

    @property
    def rates(self) -> dict[str, float]:
        """Tensor name -> learning rate in this round."""
        factor = schedule_factor(self.optimizer.schedule, max(self.round, 1), self.rounds)
        return {name: factor * rate for name, rate in self.full_rates.items()}

    @property
    def private(self) -> bool:
        """Whether clients add noise."""
        return any(terms.private for terms in self.terms.values())

    def generator(self, purpose: str) -> np.random.Generator:
        """Public randomness of this round."""
        return numpy_stream(self.seed, purpose, self.round)

    def refined(self, replies: Replies) -> dict[str, Tensor]:
        """The mean update after the configured denoising and server optimiser, for methods that do more than add it."""
        mean = replies.mean
        noise = self._noise(mean, replies)
        if self.denoise is not None:
            mean = self.denoise.step(mean, noise, self.round)
        return self.optimize.step(mean, noise, self.round)

    def step(self, replies: Replies) -> None:
        """Move the global tensors by the mean update, after the configured denoising and server optimiser.

        >>> server = Server(
        ...     model=AdapterState([], {"head.bias": torch.tensor([1.0])}),
        ...     rounds=1,
        ...     terms={0: Terms(sampling_rate=0.1, batch_size=10, clip_norm=1.0, noise_multiplier=1.0)},
        ...     optimizer=OptimizerConfig(),
        ...     local_steps=1,
        ...     full_rates={"head.bias": 0.1},
        ...     seed=0,
        ... )
        >>> server.step(Replies(updates={0: {"head.bias": torch.tensor([0.5])}}, weights={0: 1.0}))
        >>> server.model.tensors
        {'head.bias': tensor([1.5000])}
        """
        self.model.add(self.refined(replies))

    def step_head(self, replies: Replies) -> None:
        """As `step`, for the head only: for methods with their own aggregation of the factors."""
        if replies.means is not None:
            means = {name: value for name, value in replies.means.items() if name in self.model.head}
            self.step(replace(replies, means=means))
            return
        head = {
            client: {name: value for name, value in updates.items() if name in self.model.head}
            for client, updates in replies.updates.items()
        }
        self.step(replace(replies, updates=head))

    def state_dict(self) -> dict[str, Any]:
        """State of the server-side components, for a checkpoint."""
        return {name: component.state_dict() for name, component in self._components().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the output of `state_dict`."""
        for name, component in self._components().items():
            component.load_state_dict(state[name])

    def _components(self) -> dict[str, Memory]:
        components: dict[str, Memory | None] = {
            "optimizer": self.optimize,
            "denoise": self.denoise,
            "average": self.average,
            "scaffold": self.scaffold,
        }
        return {name: component for name, component in components.items() if component is not None}

    def finish_round(self) -> None:
        """Include the model after this round in the average over rounds."""
        if self.average is not None:
            self.average.update(self.model.tensors)

    @property
    def evaluated(self) -> dict[str, Tensor]:
        """The tensors to evaluate and export: the average over rounds if configured, else the current ones."""
        if self.average is not None and self.average.tensors:
            return dict(self.average.tensors)
        return dict(self.model.tensors)

    def _noise(self, names: Iterable[str], replies: Replies) -> dict[str, float]:
        """Name -> variance of the DP noise in each coordinate of the mean update."""
        momentum = self.optimizer.momentum
        return {
            name: update_noise_variance(self.terms, replies.weights, self.rates[name], self.local_steps, momentum)
            for name in names
        }


def is_zero(server: Server, sites: list[Site]) -> bool:
    """Whether `B` is zero at any of these sites. There `∂L/∂A = γ Bᵀ G` is zero, and training A uploads only noise."""
    return any(not bool(server.model.tensors[site.b].any()) for site in sites)


def client_factors(server: Server, replies: Replies, site: Site, ranks: Mapping[int, int]) -> dict[int, Pair]:
    """Client -> `(B_k, A_k)` after training: the leading ranks of the global factors plus its updates.

    Args:
        ranks: as in the `Train` that the replies answer.
    """
    factors = {}
    for client in sorted(replies.updates):
        start = {name: leading(name, server.model.tensors[name], ranks.get(client)) for name in (site.b, site.a)}
        b, a = (start[name] + replies.updates[client].get(name, 0) for name in (site.b, site.a))
        factors[client] = (b, a)
    return factors

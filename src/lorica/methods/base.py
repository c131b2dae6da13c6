"""What a federated LoRA method is: one class with a round that reads like the paper's algorithm box."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from lorica.adapters.algebra import weighted_sum
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, Factors, Pair, leading
from lorica.aggregation.averaging import RoundAverage
from lorica.aggregation.kalman import KalmanFilter
from lorica.aggregation.noise import update_noise_variance
from lorica.aggregation.robust import Aggregate
from lorica.aggregation.scaffold import Scaffold
from lorica.aggregation.server_optimizers import ServerAverage, ServerOptimizer
from lorica.aggregation.shrinkage import shrink_singular_values
from lorica.config import MethodConfig, OptimizerConfig, Strict, validate
from lorica.errors import UserError
from lorica.local.step import LocalStep
from lorica.privacy.mechanism import Terms
from lorica.streams import numpy_stream

Value = TypeVar("Value")


@dataclass(frozen=True)
class About:
    """A method's row in every table.

    Attributes:
        exact: whether the new global model is the weighted mean of the clients' models, `Σ_k w_k B_k A_k` at every
        site.
    """

    paper: str
    arxiv: str
    trains: str
    sends: str
    exact: bool
    privacy: str


@dataclass(frozen=True)
class Train:
    """One exchange: every sampled client trains these factors (and the head, if it is trained).

    Attributes:
        factors: one choice for all sites, or site name -> choice.
        steps: noisy steps of this exchange; None for all of the round's. The exchanges of a round share its steps.
        local: what clients do with the noisy gradient; None for what is configured (`Server.local`).
        ranks: client -> how many leading ranks it gets and trains; all of them for clients that are not named.
        personal: names of trained tensors that clients keep: they start from their own and do not send them.
        sketch_columns: clients send sketches of their products in place of factor updates (`Replies.sketches`).
        last_step_energy: clients also reply with the energy of their last noisy gradient, per trained tensor.
    """

    factors: Factors | Mapping[str, Factors]
    steps: int | None = None
    local: LocalStep | None = None
    ranks: Mapping[int, int] = field(default_factory=dict)
    personal: frozenset[str] = frozenset()
    sketch_columns: int | None = None
    last_step_energy: bool = False


@dataclass(frozen=True)
class Project:
    """One exchange after a `Train` with sketches: clients send `A_kᵀ (B_kᵀ Q)` of their products (`Replies.sketches`).

    Attributes:
        bases: site name -> `Q (d_out, columns)`.
    """

    bases: Mapping[str, Tensor]


@dataclass(frozen=True)
class Replies:
    """What the sampled clients released in one exchange.

    Attributes:
        updates: client -> tensor name -> update `U_k = θ_{k,E} - θ_t`.
        weights: client -> `w_k`, summing to 1.
        energies: client -> tensor name -> `‖ĝ‖²` of the last noisy gradient, if it was asked for.
        sketches: client -> site name -> sketch, if it was asked for.
        aggregate: what takes the place of the weighted mean of updates; None for nothing.
        means, mean_sketches: `mean` and `mean_sketch` where clients sent masked summands, and the fields above are
            empty. None where they sent their replies.
    """

    updates: Mapping[int, Mapping[str, Tensor]]
    weights: Mapping[int, float]
    energies: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    sketches: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    aggregate: Aggregate | None = None
    means: Mapping[str, Tensor] | None = None
    mean_sketches: Mapping[str, Tensor] | None = None

    @cached_property
    def mean(self) -> Mapping[str, Tensor]:
        """`Σ_k w_k U_k`, summed in the order of client ids; updates of a smaller rank are filled up with zeros.

        Or the configured robust aggregate of the updates.
        """
        if self.means is not None:
            return self.means
        if self.aggregate is not None:
            return self.aggregate([self.updates[client] for client in sorted(self.updates)])
        return self._mean(self.updates)

    @cached_property
    def mean_sketch(self) -> Mapping[str, Tensor]:
        """Site name -> `Σ_k w_k` sketch."""
        return self.mean_sketches if self.mean_sketches is not None else self._mean(self.sketches)

    def only(self, later: Replies) -> Replies:
        """The replies of those clients that also replied to a later exchange, with its weights.

        A sum cannot be taken apart: it stays that of all.
        """

        def kept(values: Mapping[int, Value]) -> dict[int, Value]:
            return {client: value for client, value in values.items() if client in later.weights}

        return replace(
            self,
            updates=kept(self.updates),
            weights=later.weights,
            energies=kept(self.energies),
            sketches=kept(self.sketches),
        )

    def _mean(self, tensors: Mapping[int, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        clients = sorted(tensors)
        return {
            name: weighted_sum([(self.weights[client], tensors[client][name]) for client in clients])
            for name in tensors[clients[0]]
        }


@dataclass
class Server:
    """What a method may see and change: the global adapter and public numbers.

    Attributes:
        model: the global adapter.
        round, rounds: the current round, from 1, and how many there are.
        terms: client -> its DP terms.
        optimizer, local_steps: what clients do between two exchanges.
        rates: tensor name -> learning rate.
        seed: public.
        local: what clients do with the noisy gradient before the optimiser, as configured.
        ranks: client -> rank of its factors; empty if all have the whole one.
        aggregate: what takes the place of the weighted mean; None for nothing.
        optimize: the server optimiser.
        denoise: what is done to a mean update before it.
        average: the average over rounds that is evaluated and exported.
        scaffold: control variates.
    """

    model: AdapterState
    rounds: int
    terms: Mapping[int, Terms]
    optimizer: OptimizerConfig
    local_steps: int
    rates: Mapping[str, float]
    seed: int
    round: int = 0
    local: LocalStep = field(default_factory=LocalStep)
    ranks: Mapping[int, int] = field(default_factory=dict)
    aggregate: Aggregate | None = None
    optimize: ServerOptimizer = field(default_factory=lambda: ServerAverage(1.0))
    denoise: Literal["shrinkage"] | KalmanFilter | None = None
    average: RoundAverage | None = None
    scaffold: Scaffold | None = None

    @property
    def private(self) -> bool:
        """Whether clients add noise."""
        return any(terms.private for terms in self.terms.values())

    def generator(self, purpose: str) -> np.random.Generator:
        """Public randomness of this round."""
        return numpy_stream(self.seed, purpose, self.round)

    def refined(self, replies: Replies) -> dict[str, Tensor]:
        """The mean update after the configured denoising and server optimiser: for methods that do more than add it."""
        mean = replies.mean
        noise = self._noise(mean, replies)
        if self.denoise == "shrinkage":
            mean = {name: shrink_singular_values(value, noise[name]) for name, value in mean.items()}
        elif self.denoise is not None:
            mean = self.denoise.step(mean, noise, self.round)
        return self.optimize.step(mean, noise, self.round)

    def step(self, replies: Replies) -> None:
        """Move the global tensors by the mean update, after the configured denoising and server optimiser."""
        self.model.add(self.refined(replies))

    def step_head(self, replies: Replies) -> None:
        """The same for the head alone, where the method aggregates the factors in its own way."""
        if replies.means is not None:
            means = {name: value for name, value in replies.means.items() if name in self.model.head}
            self.step(replace(replies, means=means))
            return
        head = {
            client: {name: value for name, value in updates.items() if name in self.model.head}
            for client, updates in replies.updates.items()
        }
        self.step(replace(replies, updates=head))

    def remembered(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """What the server-side pieces carry from round to round, for a checkpoint: JSON-able numbers, and tensors."""
        numbers: dict[str, object] = {name: piece.numbers for name, piece in self._pieces().items()}
        tensors = {
            f"{name}/{key}": value for name, piece in self._pieces().items() for key, value in piece.tensors.items()
        }
        return numbers, tensors

    def recall(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take back what `remembered` gave."""
        for name, piece in self._pieces().items():
            piece.numbers = dict(numbers[name])
            prefix = f"{name}/"
            piece.tensors = {
                key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
            }

    def _pieces(self) -> dict[str, Any]:
        denoise = None if self.denoise == "shrinkage" else self.denoise
        pieces = {"optimizer": self.optimize, "denoise": denoise, "average": self.average, "scaffold": self.scaffold}
        return {name: piece for name, piece in pieces.items() if piece is not None}

    def finish_round(self) -> None:
        """Take the round's model into the average over rounds."""
        if self.average is not None:
            self.average.update(self.model.tensors)

    @property
    def evaluated(self) -> dict[str, Tensor]:
        """The tensors to evaluate and to export: the average over rounds where it is kept."""
        if self.average is not None and self.average.tensors:
            return dict(self.average.tensors)
        return dict(self.model.tensors)

    def _noise(self, names: Iterable[str], replies: Replies) -> dict[str, float]:
        """Variance of the DP noise in each coordinate of the mean update."""
        momentum = self.optimizer.momentum
        return {
            name: update_noise_variance(self.terms, replies.weights, self.rates[name], self.local_steps, momentum)
            for name in names
        }


Round = Generator[Train | Project, Replies, None]


class Method(ABC):
    """A federated LoRA method.

    A subclass sets `name` and `about`, describes its options, and writes its round. Each `yield Train(...)` is one
    exchange with the sampled clients and gives back their `Replies`, those of fewer clients where some did not reply:
    they are out for the rest of the round (see `Replies.only`). A method sees released tensors and public numbers only;
    it has no way to a raw gradient.

    Attributes:
        refuses: composable piece (`lorica.methods.pieces.PIECES`) -> why the method cannot take it. A method that takes
            ranks that differ leaves `client_ranks` out and asks for `Train(ranks=server.ranks)`.
        personal: clients have models of their own, which are what is evaluated and exported.
        merges: the frozen weights are added to (`AdapterState.merge`).
    """

    name: ClassVar[str]
    about: ClassVar[About]
    refuses: Mapping[str, str] = {"client_ranks": "its rounds ask all clients for factors of one rank"}
    personal: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    class Options(Strict):
        """Keys beside `method.name`."""

    def __init__(self, options: BaseModel, sites: list[Site]) -> None:
        self.options = options
        self.sites = sites

    def check(self, optimizer: OptimizerConfig, clients: int, local_steps: int) -> None:  # noqa: B027 - may take all
        """Refuse, before the run, a setting that the method cannot work with (`UserError`).

        Args:
            clients: how many replies a round has at least.
        """

    def start(self, model: AdapterState, seed: int) -> None:  # noqa: B027 - most methods start from what PEFT gives
        """Change the initial adapter before the first round. The seed is public."""

    @abstractmethod
    def round(self, server: Server) -> Round:
        """One round, from the first exchange to the new global factors."""

    def state(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """What a checkpoint keeps: JSON-able numbers, and tensors."""
        return {}, {}

    def restore(self, numbers: dict[str, object], tensors: dict[str, Tensor]) -> None:  # noqa: B027 - may be stateless
        """Take back what `state` gave."""

    def decisions(self) -> dict[str, object]:
        """What the report shows of the last round beside the factors, such as probabilities."""
        return {}


def registry() -> dict[str, type[Method]]:
    """All methods by name: Lorica's own and those that other packages register as `lorica.methods` entry points."""
    methods: dict[str, type[Method]] = {}
    for entry in sorted(entry_points(group="lorica.methods"), key=lambda entry: entry.name):
        methods[entry.name] = entry.load()
    return methods


def make_method(config: MethodConfig, sites: list[Site]) -> Method:
    """The configured method with its options checked.

    Raises:
        UserError: no such method, or an option that it does not have.
    """
    methods = registry()
    if config.name not in methods:
        nearest = difflib.get_close_matches(config.name, methods, n=1, cutoff=0.4)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else f"choose among: {', '.join(methods)}"
        raise UserError("method.name", config.name, "no such method", remedy)
    kind = methods[config.name]
    return kind(validate(kind.Options, config.options, prefix="method"), sites)


def is_zero(server: Server, sites: list[Site]) -> bool:
    """Whether `B` is zero at some of these sites: then `∂L/∂A = γ Bᵀ G` is zero there, and training A uploads noise."""
    return any(not bool(server.model.tensors[site.b].any()) for site in sites)


def client_factors(server: Server, replies: Replies, site: Site, ranks: Mapping[int, int]) -> dict[int, Pair]:
    """Client -> `(B_k, A_k)` as it ended: the leading ranks that it started from plus its updates.

    Args:
        ranks: as in the `Train` that was answered.
    """
    factors = {}
    for client in sorted(replies.updates):
        start = {name: leading(name, server.model.tensors[name], ranks.get(client)) for name in (site.b, site.a)}
        b, a = (start[name] + replies.updates[client].get(name, 0) for name in (site.b, site.a))
        factors[client] = (b, a)
    return factors

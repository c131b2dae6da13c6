"""What a federated LoRA method is: one class with a round that reads like the paper's algorithm box."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import ClassVar

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState, Factors
from lorica.config import MethodConfig, OptimizerConfig, Strict, validate
from lorica.errors import UserError
from lorica.privacy.mechanism import Terms
from lorica.streams import numpy_stream


@dataclass(frozen=True)
class About:
    """A method's row in every table."""

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
        last_step_energy: clients also reply with the energy of their last noisy gradient, per trained tensor.
    """

    factors: Factors | Mapping[str, Factors]
    last_step_energy: bool = False


@dataclass(frozen=True)
class Replies:
    """What the sampled clients released in one exchange.

    Attributes:
        updates: client -> tensor name -> update `U_k = θ_{k,E} - θ_t`.
        weights: client -> `w_k`, summing to 1.
        energies: client -> tensor name -> `‖ĝ‖²` of the last noisy gradient, if it was asked for.
    """

    updates: Mapping[int, Mapping[str, Tensor]]
    weights: Mapping[int, float]
    energies: Mapping[int, Mapping[str, float]]

    def mean(self) -> dict[str, Tensor]:
        """`Σ_k w_k U_k`, summed in the order of client ids."""
        clients = sorted(self.updates)
        return {
            name: torch.stack([self.weights[client] * self.updates[client][name] for client in clients]).sum(0)
            for name in self.updates[clients[0]]
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
    """

    model: AdapterState
    rounds: int
    terms: Mapping[int, Terms]
    optimizer: OptimizerConfig
    local_steps: int
    rates: Mapping[str, float]
    seed: int
    round: int = 0

    def generator(self, purpose: str) -> np.random.Generator:
        """Public randomness of this round."""
        return numpy_stream(self.seed, purpose, self.round)


class Method(ABC):
    """A federated LoRA method.

    A subclass sets `name` and `about`, describes its options, and writes its round. Each `yield Train(...)` is one
    exchange with the sampled clients and gives back their `Replies`. A method sees released tensors and public numbers
    only; it has no way to a raw gradient.
    """

    name: ClassVar[str]
    about: ClassVar[About]

    class Options(Strict):
        """Keys beside `method.name`."""

    def __init__(self, options: BaseModel, sites: list[Site]) -> None:
        self.options = options
        self.sites = sites

    def check(self, optimizer: OptimizerConfig, clients: int) -> None:  # noqa: B027 - nothing to refuse by default
        """Refuse, before the run, a setting that the method cannot work with (`UserError`)."""

    def start(self, model: AdapterState) -> None:  # noqa: B027 - most methods start from what PEFT gives
        """Change the initial adapter before the first round."""

    @abstractmethod
    def round(self, server: Server) -> Generator[Train, Replies, None]:
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

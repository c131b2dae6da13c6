"""What a federated LoRA method is: one class with a round that reads like the paper's algorithm box."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel

from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState
from lorica.config import MethodConfig, OptimizerConfig, Strict, validate
from lorica.errors import UserError
from lorica.methods.exchange import Project, Replies, Round, Train
from lorica.methods.server import Server, client_factors, is_zero
from lorica.registry import METHODS, registered, remedy_for_unknown

# A method author imports everything from here.
__all__ = [
    "About",
    "Method",
    "Project",
    "Replies",
    "Round",
    "Server",
    "Train",
    "client_factors",
    "find_method",
    "is_zero",
    "make_method",
    "registry",
]


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


class Method(ABC):
    """A federated LoRA method.

    A subclass sets `name` and `about`, describes its options, and writes its round. Each `yield Train(...)` is one
    exchange with the sampled clients and gives back their `Replies`, those of fewer clients where some did not reply:
    they are out for the rest of the round (see `Replies.restricted_to`). A method sees released tensors and public
    numbers only; it has no way to a raw gradient.

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

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON-able values and tensors, in nested dictionaries whose keys have no `/`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - may be stateless
        """Take back what `state_dict` gave."""

    def decisions(self) -> dict[str, object]:
        """What the report shows of the last round beside the factors, such as probabilities."""
        return {}


def registry() -> dict[str, type[Method]]:
    """All methods by name: Lorica's own and those that other packages register as `lorica.methods` entry points."""
    return {name: entry.load() for name, entry in registered(METHODS).items()}


def find_method(config: MethodConfig) -> tuple[type[Method], BaseModel]:
    """The configured method's class, and its options checked.

    Raises:
        UserError: no such method, or an option that it does not have.
    """
    methods = registry()
    if config.name not in methods:
        raise UserError("method.name", config.name, "no such method", remedy_for_unknown(config.name, methods))
    kind = methods[config.name]
    return kind, validate(kind.Options, config.options, prefix="method")


def make_method(config: MethodConfig, sites: list[Site]) -> Method:
    """The configured method for these sites; raises what `find_method` raises."""
    kind, options = find_method(config)
    return kind(options, sites)

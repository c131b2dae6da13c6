"""The base class of federated LoRA methods. A method's `round` reads like the algorithm in its paper."""

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
    """A method's row in the tables of methods.

    Attributes:
        exact: whether the new global model is the weighted mean of the clients' models, `Σ_k w_k B_k A_k` at each
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

    A subclass sets `name` and `about`, declares its options, and implements its round. Each `yield Train(...)` is one
    exchange with the sampled clients and returns their `Replies`. Clients that did not reply are not in them and take
    no further part in the round (see `Replies.restricted_to`). A method sees only released tensors and public numbers,
    never a raw gradient.

    Attributes:
        refuses: component (`lorica.methods.components.COMPONENTS`) -> why the method does not support it. A method
            that supports different ranks leaves out `client_ranks` and yields `Train(ranks=server.ranks)`.
        personal: each client has its own model; these are evaluated and exported.
        client_level: the number of exchanges in a round, if the method needs nothing in them but the mean over the
            clients, so that `privacy.unit: client` can noise that; 0 if it needs more.
        merges: the method adds to the frozen weights (`AdapterState.merge`).
    """

    name: ClassVar[str]
    about: ClassVar[About]
    refuses: Mapping[str, str] = {"client_ranks": "all its clients must have the same rank"}
    personal: ClassVar[bool] = False
    client_level: ClassVar[int] = 0
    merges: ClassVar[bool] = False

    class Options(Strict):
        """Keys in the section `method` besides `name`."""

    def __init__(self, options: BaseModel, sites: list[Site]) -> None:
        self.options = options
        self.sites = sites

    def check(self, optimizer: OptimizerConfig, clients: int, local_steps: int) -> None:  # noqa: B027 - may accept all
        """Raise `UserError` before the run for a setting that the method does not support.

        Args:
            clients: minimum number of replies in a round.
        """

    def start(self, model: AdapterState, seed: int) -> None:  # noqa: B027 - most methods keep PEFT's initialisation
        """Change the initial adapter before the first round. The seed is public.

        A run may start from another adapter (`lora.start`): if some `B` is not zero, keep the products `B A`.
        """

    @abstractmethod
    def round(self, server: Server) -> Round:
        """One round, from the first exchange to the new global factors."""

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: JSON-able values and tensors in nested dictionaries, whose keys contain no `/`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - may be stateless
        """Restore the output of `state_dict`."""

    def decisions(self) -> dict[str, object]:
        """Information on the last round for `decisions.jsonl`, in addition to the factors, such as probabilities."""
        return {}


def registry() -> dict[str, type[Method]]:
    """All methods by name: Lorica's own and those that other packages register as `lorica.methods` entry points.

    >>> registry()["ffa-lora"].about.sends
    'B'
    """
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
    """The configured method for these sites; raises what `find_method` raises.

    >>> make_method(MethodConfig(name="fed-sb", warm_up=0), sites=[]).options
    Options(warm_up=0)
    """
    kind, options = find_method(config)
    return kind(options, sites)

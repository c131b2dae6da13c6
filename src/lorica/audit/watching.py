"""What an audit sees: everything that leaves an owner, and what a worst-case adversary knows beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.names import SKETCH, Pair
from lorica.adapters.state import AdapterState
from lorica.engines.local import LocalEngine
from lorica.messages import Projection, Request, Training
from lorica.owner.client import Client
from lorica.secure_sum.agreement import Agreement
from lorica.tensors import decode


@dataclass(frozen=True)
class Seen:
    """One reply of an owner, and the state that it started from.

    Attributes:
        held: the server's tensors at the owner.
        merged: site name -> `(B, A)` merged into the frozen weight.
        personal: the owner's own tensors before the work.
        tensors: what left the owner.
        sketched: the noisy factors behind a sketch, which stay with the owner.
    """

    request: Request
    held: Mapping[str, Tensor]
    merged: Mapping[str, Pair]
    personal: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    sketched: Mapping[str, Tensor]

    @property
    def start(self) -> dict[str, Tensor]:
        """The tensors that training started from."""
        work = self.request.work
        names = work.personal if isinstance(work, Training) else ()
        return dict(self.held) | {name: self.personal[name] for name in names if name in self.personal}


@dataclass
class WatchedClient(Client):
    """An owner that keeps what leaves it.

    Attributes:
        seen: its replies to requests for training and projections, in order.
    """

    seen: list[Seen] = field(default_factory=list)

    def reply_to(self, model: AdaptedModel, request: Request, agreement: Agreement | None = None) -> bytes:
        personal = self.personal(request.run, request.round)
        reply = super().reply_to(model, request, agreement)
        if isinstance(request.work, Training | Projection):
            left, sketched = decode(reply), {}
            if any(name.startswith(SKETCH) for name in left):
                kept = self._sketched(request, self.ledger.kept(request.run, self.number, request.round))
                sketched = {name: released.tensor for name, released in kept.items()}
            self.seen.append(Seen(request, dict(self.held), dict(self.merged), personal, left, sketched))
        return reply


@dataclass(frozen=True)
class Summed:
    """One secure sum, all that a server sees of its members.

    Attributes:
        members: client -> its weight in the sum.
        tensors: the weighted sum.
    """

    round: int
    exchange: int
    members: Mapping[int, float]
    tensors: Mapping[str, Tensor]


class WatchedEngine(LocalEngine):
    """A local engine that keeps the secure sums.

    Attributes:
        sums: in order.
    """

    def __init__(self, model: AdaptedModel, state: AdapterState, clients: Mapping[int, WatchedClient]) -> None:
        super().__init__(model, state, clients)
        self.sums: list[Summed] = []

    def sum(self, requests: Mapping[int, Request], agreement: Agreement) -> tuple[list[int], dict[str, Tensor]]:
        members, total = super().sum(requests, agreement)
        weights = {member: agreement.weights[member] for member in members}
        self.sums.append(Summed(agreement.round, agreement.exchange, weights, total))
        return members, total

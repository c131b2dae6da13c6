"""One exchange of a round: what a method asks the sampled clients for, and what they released."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from lorica.adapters.algebra import weighted_sum
from lorica.adapters.state import Factors
from lorica.aggregation.robust import Aggregate
from lorica.local.step import LocalStep

Value = TypeVar("Value")


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

    >>> replies = Replies(
    ...     updates={0: {"x": torch.tensor([4.0])}, 1: {"x": torch.tensor([0.0])}},
    ...     weights={0: 0.25, 1: 0.75},
    ... )
    >>> replies.mean
    {'x': tensor([1.])}
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

    def restricted_to(self, later: Replies) -> Replies:
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


Round = Generator[Train | Project, Replies, None]
"""A method's round: yields what it asks for, and is sent the `Replies`."""

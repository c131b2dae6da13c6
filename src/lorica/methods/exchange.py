"""One exchange of a round: the method's request to the sampled clients, and their replies."""

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
        steps: noisy steps of this exchange; None for all steps of the round, which its exchanges share.
        local: transformations of the noisy gradient; None for the configured ones (`Server.local`).
        ranks: client -> number of leading ranks that it gets and trains; other clients train all ranks.
        slices: client -> site name -> the ranks that it trains, ascending. It gets all ranks, trains nothing at a site
            that is left out, and its updates in `Replies` are zero there. Other clients train all ranks.
        personal: names of trained tensors that stay with the clients, which start from their own values.
        sketch_columns: clients send sketches of their products with so many columns (`Replies.sketches`) instead of
            factor updates.
        last_step_energy: clients also send the energy of their last noisy gradient, per trained tensor.
    """

    factors: Factors | Mapping[str, Factors]
    steps: int | None = None
    local: LocalStep | None = None
    ranks: Mapping[int, int] = field(default_factory=dict)
    slices: Mapping[int, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
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
    """The replies of the sampled clients in one exchange.

    Attributes:
        updates: client -> tensor name -> update `U_k = θ_{k,E} - θ_t`.
        weights: client -> `w_k`; they sum to 1.
        energies: client -> tensor name -> `‖ĝ‖²` of the last noisy gradient, if requested.
        sketches: client -> site name -> sketch, if requested.
        aggregate: robust aggregate that replaces the weighted mean of updates; None for the mean.
        means, mean_sketches: the values of `mean` and `mean_sketch` after a secure sum, with which `updates`,
            `energies` and `sketches` are empty. Otherwise None.

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
        """`Σ_k w_k U_k`, summed in the order of client ids, or the configured robust aggregate of the updates.

        Updates of a smaller rank are padded with zeros.
        """
        if self.means is not None:
            return self.means
        if self.aggregate is not None:
            return self.aggregate([self.updates[client] for client in sorted(self.updates)])
        return self._mean(self.updates)

    @cached_property
    def mean_sketch(self) -> Mapping[str, Tensor]:
        """Site name -> weighted mean of the sketches."""
        return self.mean_sketches if self.mean_sketches is not None else self._mean(self.sketches)

    def restricted_to(self, later: Replies) -> Replies:
        """The replies of the clients that also replied to a later exchange, with the weights of that exchange.

        A secure sum cannot be separated, so it stays the sum over all clients.
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
"""A method's round: a generator that yields requests and receives `Replies`."""

"""The terms of a summation, on which all clients agree before they exchange keys."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lorica.errors import UserError
from lorica.secure_sum.quantisation import Shapes
from lorica.secure_sum.setup import LARGEST_ID, Setup, SummationError

# Tolerance for the sum of all weights.
ROUNDING = 1e-9


@dataclass(frozen=True)
class AgreedNoise:
    """What the members of a sum agree on if they share the noise that protects their inputs.

    Each member adds noise of standard deviation `std / (w_k √(min_clients - colluding))` before its input is weighted.
    This package does not check that; it makes sure that all members were told the same.

    Attributes:
        std: standard deviation of the noise that `min_clients - colluding` members add to the weighted sum.
        min_clients: minimum number of members, before and after dropouts.
        colluding: maximum number of members that collude with the server.
        work: digest of what turns noisy gradients into inputs, which must be the same for all members.

    Raises:
        UserError: a number out of range.
    """

    std: float
    min_clients: int
    colluding: int
    work: str

    def __post_init__(self) -> None:
        if not 1e-30 <= self.std <= 1e30:
            raise UserError("noise", self.std, "out of range", "choose a number from 1e-30 to 1e30")
        if not 0 <= self.colluding < self.min_clients <= LARGEST_ID:
            raise UserError("colluding", self.colluding, "not below the number of members", "choose a smaller number")


@dataclass(frozen=True)
class Agreement:
    """The public terms of one summation, fixed by the server before keys are exchanged.

    All keys, encrypted shares, commitments, signatures and masked inputs are bound to its digest. Messages of clients
    that were told different terms therefore do not fit together: the summation fails, and no wrong sum results.

    Attributes:
        run, round, exchange: identify the replies that are summed.
        weights: client -> `w_k`, its weight in the sum. The clients listed are the members of the sum.
        shapes: name -> shape of each tensor.
        noise: the noise that the members share; None if they share none.

    Raises:
        UserError: an id or a count out of range, a number of members other than `setup.clients`, or weights that are
            not in (0, 1] or do not sum to 1.
    """

    setup: Setup
    run: str
    round: int
    exchange: int
    weights: Mapping[int, float]
    shapes: Shapes
    noise: AgreedNoise | None = None

    def __post_init__(self) -> None:
        for name, count in (("round", self.round), ("exchange", self.exchange)):
            if not 0 <= count <= LARGEST_ID:
                raise UserError(name, count, "not between 0 and 2^63 - 1", "count from 1")
        if len(self.weights) != self.setup.clients:
            problem = f"there are {len(self.weights)} members"
            raise UserError("clients", self.setup.clients, problem, "give each member a weight")
        for client, weight in self.weights.items():
            if not 0 <= client <= LARGEST_ID:
                raise UserError("client", client, "the id is not between 0 and 2^63 - 1", "choose another id")
            if not 0 < weight <= 1:
                raise UserError(
                    "weights", weight, f"the weight of client {client} is not in (0, 1]", "normalise the weights"
                )
        total = math.fsum(self.weights.values())
        if abs(total - 1) > ROUNDING:
            raise UserError("weights", total, "they do not sum to 1", "normalise the weights")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the terms."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()

    def plain(self) -> dict[str, Any]:
        """The terms as JSON-compatible values, identical for equal agreements."""
        return {
            "setup": asdict(self.setup) | {"bound": float(self.setup.bound)},
            "run": self.run,
            "round": self.round,
            "exchange": self.exchange,
            "weights": [[client, float(weight)] for client, weight in sorted(self.weights.items())],
            "shapes": [[name, list(shape)] for name, shape in sorted(self.shapes.items())],
            "noise": None if self.noise is None else asdict(self.noise) | {"std": float(self.noise.std)},
        }

    @classmethod
    def of(cls, plain: Any) -> Agreement:
        """The inverse of `plain`.

        Raises:
            SummationError: the terms are malformed or invalid.
        """
        try:
            setup = Setup(**{name: _as(kind, plain["setup"][name]) for name, kind in _SETUP.items()})
            agreement = cls(
                setup,
                _as(str, plain["run"]),
                _as(int, plain["round"]),
                _as(int, plain["exchange"]),
                {_as(int, client): _as(float, weight) for client, weight in plain["weights"]},
                {_as(str, name): tuple(_as(int, size) for size in shape) for name, shape in plain["shapes"]},
                None
                if plain["noise"] is None
                else AgreedNoise(**{name: _as(kind, plain["noise"][name]) for name, kind in _NOISE.items()}),
            )
        except UserError as error:
            raise SummationError(f"the server's terms are invalid: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise SummationError("the server's terms are malformed") from None
        # Extra keys, and clients or tensors that are listed twice or out of order.
        if agreement.plain() != plain:
            raise SummationError("the server's terms are malformed")
        return agreement


_NOISE: dict[str, type] = {"std": float, "min_clients": int, "colluding": int, "work": str}
_SETUP: dict[str, type] = {"summation": str, "clients": int, "threshold": int, "bits": int, "bound": float}


def _as(kind: type, value: Any) -> Any:
    # No conversions: all clients must read the same values.
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__}, expected a {kind.__name__}")
    return value

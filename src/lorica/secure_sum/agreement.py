"""What the clients of a summation agree on before any of them sends a key: of what, with whom, at which shares."""

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

# Of the sum of all shares, which the server computes in another order than a client adds them up.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Agreement:
    """The public terms of one summation, fixed by the server before keys are exchanged.

    Its digest is part of every key, seal, commitment, signature and masked input, so that what clients made under
    different agreements does not fit together: it ends in an error, never in a sum.

    Attributes:
        run, round, exchange: whose replies are summed.
        weights: client -> `w_k`, its share of the sum. These clients are the members; nobody else takes part.
        shapes: name -> shape of each tensor.

    Raises:
        UserError: an id or a count out of range, another number of members than `setup.clients`, or shares that are
            not in (0, 1] or do not sum to 1.
    """

    setup: Setup
    run: str
    round: int
    exchange: int
    weights: Mapping[int, float]
    shapes: Shapes

    def __post_init__(self) -> None:
        for name, count in (("round", self.round), ("exchange", self.exchange)):
            if not 0 <= count <= LARGEST_ID:
                raise UserError(name, count, "not in 0 .. 2^63 - 1", "count from 1")
        if len(self.weights) != self.setup.clients:
            problem = f"not the number of members, {len(self.weights)}"
            raise UserError("clients", self.setup.clients, problem, "give each member a share")
        for client, weight in self.weights.items():
            if not 0 <= client <= LARGEST_ID:
                raise UserError("client", client, "the id is not in 0 .. 2^63 - 1", "choose another")
            if not 0 < weight <= 1:
                raise UserError("weights", weight, f"the share of client {client} is not in (0, 1]", "normalise them")
        total = math.fsum(self.weights.values())
        if abs(total - 1) > ROUNDING:
            raise UserError("weights", total, "the shares do not sum to 1", "normalise them")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that was agreed."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()

    def plain(self) -> dict[str, Any]:
        """As JSON-able values, the same for equal agreements."""
        return {
            "setup": asdict(self.setup) | {"bound": float(self.setup.bound)},
            "run": self.run,
            "round": self.round,
            "exchange": self.exchange,
            "weights": [[client, float(weight)] for client, weight in sorted(self.weights.items())],
            "shapes": [[name, list(shape)] for name, shape in sorted(self.shapes.items())],
        }

    @classmethod
    def of(cls, plain: Any) -> Agreement:
        """The inverse of `plain`.

        Raises:
            SummationError: not an agreement, or not one that can hold.
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
            )
        except UserError as error:
            raise SummationError(f"the server's terms cannot hold: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise SummationError("the server's terms cannot be understood") from None
        # What was left out or listed twice is not understood.
        if agreement.plain() != plain:
            raise SummationError("the server's terms cannot be understood")
        return agreement


_SETUP: dict[str, type] = {"summation": str, "clients": int, "threshold": int, "bits": int, "bound": float}


def _as(kind: type, value: Any) -> Any:
    # Exactly: what Python would convert, another client may read otherwise.
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__}, expected a {kind.__name__}")
    return value

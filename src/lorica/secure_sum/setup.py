"""What all parties of one summation agree on, and the error that ends it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lorica.errors import UserError

# Shamir's x-coordinates and the messages hold ids in 64 bits.
LARGEST_ID = 2**63 - 1


class SummationError(Exception):
    """The summation cannot go on. Says why, without any private content.

    Attributes:
        client: whose bytes were wrong; None where no client is to blame: too few answered, or the server asked for
            what a client refuses.
    """

    def __init__(self, problem: str, client: int | None = None) -> None:
        self.problem, self.client = problem, client
        super().__init__(f"secure summation: {'' if client is None else f'client {client}: '}{problem}")


@dataclass(frozen=True)
class Setup:
    """The public terms of one summation.

    Attributes:
        summation: an id that is never used twice; it is bound into every key and every encrypted share.
        clients: the largest number of summands, `n`, from 2 to 65536.
        threshold: `t`: how many clients must answer each stage, and how many shares reveal a secret. More than `n / 2`.
        bits: `k`, 32 or 64: sums are modulo `2^k`.
        bound: coordinates are clipped to `[-bound, bound]`, from 1e-30 to 1e30.

    Raises:
        UserError: an attribute out of its range.
    """

    summation: str
    clients: int
    threshold: int
    bits: int
    bound: float

    def __post_init__(self) -> None:
        if not self.summation:
            raise UserError("summation", self.summation, "empty", "give each summation an id of its own")
        if not 2 <= self.clients <= 2**16:
            raise UserError("clients", self.clients, "a sum hides its parts among 2 to 65536 clients", "invite as many")
        if not self.clients < 2 * self.threshold <= 2 * self.clients:
            problem = f"not a majority of {self.clients} clients"
            raise UserError(
                "threshold", self.threshold, problem, f"choose from {self.clients // 2 + 1} to {self.clients}"
            )
        if self.bits not in (32, 64):
            raise UserError("bits", self.bits, "no such word size", "choose 32 or 64")
        if not 1e-30 <= self.bound <= 1e30:
            raise UserError("bound", self.bound, "out of range", "choose a number from 1e-30 to 1e30")

    @property
    def step(self) -> float:
        """The quantisation step: the power of two above `bound / levels`, with `levels = ⌊(2^(k-1) − 1) / n⌋`.

        Hence `n · round(bound / step) < 2^(k-1)`. Division by a power of two is exact.
        """
        levels = (2 ** (self.bits - 1) - 1) // self.clients
        return math.ldexp(1.0, math.frexp(self.bound / levels)[1])

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        """Unsigned words of k bits, little-endian as they travel; numpy's sums of them are modulo `2^k`."""
        return np.dtype(f"<u{self.bits // 8}")
